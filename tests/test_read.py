"""What regions and `read` say of changes."""

from __future__ import annotations

import mmap
import random
import threading

from support import hit, ranges, watch

from ummunotify import (
    Notifier,
)
from ummunotify.selftest.changes import ANONYMOUS, MAP_NORESERVE, PAGE, READ_WRITE, Memory, call, madvise


def test_a_region_stays_invalid(umn: Notifier, memory: Memory) -> None:
    region = watch(umn, memory, 0)
    hit(memory, 0)
    for _ in range(3):
        assert not region.valid
        umn.read()
    region.renew()
    assert region.valid
    assert umn.read() == []
    hit(memory, 0)
    assert not region.valid


def test_renew_before_read(umn: Notifier, memory: Memory) -> None:
    """Renewing makes valid; what happened before is still reported, and once."""
    region = watch(umn, memory, 0)
    hit(memory, 0)
    region.renew()
    assert region.valid
    assert umn.changed
    hit(memory, 0)
    assert not region.valid
    assert ranges(memory, umn.read()) == [(0, 1, False)]
    assert umn.read() == []


def test_other_regions_are_not_disturbed(umn: Notifier, memory: Memory) -> None:
    left, middle, right = (watch(umn, memory, i) for i in (0, 1, 2))
    hit(memory, 1)
    assert (left.valid, middle.valid, right.valid) == (True, False, True)


def test_reported_in_the_order_of_first_hits(umn: Notifier, memory: Memory) -> None:
    regions = [watch(umn, memory, i) for i in range(8)]
    order = [5, 1, 7, 0, 3]
    for page in [*order, 1, 5]:
        hit(memory, page)
    events = umn.read()
    assert [event.region for event in events] == [regions[page] for page in order]
    assert [event.exact for event in events] == [page not in (1, 5) for page in order]


def test_the_order_lasts_over_many(umn: Notifier) -> None:
    """More than are taken from the table at a time."""
    count = 1000
    address = call("mmap", 0, count * PAGE, READ_WRITE, ANONYMOUS | MAP_NORESERVE, -1, 0)
    regions = [umn.watch((address + i * PAGE, PAGE)) for i in range(count)]
    order = random.Random(1).sample(range(count), count)
    for i in order:
        madvise(address + i * PAGE, PAGE, mmap.MADV_DONTNEED)
    assert [event.region for event in umn.read()] == [regions[i] for i in order]
    assert umn.read() == []
    call("munmap", address, count * PAGE)


def test_exact_or_all_of_it(umn: Notifier, memory: Memory) -> None:
    region = umn.watch((memory.at(1) + 100, 5 * PAGE))
    hit(memory, 3, 5)
    assert ranges(memory, umn.read()) == [(3, 5, True)]
    hit(memory, 0, 3)  # clipped
    assert ranges(memory, umn.read()) == [(1 + 100 / PAGE, 3, True)]
    hit(memory, 6, 8)
    assert ranges(memory, umn.read()) == [(6, 6 + 100 / PAGE, True)]
    hit(memory, 3)
    hit(memory, 3)
    (event,) = umn.read()
    assert (event.start, event.end, event.exact) == (region.address, region.address + region.length, False)


def test_who_did_it(umn: Notifier, memory: Memory) -> None:
    regions = [watch(umn, memory, page) for page in range(3)]
    hit(memory, 0)
    threads: list[int] = []

    def other() -> None:
        threads.append(threading.get_native_id())
        hit(memory, 1)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    call("munmap", memory.at(2), PAGE)
    memory.fill()
    events = umn.read()
    assert [event.region for event in events] == regions
    assert [event.syscall for event in events] == [28, 28, 11]
    main = threading.get_native_id()
    assert [event.thread for event in events] == [main, *threads, main]
    assert events[2].cause == f"munmap by thread {main}"


def test_changed(umn: Notifier, memory: Memory) -> None:
    assert not umn.changed
    region = watch(umn, memory, 0)
    assert not umn.changed
    hit(memory, 1)
    assert not umn.changed  # nobody watches that
    before = umn.generation
    hit(memory, 0)
    assert umn.changed
    assert umn.generation != before
    umn.read()
    assert not umn.changed
    # A region that is invalid already changes again.
    hit(memory, 0)
    assert umn.changed
    assert not region.valid
    umn.read()
    assert not umn.changed


def test_nothing_is_reported_after_unwatch(umn: Notifier, memory: Memory) -> None:
    gone, stays = watch(umn, memory, 0), watch(umn, memory, 0)
    hit(memory, 0)
    gone.close()
    assert [event.region for event in umn.read()] == [stays]
    stays.close()
    hit(memory, 0)
    assert umn.read() == []


def test_a_region_is_a_context(umn: Notifier, memory: Memory) -> None:
    with watch(umn, memory, 0) as region:
        assert region.valid
    assert umn.regions == []
    assert not region.valid
    region.close()
    # Its slot goes to another one, which it has nothing to do with.
    for _ in range(100):
        other = watch(umn, memory, 0)
        assert not region.valid
        other.close()


def test_what_one_reads_the_other_need_not(umn: Notifier, keeper: Notifier, memory: Memory) -> None:
    """Each notifier has events of its own."""
    ours, theirs = watch(umn, memory, 0), watch(keeper, memory, 0)
    hit(memory, 0)
    umn.read()
    ours.renew()
    assert keeper.changed
    assert not theirs.valid
    assert [event.region for event in keeper.read()] == [theirs]
    theirs.close()
