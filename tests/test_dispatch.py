"""`dispatch`: what was invalidated counts as undelivered until its callback is done, for all threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
from support import LONG, hit, in_child, probes, readable, require, watch

import ummunotify
from ummunotify import ClosedError, ForkedError, Invalidation, Notifier, Region
from ummunotify.selftest.changes import Memory, store


@pytest.fixture(params=[*probes(), "uffd"])
def umn(request: pytest.FixtureRequest) -> Iterator[Notifier]:
    try:
        opened = ummunotify.open(request.param)
    except ummunotify.SourceUnavailableError as error:
        require(request.param.partition(":")[0], str(error))
    with opened:
        yield opened


@pytest.fixture
def regions(umn: Notifier, memory: Memory) -> list[Region]:
    """Four, the first three of them hit in this order."""
    made = [watch(umn, memory, unit) for unit in range(4)]
    for unit in range(3):
        hit(memory, unit)
        assert not made[unit].valid
    memory.touch()
    return made


def test_it_delivers_each_once(umn: Notifier, regions: list[Region]) -> None:
    found: list[Invalidation] = []
    assert umn.dispatch(found.append) == 3
    assert [event.region for event in found] == regions[:3]
    assert all((event.cookie, event.exact) == (event.region.cookie, True) for event in found)
    assert umn.dispatch(found.append) == 0
    assert not umn.changed
    assert umn.read() == []


def test_changed_until_the_callbacks_are_done(umn: Notifier, regions: list[Region]) -> None:
    """Also for other threads, and for the last callback."""
    entered, leave = threading.Event(), threading.Event()
    seen = []

    def callback(event: Invalidation) -> None:
        entered.set()
        seen.append(umn.changed)
        assert leave.wait(LONG)

    thread = threading.Thread(target=umn.dispatch, args=(callback,))
    thread.start()
    assert entered.wait(LONG)
    assert umn.changed
    assert umn.read() is not None  # takes the other two
    assert umn.changed
    leave.set()
    thread.join(LONG)
    assert seen == [True]
    assert not umn.changed


def test_a_callback_that_raises(umn: Notifier, regions: list[Region]) -> None:
    """It has not acted on its invalidation, which comes again, before the others."""
    umn.fileno()
    found: list[Region] = []

    def callback(event: Invalidation) -> None:
        if event.region is regions[1] and failing:
            raise KeyError("so it is")
        found.append(event.region)

    failing = True
    for _ in range(3):
        with pytest.raises(KeyError, match="so it is"):
            umn.dispatch(callback)
        assert found == regions[:1]
        assert umn.changed
        assert readable(umn.fileno())
    failing = False
    assert umn.dispatch(callback) == 2
    assert found == regions[:3]
    assert not umn.changed
    assert not readable(umn.fileno())


def test_what_a_callback_refused_can_be_read(umn: Notifier, regions: list[Region]) -> None:
    with pytest.raises(ZeroDivisionError):
        umn.dispatch(lambda event: 1 // 0)
    assert [event.region for event in umn.read()] == regions[:3]
    assert not umn.changed


def test_what_a_callback_refused_is_unwatched(umn: Notifier, regions: list[Region], memory: Memory) -> None:
    """By another call, and by the callback itself."""
    with pytest.raises(ZeroDivisionError):
        umn.dispatch(lambda event: 1 // 0)
    regions[0].close()
    found: list[Region] = []

    def callback(event: Invalidation) -> None:
        event.region.close()
        found.append(event.region)
        watch(umn, memory, 5)  # it may get the same place in the table
        raise KeyError

    with pytest.raises(KeyError):
        umn.dispatch(callback)
    assert umn.dispatch(lambda event: found.append(event.region)) == 1
    assert found == regions[1:3]
    assert not umn.changed


def test_nested(umn: Notifier, regions: list[Region]) -> None:
    counts = []

    def callback(event: Invalidation) -> None:
        counts.append(umn.dispatch(lambda _: pytest.fail("a dispatch inside a dispatch")))
        assert umn.changed

    assert umn.dispatch(callback) == 3
    assert counts == [0, 0, 0]


def test_callbacks_use_the_notifier(umn: Notifier, regions: list[Region], memory: Memory) -> None:
    """They unwatch what comes next, watch more, renew and change memory."""
    found = []

    def callback(event: Invalidation) -> None:
        found.append(event.region)
        if event.region is regions[0]:
            regions[1].close()
            regions[0].renew()
            hit(memory, 0)
            assert not regions[0].valid
        elif event.region is regions[2]:
            hit(memory, 3)
            assert not regions[3].valid
        assert umn.stats.regions == len(umn.regions)

    def once(event: Invalidation) -> None:
        if len(found) < 10:
            callback(event)

    # The first changes again in its callback each time, until that does no more.
    umn.dispatch(once)
    assert set(found) == {regions[0], regions[2], regions[3]}
    assert not umn.changed


def test_dispatchers_at_once(umn: Notifier, memory: Memory) -> None:
    """When one returns, every change from before the call has been acted on, by whichever thread."""
    count = 8
    regions = {watch(umn, memory, unit): unit for unit in range(count)}
    acted = [0] * count
    errors: list[BaseException] = []
    inside = 0

    def callback(event: Invalidation) -> None:
        nonlocal inside
        inside += 1
        assert inside == 1
        acted[regions[event.region]] += 1
        event.region.renew()
        inside -= 1

    def work(unit: int) -> None:
        try:
            for _ in range(100):
                before = acted[unit]
                store(memory.at(unit))  # what is not in use does not change
                hit(memory, unit)
                umn.dispatch(callback)
                assert acted[unit] > before
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(unit,)) for unit in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert errors == []
    assert inside == 0


@pytest.mark.parametrize("by", ["itself", "another thread"])
def test_closed_meanwhile(by: str, umn: Notifier, regions: list[Region]) -> None:
    found = []

    def callback(event: Invalidation) -> None:
        found.append(event.region)
        if by == "itself":
            umn.close()
        else:
            thread = threading.Thread(target=umn.close)
            thread.start()
            thread.join(LONG)
            assert not thread.is_alive()
        assert umn.closed
        assert not any(region.valid for region in regions)

    assert umn.dispatch(callback) == 1
    assert found == regions[:1]
    with pytest.raises(ClosedError):
        umn.dispatch(callback)


def test_a_callback_forks(umn: Notifier, regions: list[Region]) -> None:
    """The child returns from the callback, and is told."""
    main = os.getpid()
    found = []
    children = []

    def callback(event: Invalidation) -> None:
        found.append(event.region)
        if os.getpid() == main:
            children.append(os.fork())

    status = 1
    try:
        count = umn.dispatch(callback)
    except ForkedError:
        status = 0 if len(found) <= 3 else 2
    finally:
        if os.getpid() != main:
            os._exit(status)
    assert count == 3
    assert found == regions[:3]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    in_child(lambda: None)


def test_not_callable(umn: Notifier, regions: list[Region]) -> None:
    with pytest.raises(TypeError):
        umn.dispatch(None)  # type: ignore[arg-type]
    assert len(umn.read()) == 3
