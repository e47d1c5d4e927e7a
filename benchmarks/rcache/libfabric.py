"""Hits of libfabric's cache with its own monitor and with ours: libfabric.c, built and run under `ummunotify run`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from . import compiler_flags

REGISTRATIONS = (100, 1000, 10_000)
ORDERS = ("in order", "at random")
Figures = dict[tuple[int, str], list[tuple[float, float]]]
"""By how many are registered, and the order: a hit with memhooks and with ours, in ns, in turns."""


def measure(quick: bool) -> Figures:
    """Nothing where there is no libfabric.a of version 1.17, whose layouts libfabric.c has."""
    version = subprocess.run(["pkg-config", "--modversion", "libfabric"], capture_output=True, text=True).stdout
    if not version.startswith("1.17."):
        return {}
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        program = _build(Path(folder))
        for count in REGISTRATIONS:
            run = [sys.executable, "-m", "ummunotify", "run", "--quiet", "--", str(program), str(count)]
            run += ["3" if quick else str(1_000_000 // count)]
            environment = ["env", f"FI_MR_CACHE_MAX_COUNT={2 * max(REGISTRATIONS)}"]
            for line in subprocess.run(
                [*environment, *run], check=True, stdout=subprocess.PIPE, text=True
            ).stdout.splitlines():
                order, theirs, ours = line.split()
                figures.setdefault((count, ORDERS[int(order)]), []).append((float(theirs), float(ours)))
    return figures


def _build(folder: Path) -> Path:
    made = folder / "libfabric"
    subprocess.run(
        [
            *("gcc", "-O2", "-Wall", "-Wextra", str(Path(__file__).with_suffix(".c")), "-o", str(made), "-rdynamic"),
            # The providers would need libraries for hardware, and are not called; fi_open is the program's.
            "-Wl,--unresolved-symbols=ignore-all,-z,lazy,-z,muldefs",
            "-l:libfabric.a",
            *compiler_flags("ummunotify-libfabric", "ummunotify"),
            *("-lpthread", "-ldl"),
        ],
        check=True,
    )
    return made
