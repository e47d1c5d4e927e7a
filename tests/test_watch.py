"""What can be watched, and what is watched."""

from __future__ import annotations

import array
import ctypes
import gc
import mmap
import weakref
from typing import Any

import numpy as np
import pytest
from support import hit, ranges, watch

import ummunotify
from ummunotify import (
    CookieInUseError,
    Notifier,
)
from ummunotify.selftest.changes import ANONYMOUS, MAP_NORESERVE, PAGE, READ_WRITE, Memory, call, madvise


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
    assert umn.stats.regions == 2
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
