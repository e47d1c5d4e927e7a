"""Threads that free and map buffers anew at random, and transfer through io_uring's fixed buffers all the time.

UMMUNOTIFY_TRANSFERS says how many buffers; a million with UMMUNOTIFY_SLOW.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import random
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol, Self

import pytest
from support import map_memory, require, unmap_memory

from ummunotify import RegistrarUnavailableError, RegistrationCache
from ummunotify.registrars.io_uring import FixedBuffer, IoUringRegistrar

PAGE = mmap.PAGESIZE
THREADS = 4
BUFFERS = 8
"""Of each thread."""
SLOTS = 256
TRANSFERS = int(os.environ.get("UMMUNOTIFY_TRANSFERS", 1_000_000 if "UMMUNOTIFY_SLOW" in os.environ else 4_000))
CONTENT = random.Random(4711).randbytes(64 * PAGE)
MADV_DONTNEED = 4
MAP_FIXED = 0x10
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = _libc.mremap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (*(ctypes.c_size_t,) * 2, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.mremap.argtypes = (*(ctypes.c_size_t,) * 3, ctypes.c_int, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)


def map_over(address: int) -> int:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
    return int(_libc.mmap(address, PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0))


class Acquired(Protocol):
    @property
    def handle(self) -> FixedBuffer: ...


class Cache(Protocol):
    def acquire(self, what: tuple[int, int], /) -> AbstractContextManager[Acquired]: ...


@dataclass
class NaiveCache:
    """What programs do that keep registrations by address and length."""

    registrar: IoUringRegistrar
    lock: threading.Lock = field(default_factory=threading.Lock)
    known: dict[tuple[int, int], NaiveRegistration] = field(default_factory=dict)

    @contextlib.contextmanager
    def acquire(self, what: tuple[int, int], /) -> Iterator[NaiveRegistration]:
        with self.lock:
            if what not in self.known:
                if len(self.known) == SLOTS:
                    idle = next(key for key, known in self.known.items() if not known.users)
                    self.registrar.deregister(self.known.pop(idle).handle)
                self.known[what] = NaiveRegistration(self.registrar.register(*what))
            found = self.known[what]
            found.users += 1
        try:
            yield found
        finally:
            with self.lock:
                found.users -= 1


@dataclass
class NaiveRegistration:
    handle: FixedBuffer
    users: int = 0


@dataclass
class Buffer:
    """Whole pages. The kernel says where, so it is often where another thread's was."""

    address: int
    pages: int

    @property
    def length(self) -> int:
        return self.pages * PAGE

    @classmethod
    def map(cls, pages: int) -> Self:
        return cls(map_memory(pages * PAGE), pages)

    def replace(self, pick: random.Random) -> None:
        """Other memory takes its place, or a part of it."""
        where = self.address + pick.randrange(self.pages) * PAGE
        match pick.randrange(4):
            case 0:  # anywhere, with any length
                unmap_memory(self.address, self.length)
                self.pages = pick.randint(1, 8)
                self.address = map_memory(self.length)
            case 1:  # mapped over; not unmapped before, as another thread could get the address
                assert map_over(where) == where
            case 2:  # another page is moved there
                assert _libc.mremap(map_memory(PAGE), PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, where) == where
            case 3:
                assert _libc.madvise(where, self.address + self.length - where, MADV_DONTNEED) == 0

    def part(self, pick: random.Random) -> tuple[int, int]:
        if pick.random() < 0.5:
            return self.address, self.length
        start = pick.randrange(self.length)
        return self.address + start, pick.randint(1, self.length - start)


@dataclass
class Tally:
    buffers: int = 0
    bytes: int = 0
    wrong: int = 0
    replaced: int = 0


Transfer = Callable[[Acquired, int, int, random.Random], bool]
"""To and from the memory at an address, of some length; was every byte right?"""


def churn(cache: Cache, transfer: Transfer, count: int, seed: int, tally: Tally) -> None:
    pick = random.Random(seed)
    buffers = [Buffer.map(pick.randint(1, 8)) for _ in range(BUFFERS)]
    try:
        for _ in range(count):
            buffer = pick.choice(buffers)
            if pick.random() < 0.5:
                buffer.replace(pick)
                tally.replaced += 1
            address, length = buffer.part(pick)
            with cache.acquire((address, length)) as acquired:
                tally.wrong += not transfer(acquired, address, length, pick)
            tally.buffers += 1
            tally.bytes += length
    finally:
        for buffer in buffers:
            unmap_memory(buffer.address, buffer.length)


def in_threads(cache: Cache, transfer: Transfer, count: int) -> Tally:
    tallies = [Tally() for _ in range(THREADS)]
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            churn(cache, transfer, count // THREADS, number, tallies[number])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return Tally(*(sum(getattr(tally, name) for tally in tallies) for name in Tally.__dataclass_fields__))


class Transfers:
    """Reads a file into the memory and writes the memory to a file, through a handle, and compares every byte."""

    def __init__(self, registrar: IoUringRegistrar) -> None:
        self.registrar = registrar
        self.source = os.memfd_create("source")
        os.write(self.source, CONTENT)
        self.sink = os.memfd_create("sink")
        self.sink_lock = threading.Lock()

    def close(self) -> None:
        os.close(self.source)
        os.close(self.sink)

    def __call__(self, acquired: Acquired, address: int, length: int, pick: random.Random) -> bool:
        offset = pick.randrange(len(CONTENT) - length)
        expected = CONTENT[offset : offset + length]
        if pick.random() < 0.5:
            count = self.registrar.read_fixed(self.source, acquired.handle, address, length, offset)
            return count == length and ctypes.string_at(address, length) == expected
        ctypes.memmove(address, expected, length)
        with self.sink_lock:
            count = self.registrar.write_fixed(self.sink, acquired.handle, address, length, 0)
            return count == length and os.pread(self.sink, length, 0) == expected


@pytest.fixture
def registrar() -> Iterator[IoUringRegistrar]:
    try:
        opened = IoUringRegistrar(SLOTS)
    except RegistrarUnavailableError as error:
        require("io_uring", str(error))
    with opened:
        yield opened


@pytest.fixture
def transfers(registrar: IoUringRegistrar) -> Iterator[Transfers]:
    transfers = Transfers(registrar)
    yield transfers
    transfers.close()


def test_not_one_wrong_byte(
    keeper: object, registrar: IoUringRegistrar, transfers: Transfers, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = time.monotonic()
    # Fewer than there are slots, and than are used: so some are given up for others too.
    with RegistrationCache(registrar, max_registrations=3 * BUFFERS) as cache:
        tally = in_threads(cache, transfers, TRANSFERS)
        stats = cache.stats
    assert tally.wrong == 0
    assert tally.buffers == TRANSFERS // THREADS * THREADS
    assert stats.hits + stats.misses == tally.buffers
    # It did what it is for, and was made to do it.
    assert min(stats.hits, stats.stale, stats.evictions) > TRANSFERS // 100
    with capsys.disabled():
        if "UMMUNOTIFY_SLOW" in os.environ or "UMMUNOTIFY_TRANSFERS" in os.environ:
            print(f"\n{tally} in {time.monotonic() - begun:.0f} s\n{stats}")


def test_a_naive_cache_corrupts(registrar: IoUringRegistrar, transfers: Transfers) -> None:
    """The same, so that the test above is known to notice."""
    tally = in_threads(NaiveCache(registrar), transfers, min(TRANSFERS, 4_000))
    assert tally.wrong > tally.buffers // 100


class VerifyingRegistrar(IoUringRegistrar):
    """Knows which pages it pinned, by the numbers of their frames. While they are pinned nobody else gets these."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
        self.pinned: dict[FixedBuffer, list[int]] = {}

    def frames(self, address: int, length: int) -> list[int]:
        first, last = address // PAGE, (address + length - 1) // PAGE
        entries = os.pread(self.pagemap, (last - first + 1) * 8, first * 8)
        return [entry & (1 << 55) - 1 for (entry,) in struct.iter_unpack("=Q", entries)]

    def register(self, address: int, length: int) -> FixedBuffer:
        handle = super().register(address, length)
        self.pinned[handle] = self.frames(address, length)
        return handle

    def deregister(self, handle: FixedBuffer) -> None:
        super().deregister(handle)
        del self.pinned[handle]

    def close(self) -> None:
        if self.pagemap >= 0:
            os.close(self.pagemap)
            self.pagemap = -1
        super().close()

    def verify(self, acquired: Acquired, address: int, length: int, pick: random.Random) -> bool:
        first = address // PAGE - acquired.handle.address // PAGE
        frames = self.frames(address, length)
        return 0 not in frames and self.pinned[acquired.handle][first : first + len(frames)] == frames


@pytest.fixture
def verifying() -> Iterator[VerifyingRegistrar]:
    try:
        opened = VerifyingRegistrar(SLOTS)
    except RegistrarUnavailableError as error:
        require("io_uring", str(error))
    with opened:
        probe = ctypes.create_string_buffer(1)
        if not opened.frames(ctypes.addressof(probe), 1)[0]:
            require("pagemap", "/proc/self/pagemap tells the numbers of frames to CAP_SYS_ADMIN only")
        yield opened


@pytest.mark.parametrize("naive", [False, True])
def test_at_each_use_the_pinned_pages_are_those_mapped_now(
    keeper: object, verifying: VerifyingRegistrar, naive: bool
) -> None:
    if naive:
        assert in_threads(NaiveCache(verifying), verifying.verify, 2_000).wrong > 20
        return
    with RegistrationCache(verifying, max_registrations=3 * BUFFERS) as cache:
        tally = in_threads(cache, verifying.verify, TRANSFERS)
    assert tally.wrong == 0
    assert verifying.pinned == {}
