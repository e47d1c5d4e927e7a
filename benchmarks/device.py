"""What /dev/ummunotify costs: its own calls, and those of others that pass through what is preloaded for it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ummunotify.cli.config import INCLUDE, LIB

from . import report
from .report import Row
from .samples import Pairs, spread

TITLE = "/dev/ummunotify"
SOURCE = Path(__file__).with_name("device.c")
PASSED_ON = {
    "read": "`read` of a byte of /dev/zero",
    "fcntl": "`fcntl(F_GETFL)`",
    "open + close": "`open` + `close` of /dev/null",
    "open of nothing": "`open` of what does not exist",
    "mmap + munmap": "`mmap` + `munmap`, which the device's program sees",
}
REGISTER = ("register + unregister, none registered", "register + unregister, 100,000 registered")


def measure(quick: bool) -> tuple[dict[str, Pairs], dict[str, list[float]]]:
    """Of the calls that are passed on, with what is preloaded and without; and of the device's own."""
    passed = {name: Pairs() for name in PASSED_ON}
    own: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder, "device"))
        subprocess.run(["gcc", "-O2", f"-I{INCLUDE}", str(SOURCE), "-o", program], check=True)
        times = "200" if quick else "20000"
        preloaded = os.environ | {"LD_PRELOAD": str(LIB / "libummunotify-device.so")}
        for _ in range(2 if quick else 25):
            plain = _run([program, times], os.environ)
            with_it = _run([program, times], preloaded)
            for name, pairs in passed.items():
                pairs.add(with_it[name], plain[name])
        command = [sys.executable, "-m", "ummunotify", "run", "--source", "bpf", "--", program, times, "device"]
        for _ in range(1 if quick else 5):
            for name, time in _run(command, os.environ).items():
                own.setdefault(name, []).append(time)
    return passed, own


def _run(command: list[str], environment: Mapping[str, str]) -> dict[str, float]:
    result = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return {name: float(time) for name, _, time in (line.partition("\t") for line in result.stdout.splitlines())}


def rows(passed: Mapping[str, Pairs], own: Mapping[str, list[float]]) -> list[Row]:
    few, many = (spread(own[name]).median for name in REGISTER)
    found = [
        Row(
            "`register` + `unregister`, 100,000 registered",
            "3x",
            f"{many / few:.2f}x ({many:.0f} ns)",
            f"none registered: {few:.0f} ns",
            many <= 3 * few,
        ),
        Row("a look at the counter", "", f"{spread(own['counter']).median:.1f} ns", "", None),
        Row("`read` when there is nothing", "", f"{spread(own['read, nothing to report']).median:.0f} ns", "", None),
    ]
    for name, title in PASSED_ON.items():
        pairs = passed[name]
        found.append(
            Row(
                f"{title}, preloaded",
                "",
                f"{pairs.ratio.median:.3f}x ± {pairs.ratio.doubt:.3f} ({pairs.added.median:+.1f} ns)",
                f"not preloaded: {pairs.without.median:.0f} ns",
                None,
            )
        )
    return found


def section(quick: bool, folder: Path) -> str:
    passed, own = measure(quick)
    text = """
        Each process takes the best of five blocks of calls, in CPU time; a pair of processes is one with the device's
        library preloaded and one without, and the figures are medians over 25 pairs. No device is open in them. The
        device's own calls are with the source `bpf`, in five processes. Most of what they cost is four system calls
        beside the table: to block signals and allow them again, and to learn the process's number.
    """
    return f"{report.table(rows(passed, own))}\n{text}"
