"""The mlock registrar, on the real kernel."""

from __future__ import annotations

import gc
import mmap
import os
import random
import re
import resource
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
from other_users import require_another_user
from support import in_child, map_memory, unmap_memory

from ummunotify import RegistrarError, RegistrationCache, RegistrationError, RegistrationLimitError
from ummunotify.registrars.mlock import LockedRange, MlockRegistrar

PAGE = mmap.PAGESIZE
PAGES = 8
SIZE = PAGES * PAGE


@pytest.fixture
def memory() -> Iterator[int]:
    address = map_memory(SIZE)
    yield address
    unmap_memory(address, SIZE)


def locked(address: int) -> list[bool]:
    """For each page, whether it is in a locked mapping."""
    result = [False] * PAGES
    smaps = Path("/proc/self/smaps").read_text()
    for match in re.finditer(r"^([0-9a-f]+)-([0-9a-f]+) (?:.*\n)+?VmFlags: (.*)$", smaps, re.MULTILINE):
        start, end = (int(match[group], 16) for group in (1, 2))
        for page in range(PAGES):
            if start <= address + page * PAGE < end:
                result[page] = "lo" in match[3].split()
    return result


def test_pages_are_counted(memory: int) -> None:
    registrar = MlockRegistrar()
    first = registrar.register(memory, 2 * PAGE)
    second = registrar.register(memory + PAGE + 5, PAGE)
    third = registrar.register(memory + PAGE, 1)
    assert locked(memory) == [True] * 3 + [False] * 5
    registrar.deregister(second)
    assert locked(memory) == [True] * 2 + [False] * 6
    registrar.deregister(first)
    assert locked(memory) == [False, True] + [False] * 6
    registrar.deregister(third)
    assert locked(memory) == [False] * 8


def test_a_length_that_is_far_too_great(memory: int) -> None:
    """It fails at once, not after billions of pages, and what was locked before stays so."""
    registrar = MlockRegistrar()
    kept = registrar.register(memory + 2 * PAGE, PAGE)
    with pytest.raises(RegistrationError):
        registrar.register(memory, 1 << 46)
    assert locked(memory) == [False, False, True] + [False] * 5
    registrar.deregister(kept)
    assert locked(memory) == [False] * 8


def test_any_order(memory: int) -> None:
    registrar = MlockRegistrar()
    live: list[LockedRange] = []
    for _ in range(300):
        if live and random.random() < 0.5:
            registrar.deregister(live.pop(random.randrange(len(live))))
        else:
            start = random.randrange(SIZE)
            live.append(registrar.register(memory + start, random.randint(1, SIZE - start)))
        expected = [
            any(r.address < memory + (page + 1) * PAGE and memory + page * PAGE < r.address + r.length for r in live)
            for page in range(PAGES)
        ]
        assert locked(memory) == expected
    for handle in live:
        registrar.deregister(handle)
    assert locked(memory) == [False] * PAGES


def test_memory_that_was_mapped_anew_is_locked_anew(memory: int) -> None:
    registrar = MlockRegistrar()
    old = registrar.register(memory, 2 * PAGE)
    unmap_memory(memory, PAGE)
    map_memory(PAGE, memory)
    assert locked(memory)[:2] == [False, True]
    new = registrar.register(memory, PAGE)
    assert locked(memory)[:2] == [True, True]
    registrar.deregister(old)
    assert locked(memory)[:2] == [True, False]
    registrar.deregister(new)
    assert not any(locked(memory))


def test_what_was_unmapped_is_no_obstacle(memory: int) -> None:
    registrar = MlockRegistrar()
    handle = registrar.register(memory, SIZE)
    for page in (0, 3, 7):
        unmap_memory(memory + page * PAGE, PAGE)
    registrar.deregister(handle)
    assert not any(locked(memory))
    for page in (0, 3, 7):
        map_memory(PAGE, memory + page * PAGE)


def test_memory_that_is_not_mapped(memory: int) -> None:
    registrar = MlockRegistrar()
    kept = registrar.register(memory, PAGE)
    unmap_memory(memory + 4 * PAGE, PAGE)
    with pytest.raises(RegistrationError, match="some of it is not mapped") as caught:
        registrar.register(memory, SIZE)
    assert not isinstance(caught.value, RegistrationLimitError)
    assert locked(memory) == [True] + [False] * 7  # as before
    registrar.deregister(kept)
    map_memory(PAGE, memory + 4 * PAGE)


def test_the_limit(memory: int) -> None:
    def child() -> None:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (2 * PAGE, 2 * PAGE))
        os.setuid(65534)  # root has no limit
        registrar = MlockRegistrar()
        registrar.register(memory, 2 * PAGE)
        with pytest.raises(RegistrationLimitError, match=rf"lock {2 * PAGE} bytes.*RLIMIT_MEMLOCK \(ulimit -l\)"):
            registrar.register(memory + 4 * PAGE, 2 * PAGE)
        assert locked(memory) == [True] * 2 + [False] * 6

    require_another_user()
    in_child(child)


def test_a_child_has_nothing_registered(memory: int) -> None:
    registrar = MlockRegistrar()
    handle = registrar.register(memory, PAGE)

    def child() -> None:
        assert not any(locked(memory))
        with pytest.raises(RegistrarError, match="not registered here"):
            registrar.deregister(handle)
        registrar.deregister(registrar.register(memory, PAGE))

    in_child(child)
    assert locked(memory)[0]
    registrar.deregister(handle)


def test_strange_handles(memory: int) -> None:
    registrar = MlockRegistrar()
    handle = registrar.register(memory, PAGE)
    with pytest.raises(RegistrarError, match="not registered here"):
        registrar.deregister(LockedRange(memory, PAGE))
    registrar.deregister(handle)
    with pytest.raises(RegistrarError, match="not registered here"):
        registrar.deregister(handle)


def test_through_the_cache(keeper: object, memory: int) -> None:
    with RegistrationCache(MlockRegistrar(), max_bytes=3 * PAGE) as cache:
        for page in range(PAGES):
            with cache.acquire((memory + page * PAGE + 10, 100)):
                assert locked(memory)[page]
            assert sum(locked(memory)) <= 3
        assert cache.stats.evictions == 5
    assert not any(locked(memory))


def test_it_can_be_dropped() -> None:
    registrar = MlockRegistrar()
    gone = weakref.ref(registrar)
    del registrar
    gc.collect()
    assert gone() is None
