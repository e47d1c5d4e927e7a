"""The notifier: a watch table, what feeds it, and waiting."""

from __future__ import annotations

import collections
import contextlib
import os
import select
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

from . import sources
from ._core import WatchTable, test_page, unmap
from .errors import ClosedError, SourceUnavailableError, TooManyRegionsError
from .sources.base import Exercise, ExercisedFeed, Feed, ToldFeed, UnavailableError
from .types import Invalidation

if TYPE_CHECKING:
    import asyncio

PAGE = 4096

_PROOF_SECONDS = 10.0
_WAIT_MAX = 86400.0  # poll() takes a number of milliseconds in 32 bits


class Notifier(WatchTable):
    """Tells which of the watched ranges of this process's memory were changed. Made by `ummunotify.open`.

    All methods may be called from any number of threads. None holds the GIL while it waits.

    In the child of a fork it is closed, and its methods raise ForkedError; the parent does not notice.
    """

    _feed: Feed

    def __init__(self, feed: Feed, *, max_regions: int | None = None) -> None:
        """Raises UnavailableError if the feed does not prove itself, OSError if there is no memory."""
        self._feed = feed
        self._growing = threading.Lock()
        self._lock = threading.RLock()  # of the next three; again and again by a signal handler that closes
        self._inside = 0  # threads that use the feed, between `_enter` and `_leave`
        self._open = True
        self._closing_fd = -1  # readable once it is closed
        self._wakes = False
        _notifiers.add(self)
        try:
            self._closing_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            if isinstance(feed, ToldFeed):
                self._set_source(feed.source_address)
            self._grow()
            feed.bind()
            self._prove()
        except BaseException:
            self.close()
            raise

    def _prove(self) -> None:
        """Nothing is trusted until a change of our own was seen."""
        deadline = time.monotonic() + _PROOF_SECONDS
        proven: dict[str, bool] = {}
        while True:
            for exercise in self._exercises():
                proven[exercise.name] = self._try(exercise) or proven.get(exercise.name, False)
            if all(proven.values()):
                return
            if time.monotonic() > deadline:
                raise UnavailableError("so much else was changing that its self-test showed nothing", "try again")
            time.sleep(0.001)

    def _exercises(self) -> Iterator[Exercise]:
        page = test_page()
        yield Exercise("a page was unmapped", page, lambda: unmap(page, PAGE))
        if isinstance(self._feed, ExercisedFeed):
            yield from self._feed.exercises()

    def _try(self, exercise: Exercise) -> bool:
        """False: a source that cannot always tell, and says so, could not just now."""
        region = self.watch((exercise.page, PAGE))
        before = region.valid
        exercise.act()
        seen = not region.valid and self.changed
        events = self._drain()
        region.close()
        # "changed" may mean no more than that another thread is changing something.
        left = self.changed and self._take()
        if before and seen and [event.region for event in events] == [region] and not left:
            return True
        if seen and isinstance(self._feed, ToldFeed):
            return False
        raise UnavailableError(
            f"it failed its self-test: {exercise.name} and the event did not arrive as it should",
            "please report this with the kernel's version",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # Not in __init__'s way if that was never called.
        if "_open" in self.__dict__:
            self.close()

    def __repr__(self) -> str:
        if self.closed:
            return "<Notifier closed>"
        return f"<Notifier {self.source} {len(self.regions)} regions>"

    @property
    def source(self) -> str:
        """What feeds it: `bpf:kvm`, ..."""
        return self._feed.name

    def _refusal(self, number: int, start: int, end: int) -> Exception:
        assert isinstance(self._feed, ToldFeed)
        return self._feed.refusal(number, start, end)

    def _enter(self) -> None:
        """The feed will not be closed before `_leave`. Raises ClosedError."""
        with self._lock:
            if self._open:
                self._inside += 1
                return
        self._drain()  # which knows the error

    def _leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and not self._open:
                _making.release(self)

    def _grow(self) -> None:
        self._enter()
        try:
            with self._growing, _making.held():
                pages = self._next_pages()
                if not pages:
                    self._check()
                    raise TooManyRegionsError("the table is as large as it can be")
                try:
                    address = self._feed.add_segment(pages)
                except OSError as error:
                    if self.closed:  # there is no table yet
                        raise
                    raise TooManyRegionsError(f"the table cannot grow by {pages * PAGE >> 10} KiB ({error})") from error
                try:
                    self._add_segment(address, pages)
                except BaseException:
                    unmap(address, pages * PAGE)
                    raise
        finally:
            self._leave()

    def read(self, timeout: float | None = 0.0) -> list[Invalidation]:
        """Take what was invalidated: each region once, in the order in which they were first hit.

        A region stays watched and will be reported again when it is hit again. If several threads read, each
        invalidation goes to one of them. Takes time in proportion to what it returns.

        `timeout` is how long to wait for something, in seconds; None: for as long as it takes. Without
        anything in time the list is empty. Raises ClosedError, also when it is closed meanwhile.
        """
        self._enter()
        try:
            if timeout == 0.0:
                return self._take()
            deadline = None if timeout is None else time.monotonic() + timeout
            self.fileno()
            while True:
                events = self._take()
                if events:
                    return events
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return []
                self._wait(left)
        finally:
            self._leave()

    def _take(self) -> list[Invalidation]:
        if not self._open:  # closed meanwhile; or this is the child of a signal handler that has forked
            self._drain()  # which knows the error
        if self._feed.doubtful():
            self._doubt()
        if self._wakes:
            # In this order no wake-up is lost: what is hit after arming makes the descriptor readable again.
            self._feed.acknowledge()
            self._arm()
        return self._drain()

    def _wait(self, seconds: float | None) -> None:
        poll = select.poll()
        poll.register(self._feed.wake_fd(), select.POLLIN)
        poll.register(self._closing_fd, select.POLLIN)
        poll.poll(None if seconds is None else min(max(0.0, seconds), _WAIT_MAX) * 1000)

    def fileno(self) -> int:
        """A descriptor that polls readable when there may be something to read.

        For select, poll, epoll and event loops; do not read from it or close it. It stays readable until `read`
        is called, and `read` may then find nothing. Before it is first asked for, changes send no wake-ups and
        cost less. Raises ClosedError, OSError.
        """
        self._enter()
        try:
            with _making.held():
                fd = self._feed.wake_fd()
            if not self._wakes:
                self._wakes = True
                self._arm()
                # What has been hit by now sent no wake-up; let one more change, which nobody else sees, send it.
                if self.changed:
                    self._nudge()
            return fd
        finally:
            self._leave()

    def _check(self) -> None:
        if self.closed:
            self._drain()

    async def __aiter__(self) -> AsyncIterator[Invalidation]:
        """Invalidations as they come, until the notifier is closed."""
        import asyncio  # here, as it takes longer than all else that is imported, and whoever iterates has it already

        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as undo:
            fds = []
            self._enter()
            try:
                for fd in (self.fileno(), self._closing_fd):
                    # An event loop knows each descriptor once, and several tasks may be iterating.
                    fds.append(os.dup(fd))
                    undo.callback(os.close, fds[-1])
            finally:
                self._leave()
            while True:
                try:
                    events = self.read()
                except ClosedError:
                    return
                for event in events:
                    yield event
                if not events:
                    await _readable(loop, asyncio.Event(), fds)

    def close(self) -> None:
        """Stop watching and release everything. May be called more than once, and while other threads read.

        Those get ClosedError; regions stay around and are not valid.
        """
        with self._lock:
            if not self._open:
                return
            self._close_table()
            self._open = False
            if self._closing_fd >= 0:
                os.eventfd_write(self._closing_fd, 1)
            # Else the last of those who are inside does it.
            if not self._inside:
                _making.release(self)

    def _release(self) -> None:
        """Called under `_making`."""
        try:
            self._feed.close()
        finally:
            if self._closing_fd >= 0:
                os.close(self._closing_fd)
                self._closing_fd = -1
            _notifiers.discard(self)

    def _abandon(self) -> None:
        """In the child of a fork. Takes no lock: a thread that is not here may hold it."""
        self._lock = threading.RLock()
        self._open = False
        self._inside += 1  # for ever: nothing is left to be released
        self._abandon_table()
        self._feed.abandon()
        if self._closing_fd >= 0:
            os.close(self._closing_fd)
            self._closing_fd = -1


async def _readable(loop: asyncio.AbstractEventLoop, readable: asyncio.Event, fds: list[int]) -> None:
    """Until one of them is. In between the loop does not look at them, or it would spin while nobody reads."""
    for fd in fds:
        loop.add_reader(fd, readable.set)
    try:
        await readable.wait()
    finally:
        for fd in fds:
            loop.remove_reader(fd)


_notifiers: weakref.WeakSet[Notifier] = weakref.WeakSet()


class _Making:
    """Held where descriptors and mappings are made or released, by any notifier; so there is no fork meanwhile.

    A child could not know those that are just about to be noted down somewhere, or no longer are.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0  # how often the thread that holds the lock has taken it
        self._leaving: collections.deque[Notifier] = collections.deque()
        os.register_at_fork(
            before=self._lock.acquire, after_in_parent=self._after_in_parent, after_in_child=self._after_in_child
        )

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        try:
            with self._lock:
                self._depth += 1
                try:
                    if self._depth == 1:
                        # Or threads that hand the lock to one another would leave it all to the last of them.
                        self._release_all()
                    yield
                finally:
                    self._depth -= 1
        finally:
            self._sweep()

    def release(self, notifier: Notifier) -> None:
        """Release what it has: now, or when whoever holds the lock lets go of it.

        This must not wait: a signal handler or the garbage collector may close a notifier at any moment, also while
        this very thread holds the lock.
        """
        self._leaving.append(notifier)
        self._sweep()

    def _sweep(self) -> None:
        # Whoever has the lock comes here after he has let go of it.
        while self._leaving and self._lock.acquire(blocking=False):
            try:
                if self._depth:
                    return
                self._depth = 1
                try:
                    self._release_all()
                finally:
                    self._depth = 0
            finally:
                self._lock.release()

    def _release_all(self) -> None:
        while self._leaving:
            try:
                self._leaving[0]._release()
            finally:
                self._leaving.popleft()

    def _after_in_parent(self) -> None:
        self._lock.release()
        self._sweep()

    def _after_in_child(self) -> None:
        for notifier in [*_notifiers, *self._leaving]:
            notifier._abandon()
        _notifiers.clear()
        self._leaving.clear()
        self._lock.release()


_making = _Making()


def open(source: str | None = None, *, probe: str | None = None, max_regions: int | None = None) -> Notifier:
    """Open a notifier for this process's memory, fed by the best source that works here.

    `source` (`bpf` or `uffd`) and `probe` (`kvm`) insist on one; where both are left out, the environment variable
    UMMUNOTIFY_SOURCE (`bpf` or `bpf:kvm`) may name them. `max_regions` limits how many regions can be watched
    at a time, and so the memory that is used; without it memory is the limit.

    Raises SourceUnavailableError, which says of each source why not, and UnknownSourceError.
    """
    reasons: dict[str, str] = {}
    for candidate in sources.candidates(source, probe):
        try:
            return open_candidate(candidate, max_regions)
        except UnavailableError as error:
            reasons[candidate.name] = str(error)
    raise SourceUnavailableError(reasons)


def open_candidate(candidate: sources.Candidate, max_regions: int | None = None) -> Notifier:
    """With this source and no other. Raises UnavailableError."""
    with _making.held():
        try:
            feed = candidate.open()
        except OSError as error:  # no source expects it; others may work all the same
            raise UnavailableError(str(error), "") from error
        try:
            return Notifier(feed, max_regions=max_regions)
        except BaseException as error:
            feed.close()
            if isinstance(error, OSError):
                raise UnavailableError(f"{error}", "") from error
            raise


class Finding(NamedTuple):
    """What became of an attempt to use a source."""

    source: str
    """`bpf:kvm`"""
    available: bool
    """It was opened, and saw a change made for it to see."""
    reason: str
    """Why it is not available."""
    remedy: str
    """What can be done about that, as far as it is known."""


def survey() -> list[Finding]:
    """Try every source, best first."""
    findings = []
    for candidate in sources.every():
        try:
            with open_candidate(candidate) as opened:
                findings.append(Finding(opened.source, True, "", ""))
        except UnavailableError as error:
            findings.append(Finding(candidate.name, False, error.reason, error.remedy))
    return findings
