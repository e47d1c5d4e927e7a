"""Arguments that are never right: the error says why, and nothing has changed."""

from __future__ import annotations

import copy
import ctypes
import mmap
import pickle
import resource
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support import hit, require, watch

import ummunotify
from ummunotify import (
    CookieInUseError,
    InvalidBufferError,
    InvalidCookieError,
    InvalidRangeError,
    Notifier,
    Region,
    TooManyRegionsError,
    UnknownRegionError,
)
from ummunotify.selftest.changes import ANONYMOUS, MAP_NORESERVE, PAGE, PROT_NONE, Memory, call


def state(umn: Notifier) -> object:
    return umn.regions, umn.generation, umn.changed, umn.stats.regions


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


def test_the_table_cannot_grow(umn: Notifier, memory: Memory) -> None:
    """What is already watched stays watched, and once there is memory it goes on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    regions = []

    def watch_all() -> None:
        for _ in range(1_000_000):
            regions.append(watch(umn, memory, 0))

    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        for _ in range(3):
            with pytest.raises(TooManyRegionsError, match=r"cannot grow.*Too many open files"):
                watch_all()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(umn.regions) == umn.stats.regions == len(regions) > 100
    hit(memory, 0)
    assert len(umn.read()) == len(regions)
    for _ in range(1000):
        watch(umn, memory, 0)
    assert len(umn.regions) == umn.stats.regions == len(regions) + 1000
    assert all(region.valid for region in umn.regions[-1000:])
    hit(memory, 0)
    assert len(umn.read()) == len(regions) + 1000
