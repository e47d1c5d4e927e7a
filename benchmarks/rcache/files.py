"""Reading a file through io_uring's fixed buffers with the cache and without it, and with plain read."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from statistics import median
from typing import NamedTuple

import ummunotify
from ummunotify.registrars.io_uring import IoUringRegistrar

from . import undisturbed

BLOCK = 1 << 20
BUFFERS = 16
CACHED, EACH, PLAIN = "fixed buffers, through the cache", "fixed buffers, registered for each block", "plain `read`"


class Reading(NamedTuple):
    size: int
    times: dict[str, tuple[float, float]]
    """Wall-clock and CPU time for a block, in ns."""


def measure(quick: bool) -> Reading:
    """In a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), undisturbed) as pool:
        return pool.submit(_measure, quick).result()


def _measure(quick: bool) -> Reading:
    size = (1 << 26) if quick else (1 << 30)
    with (
        tempfile.TemporaryFile() as file,
        IoUringRegistrar(BUFFERS) as registrar,
        ummunotify.RegistrationCache(registrar) as cache,
    ):
        for _ in range(size // BLOCK):
            file.write(os.urandom(BLOCK))
        file.flush()
        fd = file.fileno()
        maps = [mmap.mmap(-1, BLOCK, flags=mmap.MAP_PRIVATE) for _ in range(BUFFERS)]
        buffers = [memoryview(area) for area in maps]

        def cached(buffer: memoryview, offset: int) -> int:
            with cache.acquire(buffer) as registration:
                return registrar.read_fixed(fd, registration.handle, registration.address, BLOCK, offset)

        addresses = {}
        for buffer in buffers:
            with cache.acquire(buffer) as registration:
                addresses[id(buffer)] = registration.address

        def each(buffer: memoryview, offset: int) -> int:
            address = addresses[id(buffer)]
            handle = registrar.register(address, BLOCK)
            try:
                return registrar.read_fixed(fd, handle, address, BLOCK, offset)
            finally:
                registrar.deregister(handle)

        def plain(buffer: memoryview, offset: int) -> int:
            return os.preadv(fd, [buffer], offset)

        ways: dict[str, Callable[[memoryview, int], int]] = {CACHED: cached, EACH: each, PLAIN: plain}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for turn in range(2 if quick else 6):
            for name, way in ways.items():
                if way is each:
                    cache.flush()  # so that there are slots
                taken = _pass(way, buffers, size)
                if turn:
                    times[name].append(taken)
        for buffer in buffers:
            buffer.release()
        for area in maps:
            area.close()
    return Reading(
        size, {name: (median(w for w, _ in taken), median(c for _, c in taken)) for name, taken in times.items()}
    )


def _pass(way: Callable[[memoryview, int], int], buffers: list[memoryview], size: int) -> tuple[float, float]:
    wall, cpu = time.monotonic_ns(), time.process_time_ns()
    for number in range(size // BLOCK):
        if way(buffers[number % BUFFERS], number * BLOCK) != BLOCK:
            raise RuntimeError("a short read")
    blocks = size // BLOCK
    return (time.monotonic_ns() - wall) / blocks, (time.process_time_ns() - cpu) / blocks
