"""The source `uffd` in a process that closes descriptors, locks its memory, resizes mappings or clones itself.

From Python; tests/core/uffd_process_test.c has more.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import signal
import time
import warnings
from pathlib import Path

import pytest
from support import SYS, in_child, map_memory, require, unmap_memory

import ummunotify
from ummunotify import DescriptorClosedError, SourceUnavailableError

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)

pytestmark = pytest.mark.usefixtures("uffd")


@pytest.fixture(scope="module")
def uffd() -> None:
    try:
        ummunotify.open("uffd").close()
    except SourceUnavailableError as error:
        require("uffd", str(error))


def mappings() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.parametrize("part", [(0, 256), (0, 128), (10, 20), (255, 1)])
def test_a_partly_watched_mapping_is_resized(part: tuple[int, int]) -> None:
    first, pages = part
    with (
        ummunotify.open("uffd") as umn,
        mmap.mmap(-1, 256 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory,
    ):
        memory[:] = b"a" * len(memory)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        gc.collect()
        with umn.watch((address + first * PAGE, pages * PAGE)):
            for size in (512, 100, 700, 300):
                memory.resize(size * PAGE)
                assert memory[: 100 * PAGE] == b"a" * 100 * PAGE
        memory.resize(400 * PAGE)


def test_mappings_heal() -> None:
    address = map_memory(512 * PAGE)
    with ummunotify.open("uffd") as umn:
        umn.watch((address, PAGE)).close()
        before = mappings()
        regions = [umn.watch((address + i * PAGE, PAGE)) for i in range(0, 512, 2)]
        assert mappings() < before + 16
        for region in regions:
            region.close()
        assert mappings() <= before
    unmap_memory(address, 512 * PAGE)


def close_all_then(what: str) -> None:
    umn = ummunotify.open("uffd")
    address = map_memory(8 * PAGE)
    region = umn.watch((address, PAGE))
    other = umn.watch((address + 4 * PAGE, PAGE))
    umn.fileno()
    os.closerange(3, 1024)
    files = [os.open("/dev/null", os.O_RDWR) for _ in range(20)] if what == "reuse" else []
    unmap_memory(address, PAGE)
    assert not region.valid
    assert umn.changed
    assert not other.valid
    for call in (lambda: umn.watch((address + PAGE, PAGE)), other.renew):
        with pytest.raises(DescriptorClosedError, match="closed or replaced a descriptor"):
            call()
    assert not other.valid
    with ummunotify.open("uffd") as anew:
        region = anew.watch((address + PAGE, PAGE))
        assert region.valid
        unmap_memory(address + PAGE, PAGE)
        assert not region.valid
    for file in files:
        os.fstat(file)


@pytest.mark.parametrize("what", ["close", "reuse"])
def test_descriptors_are_closed(what: str) -> None:
    in_child(lambda: close_all_then(what))


def lock_all() -> None:
    with ummunotify.open("uffd") as umn:
        address = map_memory(PAGE)
        region = umn.watch((address, PAGE))
        if LIBC.mlockall(3):
            return
        unmap_memory(address, PAGE)
        assert not region.valid
        region.close()
    with ummunotify.open("uffd") as umn:
        address = map_memory(PAGE)
        with umn.watch((address, PAGE)) as region:
            unmap_memory(address, PAGE)
            assert not region.valid
            assert len(umn.read(timeout=1)) == 1


def test_locked_memory() -> None:
    in_child(lock_all)


def outlive() -> None:
    signal.alarm(30)
    address = map_memory(64 * PAGE)
    with ummunotify.open("uffd") as umn:
        region = umn.watch((address + PAGE, PAGE))
        child = LIBC.syscall(SYS["clone"], signal.SIGCHLD, 0, 0, 0, 0)
        if not child:
            while True:
                signal.pause()
        LIBC.mprotect(ctypes.c_void_p(address + 8 * PAGE), ctypes.c_size_t(PAGE), mmap.PROT_READ)
        region.close()
    unmap_memory(address, 64 * PAGE)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_cloned_child_outlives_the_notifier() -> None:
    in_child(outlive)


def threads(expected: int | None = None) -> int:
    """A thread that was joined may still be on its way out."""
    for _ in range(1000):
        found = len(os.listdir("/proc/self/task"))
        if expected in (None, found):
            break
        time.sleep(0.01)
    return found


def test_no_thread_without_regions() -> None:
    address = map_memory(PAGE)
    before = threads()
    with ummunotify.open("uffd") as umn:
        with umn.watch((address, PAGE)):
            assert threads(before + 1) == before + 1
        assert threads(before) == before
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            in_child(lambda: None)
    unmap_memory(address, PAGE)
