"""Forks that Python does not make: by C's fork, by _Fork and clone, which run no handlers, and by daemon(3)."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import LONG, SLOW, SYS, hit, meanwhile, probes, require, watch

import ummunotify
from ummunotify import ForkedError, Notifier, Region
from ummunotify.selftest.changes import PAGE, Memory, madvise, store

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

SOURCES = (*probes(), "uffd")
_libc = ctypes.PyDLL(None)
"""The child has the GIL, as the caller had it."""


def clone(flags: int = 0) -> int:
    return int(_libc.syscall(SYS["clone"], int(signal.SIGCHLD) | flags, 0, 0, 0, 0))


FORKS: dict[str, Callable[[], int]] = {
    "os.fork": os.fork,
    "fork": lambda: int(_libc.fork()),
    "_Fork": lambda: int(_libc._Fork()),
    "clone": clone,
    "clone, CLONE_FILES": lambda: clone(0x400),
}
if os.uname().machine == "x86_64":  # others have only clone
    FORKS["syscall fork"] = lambda: int(_libc.syscall(57))


patience = LONG
"""Seconds that a child may take; less in a child, so that of those that hang the youngest is reported."""


def where(pid: int) -> str:
    """What the kernel knows of a process that hangs."""
    found = [f"process {pid} hangs"]
    for name in ("wchan", "syscall", "stack"):
        with contextlib.suppress(OSError):
            found.append(f"{name}: {Path(f'/proc/{pid}/{name}').read_text().strip()}")
    return "\n".join(found)


def run_child(fork: Callable[[], int], function: Callable[[], object]) -> None:
    """In a child that is made like this; it must not raise."""
    global patience
    pid = fork()
    if pid == 0:
        status = 1
        patience *= 0.75
        try:
            function()
            status = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)
    # It may hang with all signals blocked: then only SIGKILL ends it.
    deadline = time.monotonic() + patience
    hung = ""
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline and not hung:
            hung = where(pid)
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    assert os.waitstatus_to_exitcode(ended[1]) == 0, hung


@pytest.fixture(params=SOURCES)
def umn(request: pytest.FixtureRequest) -> Iterator[Notifier]:
    try:
        opened = ummunotify.open(request.param)
    except ummunotify.SourceUnavailableError as error:
        require(request.param.partition(":")[0], str(error))
    with opened:
        yield opened


@pytest.fixture
def regions(umn: Notifier, memory: Memory) -> Iterator[list[Region]]:
    """Two: the second has an event that was not read. What a child does is not noticed here."""
    made = [watch(umn, memory, unit) for unit in range(2)]
    store(memory.at(1))
    hit(memory, 1)
    assert not made[1].valid
    umn.fileno()
    yield made
    # kvm cannot tell whose memory it was that a third process changed; with clear_refs that is all there is.
    others_too = umn.source == "bpf:kvm"
    assert made[0].valid or others_too
    assert umn.changed
    events = {event.region for event in umn.read()}
    assert events == {made[1]} or (others_too and events == set(made))
    store(memory.at(0))
    later = watch(umn, memory, 2)
    store(memory.at(2))
    # Its child's copies are gone, so this is not a write to a shared page.
    for region in (made[0], later):
        region.renew()
    umn.read()
    hit(memory, 0)
    hit(memory, 2)
    assert not made[0].valid
    assert not later.valid
    assert {event.region for event in umn.read(LONG)} >= {made[0]}


def check_dead(umn: Notifier, regions: list[Region]) -> None:
    """Whatever is called first."""
    assert not any(region.valid for region in regions)
    calls: list[Callable[[], object]] = [
        lambda: umn.watch((PAGE, 1)),
        lambda: umn.unwatch(regions[0]),
        umn.read,
        lambda: umn.read(None),
        lambda: umn.dispatch(print),
        umn.fileno,
        regions[0].renew,
        lambda: umn.generation,
        lambda: umn.changed,
        lambda: umn.regions,
        lambda: umn.stats,
    ]
    for do in calls:
        with pytest.raises(ForkedError):
            do()
    assert umn.closed
    assert not any(region.valid for region in regions)


def open_anew(source: str) -> None:
    with ummunotify.open(source) as own, mmap.mmap(-1, PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapped:
        mapped[0] = 1
        region = own.watch(mapped)
        assert region.valid
        mapped.madvise(mmap.MADV_DONTNEED)
        assert not region.valid
        assert [event.region for event in own.read(LONG)] == [region]


@pytest.mark.parametrize("fork", FORKS)
def test_in_the_child_nothing_is_valid(fork: str, umn: Notifier, regions: list[Region]) -> None:
    run_child(FORKS[fork], lambda: check_dead(umn, regions))


def forget(umn: Notifier, regions: list[Region]) -> None:
    vars(umn).clear()
    regions.clear()
    gc.collect()


def grandchild(fork: Callable[[], int], umn: Notifier, regions: list[Region]) -> None:
    def check() -> None:
        check_dead(umn, regions)
        open_anew(umn.source)
        umn.close()

    run_child(fork, check)


ACTIONS: dict[str, Callable[[Notifier, list[Region]], object]] = {
    "close": lambda umn, _: umn.close(),
    "close regions": lambda _, regions: list(map(Region.close, regions)),
    "read": lambda umn, _: umn.read(),
    "dispatch": lambda umn, _: umn.dispatch(print),
    "wait": lambda umn, _: umn.read(None),
    "unwatch": lambda umn, regions: umn.unwatch(regions[1]),
    "renew": lambda _, regions: regions[1].renew(),
    "watch": lambda umn, _: umn.watch((PAGE, 1)),
    "open": lambda umn, _: open_anew(umn.source),
    "forget": lambda umn, regions: forget(umn, regions),
    "grandchild": lambda umn, regions: grandchild(os.fork, umn, regions),
    "a raw grandchild": lambda umn, regions: grandchild(clone, umn, regions),
}


@pytest.mark.parametrize("fork", FORKS)
def test_what_the_child_does_is_not_noticed(fork: str, umn: Notifier, regions: list[Region]) -> None:
    """It is the first that the child does."""
    for action in ACTIONS.values():

        def act(action: Callable[[Notifier, list[Region]], object] = action) -> None:
            with contextlib.suppress(ForkedError):
                action(umn, regions)

        run_child(FORKS[fork], act)
    assert len(regions) == 2


def test_a_child_of_a_raw_child_of_one_that_opened(umn: Notifier, regions: list[Region]) -> None:
    """Three generations, each with a notifier of its own."""

    def child() -> None:
        with contextlib.ExitStack() as stack, mmap.mmap(-1, PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapped:
            own = stack.enter_context(ummunotify.open(umn.source))
            mapped[0] = 1
            region = own.watch(mapped)

            def grandchild() -> None:
                check_dead(own, [region])
                check_dead(umn, regions)
                open_anew(umn.source)
                own.close()
                umn.close()

            run_child(clone, grandchild)
            run_child(os.fork, grandchild)
            # libc goes through its list of threads, and has the parent's there.
            os.setgid(os.getgid())
            # A grandchild may have split a huge page at these addresses, and the probe kvm cannot tell whose it was.
            mapped[0] = 2
            region.renew()
            assert region.valid
            mapped.madvise(mmap.MADV_DONTNEED)
            assert not region.valid

    run_child(clone, child)


def test_while_threads_are_in_methods(umn: Notifier, memory: Memory) -> None:
    """They hold the library's locks, and are half done, in the child for ever.

    Only os.fork: in another child of a process with threads Python's own lock is as the threads had it, and it hangs.
    From C all kinds are tried, in tests/c/forks.c.
    """

    def watch_many() -> None:
        for each in [other.watch((memory.at(2), 1)) for _ in range(300)]:
            each.close()

    def change() -> None:
        hit(memory, 1)
        region.renew()
        other.dispatch(lambda event: None)

    kept = watch(umn, memory, 4)
    other = ummunotify.open(umn.source)
    region = watch(other, memory, 1)
    count = 0

    def child() -> None:
        check_dead(other, [region])
        check_dead(umn, [kept])
        if count % 10 == 0:
            open_anew(umn.source)
        other.close()

    with meanwhile(watch_many, change, lambda: other.read(0.001), lambda: region.valid):
        for count in range(500 if SLOW else 15):  # noqa: B007
            run_child(os.fork, child)
            time.sleep(0.001)
    other.close()
    # It may be invalid by now: with uffd for the forks, and the kernel may have moved its page.
    store(memory.at(4))
    kept.renew()
    assert kept.valid
    madvise(memory.at(4), PAGE, mmap.MADV_DONTNEED)
    assert not kept.valid


DAEMON = """
import ctypes, mmap, os, sys
import ummunotify
umn = ummunotify.open(sys.argv[1])
mapped = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
mapped[0] = 1
region = umn.watch(mapped)
out = os.dup(1)
ctypes.CDLL(None).daemon(1, 1)
try:
    assert not region.valid
    try:
        umn.read()
        raise AssertionError("not told")
    except ummunotify.ForkedError:
        pass
    with ummunotify.open(sys.argv[1]) as own:
        region = own.watch(mapped)
        assert region.valid
        mapped.madvise(mmap.MADV_DONTNEED)
        assert not region.valid
    os.write(out, b"works")
except BaseException as error:
    os.write(out, repr(error).encode())
os._exit(0)
"""


@pytest.mark.parametrize("source", SOURCES)
def test_daemon(source: str) -> None:
    """daemon(3): the process goes on as a child that Python does not know of."""
    result = subprocess.run(
        [sys.executable, "-c", DAEMON, source], capture_output=True, text=True, check=False, timeout=LONG
    )
    if "SourceUnavailableError" in result.stderr:
        require(source.partition(":")[0], result.stderr)
    assert (result.stderr, result.stdout) == ("", "works")
