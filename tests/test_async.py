"""Invalidations in an event loop."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time

import pytest
from support import LONG, hit, open_fds, watch

from ummunotify import (
    ClosedError,
    Notifier,
    Region,
)
from ummunotify.selftest.changes import Memory


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


def test_the_program_replaces_the_descriptor(umn: Notifier) -> None:
    """The one that an iteration makes for itself. What has its number then is left alone."""
    umn.fileno()

    async def iterate() -> None:
        async for _ in umn:
            pass

    async def main() -> None:
        before = open_fds()
        reader = asyncio.create_task(iterate())
        await asyncio.sleep(0.02)
        made = {int(fd) for fd in open_fds() - before}
        assert made
        null = os.open(os.devnull, os.O_RDWR)
        for fd in made:
            os.dup2(null, fd)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        for fd in (null, *made):
            os.close(fd)

    asyncio.run(main())
