"""What each BPF probe costs, on the kernels of tests/vm/kernels.toml: in guests, so only the ratios count.

python -m benchmarks.probes            # on this machine; as JSON
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import ummunotify
from ummunotify import _core

from . import mappings, report
from .mappings import BETWEEN, BETWEEN_SCATTERED, OUT, Budget, added, other_process
from .report import Row
from .samples import Pairs

TITLE = "Probes"
ROOT = Path(__file__).parents[1]
MANY = 100_000
BLOCK = 10
"""Few at a time: there is hardly a millisecond in an emulated machine without another thread's having the CPU."""
FEW = 100
"""For the other process, whose table is not looked at: watching many takes longer than measuring."""
KINDS = {OUT: "outside all regions", BETWEEN: "between regions", BETWEEN_SCATTERED: "between regions, at random"}
P = ParamSpec("P")
T = TypeVar("T")

METHOD = """\
As above, but under QEMU without hardware virtualisation, where times have no meaning: only ratios are given. A process
that watches is compared with a fork of it, in turns. A process that does not watch is compared with itself while no
process watches; that is seconds apart, and so less certain. Kprobes also slow down processes that do not watch: with
them, a process that watches pays the product of both. A kprobe costs more there than on a machine: an emulator
translates modified code again, and its atomic instructions and interrupts are slow.
"""


class Cost(NamedTuple):
    ratio: float
    doubt: float


def _watching(budget: Budget) -> dict[str, Pairs]:
    mappings.BLOCK = BLOCK
    return added(MANY, budget).pairs


def _others(budget: Budget) -> Pairs:
    mappings.BLOCK = BLOCK
    return other_process(FEW, budget)


def _cost(pairs: Pairs) -> Cost:
    return Cost(pairs.ratio.median, pairs.ratio.doubt)


def _alone(source: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """In a process of its own, whose address space nobody else has used."""
    os.environ[_core.SOURCE_ENVIRONMENT] = source
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def measure(quick: bool) -> dict[str, dict[str, Cost]]:
    """Of each probe that works here, by where the changes are; "" is another process's."""
    budget = Budget(0.003, 0, 1) if quick else Budget(0.003, 5, 10)
    found: dict[str, dict[str, Cost]] = {}
    for candidate in _core.source_names("bpf"):
        try:
            ummunotify.open(candidate).close()
        except ummunotify.SourceUnavailableError:
            continue
        watching = _alone(candidate, _watching, budget)
        others = _alone(candidate, _others, budget)
        found[candidate] = {"": _cost(others), **{name: _cost(watching[name]) for name in KINDS}}
    return found


def rows(kernel: str, measured: dict[str, dict[str, Cost]]) -> list[Row]:
    found = []
    for probe, costs in measured.items():
        for name, text in KINDS.items():
            what = f"{kernel}, {probe}: mmap + touch + munmap, {MANY:,} watched, {text}"
            found.append(_row(what, 1.25, costs[name], "its fork, which does not watch"))
        what = f"{kernel}, {probe}: the same while another process watches"
        found.append(_row(what, 1.02, costs[""], "no process watches"))
    return found


def _row(what: str, goal: float, cost: Cost, baseline: str) -> Row:
    measured = f"{cost.ratio:.2f}x ± {cost.doubt:.2f}"
    if abs(cost.ratio - goal) < cost.doubt:
        return Row(what, f"{goal:.2f}x", f"inconclusive: {measured}", baseline, None)
    return Row(what, f"{goal:.2f}x", measured, baseline, cost.ratio <= goal)


def _in_guest(name: str, quick: bool) -> dict[str, dict[str, Cost]]:
    command = [sys.executable, "tests/vm/run.py", "--timeout", "1800", "--only", name, "--"]
    command += ["python", "-m", "benchmarks.probes", *(["quick"] if quick else [])]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
    line = next(line for line in output.splitlines() if line.startswith("{"))
    measured: dict[str, dict[str, Any]] = json.loads(line)
    return {probe: {name: Cost(*cost) for name, cost in costs.items()} for probe, costs in measured.items()}


def section(quick: bool, folder: Path) -> str:
    found: list[Row] = []
    for kernel in tomllib.loads((ROOT / "tests/vm/kernels.toml").read_text())["kernel"]:
        guest = f"{kernel['name']}/{kernel['preempt'][-1]}"
        found += rows(guest, _in_guest(guest, quick))
    return f"{report.table(found)}\n{METHOD}"


if __name__ == "__main__":
    print(json.dumps(measure("quick" in sys.argv)))
