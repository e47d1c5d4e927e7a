"""The registration cache: what it gives out, what it keeps, and what it does when things fail."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from pathlib import Path

import pytest
from cache_check import wrong
from registrar import Recorder
from support import LONG, SYS, in_child, map_memory, remap, require_module, require_source, unmap_memory

import ummunotify
from ummunotify import (
    ClosedError,
    DeregistrationError,
    ForkedError,
    Notifier,
    RegistrationCache,
    RegistrationError,
    RegistrationLimitError,
)

np = require_module("numpy")

PAGE = mmap.PAGESIZE
SIZE = 16 * PAGE

pytestmark = pytest.mark.usefixtures("keeper")


@pytest.fixture
def registrar() -> Recorder:
    return Recorder()


@pytest.fixture
def cache(registrar: Recorder) -> Iterator[RegistrationCache[int]]:
    with RegistrationCache(registrar) as cache:
        yield cache
        assert wrong(cache) is None
    assert registrar.live == {}


@pytest.fixture
def memory() -> Iterator[int]:
    address = map_memory(SIZE)
    yield address
    unmap_memory(address, SIZE)


def use(cache: RegistrationCache[int], address: int, length: int = PAGE) -> int:
    with cache.acquire((address, length)) as registration:
        return registration.handle


# ---- Hits ----


def test_a_second_use_is_a_hit(cache: RegistrationCache[int], registrar: Recorder, memory: int) -> None:
    with cache.acquire((memory, PAGE)) as first, cache.acquire((memory, PAGE)) as second:
        assert first.handle == second.handle
        assert cache.stats.in_use == 1
    assert use(cache, memory) == 1
    assert registrar.ranges == [(memory, PAGE)]
    assert (cache.stats.hits, cache.stats.misses, cache.stats.in_use) == (2, 1, 0)
    assert (cache.stats.registrations, cache.stats.registered_bytes) == (1, PAGE)


@pytest.mark.parametrize(("offset", "length"), [(0, 1), (0, 3 * PAGE), (5, 100), (PAGE, PAGE), (3 * PAGE - 1, 1)])
def test_a_part_is_a_hit(cache: RegistrationCache[int], memory: int, offset: int, length: int) -> None:
    whole = use(cache, memory, 3 * PAGE)
    with cache.acquire((memory + offset, length)) as part:
        assert (part.handle, part.address, part.length) == (whole, memory + offset, length)
    assert cache.stats.misses == 1


@pytest.mark.parametrize(("offset", "length"), [(0, PAGE + 1), (PAGE - 1, PAGE + 2), (PAGE - 1, 1), (2 * PAGE, 1)])
def test_more_than_is_registered_is_a_miss(
    cache: RegistrationCache[int], memory: int, offset: int, length: int
) -> None:
    part = use(cache, memory + PAGE, PAGE)
    assert use(cache, memory + offset, length) != part


def test_any_part_of_anything_is_found(cache: RegistrationCache[int], registrar: Recorder, memory: int) -> None:
    """With registrations of all lengths, next to each other and inside each other."""
    lengths = [1, 2, 3, 63, 64, 65, 1000, PAGE - 1, PAGE, PAGE + 1, SIZE]
    held = [
        (memory + offset, length) for length in lengths for offset in range(0, SIZE - length + 1, max(length, PAGE))
    ]
    for what in held:
        cache.acquire(what).release()
    assert wrong(cache) is None
    count = registrar.registered
    for address, length in held:
        for part in [(address, 1), (address + length - 1, 1), (address + length // 3, length - length // 3)]:
            cache.acquire(part).release()
    assert registrar.registered == count


def test_thousands_come_and_go(cache: RegistrationCache[int], registrar: Recorder) -> None:
    count = 2000
    address = map_memory(count * 2 * PAGE)
    handles = [use(cache, address + i * 2 * PAGE) for i in range(count)]
    assert [use(cache, address + i * 2 * PAGE) for i in range(count)] == handles
    assert wrong(cache) is None
    for i in range(0, count, 2):
        cache.invalidate((address + i * 2 * PAGE, 1))
    assert wrong(cache) is None
    assert len(registrar.live) == count / 2
    assert [use(cache, address + i * 2 * PAGE) for i in range(1, count, 2)] == handles[1::2]
    unmap_memory(address, count * 2 * PAGE)


def test_numpy_and_others(cache: RegistrationCache[int]) -> None:
    array = np.zeros(1000)
    with cache.acquire(array) as registration:
        assert (registration.address, registration.length) == (array.ctypes.data, 8000)
        assert registration.valid
    with cache.acquire(array[10:20]) as part:
        assert (part.address, part.length) == (array.ctypes.data + 80, 80)
    assert cache.stats.hits == 1
    for nothing in [object(), "text", (1, 2, 3)]:
        with pytest.raises(TypeError):
            cache.acquire(nothing)
    with pytest.raises(ummunotify.InvalidBufferError):
        cache.acquire(array[::2])
    with pytest.raises(ummunotify.InvalidRangeError):
        cache.acquire((4096, 0))


# ---- Changes ----


def test_memory_mapped_anew_is_registered_anew(cache: RegistrationCache[int], registrar: Recorder, memory: int) -> None:
    old = use(cache, memory)
    remap(memory)
    assert use(cache, memory) != old
    assert len(registrar.live) == 1
    assert cache.stats.stale == 1


def test_a_stale_one_in_use_is_given_to_nobody_and_stays(
    cache: RegistrationCache[int], registrar: Recorder, memory: int
) -> None:
    first, second = cache.acquire((memory, PAGE)), cache.acquire((memory, PAGE))
    old = first.handle
    assert first.valid
    remap(memory)
    assert not first.valid
    with cache.acquire((memory, PAGE)) as new:
        assert new.handle != old
    first.release()
    assert old in registrar.live
    assert second.handle == old
    second.release()
    assert old not in registrar.live
    assert len(registrar.live) == 1


def test_what_went_stale_unnoticed_goes_with_its_last_user(
    cache: RegistrationCache[int], registrar: Recorder, memory: int
) -> None:
    registration = cache.acquire((memory, PAGE))
    remap(memory)
    registration.release()
    assert registrar.live == {}


def test_stale_ones_go_when_something_else_is_registered(
    cache: RegistrationCache[int], registrar: Recorder, memory: int
) -> None:
    for page in range(8):
        use(cache, memory + page * PAGE)
    remap(memory, 4 * PAGE)
    assert len(registrar.live) == 8
    use(cache, memory + 8 * PAGE)
    assert registrar.ranges == [(memory + page * PAGE, PAGE) for page in range(4, 9)]
    remap(memory + 4 * PAGE, PAGE)
    cache.collect()
    assert registrar.ranges == [(memory + page * PAGE, PAGE) for page in range(5, 9)]


def test_a_change_while_it_is_registered(cache: RegistrationCache[int], registrar: Recorder, memory: int) -> None:
    changes = iter(range(3))

    def before(address: int, _length: int) -> None:
        if next(changes, None) is not None:
            remap(address)

    registrar.before = before
    with cache.acquire((memory, PAGE)) as registration:
        assert registration.valid
        assert registrar.live.keys() == {registration.handle}
    assert registrar.registered == 4
    assert cache.stats.retries == 3
    assert cache.stats.misses == 1


def test_changes_without_end(cache: RegistrationCache[int], registrar: Recorder, memory: int) -> None:
    registrar.before = lambda address, _length: remap(address)
    with pytest.raises(RegistrationError, match=r"changed during each of 16 tries; do not unmap"):
        cache.acquire((memory, PAGE))
    cache.collect()
    assert registrar.live == {}
    assert cache.stats.registrations == 0


class Cutter(Recorder):
    """To register changes the mapping, unless that memory is registered already."""

    cuts = True

    def register(self, address: int, length: int) -> int:
        if self.cuts and (address, length) not in self.live.values():
            remap(address)
        return super().register(address, length)


def test_what_registering_itself_changes(memory: int) -> None:
    registrar = Cutter()
    with RegistrationCache(registrar) as cache:
        with cache.acquire((memory, PAGE)) as registration:
            assert registration.valid
            assert registrar.live.keys() == {registration.handle}
        assert (cache.stats.retries, cache.stats.in_use, cache.stats.registrations) == (1, 0, 1)
        assert wrong(cache) is None
    assert registrar.live == {}


@pytest.mark.parametrize("limit", ["max_registrations", "max_bytes", "overlap"])
def test_what_registering_itself_changes_with_no_room_for_both(memory: int, limit: str) -> None:
    registrar = Cutter(overlap=limit != "overlap")
    with RegistrationCache(
        registrar,
        max_registrations=1 if limit == "max_registrations" else None,
        max_bytes=2 * PAGE - 1 if limit == "max_bytes" else None,
    ) as cache:
        with pytest.raises(RegistrationError, match="changed during each of 16 tries"):
            cache.acquire((memory, PAGE))
        assert cache.stats.registrations == 0
        registrar.cuts = False
        assert use(cache, memory) in registrar.live
    assert registrar.live == {}


def test_events_of_other_regions_do_no_harm(registrar: Recorder, keeper: Notifier, memory: int) -> None:
    with RegistrationCache(registrar, notifier=keeper) as cache, keeper.watch((memory + PAGE, PAGE)):
        old = use(cache, memory)
        remap(memory + PAGE)
        use(cache, memory + 2 * PAGE)
        assert use(cache, memory) == old
    assert keeper.regions == []


# ---- Rounding and merging ----


def test_exactly_what_was_asked_for_is_the_default(
    cache: RegistrationCache[int], registrar: Recorder, memory: int
) -> None:
    use(cache, memory + 5, 7)
    use(cache, memory + 10, 7)
    assert registrar.ranges == [(memory + 5, 7), (memory + 10, 7)]


def test_rounding(memory: int) -> None:
    registrar = Recorder(granularity=PAGE)
    with RegistrationCache(registrar) as cache:
        first = use(cache, memory + PAGE - 1, 2)
        assert registrar.ranges == [(memory, 2 * PAGE)]
        assert use(cache, memory, 2 * PAGE) == first


def test_merging(memory: int) -> None:
    registrar = Recorder(merge=True)
    with RegistrationCache(registrar) as cache:
        use(cache, memory, 2 * PAGE)
        use(cache, memory + PAGE, 2 * PAGE)
        assert registrar.ranges == [(memory, 3 * PAGE)]
        use(cache, memory + 3 * PAGE, PAGE)  # next to it is not overlapping
        assert registrar.ranges == [(memory, 3 * PAGE), (memory + 3 * PAGE, PAGE)]
        use(cache, memory, SIZE)
        assert registrar.ranges == [(memory, SIZE)]
        assert cache.stats.merges == 3
        assert wrong(cache) is None


def test_merging_does_not_register_all_that_came_before(memory: int) -> None:
    registrar = Recorder(merge=True)
    with RegistrationCache(registrar) as cache:
        for page in range(14):
            use(cache, memory + page * PAGE, 2 * PAGE)
        assert max(length for _, length in registrar.ranges) <= 4 * PAGE


def test_what_is_in_use_is_not_merged(memory: int) -> None:
    registrar = Recorder(merge=True)
    with RegistrationCache(registrar) as cache:
        with cache.acquire((memory, PAGE)) as first:
            use(cache, memory, 2 * PAGE)
            assert first.handle in registrar.live
        assert registrar.ranges == [(memory, PAGE), (memory, 2 * PAGE)]


@pytest.mark.parametrize("attributes", [{"merge": True, "max_length": 2 * PAGE}, {"merge": True}])
def test_no_larger_than_may_be(memory: int, attributes: dict[str, object]) -> None:
    registrar = Recorder(**attributes)
    with RegistrationCache(registrar, max_bytes=None if "max_length" in attributes else 2 * PAGE) as cache:
        use(cache, memory, PAGE + 1)
        use(cache, memory + PAGE, 2 * PAGE)
        assert max(length for _, length in registrar.ranges) == 2 * PAGE


def test_merged_with_what_cannot_be_registered_any_more(memory: int) -> None:
    registrar = Recorder(merge=True)

    def before(_address: int, length: int) -> None:
        if length == 3 * PAGE:
            raise OSError(errno.EFAULT, "Bad address")

    registrar.before = before
    with RegistrationCache(registrar) as cache:
        use(cache, memory, 2 * PAGE)
        use(cache, memory + PAGE, 2 * PAGE)
        assert registrar.ranges == [(memory + PAGE, 2 * PAGE)]


def test_memory_that_cannot_be_registered_twice(memory: int) -> None:
    registrar = Recorder(overlap=False)

    def before(address: int, length: int) -> None:
        assert not any(low < address + length and address < low + size for low, size in registrar.ranges)

    registrar.before = before
    with RegistrationCache(registrar) as cache:
        for page in range(14):
            use(cache, memory + page * PAGE, 2 * PAGE)
        assert registrar.ranges == [(memory, 15 * PAGE)]
        with (
            cache.acquire((memory, PAGE)),
            pytest.raises(RegistrationError, match="a part of it is registered and in use"),
        ):
            cache.acquire((memory, SIZE))
        use(cache, memory, SIZE)
        assert registrar.ranges == [(memory, SIZE)]
        with cache.acquire((memory, PAGE)):
            remap(memory)
            with pytest.raises(RegistrationError, match="release that first"):
                cache.acquire((memory, PAGE))
        use(cache, memory)
        assert registrar.ranges == [(memory, PAGE)]


def test_memory_that_cannot_be_registered_twice_within_a_limit(memory: int) -> None:
    registrar = Recorder(overlap=False)
    with RegistrationCache(registrar, max_bytes=2 * PAGE) as cache:
        use(cache, memory, 2 * PAGE)
        use(cache, memory + PAGE, 2 * PAGE)
        assert registrar.ranges == [(memory + PAGE, 2 * PAGE)]


@pytest.mark.parametrize("granularity", [0, -1, 3, 4097])
def test_a_strange_granularity(granularity: int) -> None:
    with pytest.raises(ValueError, match=f"a power of two, not {granularity}"):
        RegistrationCache(Recorder(granularity=granularity))


# ---- Limits ----


def test_the_least_recently_used_one_goes(registrar: Recorder, memory: int) -> None:
    with RegistrationCache(registrar, max_registrations=3) as cache:
        handles = [use(cache, memory + page * PAGE) for page in range(3)]
        use(cache, memory)
        use(cache, memory + 3 * PAGE)
        assert handles[1] not in registrar.live
        use(cache, memory + 2 * PAGE)
        use(cache, memory + 4 * PAGE)
        assert handles[0] not in registrar.live
        assert handles[2] in registrar.live
        assert cache.stats.evictions == 2
        assert wrong(cache) is None


def test_the_time_of_use_is_that_of_release(registrar: Recorder, memory: int) -> None:
    with RegistrationCache(registrar, max_registrations=2) as cache:
        with cache.acquire((memory, PAGE)) as held:
            kept = held.handle
            use(cache, memory + PAGE)
        use(cache, memory + 2 * PAGE)
        assert kept in registrar.live


def test_limit_of_bytes(registrar: Recorder, memory: int) -> None:
    with RegistrationCache(registrar, max_bytes=4 * PAGE) as cache:
        for page in range(4):
            use(cache, memory + page * PAGE)
        use(cache, memory + 8 * PAGE, 3 * PAGE)
        assert registrar.ranges == [(memory + 3 * PAGE, PAGE), (memory + 8 * PAGE, 3 * PAGE)]
        with pytest.raises(RegistrationLimitError, match=f"max_bytes is {4 * PAGE}"):
            cache.acquire((memory, 4 * PAGE + 1))
        assert len(registrar.live) == 2  # nothing had to go for that


def test_limits_hold_for_what_is_in_use(registrar: Recorder, memory: int) -> None:
    with RegistrationCache(registrar, max_registrations=2, max_bytes=3 * PAGE) as cache:
        with cache.acquire((memory, PAGE)), cache.acquire((memory + PAGE, PAGE)):
            with pytest.raises(RegistrationLimitError, match=f"2 registrations with {2 * PAGE} bytes are in use"):
                cache.acquire((memory + 2 * PAGE, PAGE))
            assert len(registrar.live) == 2
        use(cache, memory + 2 * PAGE)


def test_stale_ones_in_use_count(registrar: Recorder, memory: int) -> None:
    with RegistrationCache(registrar, max_registrations=1) as cache:
        with cache.acquire((memory, PAGE)):
            remap(memory)
            with pytest.raises(RegistrationLimitError):
                cache.acquire((memory, PAGE))
        use(cache, memory)


@pytest.mark.parametrize("limit", [0, -1])
def test_strange_limits(registrar: Recorder, limit: int) -> None:
    with pytest.raises(ValueError, match=f"max_bytes must be at least 1, not {limit}"):
        RegistrationCache(registrar, max_bytes=limit)
    with pytest.raises(ValueError, match=f"max_registrations must be at least 1, not {limit}"):
        RegistrationCache(registrar, max_registrations=limit)


# ---- Failures ----

LIMIT_ERRORS = [
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    OSError(errno.EAGAIN, "Resource temporarily unavailable"),
    RegistrationLimitError("full"),
]


@pytest.mark.parametrize("error", LIMIT_ERRORS, ids=repr)
def test_a_full_registrar(cache: RegistrationCache[int], registrar: Recorder, memory: int, error: Exception) -> None:
    for page in range(8):
        use(cache, memory + page * PAGE)
    registrar.register_errors = chain([error, error], repeat(None))
    with cache.acquire((memory + 8 * PAGE, PAGE)) as registration:
        # One, then twice as many, those used least recently first.
        assert registrar.ranges == [(memory + page * PAGE, PAGE) for page in range(3, 9)]
        registrar.register_errors = repeat(error)
        with pytest.raises(RegistrationLimitError) as caught:
            cache.acquire((memory + 9 * PAGE, PAGE))
        assert error in (caught.value, caught.value.__cause__)
        assert registrar.live.keys() == {registration.handle}
    assert cache.stats.evictions == 8


def test_memory_that_cannot_be_registered(cache: RegistrationCache[int], registrar: Recorder, memory: int) -> None:
    use(cache, memory)
    error = OSError(errno.EFAULT, "Bad address")
    registrar.register_errors = iter([error])
    with pytest.raises(
        RegistrationError, match=f"cannot register {PAGE} bytes at {memory + PAGE:#x}.*Bad address"
    ) as e:
        cache.acquire((memory + PAGE, PAGE))
    assert e.value.__cause__ is error
    assert not isinstance(e.value, RegistrationLimitError)
    own = RegistrationError("not this")
    registrar.register_errors = iter([own, KeyError("a bug")])
    with pytest.raises(RegistrationError) as e:
        cache.acquire((memory + PAGE, PAGE))
    assert e.value is own
    with pytest.raises(KeyError):
        cache.acquire((memory + PAGE, PAGE))
    assert (cache.stats.registrations, cache.stats.evictions) == (1, 0)
    use(cache, memory + PAGE)


def test_a_full_notifier(registrar: Recorder, memory: int) -> None:
    with ummunotify.open(max_regions=2) as notifier, RegistrationCache(registrar, notifier=notifier) as cache:
        for page in range(4):
            use(cache, memory + page * PAGE)
        assert registrar.ranges == [(memory + page * PAGE, PAGE) for page in (2, 3)]
        with (
            cache.acquire((memory, PAGE)),
            cache.acquire((memory + PAGE, PAGE)),
            pytest.raises(RegistrationLimitError, match="2 regions are watched"),
        ):
            cache.acquire((memory + 2 * PAGE, PAGE))


def test_a_failed_deregistration_is_told_and_tried_again(
    cache: RegistrationCache[int], registrar: Recorder, memory: int
) -> None:
    error = OSError(errno.EBUSY, "Device or resource busy")
    registration = cache.acquire((memory, PAGE))
    remap(memory)
    registrar.deregister_errors = repeat(error, 3)
    with pytest.raises(DeregistrationError, match=r"1 registrations could not.*busy.*flush or close") as caught:
        registration.release()
    assert caught.value.errors == [error]
    assert (cache.stats.not_deregistered, cache.stats.registrations) == (1, 1)
    with cache.acquire((memory, PAGE)):  # which does not try it again
        for _ in range(2):
            with pytest.raises(DeregistrationError):
                cache.flush()
        assert cache.stats.failed_deregistrations == 3
        assert len(registrar.live) == 2
    cache.flush()
    assert registrar.live == {}
    assert cache.stats.not_deregistered == 0


def test_a_failed_deregistration_does_not_fail_others_calls(
    cache: RegistrationCache[int], registrar: Recorder, memory: int
) -> None:
    use(cache, memory)
    remap(memory)
    registrar.deregister_errors = iter([OSError(errno.EBUSY, "Device or resource busy")])
    with pytest.warns(RuntimeWarning, match="1 registrations could not be deregistered"):
        use(cache, memory + PAGE)
    assert cache.stats.not_deregistered == 1


def test_close_deregisters_the_others(registrar: Recorder, memory: int) -> None:
    cache = RegistrationCache(registrar)
    for page in range(4):
        use(cache, memory + page * PAGE)
    registrar.deregister_errors = iter([None, OSError(errno.EBUSY, "busy"), None, OSError(errno.EBUSY, "busy")])
    with pytest.raises(DeregistrationError) as caught:
        cache.close()
    assert len(caught.value.errors) == 2
    assert len(registrar.live) == 2
    cache.close()
    assert registrar.live == {}


@pytest.mark.parametrize("method", ["register", "deregister"])
def test_ctrl_c_in_the_registrar(cache: RegistrationCache[int], registrar: Recorder, memory: int, method: str) -> None:
    use(cache, memory)
    remap(memory)
    setattr(registrar, f"{method}_errors", iter([KeyboardInterrupt()]))
    with pytest.raises(KeyboardInterrupt):
        use(cache, memory)
    use(cache, memory)
    assert wrong(cache) is None
    assert cache.stats.registrations == len(registrar.live)


# ---- Flush, invalidate, close ----


def test_flush(cache: RegistrationCache[int], registrar: Recorder, memory: int) -> None:
    with cache.acquire((memory, PAGE)) as held:
        use(cache, memory + PAGE)
        cache.flush()
        assert registrar.live.keys() == {held.handle}
        assert use(cache, memory) == held.handle


def test_invalidate(cache: RegistrationCache[int], registrar: Recorder, memory: int) -> None:
    with cache.acquire((memory, 2 * PAGE)) as held:
        use(cache, memory + 2 * PAGE)
        use(cache, memory + 3 * PAGE)
        cache.invalidate((memory + 2 * PAGE - 1, 2))
        assert registrar.ranges == [(memory, 2 * PAGE), (memory + 3 * PAGE, PAGE)]
        assert use(cache, memory) != held.handle
    assert registrar.ranges == [(memory, PAGE), (memory + 3 * PAGE, PAGE)]


def test_close(registrar: Recorder, memory: int) -> None:
    cache = RegistrationCache(registrar)
    use(cache, memory)
    held = cache.acquire((memory + PAGE, PAGE))
    assert not cache.closed
    cache.close()
    cache.close()
    assert cache.closed
    assert registrar.live.keys() == {held.handle}
    with pytest.raises(ClosedError, match="this registration cache is closed"):
        cache.acquire((memory + PAGE, PAGE))
    cache.flush()
    cache.collect()
    held.release()
    assert registrar.live == {}
    assert repr(cache) == "<RegistrationCache closed>"


def test_a_notifier_that_was_given_stays_open(registrar: Recorder, keeper: Notifier, memory: int) -> None:
    with RegistrationCache(registrar, notifier=keeper) as cache:
        use(cache, memory)
    assert not keeper.closed
    assert keeper.regions == []


def test_a_notifier_that_was_closed(registrar: Recorder, memory: int) -> None:
    with ummunotify.open() as notifier:
        cache = RegistrationCache(registrar, notifier=notifier)
        use(cache, memory)
    with pytest.raises(ClosedError):
        cache.acquire((memory, PAGE))
    cache.close()
    assert registrar.live == {}


def test_a_cache_that_is_dropped_is_closed(registrar: Recorder, memory: int) -> None:
    cache = RegistrationCache(registrar)
    use(cache, memory)
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None
    assert registrar.live == {}


# ---- Registrations ----


def test_a_registration(cache: RegistrationCache[int], memory: int) -> None:
    registration = cache.acquire((memory, 5))
    assert repr(registration) == f"<Registration {memory:#x}-{memory + 5:#x} valid>"
    registration.release()
    registration.release()
    assert (registration.address, registration.length) == (memory, 5)
    for name in ("handle", "valid"):
        with pytest.raises(ClosedError, match="this registration was released"):
            getattr(registration, name)
    assert repr(registration).endswith("released>")
    with pytest.raises(TypeError, match=r"made by RegistrationCache\.acquire"):
        ummunotify.Registration()


def test_a_registration_that_is_dropped_is_released(
    cache: RegistrationCache[int], registrar: Recorder, memory: int
) -> None:
    registration = cache.acquire((memory, PAGE))
    remap(memory)
    with pytest.warns(ResourceWarning, match=r"dropped without release\(\)"):
        del registration
    assert cache.stats.in_use == 0
    assert len(registrar.live) == 1  # nothing is deregistered there
    cache.collect()
    assert registrar.live == {}


# ---- One notifier for many ----


def test_many_caches_share_one_notifier(registrar: Recorder, memory: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with contextlib.ExitStack() as stack:
        caches = [stack.enter_context(RegistrationCache(registrar)) for _ in range(100)]
        after_first = len(os.listdir("/proc/self/fd"))
        handles = [use(cache, memory) for cache in caches]
        assert [use(cache, memory) for cache in caches] == handles
        assert len(os.listdir("/proc/self/fd")) == after_first
        remap(memory)
        for cache in caches:
            assert use(cache, memory) not in handles
            assert (cache.stats.misses, cache.stats.stale, cache.stats.uncached) == (2, 1, 0)
    assert len(os.listdir("/proc/self/fd")) == before
    assert registrar.live == {}


def test_each_cache_deregisters_its_own(registrar: Recorder, memory: int) -> None:
    """Whichever cache reads the event."""
    other = Recorder()
    with RegistrationCache(registrar) as first, RegistrationCache(other) as second:
        use(first, memory)
        use(second, memory)
        remap(memory)
        first.collect()
        assert (registrar.live, len(other.live)) == ({}, 1)
        second.collect()
        assert other.live == {}


def test_a_cache_that_the_interpreters_end_finds_open() -> None:
    code = """
import mmap, ummunotify
class Registrar:
    def register(self, address, length):
        return address
    def deregister(self, handle):
        raise OSError("too late")
cache = ummunotify.RegistrationCache(Registrar())
memory = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE)
cache.acquire(memory).release()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- No source ----


def test_without_a_source_each_use_registers(
    registrar: Recorder, memory: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("UMMUNOTIFY_SOURCE", "daemon")
    monkeypatch.setenv("UMMUNOTIFY_SOCKET", str(tmp_path / "none"))
    with pytest.warns(RuntimeWarning, match="registered anew for each use, because.*no daemon runs here") as warned:
        cache = RegistrationCache(registrar, max_registrations=2)
    assert [warning.filename for warning in warned] == [__file__]
    with cache.acquire((memory, PAGE)) as first, cache.acquire((memory, PAGE)) as second:
        assert first.handle != second.handle
        assert not first.valid
        with pytest.raises(RegistrationLimitError):
            cache.acquire((memory, PAGE))
    assert registrar.live == {}
    use(cache, memory)
    cache.flush()
    assert len(warned) == 1
    assert registrar.live == {}
    assert (cache.stats.uncached, cache.stats.hits, cache.stats.registrations) == (3, 0, 0)
    cache.close()


def test_memory_that_cannot_be_watched(registrar: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    require_source("uffd")
    monkeypatch.setenv("UMMUNOTIFY_SOURCE", "uffd")
    with RegistrationCache(registrar) as cache, mmap.mmap(-1, PAGE) as shared:  # which uffd cannot watch
        with pytest.warns(RuntimeWarning, match="registered anew for each use, because.*") as warned:
            cache.acquire(shared).release()
        assert [warning.filename for warning in warned] == [__file__]
        cache.acquire(shared).release()
        assert len(warned) == 1
        assert cache.stats.uncached == 2
        assert registrar.live == {}


def test_a_warning_that_is_an_error_loses_nothing(registrar: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    require_source("uffd")
    monkeypatch.setenv("UMMUNOTIFY_SOURCE", "uffd")
    with RegistrationCache(registrar) as cache, mmap.mmap(-1, PAGE) as shared, warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="registered anew"):
            cache.acquire(shared)
        assert (cache.stats.in_use, registrar.live) == (0, {})


# ---- Threads ----


def run_threads(*functions: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def run(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def set_soon(after: threading.Event, event: threading.Event) -> None:
    """Once the others had time to come to where they wait. If they are late, the test tests less, but does not fail."""
    assert after.wait(60)
    time.sleep(0.05)
    event.set()


def test_two_threads_that_miss_register_once(cache: RegistrationCache[int], registrar: Recorder, memory: int) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def before(_address: int, _length: int) -> None:
        entered.set()
        assert go_on.wait(60)

    registrar.before = before
    handles: list[int] = []

    def second() -> None:
        assert entered.wait(60)
        handles.append(use(cache, memory + 5, 7))

    run_threads(lambda: handles.append(use(cache, memory)), second, lambda: set_soon(entered, go_on))
    assert handles[0] == handles[1]
    assert registrar.registered == 1
    assert (cache.stats.hits, cache.stats.misses) == (1, 1)


def test_a_thread_that_waited_in_vain_registers_itself(
    cache: RegistrationCache[int], registrar: Recorder, memory: int
) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def before(_address: int, _length: int) -> None:
        registrar.before = None
        entered.set()
        assert go_on.wait(60)
        raise RegistrationError("not you")

    def first() -> None:
        with pytest.raises(RegistrationError, match="not you"):
            use(cache, memory)

    def second() -> None:
        assert entered.wait(60)
        use(cache, memory)

    registrar.before = before
    run_threads(first, second, lambda: set_soon(entered, go_on))
    assert registrar.registered == 1


def test_other_memory_is_registered_meanwhile(cache: RegistrationCache[int], registrar: Recorder, memory: int) -> None:
    both = threading.Barrier(2, timeout=LONG)
    registrar.before = lambda _address, _length: void(both.wait())
    run_threads(lambda: void(use(cache, memory)), lambda: void(use(cache, memory + PAGE)))


def void(_result: object) -> None:
    pass


def test_closed_while_it_registers(registrar: Recorder, memory: int) -> None:
    cache = RegistrationCache(registrar)
    registrar.before = lambda _address, _length: cache.close()
    with pytest.raises(ClosedError, match="this registration cache is closed"):
        cache.acquire((memory, PAGE))
    assert registrar.live == {}


def test_closed_while_it_registers_with_another_notifier(registrar: Recorder, keeper: Notifier, memory: int) -> None:
    cache = RegistrationCache(registrar, notifier=keeper)
    registrar.before = lambda _address, _length: cache.close()
    with cache.acquire((memory, PAGE)) as registration:
        assert registration.handle in registrar.live
    assert registrar.live == {}


# ---- Fork ----


def test_the_childs_cache_is_empty_and_works(cache: RegistrationCache[int], registrar: Recorder, memory: int) -> None:
    idle = use(cache, memory)
    held = cache.acquire((memory + PAGE, PAGE))

    def child() -> None:
        assert cache.stats == ummunotify.CacheStats(*[0] * 13)
        before = set(registrar.live)
        held.release()
        assert wrong(cache) is None
        with cache.acquire((memory, PAGE)) as own:
            assert own.handle not in before
            remap(memory)
        assert registrar.live.keys() == before
        use(cache, memory)
        cache.flush()
        cache.close()
        assert registrar.live.keys() == before

    in_child(child)
    assert registrar.live.keys() == {idle, held.handle}
    assert use(cache, memory) == idle
    held.release()


def clone(function: Callable[[], object]) -> None:
    """As in_child, but no handler of a fork runs, neither C's nor Python's."""
    pid = ctypes.CDLL(None).syscall(SYS["clone"], signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        status = 1
        try:
            function()
            status = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_child_that_no_handler_knows_of(cache: RegistrationCache[int], registrar: Recorder, memory: int) -> None:
    idle = use(cache, memory)
    held = cache.acquire((memory + PAGE, PAGE))

    def child() -> None:
        before = set(registrar.live)
        assert not held.valid
        with pytest.raises(ForkedError):
            _ = held.handle
        held.release()
        assert cache.stats == ummunotify.CacheStats(*[0] * 13)
        assert use(cache, memory) not in before
        cache.close()
        assert registrar.live.keys() == before

    clone(child)
    assert use(cache, memory) == idle
    assert held.valid
    held.release()


def test_a_child_drops_everything_without_deregistering(registrar: Recorder, memory: int) -> None:
    caches = [RegistrationCache(registrar)]
    use(caches[0], memory)
    held = [caches[0].acquire((memory, PAGE))]

    def child() -> None:
        with pytest.warns(ResourceWarning, match="dropped without release"):
            held.clear()
        caches.clear()
        gc.collect()
        assert len(registrar.live) == 1

    in_child(child)
    held.pop().release()
    caches.pop().close()


def test_a_notifier_that_was_given_does_not_work_in_the_child(
    registrar: Recorder, keeper: Notifier, memory: int
) -> None:
    with RegistrationCache(registrar, notifier=keeper) as cache:
        use(cache, memory)

        def child() -> None:
            with pytest.raises(ForkedError):
                cache.acquire((memory, PAGE))

        in_child(child)
        assert cache.stats.registrations == 1


def test_a_fork_while_another_thread_registers(registrar: Recorder, memory: int) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def before(_address: int, _length: int) -> None:
        registrar.before = None
        entered.set()
        assert go_on.wait(60)

    registrar.before = before
    with RegistrationCache(registrar) as cache:
        thread = threading.Thread(target=lambda: use(cache, memory))
        thread.start()
        assert entered.wait(60)
        in_child(lambda: void(use(cache, memory)))
        go_on.set()
        thread.join()
        assert registrar.registered == 1
