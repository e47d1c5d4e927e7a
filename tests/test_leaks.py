"""Nothing grows: not with notifiers opened and closed, regions watched and unwatched, nor changes that nobody reads.

UMMUNOTIFY_SLOW=1 makes it ten thousand, a million and ten million; without, it takes seconds.
"""

from __future__ import annotations

import gc
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
from support import require

import ummunotify
from ummunotify.selftest.changes import PAGE, Memory, madvise, private

SLOW = "UMMUNOTIFY_SLOW" in os.environ
OPENED = 10_000 if SLOW else 100
WATCHED = 1_000_000 if SLOW else 40_000
INVALIDATIONS = 10_000_000 if SLOW else 200_000
HANDED_OVER = 10_000_000 if SLOW else 20_000
"""With uffd each waits for another thread."""


class Usage(NamedTuple):
    fds: int
    threads: int
    mappings: int
    kib: int

    @classmethod
    def now(cls) -> Usage:
        gc.collect()
        status = Path("/proc/self/status").read_text()
        (resident,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
        return cls(
            len(os.listdir("/proc/self/fd")),
            len(os.listdir("/proc/self/task")),
            len(Path("/proc/self/maps").read_text().splitlines()),
            resident,
        )


def check_constant(step: Callable[[], object], times: int) -> None:
    for _ in range(max(times // 10, 10)):  # until what is kept for later use is there
        step()
    before = Usage.now()
    for _ in range(times):
        step()
    after = Usage.now()
    print(f"{times:,} times: {before} -> {after}")
    assert after.fds == before.fds
    assert after.threads <= before.threads
    # The allocator may map or return some; one for each time would be more in any case.
    assert after.mappings - before.mappings < 20
    assert after.kib - before.kib < 1024


@pytest.fixture(params=["bpf", "uffd"])
def source(request: pytest.FixtureRequest) -> Iterator[str]:
    """A source that works here, and stays open."""
    try:
        opened = ummunotify.open(source=request.param)
    except ummunotify.SourceUnavailableError as error:
        require(request.param, str(error))
    with opened:
        yield request.param


def test_open_and_close(source: str, memory: Memory) -> None:
    def step() -> None:
        with ummunotify.open(source=source) as umn:
            region = umn.watch((memory.address, memory.length))
            umn.fileno()
            madvise(memory.address, PAGE, mmap.MADV_DONTNEED)
            assert not region.valid

    check_constant(step, OPENED)


def test_open_and_forget(source: str, memory: Memory) -> None:
    def step() -> None:
        umn = ummunotify.open(source=source)
        umn.watch((memory.address, memory.length))
        del umn
        gc.collect()  # a notifier and its regions know each other

    check_constant(step, OPENED // 10)


def test_watch_and_unwatch(source: str) -> None:
    """Of all sizes, several at a time, some of them hit."""
    with ummunotify.open(source=source) as umn, Memory() as memory:
        memory.count = 64
        private(memory)
        number = 0
        held = [umn.watch((memory.address, PAGE)) for _ in range(16)]

        def step() -> None:
            nonlocal number
            number += 1
            held[number % 16].close()
            first = number * 7 % 48
            held[number % 16] = umn.watch((memory.at(first) + number % 100, PAGE * (1 + number % 11)))
            if number % 16 == 0:
                madvise(memory.at(number // 16 % 64), PAGE, mmap.MADV_DONTNEED)
                if number % 64 == 0:
                    umn.read()

        for _ in range(1000):
            step()
        size = umn.stats.bytes
        check_constant(step, WATCHED)
        assert umn.stats.bytes == size
        assert umn.stats.regions == len(umn.regions) == 16


def test_changes_that_nobody_reads(source: str) -> None:
    with ExitStack() as undo, ummunotify.open(source=source) as umn:
        memory = undo.enter_context(Memory())
        memory.count = 64
        private(memory)
        regions = [umn.watch((memory.at(unit), PAGE)) for unit in range(memory.count)]
        number = 0

        def step() -> None:
            nonlocal number
            number += 1
            madvise(memory.at(number % 64), PAGE, mmap.MADV_DONTNEED)

        before, stats = umn.generation, umn.stats
        check_constant(step, HANDED_OVER if source == "uffd" else INVALIDATIONS)
        assert umn.changed
        assert umn.generation != before
        assert umn.stats == stats
        assert [region.valid for region in regions] == [False] * 64
        events = umn.read()
        assert {event.region for event in events} == set(regions)
        assert len(events) == 64
        assert not any(event.exact for event in events)
        assert not umn.changed
