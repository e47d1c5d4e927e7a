"""Invalidation.thread is the number that the watching process knows, in whatever pid namespaces the processes are."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import threading
from collections.abc import Callable
from typing import NamedTuple

import pytest
from daemons import PAGE, Daemon
from support import in_child, map_memory, unmap_memory

import ummunotify
from ummunotify import Notifier

CLONE_NEWPID = 0x20000000
PID_NAMESPACE_INITIAL = 0xEFFFFFFC
libc = ctypes.CDLL(None, use_errno=True)


def in_pid_namespace(function: Callable[[], object], nested: int = 1) -> None:
    """Run it as the first process of a new one, that many deep; it must not raise."""
    if not nested:
        return in_child(function)

    def enter() -> None:
        assert libc.unshare(CLONE_NEWPID) == 0, os.strerror(ctypes.get_errno())
        in_pid_namespace(function, nested - 1)

    return in_child(enter)


class Seen(NamedTuple):
    """Of two changes, by the main thread and by another."""

    told: list[int]
    known: list[int]


def changes(umn: Notifier) -> Seen:
    known: list[int] = []

    def change() -> None:
        known.append(threading.get_native_id())
        unmap_memory(addresses[len(known) - 1], PAGE)

    addresses = [map_memory(PAGE) for _ in range(2)]
    for address in addresses:
        ctypes.c_ubyte.from_address(address).value = 1
        umn.watch((address, PAGE))
    change()
    thread = threading.Thread(target=change)
    thread.start()
    thread.join()
    return Seen([event.thread for event in umn.read()], known)


@pytest.mark.parametrize("nested", [0, 1, 2])
def test_own_threads(keeper: Notifier, nested: int) -> None:
    def program() -> None:
        with ummunotify.open(keeper.source) as umn:
            told, known = changes(umn)
            assert told == known
            assert (known[0] == 1) == (nested > 0)

    in_pid_namespace(program, nested)


@pytest.mark.parametrize("nested", [0, 1, 2])
def test_own_threads_by_the_daemon(daemon: Daemon, nested: int) -> None:
    def program() -> None:
        with ummunotify.open("daemon") as umn:
            told, known = changes(umn)
            assert told == known

    in_pid_namespace(program, nested)
    daemon.settled()


def in_another_process(act: Callable[[], object], nested: bool) -> int:
    """Its number here. `nested`: it is in a pid namespace of its own."""
    reader, writer = os.pipe()

    def start() -> None:
        assert not nested or libc.unshare(CLONE_NEWPID) == 0
        pid = os.fork()
        if not pid:
            act()
            os._exit(0)
        os.write(writer, str(pid).encode())
        assert os.waitpid(pid, 0)[1] == 0

    in_child(start)
    number = os.read(reader, 100)
    os.close(reader)
    os.close(writer)
    return int(number)


@pytest.mark.parametrize("watcher", [0, 1])
@pytest.mark.parametrize("nested", [False, True])
def test_threads_of_other_processes(keeper: Notifier, watcher: int, nested: bool) -> None:
    """By the number in the watcher's namespace. In the initial one also those of all others have one."""

    def watch() -> None:
        with ummunotify.open(keeper.source) as umn, mmap.mmap(file.fileno(), PAGE) as mapped:
            mapped[0] = 1
            region = umn.watch(mapped)
            number = in_another_process(lambda: file.truncate(0), nested)
            (event,) = umn.read()
            assert event.region is region
            initial = os.stat("/proc/self/ns/pid").st_ino == PID_NAMESPACE_INITIAL and not watcher
            assert event.thread == (0 if nested and not initial else number)

    with tempfile.TemporaryFile() as file:
        file.truncate(PAGE)
        in_pid_namespace(watch, watcher)
