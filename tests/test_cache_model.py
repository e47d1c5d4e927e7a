"""A model of the cache, the memory and the registrar, compared with the real ones after each of many random steps.

The memory is real, and the kernel tells of its changes. Each page has a number in the model, a new one whenever other
memory is mapped there. To register is to note the numbers of the pages, as real registrars hold on to the pages that
they found.
"""

from __future__ import annotations

import errno
import mmap
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

from cache_check import wrong
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from models import run_model
from support import map_memory, unmap_memory

import ummunotify
from ummunotify import (
    DeregistrationError,
    Notifier,
    Registration,
    RegistrationCache,
    RegistrationError,
    RegistrationLimitError,
)

PAGE = mmap.PAGESIZE
PAGES = 12
SIZE = PAGES * PAGE


@dataclass(eq=False)
class Handle:
    address: int
    length: int
    numbers: dict[int, int]
    """Of the pages, when they were registered."""
    users: int = 0
    failed: bool = False
    """To deregister it."""


@dataclass
class Memory:
    address: int = field(default_factory=lambda: map_memory(SIZE))
    numbers: list[int] = field(default_factory=lambda: list(range(PAGES)))
    """-1: not mapped."""
    last: int = PAGES

    def pages(self, address: int, length: int) -> range:
        return range((address - self.address) // PAGE, (address + length - 1 - self.address) // PAGE + 1)

    def numbers_of(self, address: int, length: int) -> dict[int, int]:
        return {page: self.numbers[page] for page in self.pages(address, length)}

    def change(self, pages: range, mapped: bool = True) -> None:
        for page in pages:
            if self.numbers[page] != -1:
                unmap_memory(self.address + page * PAGE, PAGE)
            self.numbers[page] = -1
            if mapped:
                map_memory(PAGE, self.address + page * PAGE)
                self.last += 1
                self.numbers[page] = self.last


class Registrar:
    def __init__(self, memory: Memory, granularity: int, merge: bool, overlap: bool, max_length: int) -> None:
        self.granularity = granularity
        self.merge = merge
        self.overlap = overlap
        self.max_length = max_length
        self.memory = memory
        self.live: list[Handle] = []
        self.faults: list[Exception | range] = []
        """What happens in the next calls of `register`: errors, or pages that change."""
        self.deregistrations_to_fail = 0

    def register(self, address: int, length: int) -> Handle:
        assert address % self.granularity == 0
        assert length % self.granularity == 0
        if not self.overlap:
            assert not any(
                other.address < address + length and address < other.address + other.length for other in self.live
            )
        numbers = self.memory.numbers_of(address, length)
        if -1 in numbers.values():
            raise OSError(errno.EFAULT, "Bad address")
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, Exception):
            raise fault
        handle = Handle(address, length, numbers)
        self.live.append(handle)
        if fault is not None:
            self.memory.change(fault)
        return handle

    def deregister(self, handle: Handle) -> None:
        assert handle.users == 0
        assert handle in self.live
        if self.deregistrations_to_fail:
            self.deregistrations_to_fail -= 1
            handle.failed = True
            raise OSError(errno.EBUSY, "busy")
        self.live.remove(handle)


pages = st.tuples(st.integers(0, PAGES - 1), st.integers(1, PAGES)).map(
    lambda pair: range(pair[0], min(PAGES, sum(pair)))
)
ranges = pages.flatmap(
    lambda these: st.tuples(
        st.just(these.start * PAGE) | st.integers(these.start * PAGE, (these.start + 1) * PAGE - 1),
        st.just(these.stop * PAGE) | st.integers((these.stop - 1) * PAGE + 1, these.stop * PAGE),
    )
).filter(lambda pair: pair[0] < pair[1])
register_errors = st.sampled_from(
    [
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RegistrationLimitError("full"),
        OSError(errno.EPERM, "Operation not permitted"),
        RegistrationError("no"),
    ]
)


class CacheModel(RuleBasedStateMachine):
    umn: Notifier
    """Of the subclass that runs."""
    cache: RegistrationCache[Handle]

    @initialize(
        granularity=st.sampled_from([1, 64, PAGE]),
        merge=st.booleans(),
        overlap=st.booleans(),
        max_length=st.sampled_from([1 << 63, 3 * PAGE]),
        max_registrations=st.sampled_from([None, 1, 3]),
        max_bytes=st.sampled_from([None, 4 * PAGE, SIZE]),
    )
    def begin(
        self,
        granularity: int,
        merge: bool,
        overlap: bool,
        max_length: int,
        max_registrations: int | None,
        max_bytes: int | None,
    ) -> None:
        self.memory = Memory()
        self.registrar = Registrar(self.memory, granularity, merge, overlap, max_length)
        self.max_registrations = max_registrations or 1 << 63
        self.max_bytes = max_bytes or 1 << 63
        self.cache = RegistrationCache(
            self.registrar, notifier=self.umn, max_registrations=max_registrations, max_bytes=max_bytes
        )
        self.held: list[Registration[Handle]] = []
        self.acquired = 0

    # ---- What can happen ----

    @rule(what=ranges)
    def acquire(self, what: tuple[int, int]) -> None:
        address, length = self.memory.address + what[0], what[1] - what[0]
        faults = bool(self.registrar.faults)
        mapped = -1 not in self.memory.numbers_of(address, length).values()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # deregistrations that fail
            try:
                registration = self.cache.acquire((address, length))
            except RegistrationError as error:
                limit = isinstance(error, RegistrationLimitError)
                registration = None
        if registration is None:
            assert faults or not mapped or self.may_fail(address, length, limit)
            return
        handle = registration.handle
        assert handle in self.registrar.live
        assert not handle.failed
        assert handle.address <= address
        assert address + length <= handle.address + handle.length
        now = self.memory.numbers_of(address, length)
        assert {page: handle.numbers[page] for page in now} == now
        assert (registration.address, registration.length) == (address, length)
        handle.users += 1
        self.held.append(registration)
        self.acquired += 1

    def may_fail(self, address: int, length: int, limit: bool) -> bool:
        """What is left is in use, or could not be deregistered, and does not leave room."""
        grain = self.registrar.granularity
        start, end = address & -grain, (address + length + grain - 1) & -grain
        stay = [handle for handle in self.registrar.live if handle.users or handle.failed]
        if limit:
            total = sum(handle.length for handle in stay)
            return len(stay) >= self.max_registrations or total + end - start > self.max_bytes
        return not self.registrar.overlap and any(h.address < end and start < h.address + h.length for h in stay)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        registration = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        registration.handle.users -= 1
        failing = self.registrar.deregistrations_to_fail
        try:
            registration.release()
        except DeregistrationError:
            assert self.registrar.deregistrations_to_fail < failing

    @rule(which=pages, mapped=st.booleans())
    def change(self, which: range, mapped: bool) -> None:
        self.memory.change(which, mapped)

    @rule()
    def map_all(self) -> None:
        for page in range(PAGES):
            if self.memory.numbers[page] == -1:
                self.memory.change(range(page, page + 1))

    @rule(faults=st.lists(register_errors | pages, max_size=3))
    def fail_to_register(self, faults: list[Exception | range]) -> None:
        self.registrar.faults = faults

    @rule(count=st.integers(1, 3))
    def fail_to_deregister(self, count: int) -> None:
        self.registrar.deregistrations_to_fail = count

    @rule()
    def flush(self) -> None:
        self.deregister_with(self.cache.flush)
        assert all(handle.users or handle.failed for handle in self.registrar.live)

    @rule(what=ranges)
    def invalidate(self, what: tuple[int, int]) -> None:
        self.deregister_with(lambda: self.cache.invalidate((self.memory.address + what[0], what[1] - what[0])))
        for handle in self.registrar.live:
            apart = handle.address >= self.memory.address + what[1] or (
                handle.address + handle.length <= self.memory.address + what[0]
            )
            assert apart or handle.users or handle.failed

    @rule()
    def collect(self) -> None:
        self.deregister_with(self.cache.collect)
        for handle in self.registrar.live:
            stale = handle.numbers != self.memory.numbers_of(handle.address, handle.length)
            assert not stale or handle.users or handle.failed

    def deregister_with(self, method: Callable[[], None]) -> None:
        for handle in self.registrar.live:
            handle.failed = False if method == self.cache.flush else handle.failed
        failing = self.registrar.deregistrations_to_fail
        reported = 0
        try:
            method()
        except DeregistrationError as error:
            reported = len(error.errors)
        assert reported == failing - self.registrar.deregistrations_to_fail

    # ---- What is always true ----

    @invariant()
    def limits_hold(self) -> None:
        live = self.registrar.live
        assert len(live) <= self.max_registrations
        assert sum(handle.length for handle in live) <= self.max_bytes

    @invariant()
    def who_uses_it_keeps_it(self) -> None:
        for registration in self.held:
            assert registration.handle in self.registrar.live
            unchanged = registration.handle.numbers == self.memory.numbers_of(
                registration.handle.address, registration.handle.length
            )
            assert unchanged or not registration.valid

    @invariant()
    def it_knows_what_is_registered(self) -> None:
        stats = self.cache.stats
        live = self.registrar.live
        assert stats.registrations == len(live)
        assert stats.registered_bytes == sum(handle.length for handle in live)
        assert stats.in_use == sum(handle.users > 0 for handle in live)
        assert stats.not_deregistered == sum(handle.failed for handle in live)
        assert stats.hits <= self.acquired
        assert wrong(self.cache) is None

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.registrar.deregistrations_to_fail = 0
        self.cache.close()
        assert all(handle.users for handle in self.registrar.live)
        while self.held:
            registration = self.held.pop()
            registration.handle.users -= 1
            registration.release()
        assert not self.registrar.live
        assert not self.umn.regions
        self.memory.change(range(PAGES), mapped=False)


def test_model(keeper: Notifier) -> None:
    with ummunotify.open() as opened:

        class Model(CacheModel):
            umn = opened

        run_model(Model, examples=150, slow=20_000, steps=40)
