"""The notifier as its users see it, on the running kernel."""

from __future__ import annotations

import array
import asyncio
import copy
import ctypes
import errno
import gc
import itertools
import mmap
import os
import pickle
import random
import re
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import require

import ummunotify
from ummunotify import (
    ClosedError,
    CookieInUseError,
    Invalidation,
    InvalidBufferError,
    InvalidCookieError,
    InvalidRangeError,
    Notifier,
    Region,
    SourceUnavailableError,
    TooManyRegionsError,
    UnknownRegionError,
    sources,
)
from ummunotify.bpf import libbpf
from ummunotify.notifier import survey
from ummunotify.selftest.changes import ANONYMOUS, MAP_NORESERVE, PAGE, PROT_NONE, READ_WRITE, Memory, call, madvise

LONG = 60.0
"""Seconds in which everything has happened that is going to."""


def hit(memory: Memory, first: int, last: int | None = None) -> None:
    """Change pages, which stay mapped."""
    last = first + 1 if last is None else last
    madvise(memory.at(first), (last - first) * PAGE, mmap.MADV_DONTNEED)


def watch(umn: Notifier, memory: Memory, first: int, last: int | None = None) -> Region:
    last = first + 1 if last is None else last
    return umn.watch((memory.at(first), (last - first) * PAGE))


def ranges(memory: Memory, events: list[Invalidation]) -> list[tuple[float, float, bool]]:
    """In pages of the memory."""
    return [
        ((event.start - memory.address) / PAGE, (event.end - memory.address) / PAGE, event.exact) for event in events
    ]


# ---- What it is for ----


def test_the_example() -> None:
    with ummunotify.open() as umn:
        buf = mmap.mmap(-1, 1 << 20)
        region = umn.watch(buf)
        assert region.valid
        assert not umn.changed
        generation = umn.generation
        buf.close()
        assert not region.valid
        assert umn.changed
        assert umn.generation != generation
        (inv,) = umn.read()
        assert (inv.region, inv.cookie) == (region, region.cookie)
        assert (inv.start, inv.end, inv.exact) == (region.address, region.address + region.length, True)
        assert not umn.changed
        assert not region.valid
        region.renew()
        assert region.valid
        umn.unwatch(region)
        assert not region.valid


def test_the_same_address_again(umn: Notifier) -> None:
    """The case that decides everything."""
    a = mmap.mmap(-1, PAGE)
    region = umn.watch(a)
    a.close()
    b = call("mmap", region.address, PAGE, READ_WRITE, ANONYMOUS, -1, 0)
    assert b == region.address
    assert not region.valid
    call("munmap", b, PAGE)


def test_insisting_on_a_source(keeper: Notifier, monkeypatch: pytest.MonkeyPatch) -> None:
    name, _, probe = keeper.source.partition(":")
    monkeypatch.delenv("UMMUNOTIFY_SOURCE")
    for arguments in ((name, probe), (None, probe)):
        with ummunotify.open(arguments[0], probe=arguments[1]) as umn:
            assert umn.source == keeper.source
    for named in ("bpf", ""):
        monkeypatch.setenv("UMMUNOTIFY_SOURCE", named)
        with ummunotify.open() as umn, ummunotify.open("bpf") as other:
            assert umn.source == other.source
            assert umn.source.startswith("bpf:")
    monkeypatch.setenv("UMMUNOTIFY_SOURCE", keeper.source)
    with ummunotify.open() as umn:
        assert umn.source == keeper.source


@pytest.mark.parametrize("named", ["nonsense", "bpf:nonsense", ":nonsense", "bpf:kvm:more", "BPF", " ", "kvm"])
def test_a_source_that_there_is_not(named: str, keeper: Notifier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UMMUNOTIFY_SOURCE", named)
    with pytest.raises(ValueError, match=r"UMMUNOTIFY_SOURCE.*bpf:kvm"):
        ummunotify.open()
    # Arguments go before the environment.
    with ummunotify.open(source="bpf") as umn:
        assert umn.source.startswith("bpf:")
    monkeypatch.delenv("UMMUNOTIFY_SOURCE")
    source, _, probe = named.partition(":")
    with pytest.raises(ValueError, match="bpf:kvm"):
        ummunotify.open(source=source or None, probe=probe or None)


# ---- What can be watched ----


class Record(ctypes.Structure):
    _fields_ = (("a", ctypes.c_int), ("b", ctypes.c_double))


def buffers() -> dict[str, tuple[Any, int, int]]:
    """Objects with their addresses and sizes in bytes."""
    some = bytearray(1000)
    numbers = array.array("d", range(50))
    matrix = np.arange(300, dtype=np.int32).reshape(30, 10)
    fortran = np.asfortranarray(matrix)
    frozen = np.arange(10)
    frozen.flags.writeable = False
    record = Record()
    records = (Record * 5)()
    content = b"read-only" * 20
    mapped = np.memmap("/proc/self/exe", mode="r", shape=5000, offset=100)

    def address(buffer: Any) -> int:
        return int(np.frombuffer(buffer, dtype=np.uint8).ctypes.data)

    return {
        "bytearray": (some, address(some), 1000),
        "bytes": (content, address(content), 180),
        "memoryview": (memoryview(some)[100:], address(some) + 100, 900),
        "read-only memoryview": (memoryview(content)[9:].toreadonly(), address(content) + 9, 171),
        "memoryview of two dimensions": (memoryview(some).cast("B", (10, 100)), address(some), 1000),
        "array": (numbers, numbers.buffer_info()[0], 400),
        "NumPy": (matrix, matrix.ctypes.data, 1200),
        "NumPy, Fortran order": (fortran, fortran.ctypes.data, 1200),
        "NumPy, transposed": (matrix.T, matrix.ctypes.data, 1200),
        "NumPy, rows": (matrix[10:20], matrix.ctypes.data + 400, 400),
        "NumPy, no dimension": (np.array(1.5), 0, 8),
        "NumPy, read-only": (frozen, frozen.ctypes.data, 80),
        "NumPy, of a file": (mapped, mapped.ctypes.data, 5000),
        "ctypes structure": (record, ctypes.addressof(record), ctypes.sizeof(record)),
        "ctypes array": (records, ctypes.addressof(records), ctypes.sizeof(records)),
    }


@pytest.mark.parametrize("kind", buffers())
def test_buffers(kind: str, umn: Notifier) -> None:
    buffer, address, length = buffers()[kind]
    with umn.watch(buffer) as region:
        assert region.length == length
        assert region.address == (address or buffer.ctypes.data)
        assert region.valid


def test_a_buffer_is_not_exported(umn: Notifier) -> None:
    resized = bytearray(64 << 20)
    mapped = mmap.mmap(-1, 1 << 20)
    view = memoryview(bytearray(8))
    regions = [umn.watch(what) for what in (resized, mapped, view)]
    resized.clear()
    mapped.close()
    view.release()
    # malloc gives so much back to the kernel at once.
    assert [region.valid for region in regions] == [False, False, True]


def test_a_buffer_is_not_kept_alive(umn: Notifier) -> None:
    watched = np.zeros(8 << 20)  # so much is given back to the kernel at once
    alive = weakref.ref(watched)
    region = umn.watch(watched)
    del watched
    assert alive() is None
    assert not region.valid


def test_address_and_length(umn: Notifier, memory: Memory) -> None:
    region = umn.watch((memory.address + 5, 7))
    assert (region.address, region.length) == (memory.address + 5, 7)
    # Numbers that are no int.
    region = umn.watch((np.uint64(memory.address), np.int16(100)))
    assert (region.address, region.length) == (memory.address, 100)
    assert type(region.address) is int
    # Nothing need be mapped there.
    umn.watch((PAGE, PAGE))


def test_one_byte(umn: Notifier, memory: Memory) -> None:
    """Pages change, and what is reported of one is what was watched."""
    offsets = (0, 1, PAGE - 1, PAGE, 2 * PAGE - 1, 2 * PAGE)
    regions = [umn.watch((memory.address + offset, 1)) for offset in offsets]
    hit(memory, 1)
    assert [region.valid for region in regions] == [True, True, True, False, False, True]
    assert {(event.start - memory.address, event.end - memory.address, event.exact) for event in umn.read()} == {
        (PAGE, PAGE + 1, True),
        (2 * PAGE - 1, 2 * PAGE, True),
    }


def test_terabytes(umn: Notifier) -> None:
    length = 4 << 40
    address = call("mmap", 0, length, READ_WRITE, ANONYMOUS | MAP_NORESERVE, -1, 0)
    region = umn.watch((address, length))
    assert umn.watch((address, 1 << 40)).valid
    middle = address + length // 2
    madvise(middle, PAGE, mmap.MADV_DONTNEED)
    (event,) = umn.read()
    assert (event.region, event.start, event.end, event.exact) == (region, middle, middle + PAGE, True)
    call("munmap", address, length)
    assert {event.end - event.start for event in umn.read()} == {length, 1 << 40}


def test_the_whole_address_space(umn: Notifier, memory: Memory) -> None:
    region = umn.watch((PAGE, (1 << 47) - 2 * PAGE))
    hit(memory, 3)
    assert not region.valid
    # Python may have changed more meanwhile.
    (event,) = umn.read()
    assert event.start <= memory.at(3) < memory.at(4) <= event.end


def test_identical(umn: Notifier, memory: Memory) -> None:
    regions = [watch(umn, memory, 2, 4) for _ in range(100)]
    assert len({region.cookie for region in regions}) == 100
    assert umn._check_table() is None
    regions.pop(50).close()
    hit(memory, 3)
    assert not any(region.valid for region in regions)
    events = umn.read()
    assert {event.region for event in events} == set(regions)
    assert set(ranges(memory, events)) == {(3, 4, True)}
    assert len(events) == 99
    for region in regions:
        region.close()
    assert umn.regions == []
    assert umn._check_table() is None


def test_nested_and_overlapping(umn: Notifier, memory: Memory) -> None:
    spans = [(0, 8), (1, 7), (2, 6), (3, 5), (0, 4), (4, 8), (3, 4)]
    regions = {span: watch(umn, memory, *span) for span in spans}
    hit(memory, 3)
    for (first, last), region in regions.items():
        assert region.valid == (not first <= 3 < last)
    umn.read()
    for region in regions.values():
        region.renew()
    hit(memory, 7)
    assert [span for span, region in regions.items() if not region.valid] == [(0, 8), (4, 8)]


def test_regions(umn: Notifier, memory: Memory) -> None:
    a, b, c = (watch(umn, memory, i) for i in range(3))
    assert umn.regions == [a, b, c]
    umn.regions.clear()  # a copy
    umn.unwatch(b)
    assert umn.regions == [a, c]
    assert repr(umn) == f"<Notifier {umn.source} 2 regions>"
    assert umn.stats["regions"] == 2
    # Dropping the object does not end the watch.
    cookie = a.cookie
    del a, b
    gc.collect()
    hit(memory, 0)
    assert [event.cookie for event in umn.read()] == [cookie]


def test_repr_of_a_region(umn: Notifier) -> None:
    region = umn.watch((0x1000, 0x800), cookie=0xAB)
    assert repr(region) == "<Region 0x1000-0x1800 cookie=0xab valid>"
    region.close()
    assert repr(region) == "<Region 0x1000-0x1800 cookie=0xab unwatched>"


def test_cookies(umn: Notifier) -> None:
    given: list[Any] = [0, 1, 1 << 63, (1 << 64) - 1, np.uint64(77)]
    regions = [umn.watch((PAGE, 1), cookie=cookie) for cookie in given]
    assert [region.cookie for region in regions] == given
    assert {type(region.cookie) for region in regions} == {int}
    others = [umn.watch((PAGE, 1)).cookie for _ in range(10)]
    assert len({*given, *others}) == 15
    assert min(others) >= 1 << 63
    with pytest.raises(CookieInUseError, match="0x1 ") as caught:
        umn.watch((PAGE, 1), cookie=1)
    assert caught.value.cookie == 1
    regions[1].close()
    assert umn.watch((PAGE, 1), cookie=1).cookie == 1


def test_a_cookie_per_notifier(umn: Notifier, keeper: Notifier, memory: Memory) -> None:
    with keeper.watch((memory.at(0), PAGE), cookie=5) as other:
        region = umn.watch((memory.at(0), PAGE), cookie=5)
        hit(memory, 0)
        assert [event.region for event in umn.read()] == [region]
        assert [event.region for event in keeper.read()] == [other]


# ---- valid, renew, changed, read ----


def test_a_region_stays_invalid(umn: Notifier, memory: Memory) -> None:
    region = watch(umn, memory, 0)
    hit(memory, 0)
    for _ in range(3):
        assert not region.valid
        umn.read()
    region.renew()
    assert region.valid
    assert umn.read() == []
    hit(memory, 0)
    assert not region.valid


def test_renew_before_read(umn: Notifier, memory: Memory) -> None:
    """Renewing makes valid; what happened before is still reported, and once."""
    region = watch(umn, memory, 0)
    hit(memory, 0)
    region.renew()
    assert region.valid
    assert umn.changed
    hit(memory, 0)
    assert not region.valid
    assert ranges(memory, umn.read()) == [(0, 1, False)]
    assert umn.read() == []


def test_other_regions_are_not_disturbed(umn: Notifier, memory: Memory) -> None:
    left, middle, right = (watch(umn, memory, i) for i in (0, 1, 2))
    hit(memory, 1)
    assert (left.valid, middle.valid, right.valid) == (True, False, True)


def test_reported_in_the_order_of_first_hits(umn: Notifier, memory: Memory) -> None:
    regions = [watch(umn, memory, i) for i in range(8)]
    order = [5, 1, 7, 0, 3]
    for page in [*order, 1, 5]:
        hit(memory, page)
    events = umn.read()
    assert [event.region for event in events] == [regions[page] for page in order]
    assert [event.exact for event in events] == [page not in (1, 5) for page in order]


def test_the_order_lasts_over_many(umn: Notifier) -> None:
    """More than are taken from the table at a time."""
    count = 1000
    address = call("mmap", 0, count * PAGE, READ_WRITE, ANONYMOUS | MAP_NORESERVE, -1, 0)
    regions = [umn.watch((address + i * PAGE, PAGE)) for i in range(count)]
    order = random.Random(1).sample(range(count), count)
    for i in order:
        madvise(address + i * PAGE, PAGE, mmap.MADV_DONTNEED)
    assert [event.region for event in umn.read()] == [regions[i] for i in order]
    assert umn.read() == []
    call("munmap", address, count * PAGE)


def test_exact_or_all_of_it(umn: Notifier, memory: Memory) -> None:
    region = umn.watch((memory.at(1) + 100, 5 * PAGE))
    hit(memory, 3, 5)
    assert ranges(memory, umn.read()) == [(3, 5, True)]
    hit(memory, 0, 3)  # clipped
    assert ranges(memory, umn.read()) == [(1 + 100 / PAGE, 3, True)]
    hit(memory, 6, 8)
    assert ranges(memory, umn.read()) == [(6, 6 + 100 / PAGE, True)]
    hit(memory, 3)
    hit(memory, 3)
    (event,) = umn.read()
    assert (event.start, event.end, event.exact) == (region.address, region.address + region.length, False)


def test_who_did_it(umn: Notifier, memory: Memory) -> None:
    regions = [watch(umn, memory, page) for page in range(3)]
    hit(memory, 0)
    threads: list[int] = []

    def other() -> None:
        threads.append(threading.get_native_id())
        hit(memory, 1)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    call("munmap", memory.at(2), PAGE)
    memory.fill()
    events = umn.read()
    assert [event.region for event in events] == regions
    assert [event.syscall for event in events] == [28, 28, 11]
    status = Path("/proc/self/status").read_text()
    if len(status.partition("NSpid:")[2].splitlines()[0].split()) == 1:
        main = threading.get_native_id()
        assert [event.thread for event in events] == [main, *threads, main]
        assert events[2].cause == f"munmap by thread {main}"


def test_changed(umn: Notifier, memory: Memory) -> None:
    assert not umn.changed
    region = watch(umn, memory, 0)
    assert not umn.changed
    hit(memory, 1)
    assert not umn.changed  # nobody watches that
    before = umn.generation
    hit(memory, 0)
    assert umn.changed
    assert umn.generation != before
    umn.read()
    assert not umn.changed
    # A region that is invalid already changes again.
    hit(memory, 0)
    assert umn.changed
    assert not region.valid
    umn.read()
    assert not umn.changed


def test_nothing_is_reported_after_unwatch(umn: Notifier, memory: Memory) -> None:
    gone, stays = watch(umn, memory, 0), watch(umn, memory, 0)
    hit(memory, 0)
    gone.close()
    assert [event.region for event in umn.read()] == [stays]
    stays.close()
    hit(memory, 0)
    assert umn.read() == []


def test_a_region_is_a_context(umn: Notifier, memory: Memory) -> None:
    with watch(umn, memory, 0) as region:
        assert region.valid
    assert umn.regions == []
    assert not region.valid
    region.close()
    # Its slot goes to another one, which it has nothing to do with.
    for _ in range(100):
        other = watch(umn, memory, 0)
        assert not region.valid
        other.close()


def test_what_one_reads_the_other_need_not(umn: Notifier, keeper: Notifier, memory: Memory) -> None:
    """Each notifier has events of its own."""
    ours, theirs = watch(umn, memory, 0), watch(keeper, memory, 0)
    hit(memory, 0)
    umn.read()
    ours.renew()
    assert keeper.changed
    assert not theirs.valid
    assert [event.region for event in keeper.read()] == [theirs]
    theirs.close()


# ---- Waiting ----


def later(act: Callable[[], None], seconds: float = 0.1) -> threading.Timer:
    timer = threading.Timer(seconds, act)
    timer.start()
    return timer


def test_read_waits(umn: Notifier, memory: Memory) -> None:
    region = watch(umn, memory, 0)
    for timeout in (None, LONG):
        timer = later(lambda: hit(memory, 0))
        started = time.monotonic()
        assert [event.region for event in umn.read(timeout)] == [region]
        assert time.monotonic() - started < LONG
        timer.join()


def test_read_waits_no_longer_than_asked(umn: Notifier, memory: Memory) -> None:
    watch(umn, memory, 0)
    started = time.monotonic()
    assert umn.read(0.2) == []
    assert time.monotonic() - started >= 0.2
    assert umn.read(0) == umn.read(0.0) == umn.read() == umn.read(-1) == []


def test_read_does_not_wait_if_there_is_something(umn: Notifier, memory: Memory) -> None:
    watch(umn, memory, 0)
    for _ in range(3):
        hit(memory, 0)
        assert len(umn.read(None)) == 1
        assert umn.read(0.01) == []


@pytest.mark.parametrize("timeout", [1e7, 1e15, float("inf")])
def test_read_waits_for_as_long_as_asked(timeout: float, umn: Notifier, memory: Memory) -> None:
    watch(umn, memory, 0)
    timer = later(lambda: hit(memory, 0), 0.02)
    assert len(umn.read(timeout)) == 1
    timer.join()


def test_others_run_while_it_waits(umn: Notifier, memory: Memory) -> None:
    watch(umn, memory, 0)
    reader = threading.Thread(target=umn.read, args=(None,))
    reader.start()
    for _ in range(1000):
        assert umn.watch((memory.at(1), 1)).valid
    assert reader.is_alive()
    hit(memory, 0)
    reader.join(LONG)
    assert not reader.is_alive()


def test_each_invalidation_goes_to_one_reader(umn: Notifier) -> None:
    rounds, readers, count = 50, 4, 100
    address = call("mmap", 0, count * PAGE, READ_WRITE, ANONYMOUS, -1, 0)
    regions = [umn.watch((address + i * PAGE, PAGE)) for i in range(count)]
    results: list[list[Region]] = [[] for _ in range(readers)]
    taken = threading.Semaphore(0)

    def read(into: list[Region]) -> None:
        try:
            while True:
                events = umn.read(None)
                into.extend(event.region for event in events)
                taken.release(len(events))
        except ClosedError:
            pass

    threads = [threading.Thread(target=read, args=(result,)) for result in results]
    for thread in threads:
        thread.start()
    for _ in range(rounds):
        for i in range(count):
            madvise(address + i * PAGE, PAGE, mmap.MADV_DONTNEED)
        # Only when all are read can each be expected again.
        for _ in range(count):
            assert taken.acquire(timeout=LONG)
    umn.close()
    for thread in threads:
        thread.join(LONG)
    everything = [region for result in results for region in result]
    assert len(everything) == rounds * count
    assert all(everything.count(region) == rounds for region in regions)
    call("munmap", address, count * PAGE)


def readable(fd: int, timeout: float = 0) -> bool:
    by_select = bool(select.select([fd], [], [], timeout)[0])
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    with select.epoll() as epoll:
        epoll.register(fd, select.EPOLLIN)
        answers = {by_select, poll.poll(0) == [(fd, select.POLLIN)], epoll.poll(0) == [(fd, select.EPOLLIN)]}
    assert len(answers) == 1
    return answers.pop()


def test_the_descriptor(umn: Notifier, memory: Memory) -> None:
    watch(umn, memory, 0)
    watch(umn, memory, 1)
    fd = umn.fileno()
    assert umn.fileno() == fd
    assert not os.get_inheritable(fd)
    assert not readable(fd)
    for _ in range(3):
        hit(memory, 0)
        assert readable(fd)
        hit(memory, 1)
        assert readable(fd)  # level-triggered
        assert len(umn.read()) == 2
        assert not readable(fd)
        assert select.select([umn], [], [], 0) == ([], [], [])


def test_the_descriptor_comes_late(umn: Notifier, memory: Memory) -> None:
    """Asked for when there is something already."""
    watch(umn, memory, 0)
    hit(memory, 0)
    assert readable(umn.fileno())
    assert len(umn.read()) == 1
    assert not readable(umn.fileno())


def test_the_descriptor_comes_late_and_the_table_is_full(keeper: Notifier, memory: Memory) -> None:
    with ummunotify.open(max_regions=1) as umn:
        watch(umn, memory, 0)
        hit(memory, 0)
        assert readable(umn.fileno())
        assert len(umn.regions) == 1
        assert len(umn.read()) == 1


def test_the_descriptor_wakes(umn: Notifier, memory: Memory) -> None:
    watch(umn, memory, 0)
    umn.fileno()
    for _ in range(20):
        timer = later(lambda: hit(memory, 0), 0.01)
        assert readable(umn.fileno(), LONG)
        timer.join()
        assert len(umn.read()) == 1


def test_edge_triggered(umn: Notifier, memory: Memory) -> None:
    watch(umn, memory, 0)
    with select.epoll() as epoll:
        epoll.register(umn.fileno(), select.EPOLLIN | select.EPOLLET)
        for _ in range(5):
            hit(memory, 0)
            assert epoll.poll(LONG) == [(umn.fileno(), select.EPOLLIN)]
            assert epoll.poll(0) == []
            assert len(umn.read()) == 1
            assert epoll.poll(0) == []


def test_one_wake_up_a_drain(umn: Notifier, memory: Memory) -> None:
    """Changes that nobody has read yet send no more of them."""
    watch(umn, memory, 0)
    with select.epoll() as epoll:
        epoll.register(umn.fileno(), select.EPOLLIN | select.EPOLLET)
        hit(memory, 0)
        assert epoll.poll(LONG)
        for _ in range(100):
            hit(memory, 0)
        assert epoll.poll(0) == []
        umn.read()
        hit(memory, 0)
        assert epoll.poll(LONG)


def test_async(umn: Notifier, memory: Memory) -> None:
    regions = [watch(umn, memory, i) for i in range(3)]

    async def collect() -> list[Region]:
        found = []
        async for event in umn:
            found.append(event.region)
            if len(found) == 4:
                umn.close()
        return found

    async def main() -> list[Region]:
        hit(memory, 2)
        reader = asyncio.create_task(collect())
        for page in (1, 0, 1):
            await asyncio.sleep(0.02)
            hit(memory, page)
        return await asyncio.wait_for(reader, LONG)

    assert asyncio.run(main()) == [regions[i] for i in (2, 1, 0, 1)]


def test_several_async_readers(umn: Notifier, memory: Memory) -> None:
    regions = [watch(umn, memory, i) for i in range(8)]

    async def collect(found: list[Region]) -> None:
        async for event in umn:
            found.append(event.region)

    async def main() -> list[list[Region]]:
        found: list[list[Region]] = [[], [], []]
        readers = [asyncio.create_task(collect(result)) for result in found]
        for page in range(8):
            await asyncio.sleep(0.005)
            hit(memory, page)
        while sum(map(len, found)) < 8:
            await asyncio.sleep(0.005)
        threading.Thread(target=umn.close).start()
        await asyncio.wait_for(asyncio.gather(*readers), LONG)
        return found

    found = asyncio.run(main())
    assert sorted(itertools.chain(*found), key=regions.index) == regions


def test_a_slow_async_reader_does_not_keep_the_loop_busy(umn: Notifier, memory: Memory) -> None:
    watch(umn, memory, 0)
    watch(umn, memory, 1)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.01)
            turns += 1

    async def main() -> float:
        async for _ in umn:
            hit(memory, 1)  # there is more to read
            counter = asyncio.create_task(count())
            before = time.process_time()
            await asyncio.sleep(0.5)
            counter.cancel()
            return time.process_time() - before
        raise AssertionError("it was closed")

    hit(memory, 0)
    # A loop that spins takes all of the half second.
    assert asyncio.run(main()) < 0.25
    assert turns > 0


def test_async_cancelled(umn: Notifier, memory: Memory) -> None:
    region = watch(umn, memory, 0)

    async def one() -> Region:
        async for event in umn:
            return event.region
        raise AssertionError("it was closed")

    async def main() -> None:
        task = asyncio.create_task(one())
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        hit(memory, 0)
        assert await asyncio.wait_for(one(), LONG) is region

    asyncio.run(main())


def test_async_and_closed(umn: Notifier) -> None:
    umn.close()

    async def main() -> None:
        async for _ in umn:
            raise AssertionError("it is closed")

    with pytest.raises(ClosedError):
        asyncio.run(main())


# ---- Closing ----


def test_everything_says_closed(memory: Memory) -> None:
    umn = ummunotify.open()
    region = watch(umn, memory, 0)
    hit(memory, 0)
    umn.close()
    umn.close()
    assert umn.closed
    assert not region.valid
    calls: list[Callable[[], object]] = [
        lambda: umn.watch((memory.address, 1)),
        lambda: umn.unwatch(region),
        umn.read,
        lambda: umn.read(None),
        lambda: umn.read(1),
        umn.fileno,
        region.renew,
        lambda: umn.generation,
        lambda: umn.changed,
        lambda: umn.regions,
        lambda: umn.stats,
        umn._check_table,
    ]
    for do in calls:
        with pytest.raises(ClosedError, match="closed"):
            do()
    region.close()
    region.close()
    assert not region.valid
    assert (region.address, region.length) == (memory.address, PAGE)
    assert repr(umn) == "<Notifier closed>"
    with umn:
        pass


def test_closing_wakes_readers() -> None:
    for timeout in (None, LONG):
        umn = ummunotify.open()
        errors: list[BaseException] = []

        def read(umn: Notifier = umn, timeout: float | None = timeout, errors: list[BaseException] = errors) -> None:
            try:
                umn.read(timeout)
            except ClosedError as error:
                errors.append(error)

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.02)
        umn.close()
        for thread in threads:
            thread.join(LONG)
        assert len(errors) == 4


def test_closing_while_others_use_it(memory: Memory) -> None:
    """Each call works or says that it is closed."""
    for _ in range(10):
        umn = ummunotify.open()
        errors: list[BaseException] = []

        def use(umn: Notifier = umn, errors: list[BaseException] = errors) -> None:
            try:
                while True:
                    region = watch(umn, memory, 0)
                    hit(memory, 0)
                    region.renew()
                    umn.read(0.0001)
                    assert umn.changed in (True, False)
                    umn.unwatch(region)
            except ClosedError:
                pass
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=use) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.01)
        umn.close()
        for thread in threads:
            thread.join(LONG)
        assert errors == []


def test_closing_in_several_threads() -> None:
    for _ in range(10):
        umn = ummunotify.open()
        umn.fileno()
        threads = [threading.Thread(target=umn.close) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG)
        assert umn.closed


@pytest.fixture
def alarm() -> Iterator[Callable[[Callable[[], None], float], None]]:
    """Runs something in a signal handler, again and again."""
    before = signal.getsignal(signal.SIGALRM)

    def start(act: Callable[[], None], seconds: float) -> None:
        signal.signal(signal.SIGALRM, lambda *_: act())
        signal.setitimer(signal.ITIMER_REAL, seconds, seconds)

    yield start
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


Alarm = Callable[[Callable[[], None], float], None]


def test_closing_in_a_signal_handler(umn: Notifier, alarm: Alarm) -> None:
    alarm(umn.close, 0.05)
    with pytest.raises(ClosedError):
        umn.read(None)


def test_a_signal_handler_that_does_not_raise(umn: Notifier, memory: Memory, alarm: Alarm) -> None:
    """The waiting goes on."""
    calls: list[None] = []
    watch(umn, memory, 0)

    def handler() -> None:
        calls.append(None)
        if len(calls) == 5:
            hit(memory, 0)

    alarm(handler, 0.01)
    assert len(umn.read(None)) == 1
    assert len(calls) >= 5


def test_closing_in_a_signal_handler_while_another_opens(keeper: Notifier, alarm: Alarm) -> None:
    """At any moment of opening and closing, in the same thread."""
    others = [ummunotify.open() for _ in range(8)]
    count = len(others)

    def handler() -> None:
        if others:
            others.pop().close()

    alarm(handler, 0.003)
    deadline = time.monotonic() + LONG
    while others:
        ummunotify.open().close()
        assert time.monotonic() < deadline
    assert count


def test_ctrl_c() -> None:
    code = """
import ummunotify
umn = ummunotify.open()
print("ready", flush=True)
try:
    umn.read(None)
except KeyboardInterrupt:
    print("interrupted", umn.closed, umn.read())
    umn.close()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=LONG)
    assert (output, errors, process.returncode) == ("interrupted False []\n", "", 0)


# ---- Garbage, and the end ----


class Holder:
    """Holds things in a reference cycle."""

    def __init__(self, *things: object) -> None:
        self.things = things
        self.itself = self


def test_a_forgotten_notifier_is_closed(memory: Memory) -> None:
    """Whatever refers to what, and in whatever order it goes; the fixture counts what is left over."""
    makers: list[Callable[[], object]] = [
        ummunotify.open,
        lambda: watch(ummunotify.open(), memory, 0),
        lambda: Holder(ummunotify.open()),
        lambda: Holder(watch(ummunotify.open(), memory, 0)),
    ]

    def both(backwards: bool) -> object:
        umn = ummunotify.open()
        region = watch(umn, memory, 0)
        umn.fileno()
        hit(memory, 0)
        return Holder(region, umn) if backwards else Holder(umn, region)

    makers += [lambda: both(False), lambda: both(True)]
    for make in makers:
        made = make()
        gone = weakref.ref(made) if not isinstance(made, Region) else None
        del made
        gc.collect()
        assert gone is None or gone() is None


def test_a_region_outlives_its_notifier(memory: Memory) -> None:
    umn = ummunotify.open()
    region = watch(umn, memory, 0)
    umn.close()
    del umn
    gc.collect()
    assert not region.valid
    with pytest.raises(ClosedError):
        region.renew()
    region.close()


def test_events_outlive_their_regions(umn: Notifier, memory: Memory) -> None:
    region = watch(umn, memory, 0)
    hit(memory, 0)
    (event,) = umn.read()
    region.close()
    umn.close()
    del region
    gc.collect()
    assert event.region.address == event.start == memory.address


def test_an_unexpected_error_of_one_source(keeper: Notifier, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is that source's reason, and the next is tried."""

    def fail(_program: int) -> int:
        raise OSError(errno.EINVAL, "what a kernel of the future says")

    monkeypatch.setattr("ummunotify.sources.bpf.skipped_runs", fail)
    monkeypatch.delenv("UMMUNOTIFY_SOURCE")
    with pytest.raises(SourceUnavailableError, match="what a kernel of the future says"):
        ummunotify.open(source="bpf")
    reasons = {finding.source: finding.reason for finding in survey()}
    assert "what a kernel of the future says" in reasons["bpf:kvm"]
    assert len(reasons) == len(sources.every())


def test_garbage_collected_while_another_opens(keeper: Notifier, monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector may run, and close a notifier, at any moment of opening and closing another one."""
    gc.collect()
    real = libbpf.map_update

    def map_update(*arguments: Any) -> None:
        gc.collect()
        real(*arguments)

    monkeypatch.setattr(libbpf, "map_update", map_update)
    Holder(ummunotify.open())
    result: list[Notifier] = []
    # In a thread, so that a deadlock fails the test.
    thread = threading.Thread(target=lambda: result.append(ummunotify.open()), daemon=True)
    thread.start()
    thread.join(LONG)
    assert result
    Holder(result.pop())
    thread = threading.Thread(target=lambda: result.append(ummunotify.open()), daemon=True)
    thread.start()
    thread.join(LONG)
    result.pop().close()


ENDINGS = {
    "open": "umn = ummunotify.open(); region = umn.watch(buf)",
    "many": "all = [ummunotify.open() for _ in range(5)]; regions = [umn.watch(buf) for umn in all]",
    "invalid": "umn = ummunotify.open(); region = umn.watch(buf); umn.fileno(); buf.close()",
    "only the region": "region = ummunotify.open().watch(buf)",
    "in a cycle": "umn = ummunotify.open(); umn.itself = umn; umn.region = umn.watch(buf)",
    "in a module": "sys.ummunotify = ummunotify.open(); sys.region = sys.ummunotify.watch(buf)",
    "a thread waits": (
        "umn = ummunotify.open(); region = umn.watch(buf)\n"
        "threading.Thread(target=umn.read, args=(None,), daemon=True).start(); time.sleep(0.05)"
    ),
    "atexit": "umn = ummunotify.open(); atexit.register(lambda: (umn.watch(buf), umn.close()))",
    "sys.exit in a handler": (
        "umn = ummunotify.open(); signal.signal(signal.SIGALRM, lambda *_: sys.exit(0))\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.05); umn.read(None)"
    ),
    "an object closes it": (
        "class Late:\n"
        "    def __init__(self): self.umn = ummunotify.open(); self.region = self.umn.watch(buf)\n"
        "    def __del__(self): self.region.close(); self.umn.close()\n"
        "late = Late(); late.itself = late"
    ),
}


def test_interpreter_exit() -> None:
    processes = {
        name: subprocess.Popen(
            [
                sys.executable,
                "-X",
                "dev",
                "-W",
                "error",
                "-c",
                "import atexit, mmap, signal, sys, threading, time, ummunotify\nbuf = mmap.mmap(-1, 1 << 20)\n" + code,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, code in ENDINGS.items()
    }
    results = {}
    for name, process in processes.items():
        with process:
            results[name] = (process.communicate(timeout=LONG)[0], process.returncode)
    assert results == dict.fromkeys(ENDINGS, ("", 0))


# ---- Bad input ----


def state(umn: Notifier) -> object:
    return umn.regions, umn.generation, umn.changed, umn.stats["regions"], umn._check_table()


@pytest.fixture
def unchanged(umn: Notifier, memory: Memory) -> Iterator[Notifier]:
    """A notifier in which a test must change nothing."""
    region = umn.watch((memory.address, PAGE), cookie=1)
    before = state(umn)
    yield umn
    assert state(umn) == before
    assert region.valid
    hit(memory, 0)
    assert [event.region for event in umn.read()] == [region]


TOP = (1 << 47) - PAGE
"""User space ends here, with four levels of page tables."""


@pytest.mark.parametrize(
    ("address", "length", "why"),
    [
        (PAGE, 0, "empty"),
        (0, 0, "empty"),
        (0, PAGE, "user space"),
        ((1 << 64) - PAGE, PAGE + 1, "wraps"),
        ((1 << 64) - PAGE, (1 << 64) - 1, "wraps"),
        (PAGE, (1 << 64) - 1, "wraps"),
        (-PAGE, PAGE, "64 bits"),
        (PAGE, -1, "64 bits"),
        (1 << 64, 1, "64 bits"),
        (1, 1 << 64, "64 bits"),
        (1 << 56, 1, "user space"),
        (0xFFFF_8000_0000_0000, PAGE, "user space"),
        ((1 << 64) - 1, 1, "wraps"),
        (PAGE, 1 << 62, "user space"),
        (10**30, -(10**30), "64 bits"),
    ],
)
def test_bad_ranges(address: int, length: int, why: str, unchanged: Notifier) -> None:
    with pytest.raises(InvalidRangeError, match=why) as caught:
        unchanged.watch((address, length))
    assert (caught.value.address, caught.value.length) == (address, length)
    assert f"{length} bytes" in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_the_end_of_user_space(umn: Notifier) -> None:
    flags = ANONYMOUS | MAP_NORESERVE | 0x100000
    try:
        # Five levels of page tables go on from here.
        call("munmap", call("mmap", 1 << 47, PAGE, PROT_NONE, flags, -1, 0), PAGE)
    except OSError:
        pass
    else:
        require("four levels of page tables", "there are five")
    region = umn.watch((TOP - 1, 1))
    assert region.valid
    with pytest.raises(InvalidRangeError):
        umn.watch((TOP - 1, 2))


def released() -> memoryview:
    view = memoryview(bytearray(8))
    view.release()
    return view


def closed_map() -> mmap.mmap:
    mapped = mmap.mmap(-1, PAGE)
    mapped.close()
    return mapped


@pytest.mark.parametrize(
    ("buffer", "error", "text"),
    [
        (np.zeros(10)[::2], InvalidBufferError, "ndarray"),
        (np.zeros((10, 10))[:, 1], InvalidBufferError, "ndarray"),
        (np.zeros((10, 10))[1:5, 1:5], InvalidBufferError, "ndarray"),
        (memoryview(bytearray(10))[::2], InvalidBufferError, "memoryview"),
        (released(), InvalidBufferError, "memoryview.*released"),
        (closed_map(), InvalidBufferError, "mmap"),
        (b"", InvalidRangeError, "empty"),
        (bytearray(), InvalidRangeError, "empty"),
        (np.zeros((0, 5)), InvalidRangeError, "empty"),
        ((ctypes.c_char * 0)(), InvalidRangeError, "empty"),
        ("text", TypeError, "str"),
        (None, TypeError, "NoneType"),
        (4096, TypeError, "int"),
        ([4096, 1], TypeError, "list"),
        ((), TypeError, r"\(\)"),
        ((4096,), TypeError, r"\(4096,\)"),
        ((4096, 1, 1), TypeError, r"\(4096, 1, 1\)"),
        ((4096.0, 1), TypeError, "float"),
        ((4096, 1.5), TypeError, "float"),
        (("4096", 1), TypeError, "str"),
        ((4096, None), TypeError, "NoneType"),
    ],
    ids=repr,
)
def test_bad_buffers(buffer: Any, error: type[Exception], text: str, unchanged: Notifier) -> None:
    with pytest.raises(error, match=text):
        unchanged.watch(buffer)


@pytest.mark.parametrize("cookie", [-1, 1 << 64, 10**30, 1.5, "1", b"1", [], object()])
def test_bad_cookies(cookie: Any, unchanged: Notifier, memory: Memory) -> None:
    with pytest.raises(InvalidCookieError) as caught:
        unchanged.watch((memory.address, 1), cookie=cookie)
    assert caught.value.cookie is cookie
    assert repr(cookie) in str(caught.value)


def test_a_cookie_in_use(unchanged: Notifier, memory: Memory) -> None:
    with pytest.raises(CookieInUseError) as caught:
        unchanged.watch((memory.address, 1), cookie=1)
    assert caught.value.cookie == 1


def test_foreign_regions(unchanged: Notifier, keeper: Notifier, memory: Memory) -> None:
    with watch(keeper, memory, 0) as foreign:
        with pytest.raises(UnknownRegionError, match=hex(foreign.cookie)):
            unchanged.unwatch(foreign)
        assert foreign.valid
        assert keeper.regions == [foreign]


def test_a_region_is_unwatched_once(unchanged: Notifier, memory: Memory) -> None:
    region = watch(unchanged, memory, 1)
    unchanged.unwatch(region)
    with pytest.raises(UnknownRegionError, match=hex(region.cookie)):
        unchanged.unwatch(region)
    with pytest.raises(UnknownRegionError, match=hex(region.cookie)):
        region.renew()
    region.close()


@pytest.mark.parametrize("what", [None, 5, "region", object()])
def test_not_a_region(what: Any, unchanged: Notifier) -> None:
    with pytest.raises(TypeError):
        unchanged.unwatch(what)


def test_regions_cannot_be_made(unchanged: Notifier) -> None:
    made: Any = Region
    with pytest.raises(TypeError):
        made()
    with pytest.raises(TypeError, match=r"Notifier\.watch"):
        made(unchanged)
    with pytest.raises(TypeError):
        made.__new__(Region)
    never = made.__new__(Region, unchanged)
    assert not never.valid
    assert "unwatched" in repr(never)
    with pytest.raises(UnknownRegionError):
        unchanged.unwatch(never)
    with pytest.raises(UnknownRegionError):
        never.renew()
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError):
            copied(unchanged.regions[0])


@pytest.mark.parametrize("timeout", ["1", b"", [], object()])
def test_a_timeout_that_is_no_number(timeout: Any, unchanged: Notifier) -> None:
    with pytest.raises(TypeError):
        unchanged.read(timeout)


@pytest.mark.parametrize(("limit", "error"), [(0, ValueError), (-5, ValueError), ("5", TypeError), (1.5, TypeError)])
def test_bad_limits(limit: Any, error: type[Exception], keeper: Notifier) -> None:
    with pytest.raises(error):
        ummunotify.open(max_regions=limit)


def test_a_failed_open_leaves_nothing(keeper: Notifier) -> None:
    for _ in range(100):
        with pytest.raises(ValueError, match="max_regions"):
            ummunotify.open(max_regions=0)
    ummunotify.open().close()


def test_max_regions(keeper: Notifier, memory: Memory) -> None:
    with ummunotify.open(max_regions=3) as umn:
        regions = [watch(umn, memory, i) for i in range(3)]
        for _ in range(3):
            with pytest.raises(TooManyRegionsError, match=r"3 regions.*max_regions"):
                watch(umn, memory, 3)
        assert umn.regions == regions
        hit(memory, 0, 8)
        assert {event.region for event in umn.read()} == set(regions)
        regions[1].close()
        assert watch(umn, memory, 3).valid
        with pytest.raises(TooManyRegionsError):
            watch(umn, memory, 4)
    with ummunotify.open(max_regions=10**30) as umn:
        watch(umn, memory, 0)


def test_the_table_cannot_grow(umn: Notifier, memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is already watched stays watched, and once there is memory it goes on."""

    def no_memory(*_: object) -> None:
        raise OSError(12, "no memory")

    with monkeypatch.context() as patched:
        patched.setattr(libbpf, "create_map", no_memory)
        regions = []

        def watch_all() -> None:
            for _ in range(1_000_000):
                regions.append(watch(umn, memory, 0))

        with pytest.raises(TooManyRegionsError, match="no memory") as caught:
            watch_all()
        assert isinstance(caught.value.__cause__, OSError)
        assert len(umn.regions) == len(regions) > 100
        assert umn._check_table() is None
        hit(memory, 0)
        assert len(umn.read()) == len(regions)
    for _ in range(1000):
        watch(umn, memory, 0)
    assert len(umn.regions) == len(regions) + 1000
    assert umn._check_table() is None


# ---- Opening ----


def test_many_notifiers(keeper: Notifier, memory: Memory) -> None:
    """Until there are no more to be had, which is said and disturbs nobody."""
    with ExitStack() as stack:
        opened: list[Notifier] = []

        def open_all() -> None:
            for _ in range(1000):
                opened.append(stack.enter_context(ummunotify.open()))

        with pytest.raises(SourceUnavailableError, match="in use") as caught:
            open_all()
        assert keeper.source in caught.value.reasons
        assert len(opened) >= 10
        regions = [watch(umn, memory, 0) for umn in opened]
        hit(memory, 0)
        assert not any(region.valid for region in regions)
        # Whichever of them are closed, the others are fed.
        order = random.Random(2).sample(range(len(opened)), len(opened))
        for done, i in enumerate(order):
            opened[i].close()
            for j in order[done + 1 :]:
                assert [event.region for event in opened[j].read()] == [regions[j]]
            hit(memory, 0)
        stack.enter_context(ummunotify.open())


def test_a_table_number_is_used_again(keeper: Notifier, memory: Memory) -> None:
    for page in range(30):
        with ummunotify.open() as umn:
            region = watch(umn, memory, page % 8)
            hit(memory, page % 8)
            assert [event.region for event in umn.read()] == [region]


def test_several_threads_open_and_close(keeper: Notifier, memory: Memory) -> None:
    errors: list[BaseException] = []

    def work(page: int) -> None:
        try:
            for _ in range(10):
                with ummunotify.open() as umn:
                    region = watch(umn, memory, page)
                    hit(memory, page)
                    assert not region.valid
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(page,)) for page in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert errors == []


def test_the_self_test_decides(keeper: Notifier, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that does not show a change of our own is not used."""
    monkeypatch.setattr("ummunotify.notifier.unmap", lambda address, length: None)
    with pytest.raises(SourceUnavailableError, match="self-test"):
        ummunotify.open()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FileNotFoundError(2, "No such file"), "no /dev/kvm.*modprobe kvm"),
        (PermissionError(13, "Permission denied"), "/dev/kvm cannot be opened.*Permission denied"),
    ],
)
def test_what_is_missing_is_said(error: OSError, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process that has no notifier yet."""
    code = """
import builtins, os, sys, ummunotify
real = os.open
def no_kvm(path, *rest, **more):
    if path == "/dev/kvm":
        raise ERROR
    return real(path, *rest, **more)
os.open = no_kvm
before = os.listdir("/proc/self/fd")
try:
    ummunotify.open("bpf")
except ummunotify.SourceUnavailableError as error:
    print(error)
assert os.listdir("/proc/self/fd") == before
os.open = real
ummunotify.open().close()
""".replace("ERROR", repr(error))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.stderr, result.returncode) == ("", 0)
    assert re.search(reason, result.stdout)


def test_without_privileges() -> None:
    """It says what to do about it."""
    if os.getuid():
        require("root", "the test drops its privileges")
    code = """
import os, secrets, ummunotify.sources.bpf
os.setuid(65534)
before = os.listdir("/proc/self/fd")
try:
    ummunotify.open("bpf")
except ummunotify.SourceUnavailableError as error:
    print(error.reasons)
assert os.listdir("/proc/self/fd") == before
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.stderr, result.returncode) == ("", 0)
    assert "CAP_BPF" in result.stdout
