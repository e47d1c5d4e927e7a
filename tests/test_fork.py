"""Fork, exec and other processes: the child gets nothing, and the parent does not notice."""

from __future__ import annotations

import ctypes
import functools
import gc
import mmap
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
from support import LONG, in_child, is_ours, meanwhile

import ummunotify
from ummunotify import ClosedError, ForkedError, Notifier, Region
from ummunotify.selftest.changes import (
    CLONE_EXIT,
    FORK_PAUSE,
    Memory,
    call,
    clone_exit,
    madvise,
    map_at,
    run_code,
    store,
    untouched,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def hit(memory: Memory, unit: int) -> None:
    madvise(memory.at(unit), memory.unit, mmap.MADV_DONTNEED)


def leftovers(*, opened: bool = False) -> list[str]:
    """What this process has of a notifier. If it has opened one itself, the virtual machine stays until it ends."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # the one that listdir used
            continue
        if is_ours(target) or "eventfd" in target:
            found.append(target)
    with open("/proc/self/maps") as maps:
        found += [line.strip() for line in maps if is_ours(line)]
    return found[1:] if opened and found and "io_uring" in found[0] else found


@pytest.fixture
def watched(umn: Notifier, memory: Memory) -> Iterator[Region]:
    """A region that a test must leave alone, and that is fed afterwards."""
    region = umn.watch((memory.at(0), memory.unit))
    umn.fileno()
    yield region
    assert region.valid
    assert not umn.changed
    assert umn.read() == []
    hit(memory, 0)
    assert not region.valid
    assert [event.region for event in umn.read()] == [region]


def check_child(umn: Notifier, region: Region, *more: Any, opening: bool = False) -> None:
    """What a child must find, of one notifier and its region or of several.

    `opening`: a thread of the parent was opening one. What that was just handed stays until the child execs or ends.
    """
    if more:
        check_child(*more, opening=opening)
    assert opening or leftovers() == []
    assert umn.closed
    assert not region.valid
    assert "closed" in repr(umn)
    assert umn.source
    calls: list[Callable[[], object]] = [
        lambda: umn.watch((region.address, 1)),
        lambda: umn.unwatch(region),
        umn.read,
        lambda: umn.read(None),
        umn.fileno,
        region.renew,
        lambda: umn.generation,
        lambda: umn.changed,
        lambda: umn.regions,
        lambda: umn.stats,
    ]
    for do in calls:
        with pytest.raises(ForkedError, match="open another one"):
            do()
    region.close()
    umn.close()
    with pytest.raises(ClosedError):
        umn.read()


def use_own(memory: Memory, *, opening: bool = False) -> None:
    """Open a notifier here, and see that it works."""
    with ummunotify.open() as umn:
        region = umn.watch((memory.at(0), memory.unit))
        assert region.valid
        hit(memory, 0)
        assert not region.valid
        assert [event.region for event in umn.read(LONG)] == [region]
    assert opening or leftovers(opened=True) == []


def test_fork(umn: Notifier, watched: Region) -> None:
    in_child(lambda: check_child(umn, watched))


def test_fork_by_a_thread(umn: Notifier, watched: Region) -> None:
    done: list[None] = []

    def work() -> None:
        in_child(lambda: check_child(umn, watched))
        done.append(None)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done


def test_forks_of_forks(umn: Notifier, watched: Region, memory: Memory) -> None:
    def child() -> None:
        with ummunotify.open() as own:
            region = own.watch((memory.at(1), memory.unit))
            in_child(lambda: check_child(umn, watched, own, region))
            assert region.valid
            hit(memory, 1)
            assert not region.valid

    in_child(child)


def test_the_child_opens_its_own(watched: Region, memory: Memory) -> None:
    in_child(lambda: use_own(memory))


def test_the_parent_ends_first(watched: Region, memory: Memory) -> None:
    """As for a daemon."""
    ours, theirs = os.pipe()

    parent = 0

    def child() -> None:
        if os.fork():
            return
        while os.getppid() == parent:
            time.sleep(0.001)
        use_own(memory)
        os.write(theirs, b"works")
        os._exit(0)

    def start() -> None:
        nonlocal parent
        parent = os.getpid()
        child()

    in_child(start)
    os.close(theirs)  # or the end of a child that failed would go unnoticed
    assert os.read(ours, 100) == b"works"
    os.close(ours)


def test_many_forks(umn: Notifier, watched: Region) -> None:
    for _ in range(50):
        in_child(lambda: watched.valid and sys.exit(1))


# ---- Both at the same time ----


def child_loop(pipe: Connection, memory: Memory) -> None:
    """A child with a notifier of its own that does as it is told: the name of a function here, and its arguments."""
    with ummunotify.open() as umn:
        regions = [umn.watch((memory.at(unit), memory.unit)) for unit in range(memory.count)]
        pipe.send("ready")
        while (what := pipe.recv()) is not None:
            name, *arguments = what
            ACTIONS[name](memory, *arguments)
            pipe.send([unit for unit, region in enumerate(regions) if not region.valid])
            for region in regions:
                region.renew()
            umn.read()


ACTIONS: dict[str, Callable[..., object]] = {
    "nothing": lambda m: None,
    "DONTNEED": hit,
    "munmap": lambda m, unit: call("munmap", m.at(unit), m.unit),
    "mmap": lambda m, unit: map_at(m.at(unit), m.unit),
    "mprotect": lambda m, unit: call("mprotect", m.at(unit), m.unit, 1),
    "mremap": lambda m, unit: call("mremap", m.at(unit), m.unit, m.unit, 3, m.at(unit + 1)),
    "fork": lambda m: in_child(lambda: None),
}


@pytest.fixture
def child(umn: Notifier, memory: Memory) -> Iterator[Callable[..., list[int]]]:
    """A child of that kind, by fork: with the parent's addresses. Calling it returns which units it saw change."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=child_loop, args=(theirs, memory))
    process.start()
    theirs.close()
    assert ours.recv() == "ready"

    def command(*what: object) -> list[int]:
        ours.send(what)
        result = ours.recv()
        assert isinstance(result, list)
        return result

    yield command
    ours.send(None)
    process.join(LONG)
    assert process.exitcode == 0
    process.close()
    ours.close()


def test_a_child_changes_the_same_addresses(umn: Notifier, memory: Memory, child: Callable[..., list[int]]) -> None:
    """They are the same numbers, but not the same memory."""
    regions = [umn.watch((memory.at(unit), memory.unit)) for unit in range(memory.count)]
    for what, seen in (
        (("DONTNEED", 0), [0]),
        (("mprotect", 1), []),
        (("mmap", 2), [2]),
        (("mremap", 3), [3, 4]),
        (("munmap", 5), [5]),
        (("fork",), []),
    ):
        assert child(*what) == seen, what
        assert [unit for unit, region in enumerate(regions) if not region.valid] == [], what
    assert not umn.changed
    # And the other way round.
    hit(memory, 6)
    call("munmap", memory.at(7), memory.unit)
    memory.fill()
    assert child("nothing") == []
    assert [unit for unit, region in enumerate(regions) if not region.valid] == [6, 7]


def test_children_that_end_or_exec(watched: Region, memory: Memory) -> None:
    """A process with a virtual machine gives up its whole address space."""

    def opens(then: Callable[[], object]) -> Callable[[], object]:
        def work() -> None:
            umn = ummunotify.open()
            umn.watch((memory.at(0), memory.unit))
            then()

        return work

    in_child(opens(lambda: None))
    in_child(opens(lambda: os._exit(0)))
    in_child(opens(lambda: os.execv("/bin/true", ["true"])))
    for number in (signal.SIGKILL, signal.SIGTERM):
        pid = os.fork()
        if pid == 0:
            opens(functools.partial(os.kill, os.getpid(), number))()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -number


# ---- What fork does not invalidate, and what comes later does ----


def test_copy_on_write_afterwards(umn: Notifier, memory: Memory) -> None:
    regions = [umn.watch((memory.at(unit), memory.unit)) for unit in range(memory.count)]
    memory.child(run_code(FORK_PAUSE))
    assert all(region.valid for region in regions)
    store(memory.at(3))
    store(memory.at(5))
    assert [unit for unit, region in enumerate(regions) if not region.valid] == [3, 5]
    assert [(event.region, event.exact, event.syscall) for event in umn.read()] == [
        (regions[3], True, -1),
        (regions[5], True, -1),
    ]
    # It is the parent's alone now.
    regions[3].renew()
    store(memory.at(3))
    assert regions[3].valid


def test_copy_on_write_after_os_fork(umn: Notifier, memory: Memory) -> None:
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(theirs)
        os.read(ours, 1)  # until the parent closes it
        os._exit(0)
    region = umn.watch((memory.at(0), memory.unit))
    other = umn.watch((memory.at(1), memory.unit))
    store(memory.at(0))
    assert not region.valid
    assert other.valid
    os.close(theirs)
    os.close(ours)
    os.waitpid(pid, 0)


def test_nobody_was_forked(umn: Notifier) -> None:
    """Memory that was never in use has nothing to copy."""
    with Memory() as memory:
        untouched(memory)
        region = umn.watch((memory.address, memory.length))
        memory.child(run_code(FORK_PAUSE))
        memory.touch()
        assert region.valid
        region.close()


# ---- The ways to start a process ----


LIST = """
import os
fds = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
found = [os.readlink(fd) for fd in fds if os.path.exists(fd)]
with open("/proc/self/maps") as maps:
    found += list(maps)
print([name for name in found if "bpf" in name or "kvm" in name or "eventfd" in name])
"""


def test_subprocess(watched: Region) -> None:
    for options in (
        {},
        {"close_fds": False},
        {"preexec_fn": os.getpid},
        {"preexec_fn": os.getpid, "close_fds": False},
        {"start_new_session": True},
    ):
        command = [sys.executable, "-S", "-c", LIST]
        result = subprocess.run(command, capture_output=True, text=True, check=True, **options)
        assert result.stdout == "[]\n"


def test_posix_spawn(watched: Region) -> None:
    ours, theirs = os.pipe()
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-S", "-c", LIST],
        dict(os.environ),
        file_actions=[(os.POSIX_SPAWN_DUP2, theirs, 1)],
    )
    os.close(theirs)
    assert os.waitpid(pid, 0)[1] == 0
    assert os.read(ours, 1000) == b"[]\n"
    os.close(ours)


def test_exec(watched: Region) -> None:
    ours, theirs = os.pipe()

    def child() -> None:
        os.dup2(theirs, 1)
        os.execv(sys.executable, [sys.executable, "-S", "-c", LIST])

    in_child(child)
    os.close(theirs)
    assert os.read(ours, 1000) == b"[]\n"
    os.close(ours)


def test_vfork(watched: Region) -> None:
    """A child that shares the memory; here it only ends."""
    code = CLONE_EXIT
    for flags in (0x100 | 0x4000, 0x4000, 0):  # CLONE_VM, CLONE_VFORK
        os.waitpid(run_code(code, flags | signal.SIGCHLD, 0, 0), 0)
    clone_exit(0, 0)


def test_system_and_popen(watched: Region) -> None:
    assert os.system("true") == 0
    with os.popen("echo text") as stream:
        assert stream.read() == "text\n"


_notifier: Notifier | None = None
_region: Region | None = None


def worker(address: int, length: int, forked: bool) -> list[str]:
    """Runs in a process of multiprocessing, which has this module either by fork or by import."""
    if forked:
        assert _notifier is not None
        assert _region is not None
        check_child(_notifier, _region)
    else:
        assert _notifier is None
    with ummunotify.open() as umn, mmap.mmap(-1, 4096) as mapped:
        region = umn.watch(mapped)
        mapped.madvise(mmap.MADV_DONTNEED)
        assert not region.valid
    return leftovers(opened=True)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(method: str, umn: Notifier, watched: Region, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "_notifier", umn)
    monkeypatch.setattr(sys.modules[__name__], "_region", watched)
    context = multiprocessing.get_context(method)
    # The virtual machine of a child's own notifier stays until the child ends.
    with context.Pool(2, maxtasksperchild=1) as pool:
        arguments = (watched.address, watched.length, method == "fork")
        results = [pool.apply_async(worker, arguments) for _ in range(4)]
        assert [result.get(LONG) for result in results] == [[]] * 4
        pool.close()
        pool.join()
    del pool, results
    gc.collect()
    if method == "forkserver":
        from multiprocessing.forkserver import _forkserver

        _forkserver._stop()  # type: ignore[attr-defined]


def test_it_is_not_sent_to_another_process(umn: Notifier, watched: Region) -> None:
    for what in (umn, watched):
        with pytest.raises(TypeError):
            pickle.dumps(what)


# ---- At any moment ----


def test_fork_while_others_are_in_it(umn: Notifier, watched: Region, memory: Memory) -> None:
    """Threads that the child does not have hold the library's locks, and are half done with all that it does."""

    def watch_many() -> None:
        for region in [other.watch((memory.at(2), 1)) for _ in range(2000)]:
            region.close()

    def change() -> None:
        hit(memory, 1)
        region.renew()

    def open_and_close() -> None:
        with ummunotify.open() as another:
            another.fileno()

    other = ummunotify.open()
    region = other.watch((memory.at(1), memory.unit))
    deadline = time.monotonic() + 2
    forks = 0
    with meanwhile(watch_many, change, lambda: other.read(0.001), open_and_close):
        while time.monotonic() < deadline or forks < 3:
            in_child(lambda: check_child(umn, watched, other, region, opening=True))
            forks += 1
        in_child(lambda: use_own(memory, opening=True))
    other.close()


def test_fork_while_the_first_is_opened() -> None:
    """That takes long, and nothing is recorded yet; the child can open its own, and the parent goes on."""
    code = """
import mmap, os, threading, time, ummunotify

def works():
    with ummunotify.open() as umn:
        memory = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory[0] = 1
        region = umn.watch(memory)
        valid = region.valid
        memory.close()
        return valid and not region.valid

def work():
    for _ in range(5):
        assert works()

thread = threading.Thread(target=work)
thread.start()
failed = forks = 0
while thread.is_alive():
    pid = os.fork()
    if pid == 0:
        os._exit(forks % 20 == 0 and not works())
    failed += os.waitpid(pid, 0)[1] != 0
    forks += 1
    time.sleep(0.002)
print(failed, forks > 0)
"""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.stderr, result.stdout) == ("", "0 True\n")


def test_fork_in_a_signal_handler_while_it_reads(umn: Notifier, memory: Memory) -> None:
    """Both go on: the parent reads, the child is told."""
    region = umn.watch((memory.at(0), memory.unit))
    main = os.getpid()
    pids: list[int] = []

    def handler(*_: object) -> None:
        pids.append(os.fork())
        if os.getpid() == main:
            hit(memory, 0)

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    status = 1
    try:
        events = umn.read(None)
    except ForkedError:
        status = leftovers() != []
    finally:
        if os.getpid() != main:
            os._exit(status)
    signal.signal(signal.SIGALRM, before)
    assert os.waitpid(pids[0], 0)[1] == 0
    assert [event.region for event in events] == [region]


def test_both_end_as_usual() -> None:
    """Interpreters that go down with a forked notifier."""
    code = """
import mmap, os, sys, ummunotify
buf = mmap.mmap(-1, 4096)
umn = ummunotify.open()
region = umn.watch(buf)
umn.fileno()
pid = os.fork()
if pid:
    status = os.waitpid(pid, 0)[1]
    assert region.valid
    buf.close()
    assert len(umn.read()) == 1
    sys.exit(status)
umn.own = ummunotify.open()
umn.mine = umn.own.watch(buf)
"""
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.stderr, result.returncode) == ("", 0)


def test_fork_without_python(umn: Notifier, watched: Region) -> None:
    """By a library that knows nothing of Python: nothing in the child must disturb the parent."""
    libc = ctypes.PyDLL(None)
    pid = libc.fork()
    if pid == 0:
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
