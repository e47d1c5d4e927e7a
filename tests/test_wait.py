"""Waiting for changes: `read` with a timeout, and the descriptor."""

from __future__ import annotations

import mmap
import os
import select
import threading
import time
from typing import Any

import pytest
from support import LONG, hit, later, open_fds, readable, watch

import ummunotify
from ummunotify import (
    ClosedError,
    Notifier,
    Region,
)
from ummunotify.selftest.changes import ANONYMOUS, PAGE, READ_WRITE, Memory, call, madvise


def test_read_waits(umn: Notifier, memory: Memory) -> None:
    region = watch(umn, memory, 0)
    for timeout in (None, LONG):
        timer = later(lambda: hit(memory, 0))
        started = time.monotonic()
        assert [event.region for event in umn.read(timeout)] == [region]
        assert time.monotonic() - started < LONG
        timer.join()


def test_read_lets_green_threads_run(umn: Notifier, memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """gevent and eventlet replace select.select: to wait in it lets the others run."""
    region = watch(umn, memory, 0)
    before = open_fds()
    wait = select.select

    def replaced(*arguments: Any) -> Any:
        hit(memory, 0)
        return wait(*arguments)

    monkeypatch.setattr(select, "select", replaced)
    assert [event.region for event in umn.read(LONG)] == [region]
    assert open_fds() == before
    monkeypatch.setattr(select, "select", lambda *_: ([], [], []))
    assert umn.read(0.01) == []


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
