"""What calls cost in Python: `python -m benchmarks.calls` is a pyperf script, with 100,000 regions watched.

It counts CPU time, so that what else runs on the machine matters less.
"""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import tempfile
import time
import timeit
from pathlib import Path

import pyperf  # type: ignore[import-untyped]

import ummunotify
from ummunotify._core import SOURCE_ENVIRONMENT

from . import bare

REGIONS = 100_000
REGIONS_UFFD = 1000
"""With that source: each makes two mappings more, of which a process can have some 65,000."""
PLACES = 1000
"""`watch` and `unwatch` take turns with so many ranges, at random between those that are watched."""
NOTHING, SLOT, CHANGED, VALID, WATCH = "pass", "thing.slot", "umn.changed", "region.valid", "watch + unwatch"
_FULL = ("--processes=8", "--values=3", "--min-time=0.03")
_QUICK = ("--processes=1", "--values=2", "--warmups=0", "--min-time=0.005")


def measure(quick: bool, source: str | None = None) -> dict[str, pyperf.Benchmark]:
    """By the names above."""
    environment = {**os.environ, **({SOURCE_ENVIRONMENT: source} if source else {})}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "calls.json")
        script = (sys.executable, "-m", __name__, "--quiet", f"--output={result}")
        inherit = ("--inherit-environ", SOURCE_ENVIRONMENT)
        command = [*script, *inherit, *(_QUICK if quick else _FULL)]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        return {benchmark.get_name(): benchmark for benchmark in pyperf.BenchmarkSuite.load(str(result))}


class _Thing:
    __slots__ = ("slot",)

    def __init__(self) -> None:
        self.slot = True


def _main() -> None:
    runner = pyperf.Runner(program_args=("-m", "benchmarks.calls"))
    umn = ummunotify.open()
    regions = REGIONS_UFFD if umn.source == "uffd" else REGIONS
    if umn.source == "uffd":  # it watches only what is mapped
        bare.reserve(0x1000_0000_0000, regions * 0x4000)
    order = list(range(regions))
    random.Random(1).shuffle(order)
    for i in order:
        umn.watch((0x1000_0000_0000 + i * 0x4000, 0x1000))
    places = [(0x1000_0000_2000 + i * 0x4000, 0x1000) for i in order[:PLACES]]
    region = umn.watch(places[0])
    names = {"umn": umn, "region": region, "thing": _Thing()}

    def attribute(loops: int, statement: str) -> float:
        return timeit.Timer(statement, timer=time.thread_time, globals=names).timeit(loops)

    def watch_unwatch(loops: int) -> float:
        watch, unwatch = umn.watch, umn.unwatch
        begin = time.thread_time()
        for place in itertools.islice(itertools.cycle(places), loops):
            unwatch(watch(place))
        return time.thread_time() - begin

    for statement in (NOTHING, SLOT, CHANGED, VALID):
        runner.bench_time_func(statement, attribute, statement)
    runner.bench_time_func(WATCH, watch_unwatch)


if __name__ == "__main__":
    _main()
