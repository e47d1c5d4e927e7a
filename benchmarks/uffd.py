"""The source `uffd`: what it costs to be told, against the least that any user of userfaultfd pays."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import re
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pyperf  # type: ignore[import-untyped]

import ummunotify

from . import bare, calls
from .mappings import AREA, OUT, PAGE, STRIDE, Budget, doubtful, in_turns, pin, places, timed, until
from .report import Row, table
from .samples import Pairs

TITLE = "Without privileges: userfaultfd"

PAGES = 100
"""Unmapped one after the other between two looks at the clock."""
WATCHED = 1000
HUGE = 2 << 20
HUGE_PAGES = 32


class Told(NamedTuple):
    """Wall-clock times of one munmap of a page."""

    bare: Pairs
    """Watched, against a bare reader."""
    unwatched: Pairs
    """Watched, against nobody."""


def told(budget: Budget, cpu: int, readers: int) -> Told:
    """Munmap of watched pages, on one CPU, with the readers on that or another. To be called in a process of its own.

    Left to the scheduler, one reader may be on the same CPU and the other not, which is 15 us against 80.
    """
    os.sched_setaffinity(0, {readers})  # threads inherit it
    where = bare.addresses([AREA + i * STRIDE for i in range(PAGES)])
    result = Told(Pairs(), Pairs())
    reader = bare.Reader()
    bare.map_each(where)
    with ummunotify.open("uffd") as umn:
        regions = [umn.watch((address, PAGE)) for address in where]
        os.sched_setaffinity(0, {cpu})
        bare.unmap_each(where)

        def watched() -> float:
            bare.map_each(where)
            for region in regions:
                region.renew()
            umn.read()
            took = bare.unmap_each(where).wall
            if any(region.valid for region in regions) or len(umn.read()) != PAGES:
                raise RuntimeError("a change was missed")
            return took

        def registered() -> float:
            bare.map_each(where)
            reader.register(where)
            before = reader.seen
            took = bare.unmap_each(where).wall
            while reader.seen < before + PAGES:  # it counts after it has let the other thread go on
                time.sleep(0.0001)
            return took

        def alone() -> float:
            bare.map_each(where)
            return bare.unmap_each(where).wall

        for number in until(budget, lambda: doubtful(result.bare)):
            if number % 2:
                ours, theirs, nobodys = watched(), registered(), alone()
            else:
                theirs, ours, nobodys = registered(), watched(), alone()
            result.bare.add(ours, theirs)
            result.unwatched.add(ours, nobodys)
    return result


def outside(budget: Budget) -> Pairs:
    """mmap + touch + munmap of what is not watched, against not watching. To be called in a process of its own."""
    pin()
    cases = {OUT: places(WATCHED)[OUT]}
    with ummunotify.open("uffd") as umn:
        for i in range(WATCHED):
            if i % 10:  # every tenth was unmapped, to be used by other cases
                umn.watch((AREA + i * STRIDE + 3 * PAGE, PAGE))
        return in_turns(cases, lambda name, number: timed(cases[name], number), 0, budget)[0][OUT]


def asking(blocks: int) -> float:
    """The ioctl by itself, in ns. To be called in a process of its own."""
    reader = bare.Reader()
    return median(reader.ask(10_000) for _ in range(blocks))


def huge_pages(kind: str) -> int:
    """How many huge pages the kernel uses for memory that could have HUGE_PAGES of them."""
    with mmap.mmap(-1, (HUGE_PAGES + 1) * HUGE, flags=mmap.MAP_PRIVATE) as memory, ummunotify.open("uffd") as umn:
        memory.madvise(mmap.MADV_HUGEPAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        start = -(-address // HUGE) * HUGE
        if kind == "all":
            umn.watch((start, HUGE_PAGES * HUGE))
        if kind == "page":
            umn.watch((start + HUGE_PAGES // 2 * HUGE + 10 * PAGE, PAGE))
        for i in range(HUGE_PAGES):
            memory[start - address + i * HUGE] = 1
        used = 0
        inside = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                inside = int(found[1], 16) < start + HUGE_PAGES * HUGE and int(found[2], 16) > start
            elif inside and line.startswith("AnonHugePages:"):
                used += int(line.split()[1])
        return used * 1024 // HUGE


def _rows(tells: dict[str, Told], out: Pairs, asked: float, found: dict[str, pyperf.Benchmark]) -> list[Row]:
    rows = []
    for where, tell in tells.items():
        ratio, slower = tell.bare.ratio, tell.unwatched.ratio
        rows += [
            Row(
                f"munmap of a watched page, the reader on {where}",
                "1.3x",
                f"{ratio.median:.2f}x ± {ratio.doubt:.2f} ({tell.bare.added.median / 1000:+.1f} us)",
                f"a bare reader in C: {tell.bare.without.median / 1000:.1f} us",
                ratio.median <= 1.3,
            ),
            Row(
                "the same",
                "",
                f"{slower.median:.1f}x",
                f"not watched: {tell.unwatched.without.median / 1000:.1f} us",
                None,
            ),
        ]
    rows.append(
        Row(
            f"mmap + touch + munmap elsewhere, {WATCHED:,} watched",
            "1.02x",
            f"{out.ratio.median:.3f}x ± {out.ratio.doubt:.3f}",
            f"not watching: {out.without.median:,.0f} ns",
            out.ratio.median <= 1.02,
        )
    )
    baseline = f"its system call by itself: {asked:.0f} ns"
    for name in (calls.CHANGED, calls.VALID):
        took = found[name].median() * 1e9
        rows.append(Row(f"`{name}` in Python", "400 ns", f"{took:.0f} ns", baseline, took < 400))
    return rows


def section(quick: bool, folder: Path) -> str:
    budget = Budget(0.01, 0, 2) if quick else Budget(0.005, 10, 30)
    first, *others = sorted(os.sched_getaffinity(0))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        tells = {"the same CPU": pool.submit(told, budget, first, first).result()}
        if others:
            tells["another CPU"] = pool.submit(told, budget, first, others[0]).result()
        out = pool.submit(outside, budget).result()
        before = pool.submit(asking, 10 if quick else 300).result()
        nothing, everything, a_page = (pool.submit(huge_pages, kind).result() for kind in ("", "all", "page"))
        found = calls.measure(quick, "uffd")
        asked = (before + pool.submit(asking, 10 if quick else 300).result()) / 2
    return f"""
{table(_rows(tells, out, asked, found))}
The thread that unmaps watched memory waits until our thread has read the event: that is the kernel's way, and it is
what takes the time; to wake a thread on an idle CPU of a virtual machine takes most. The times of munmap are wall-clock
times for that reason. Unmapping other memory does not wait.

The system call in `changed` and `valid` is the barrier that closes the window in which the kernel has given
an address away and not told yet (`sources/uffd.c` has the argument). Through `bpf` and `daemon` there is none.

Huge pages: of memory that could have {HUGE_PAGES}, the kernel makes {nothing} where nothing is watched, {everything}
where all of it is watched, and {a_page} where one small page in the middle is: a mapping's watched part becomes a
mapping of its own, and a huge page cannot lie in two. Other huge pages are not affected.
"""
