"""Signal handlers that raise, at any moment of any method: nothing is missed or left over, and the object is usable.

UMMUNOTIFY_SLOW=1: for minutes, and hundreds of thousands of interruptions of each method.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import mmap
import os
import random
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
from support import LONG, SLOW, probes, require, watch

import ummunotify
from ummunotify import Invalidation, Notifier, Region
from ummunotify.selftest.changes import PAGE, Memory, madvise, private

INTERRUPTIONS = 100_000 if SLOW else 400
"""Of each method, with each source."""

SOURCES = (*probes(), "uffd")


class Interrupted(Exception):
    """What the handler raises."""


class Interrupter:
    """Raises Interrupted in the main thread, at random moments of what it is given to do."""

    def __init__(self) -> None:
        self.count = 0
        """How often it has raised."""
        self.armed = False
        self.random = random.Random(time.time_ns())
        self.longest = 0.0005

    def handler(self, number: int, frame: FrameType | None) -> None:
        if self.armed:
            self.armed = False
            self.count += 1
            raise Interrupted

    def try_to(self, act: Callable[..., object]) -> bool:
        """True: it was not interrupted. `act` runs to its end, or is interrupted once."""
        try:
            try:
                self.armed = True
                signal.setitimer(signal.ITIMER_REAL, self.random.uniform(1e-6, self.longest))
                act()
                # About half of the attempts are to be interrupted, however long they take.
                self.longest = max(self.longest * 0.9, 5e-6)
                return True
            finally:
                self.armed = False
                signal.setitimer(signal.ITIMER_REAL, 0)
        except Interrupted:
            self.armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.longest = min(self.longest * 1.1, 0.02)
            return False


@pytest.fixture
def interrupter() -> Iterator[Interrupter]:
    interrupter = Interrupter()
    before = signal.signal(signal.SIGALRM, interrupter.handler)
    yield interrupter
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(params=SOURCES)
def umn(request: pytest.FixtureRequest) -> Iterator[Notifier]:
    try:
        opened = ummunotify.open(request.param)
    except ummunotify.SourceUnavailableError as error:
        require(request.param.partition(":")[0], str(error))
    with opened:
        yield opened


@pytest.fixture(autouse=True)
def no_collections() -> Iterator[None]:
    """Other modules have callbacks of the collector in Python, from which a handler's exception goes nowhere."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def arena() -> Iterator[Memory]:
    with Memory() as memory:
        memory.count = 32
        private(memory)
        yield memory


def drop(memory: Memory, unit: int) -> None:
    """Change a page. What is there afterwards is in use again."""
    madvise(memory.at(unit), PAGE, mmap.MADV_DONTNEED)
    memory.touch()


def check_usable(umn: Notifier, memory: Memory) -> None:
    """It has no region but a new one, and sees a change."""
    umn.read()
    assert (umn.regions, umn.stats.regions) == ([], 0)
    with watch(umn, memory, 0) as region:
        while not region.valid:  # a change that had not arrived
            region.renew()
        drop(memory, 0)
        assert not region.valid
        assert region in [event.region for event in umn.read(LONG)]
        assert not region.valid
    umn.read()


def report(interrupter: Interrupter, umn: Notifier, record: Callable[[str, object], None]) -> None:
    record("interruptions", f"{umn.source}: {interrupter.count:,}")


# With list.extend and map no bytecode is run between a method's return and the keeping of its result: an exception
# there would come after the method, and the result would be lost.


def test_watch_and_unwatch(
    umn: Notifier, arena: Memory, interrupter: Interrupter, record_property: Callable[[str, object], None]
) -> None:
    """A region is watched and returned, or it is not watched; also while the table grows."""
    kept: list[Region] = []
    rounds = 0
    while interrupter.count < INTERRUPTIONS:
        rounds += 1
        unit = rounds % arena.count
        span = (arena.at(unit), PAGE)
        interrupter.try_to(lambda span=span: kept.extend(map(umn.watch, [span] * 20)))
        assert set(umn.regions) == set(kept)
        assert umn.stats.regions == len(kept)
        if rounds % 4 == 0:
            drop(arena, unit)
            assert not any(region.valid for region in kept if region.address == span[0])
        if len(kept) > 1500:
            while kept:
                # Whatever is interrupted, a region is either watched or not.
                interrupter.try_to(kept[-1].close)
                assert umn.stats.regions in (len(kept), len(kept) - 1)
                if umn.stats.regions < len(kept):
                    assert not kept.pop().valid
    while kept:
        kept.pop().close()
    check_usable(umn, arena)
    report(interrupter, umn, record_property)


def test_valid_renew_changed_and_generation(
    umn: Notifier, arena: Memory, interrupter: Interrupter, record_property: Callable[[str, object], None]
) -> None:
    regions = [watch(umn, arena, unit) for unit in range(arena.count)]
    round = 0
    while interrupter.count < INTERRUPTIONS:
        round += 1
        unit = round % arena.count
        before = umn.generation
        drop(arena, unit)
        region = regions[unit]
        answers: list[bool] = []
        interrupter.try_to(lambda region=region, answers=answers: answers.extend(region.valid for _ in range(50)))
        assert not any(answers)
        answers.clear()
        interrupter.try_to(lambda answers=answers: answers.extend(umn.changed for _ in range(50)))
        assert all(answers)
        interrupter.try_to(lambda: [umn.generation for _ in range(50)])
        assert umn.generation != before
        assert not regions[unit].valid
        if interrupter.try_to(lambda region=region: [region.renew() for _ in range(20)]) and umn.source != "uffd":
            assert region.valid
        interrupter.try_to(lambda: [umn.stats for _ in range(5)])
        interrupter.try_to(lambda: [umn.regions for _ in range(5)])
        regions[unit].renew()
        umn.read()
    for region in regions:
        region.close()
    check_usable(umn, arena)
    report(interrupter, umn, record_property)


@pytest.mark.parametrize("waiting", [False, True], ids=["at once", "waiting"])
def test_read(
    waiting: bool,
    umn: Notifier,
    arena: Memory,
    interrupter: Interrupter,
    record_property: Callable[[str, object], None],
) -> None:
    """Every change is reported by one of the reads, the interrupted one or a later one."""
    regions = [watch(umn, arena, unit) for unit in range(arena.count)]
    known = set(regions)
    if waiting:
        umn.fileno()
    generator = random.Random(5)
    while interrupter.count < INTERRUPTIONS:
        hit = set(generator.sample(range(arena.count), generator.randrange(arena.count // 2)))
        for unit in hit:
            madvise(arena.at(unit), PAGE, mmap.MADV_DONTNEED)
        arena.touch()
        found: list[list[Invalidation]] = []
        timeouts = [0.0, 0.0003, 0.0] if waiting else [0.0] * 10
        interrupter.try_to(lambda found=found, timeouts=timeouts: found.extend(map(umn.read, timeouts)))
        missing = {regions[unit] for unit in hit} - {event.region for events in found for event in events}
        if missing:
            assert umn.changed
        assert missing <= {event.region for event in umn.read()} <= known
        for unit in hit:
            assert not regions[unit].valid
            regions[unit].renew()
    for region in regions:
        region.close()
    check_usable(umn, arena)
    report(interrupter, umn, record_property)


def test_dispatch(
    umn: Notifier, arena: Memory, interrupter: Interrupter, record_property: Callable[[str, object], None]
) -> None:
    """An invalidation is delivered until a callback has accepted it."""
    regions = [watch(umn, arena, unit) for unit in range(arena.count)]
    generator = random.Random(5)
    while interrupter.count < INTERRUPTIONS:
        hit = set(generator.sample(range(arena.count), generator.randrange(1, arena.count // 2)))
        for unit in hit:
            madvise(arena.at(unit), PAGE, mmap.MADV_DONTNEED)
        arena.touch()
        missing = {regions[unit] for unit in hit}

        def callback(event: Invalidation, missing: set[Region] = missing) -> None:
            assert umn.changed
            missing.discard(event.region)

        interrupter.try_to(lambda callback=callback: umn.dispatch(callback))
        if missing:
            assert umn.changed
        umn.dispatch(callback)
        assert not missing
        for unit in hit:
            assert not regions[unit].valid
            regions[unit].renew()
    for region in regions:
        region.close()
    check_usable(umn, arena)
    report(interrupter, umn, record_property)


def test_open_and_close(
    umn: Notifier, arena: Memory, interrupter: Interrupter, record_property: Callable[[str, object], None]
) -> None:
    """What was opened is returned or gone; what was closed is closed, or is closed by the next call."""
    kept: list[Notifier] = []
    before = len(os.listdir("/proc/self/fd"))
    while interrupter.count < INTERRUPTIONS // 20:
        interrupter.try_to(lambda: kept.extend(map(ummunotify.open, [umn.source])))
        if not kept:
            continue
        opened = kept.pop()
        region = watch(opened, arena, 1)
        drop(arena, 1)
        assert not region.valid
        interrupter.try_to(opened.close)
        if opened.closed:
            assert not region.valid
        opened.close()
        assert opened.closed
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    check_usable(umn, arena)
    report(interrupter, umn, record_property)


def test_fileno_and_asynchronous_iteration(umn: Notifier, arena: Memory, interrupter: Interrupter) -> None:
    """With a signal handler of the program's own; asyncio's for Ctrl-C cancels the task."""
    regions = [watch(umn, arena, unit) for unit in range(arena.count)]

    async def collect(found: set[Region], wanted: int) -> None:
        async for event in umn:
            found.add(event.region)
            if len(found) >= wanted:
                return

    for round in range(INTERRUPTIONS // 20):
        first = round % (arena.count - 4)
        for unit in range(first, first + 4):
            madvise(arena.at(unit), PAGE, mmap.MADV_DONTNEED)
        arena.touch()
        hit = set(regions[first : first + 4])
        found: set[Region] = set()
        interrupter.try_to(umn.fileno)
        # It takes only what it yields.
        asyncio.run(asyncio.wait_for(collect(found, 2), LONG))
        assert len(found & hit) >= 1
        found |= {event.region for event in umn.read()}
        assert hit <= found
        for region in regions:
            region.renew()
        umn.read()
    for region in regions:
        region.close()
    check_usable(umn, arena)


# ---- Systematically: at every step of Python code that runs inside a call ----


class Stepper:
    """Raises at the n-th line of Python code that the library runs, where sys.settrace calls it."""

    def __init__(self, step: int) -> None:
        self.left = step
        self.raised = False

    def trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if self.raised or not (frame.f_globals.get("__name__") or "").startswith("ummunotify"):
            return None
        self.left -= 1
        if self.left <= 0:
            self.raised = True
            raise Interrupted
        return self.trace


def steps_of(act: Callable[[], object]) -> int:
    """Interrupt it at its first step, its second, ... and let it go on after each; how many there were."""
    for step in itertools.count(1, 1 if SLOW else 41):
        stepper = Stepper(step)
        before = sys.gettrace()
        sys.settrace(stepper.trace)
        try:
            act()
        except Interrupted:
            pass
        finally:
            sys.settrace(before)
        if not stepper.raised:
            return step - 1
    raise AssertionError


@pytest.mark.parametrize("source", SOURCES)
def test_opening_at_every_step(source: str, arena: Memory) -> None:
    try:
        keeper = ummunotify.open(source)  # or each step would wait for the program to be loaded
    except ummunotify.SourceUnavailableError as error:
        require(source.partition(":")[0], str(error))
    before = len(os.listdir("/proc/self/fd"))

    def act() -> None:
        with ummunotify.open(source) as umn:
            region = watch(umn, arena, 0)
            # With the source bpf the table grows.
            others = [watch(umn, arena, 1) for _ in range(3000 if source != "uffd" else 10)]
            assert all(other.valid for other in others)
            drop(arena, 0)
            assert not region.valid
            umn.dispatch(lambda event: None)

    assert steps_of(act) > 0
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    act()
    keeper.close()


class Index:
    """An integer that runs Python code."""

    def __init__(self, value: int, act: Callable[[], object]) -> None:
        self.value = value
        self.act = act

    def __index__(self) -> int:
        self.act()
        return self.value


class Array:
    """Has the array interface, and runs Python code when it is asked for it."""

    def __init__(self, address: int, length: int, act: Callable[[], object]) -> None:
        self.address = address
        self.length = length
        self.act = act

    @property
    def __array_interface__(self) -> dict[str, object]:
        self.act()
        return {"data": (self.address, False), "shape": (self.length,), "typestr": "|u1"}


def raise_it() -> None:
    raise Interrupted


def test_arguments_that_raise(umn: Notifier, memory: Memory) -> None:
    address = memory.at(0)
    calls: list[Callable[[], object]] = [
        lambda: umn.watch((Index(address, raise_it), 1)),
        lambda: umn.watch((address, Index(1, raise_it))),
        lambda: umn.watch((address, 1), cookie=Index(5, raise_it)),
        lambda: ummunotify.open(umn.source, max_regions=Index(5, raise_it)),  # type: ignore[arg-type]
    ]
    for do in calls:
        with pytest.raises(Interrupted):
            do()
        assert (umn.regions, umn.stats.regions) == ([], 0)
    with pytest.raises((Interrupted, ummunotify.InvalidBufferError)):
        umn.watch(Array(address, 1, raise_it))
    check_usable(umn, memory)


def test_arguments_that_use_the_notifier(umn: Notifier, memory: Memory) -> None:
    """Also those that close it."""
    address = memory.at(0)
    inner: list[Region] = []

    def watch_another() -> None:
        inner.append(umn.watch((address, 1), cookie=5))

    with pytest.raises(ummunotify.CookieInUseError):
        umn.watch((address, 1), cookie=Index(5, watch_another))
    region = umn.watch(Array(address, PAGE, lambda: umn.read()))
    assert set(umn.regions) == {*inner, region}
    drop(memory, 0)
    assert not region.valid
    other = ummunotify.open(umn.source)
    with pytest.raises(ummunotify.ClosedError):
        other.watch((Index(address, other.close), 1))
    region.close()
    inner.pop().close()
    check_usable(umn, memory)


def test_finalisers_and_weak_references(umn: Notifier, memory: Memory) -> None:
    """The collector runs in the middle of `watch` and `read`, and with it code that uses the same notifier."""
    before = gc.get_threshold()
    uses = 0
    address = memory.at(1)

    def use(*_: object) -> None:
        nonlocal uses
        uses += 1
        with umn.watch((address, 1), cookie=uses) as region:
            region.renew()
            umn.read()
            assert umn.changed in (True, False)

    class Cycle:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            use()
            raise Interrupted

    regions = []
    unraisable = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        gc.set_threshold(1)
        for i in range(300):
            cycle = Cycle()
            reference = weakref.ref(cycle, use)
            del cycle
            regions.append(umn.watch((memory.at(0), 1)))
            if i % 10 == 0:
                drop(memory, 0)
                assert not regions[-1].valid
                umn.read()
            del reference
    finally:
        gc.set_threshold(*before)
        gc.collect()
        sys.unraisablehook = unraisable
    assert uses >= 300
    assert set(umn.regions) == set(regions)
    assert umn.stats.regions == len(regions)
    for region in regions:
        region.close()
    check_usable(umn, memory)


# ---- A handler that uses what it interrupts ----


def test_a_handler_uses_the_same_notifier(umn: Notifier, arena: Memory) -> None:
    """In whatever method the interrupted code is: nothing waits for itself."""
    uses = 0
    refused = 0
    running = True

    def use(*_: object) -> None:
        nonlocal uses, refused
        uses += 1
        try:
            with watch(umn, arena, 3) as region:
                region.renew()
                if uses % 8 == 0:
                    drop(arena, 3)
                    assert not region.valid
        except ummunotify.TooManyRegionsError:  # the interrupted code makes the table larger
            refused += 1
        umn.dispatch(lambda event: None)
        umn.read(0.0001)
        assert umn.changed in (True, False)
        assert umn.stats.regions >= 0
        if uses % 20 == 0:
            ummunotify.open(umn.source).close()

    def work() -> None:
        kept: list[Region] = []
        while running and (uses < INTERRUPTIONS // 2 or not kept):
            kept += [watch(umn, arena, 0) for _ in range(100)]
            umn.read(0.0001)
            umn.dispatch(lambda event: None)
            drop(arena, 0)
            assert not any(region.valid for region in kept)
            if len(kept) >= 3000:
                for region in kept:
                    region.close()
                kept.clear()
        for region in kept:
            region.close()

    before = signal.signal(signal.SIGALRM, use)
    # A deadlock would hold this thread: another one ends the process.
    watchdog = threading.Timer(LONG + INTERRUPTIONS / 50, lambda: os._exit(3))
    watchdog.start()
    signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
    try:
        work()
    finally:
        running = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        watchdog.cancel()
        watchdog.join()
    assert refused < uses
    check_usable(umn, arena)
