"""A naive model of the notifier, compared with the real one after each of many random steps.

The memory is real and the kernel tells of its changes. The table's own feeder and owner under random steps, without a
kernel, are in core/exact.c.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from models import run_model
from support import map_memory, require, unmap_memory

import ummunotify
from ummunotify import Notifier, Region, UnknownRegionError, UnsupportedMemoryError
from ummunotify.selftest.changes import madvise, map_at

PAGE = mmap.PAGESIZE
PAGES = 12
ARENA = 1 << 40
"""Far from where the kernel puts what is mapped anywhere, so that nobody else uses what is free here."""


@dataclass(eq=False)
class Watched:
    """What is known of a region: bytes of the arena, and what has happened to it."""

    region: Region
    start: int
    end: int
    valid: bool = True
    hits: list[tuple[int, int]] = field(default_factory=list)
    """Changes since it was last reported, in bytes of the arena, clipped to the region."""
    blind: bool = False
    """What was there has been replaced, and the source does not see what is there now until it is renewed."""
    maybe: bool = False
    """It has changed since, which may be reported or not; it stays invalid all the same."""


class NotifierModel(RuleBasedStateMachine):
    umn: Notifier
    """The same for all runs, which leave nothing behind in it."""

    @initialize()
    def begin(self) -> None:
        self.arena = map_memory(PAGES * PAGE, ARENA)
        self.mapped = [True] * PAGES
        self.late = self.umn.source == "uffd"
        """It is told of changes one by one, of mappings only, and refuses what is not mapped."""
        self.watched: list[Watched] = []
        self.unwatched: list[Region] = []
        self.pending: list[Watched] = []
        """In the order of the first hit; those that were hit by one change in any order."""
        self.groups: list[int] = []
        """For each of the pending, by which change that was."""
        self.changes = 0
        self.cookies: set[int] = set()

    # ---- What can happen ----

    @rule(
        first=st.integers(0, PAGES - 1),
        pages=st.integers(1, PAGES),
        skip=st.sampled_from([0, 1, 100, PAGE - 1]),
        spare=st.sampled_from([0, 1, 100, PAGE - 1]),
        cookie=st.none() | st.integers(0, 5),
    )
    def watch(self, first: int, pages: int, skip: int, spare: int, cookie: int | None) -> None:
        start = first * PAGE + skip
        end = min(PAGES, first + pages) * PAGE - spare
        if start >= end:
            end = start + 1
        holes = not all(self.mapped[start // PAGE : (end - 1) // PAGE + 1])
        in_use = cookie in self.cookies
        try:
            region = self.umn.watch((self.arena + start, end - start), cookie=cookie)
        except UnsupportedMemoryError:
            assert self.late
            assert holes
            return
        except ummunotify.CookieInUseError:
            assert in_use
            return
        assert not in_use
        assert not (self.late and holes)
        assert cookie is None or region.cookie == cookie
        assert region.cookie not in self.cookies
        self.cookies.add(region.cookie)
        self.watched.append(Watched(region, start, end))

    @precondition(lambda self: self.watched)
    @rule(data=st.data())
    def unwatch(self, data: st.DataObject) -> None:
        watched = self.watched.pop(data.draw(st.integers(0, len(self.watched) - 1)))
        self.cookies.remove(watched.region.cookie)
        self.forget(watched)
        self.umn.unwatch(watched.region)
        self.unwatched.append(watched.region)

    def forget(self, watched: Watched) -> None:
        if watched in self.pending:
            at = self.pending.index(watched)
            del self.pending[at], self.groups[at]

    @precondition(lambda self: self.watched)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        watched = data.draw(st.sampled_from(self.watched))
        holes = not all(self.mapped[watched.start // PAGE : (watched.end - 1) // PAGE + 1])
        try:
            watched.region.renew()
        except UnsupportedMemoryError:
            assert self.late
            assert holes
            return
        assert not (self.late and holes)
        watched.valid = True
        watched.blind = False

    @precondition(lambda self: self.unwatched)
    @rule(data=st.data())
    def misuse(self, data: st.DataObject) -> None:
        region = data.draw(st.sampled_from(self.unwatched))
        with pytest.raises(UnknownRegionError):
            self.umn.unwatch(region)
        with pytest.raises(UnknownRegionError):
            region.renew()
        region.close()

    @rule(first=st.integers(0, PAGES - 1), pages=st.integers(1, PAGES), how=st.sampled_from(["unmap", "map", "drop"]))
    def change(self, first: int, pages: int, how: str) -> None:
        """Of what is mapped: where a change goes over holes, the kernel may tell of them too, or not."""
        last = next((page for page in range(first, min(PAGES, first + pages)) if not self.mapped[page]), first + pages)
        last = min(PAGES, last)
        if first == last:
            return
        address, length = self.arena + first * PAGE, (last - first) * PAGE
        if how == "drop":
            madvise(address, length, mmap.MADV_DONTNEED)
        elif how == "unmap":
            unmap_memory(address, length)
        else:
            map_at(address, length)
        self.mapped[first:last] = [how != "unmap"] * (last - first)
        # Or what is watched next could be hit by this, which is needless, and allowed. While something may be on its
        # way, the generation counts up whenever it is asked for.
        while self.late and self.umn.generation != self.umn.generation:
            pass
        self.hit(first, last, replaced=how != "drop")

    @rule(page=st.integers(0, PAGES - 1))
    def fill(self, page: int) -> None:
        """Where there is nothing, mapping is no change."""
        if not self.mapped[page]:
            map_memory(PAGE, self.arena + page * PAGE)
            self.mapped[page] = True

    def hit(self, first: int, last: int, replaced: bool) -> None:
        self.changes += 1
        for watched in self.watched:
            start, end = max(first * PAGE, watched.start), min(last * PAGE, watched.end)
            if start < end:
                watched.valid = False
                if watched.blind:
                    watched.maybe = True
                    continue
                watched.blind = self.late and replaced
                watched.hits.append((start, end))
                if watched not in self.pending:
                    self.pending.append(watched)
                    self.groups.append(self.changes)

    @rule()
    def read(self) -> None:
        events = self.umn.read()
        # Regions that one change hit come in any order.
        groups = {watched.region: group for watched, group in zip(self.pending, self.groups, strict=True)}
        maybe = {watched.region for watched in self.watched if watched.maybe and watched.region not in groups}
        events = [event for event in events if event.region not in maybe]
        reported = [event.region for event in events]
        assert set(reported) == set(groups)
        assert len(reported) == len(groups)
        assert [groups[region] for region in reported] == sorted(groups.values())
        known = {watched.region: watched for watched in self.pending}
        for event in events:
            watched = known[event.region]
            assert event.cookie == watched.region.cookie
            start, end = event.start - self.arena, event.end - self.arena
            if watched.maybe:
                pass
            elif event.exact:
                assert watched.hits == [(start, end)]
            else:
                # The kernel tells of each mapping by itself, and adjacent ones may be one or two.
                assert len(watched.hits) > 1 or watched.hits[0][1] - watched.hits[0][0] > PAGE
                assert (start, end) == (watched.start, watched.end)
            watched.hits = []
        for watched in self.watched:
            watched.maybe = False
        self.pending = []
        self.groups = []

    # ---- What is always true ----

    @invariant()
    def regions_are_valid_or_not(self) -> None:
        assert [watched.region.valid for watched in self.watched] == [watched.valid for watched in self.watched]
        assert not any(region.valid for region in self.unwatched)

    @invariant()
    def it_says_whether_there_is_something(self) -> None:
        if self.pending:
            assert self.umn.changed

    @invariant()
    def it_knows_its_regions(self) -> None:
        assert set(self.umn.regions) == {watched.region for watched in self.watched}
        assert self.umn.stats.regions == len(self.watched)

    def teardown(self) -> None:
        if not hasattr(self, "arena"):
            return
        try:
            self.read()
            assert not self.umn.changed
        finally:
            for region in self.umn.regions:
                region.close()
            self.umn.read()
            unmap_memory(self.arena, PAGES * PAGE)


@pytest.mark.parametrize("source", ["bpf", "uffd"])
def test_model(source: str) -> None:
    try:
        opened = ummunotify.open(source=source)
    except ummunotify.SourceUnavailableError as error:
        require(source, str(error))

    class Model(NotifierModel):
        umn = opened

    with opened:
        run_model(Model, examples=100, slow=3_000, steps=50)
