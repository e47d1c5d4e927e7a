"""The registration cache: pin memory once, use the pin again, never use a stale one."""

from __future__ import annotations

import errno
import os
import threading
import warnings
import weakref
from types import TracebackType
from typing import Any, Generic, NamedTuple, Self, TypeVar

from ._cache import CacheTable, Registration
from ._core import Region
from .errors import (
    ClosedError,
    DeregistrationError,
    RegistrationError,
    RegistrationLimitError,
    SourceUnavailableError,
    TooManyRegionsError,
    UnsupportedMemoryError,
)
from .notifier import Notifier
from .notifier import open as open_notifier
from .registrars import Registrar

Handle = TypeVar("Handle")

_TRIES = 16
_NO_LIMIT = (1 << 64) - 1
# What the system says when it could register the memory but for a limit.
_LIMITS = {
    errno.EAGAIN,
    errno.EDQUOT,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOBUFS,
    errno.ENOMEM,
    errno.ENOSPC,
}


class CacheStats(NamedTuple):
    """What a cache has done, and what it holds. Counts begin at 0, also in the child of a fork."""

    hits: int
    """Calls of `acquire` that were given what was registered already, by Python or C."""
    misses: int
    """Calls that had to register."""
    stale: int
    """Registrations that were given to nobody any more, because their memory had changed."""
    evictions: int
    """Registrations that were given up for others, because of a limit."""
    merges: int
    """Registrations that became part of a larger one."""
    retries: int
    """How often memory changed while it was being registered, and so had to be registered again."""
    uncached: int
    """Registrations for one use, because nothing tells of changes of that memory here."""
    failed_deregistrations: int
    """How often the registrar failed to deregister."""
    registrations: int
    """Registered now, or being registered."""
    registered_bytes: int
    in_use: int
    """Of the registrations."""
    in_use_bytes: int
    not_deregistered: int
    """Of the registrations: those that the registrar failed to deregister."""


class _Pending:
    """A range that a thread is about to register."""

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end


class RegistrationCache(CacheTable[Handle], Generic[Handle]):
    """Registers memory when it is first used, and keeps it registered for the next use.

    It uses no registration whose memory was unmapped or otherwise changed since: it watches what it registers.

    `registrar` is what registers; see `ummunotify.registrars.Registrar`. `notifier` is what it watches with, and reads:
    nobody else should read from it. Left out, the cache opens one of its own. Memory whose changes no source can see
    here is registered for each use; the cache says so once, with a warning (RuntimeWarning).

    At most `max_registrations` are registered at a time, with at most `max_bytes` in all (both at least 1). Before that
    is exceeded those are deregistered that are not in use, the least recently used ones first. The order of use is
    known to within one miss: what was used between two misses may be given up in any order.

    Threads: any thread may call any method. Hits take no lock. The registrar's methods are called without any lock
    held, by several threads at once; two threads that want the same memory register it once.

    Fork: the cache is empty in the child, and never deregisters what belongs to the parent. It works there if the
    registrar does, unless `notifier` was given, which does not.
    """

    _closed = True  # if __init__ fails

    def __init__(
        self,
        registrar: Registrar[Handle],
        *,
        notifier: Notifier | None = None,
        max_bytes: int | None = None,
        max_registrations: int | None = None,
    ) -> None:
        """Raises ValueError for a limit below 1."""
        self._changed = threading.Condition()  # of all below; re-entrant, for signal handlers
        self._pending: list[_Pending] = []
        for name, limit in (("max_bytes", max_bytes), ("max_registrations", max_registrations)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name} must be at least 1, not {limit}")
        self._max_bytes = _NO_LIMIT if max_bytes is None else max_bytes
        self._max_registrations = _NO_LIMIT if max_registrations is None else max_registrations
        self._granularity: int = getattr(registrar, "granularity", 1)
        if self._granularity < 1 or self._granularity & (self._granularity - 1):
            raise ValueError(f"the registrar's granularity must be a power of two, not {self._granularity}")
        self._max_length: int = getattr(registrar, "max_length", _NO_LIMIT)
        self._overlap: bool = getattr(registrar, "overlap", True)
        self._merging: bool = getattr(registrar, "merge", False) or not self._overlap
        self._reset()
        self._notifier = notifier
        self._opens = self._must_open = notifier is None
        _caches.add(self)
        if self._opens:
            self._open()
        self._closed = False

    def _reset(self) -> None:
        self._misses = 0
        self._evictions = 0
        self._merges = 0
        self._retries = 0
        self._failed = 0
        self._said = False

    def _open(self) -> None:
        self._must_open = False
        try:
            self._notifier = open_notifier()
        except SourceUnavailableError as error:
            self._say_once(error)

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
        if not self._closed:
            self.close()

    def __repr__(self) -> str:
        if self._closed:
            return "<RegistrationCache closed>"
        registrations, total, _, _ = self._load()
        return f"<RegistrationCache {registrations} registrations, {total} bytes>"

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this registration cache is closed")

    # ---- A miss ----

    def _miss(self, start: int, end: int) -> Registration[Handle]:
        with self._changed:
            while True:
                self._check_open()
                self._drop_stale()
                found = self._find(start, end)
                if found is not None:
                    return found
                pending = _Pending(
                    start & -self._granularity,
                    (end + self._granularity - 1) & -self._granularity,
                )
                if not self._must_wait(pending, start, end):
                    break
                self._changed.wait()
            self._misses += 1
            alone = pending.start, pending.end
            if self._merging:
                self._widen(pending)
            self._pending.append(pending)
        try:
            try:
                return self._register_range(pending.start, pending.end, start, end)
            except RegistrationError:
                if (pending.start, pending.end) == alone:
                    raise
                # What it was merged with may have been unmapped just now, or be too much for a limit.
                return self._register_range(*alone, start, end)
        finally:
            with self._changed:
                self._pending.remove(pending)
                if self._closed:
                    self._drop_range()  # it was closed meanwhile
                self._changed.notify_all()
            self._deregister_or_warn()

    def _drop_stale(self) -> None:
        if self._must_open:
            self._open()
        if self._notifier is not None:
            for event in self._notifier.read():
                self._drop(event.region)

    def _must_wait(self, wanted: _Pending, start: int, end: int) -> bool:
        """Is another thread about to register what this one needs, or what must not be registered twice?"""
        if not self._overlap:
            return any(other.start < wanted.end and wanted.start < other.end for other in self._pending)
        return self._notifier is not None and any(other.start <= start and end <= other.end for other in self._pending)

    def _widen(self, pending: _Pending) -> None:
        """Replace what overlaps it and is not in use; but where that is up to us, by no more than as much again.

        Without a bound, to use one buffer after the other, each with a page in common with the last, would register
        all that came before each time.
        """
        limit = min(self._max_length, self._max_bytes)
        if self._overlap:
            limit = min(limit, 2 * (pending.end - pending.start))
        pending.start, pending.end, count = self._merge(pending.start, pending.end, limit, not self._overlap)
        self._merges += count

    def _register_range(self, low: int, high: int, start: int, end: int) -> Registration[Handle]:
        # To register may be what changes the mapping: mlock, or the MADV_DONTFORK of libibverbs, cuts it, and a source
        # that cannot tell takes the split of a huge page there for a change. To deregister joins it again. So what was
        # registered in vain stays until the next try is over: that finds the mapping cut already, and changes nothing.
        # Only where memory cannot be registered twice, or a limit leaves no room for both, it goes first.
        keeps = self._overlap
        kept: Registration[Handle] | None = None
        try:
            for _ in range(_TRIES):
                self._check_open()
                try:
                    registration, changed = self._register_once(low, high, start, end)
                except RegistrationLimitError:
                    if kept is None:
                        raise
                    self._give_up(kept)
                    kept, keeps = None, False
                    continue
                if not changed:
                    return registration
                if kept is not None:
                    self._give_up(kept)
                kept = registration
                if not keeps:
                    self._give_up(kept)
                    kept = None
                with self._changed:
                    self._retries += 1
        finally:
            if kept is not None:
                self._give_up(kept)
        raise RegistrationError(
            f"cannot register {high - low} bytes at {low:#x}: their mapping changed during each of {_TRIES} tries; "
            "do not unmap or move memory while it is being used"
        )

    def _register_once(self, low: int, high: int, start: int, end: int) -> tuple[Registration[Handle], bool]:
        """Register [low, high) for a use of [start, end). True: it changed meanwhile."""
        count = 1
        while True:
            reserved = self._make_room(low, high)
            try:
                return self._pin(reserved, start, end)
            except (RegistrationLimitError, TooManyRegionsError, OSError) as error:
                message = f"cannot register {high - low} bytes at {low:#x}: {error}"
                if isinstance(error, OSError) and error.errno not in _LIMITS:
                    raise RegistrationError(message) from error
                with self._changed:
                    if not self._give_way(count):
                        if isinstance(error, RegistrationLimitError):
                            raise
                        raise RegistrationLimitError(f"{message}; all that is registered is in use") from error
                count *= 2

    def _watch(self, address: int, length: int) -> Region | None:
        if self._notifier is not None:
            try:
                return self._notifier.watch((address, length))
            except UnsupportedMemoryError as error:
                self._say_once(error)
        return None

    def _say_once(self, error: Exception) -> None:
        if not self._said:
            self._said = True
            warnings.warn(f"memory is registered anew for each use, because {error}", RuntimeWarning, stacklevel=4)

    def _make_room(self, low: int, high: int) -> int:
        """Wait until [low, high) can be registered, and reserve it."""
        what = f"cannot register {high - low} bytes at {low:#x}:"
        if high - low > self._max_bytes:
            raise RegistrationLimitError(f"{what} max_bytes is {self._max_bytes}")
        while True:
            self._deregister_or_warn()
            with self._changed:
                registrations, total, _, _ = self._load()
                if registrations >= self._max_registrations or total + high - low > self._max_bytes:
                    if not self._give_way(1):
                        raise RegistrationLimitError(
                            f"{what} {registrations} registrations with {total} bytes are in use, and the cache's "
                            "limits allow for no more; release some, or raise max_registrations or max_bytes"
                        )
                elif not self._overlap and self._overlaps(low, high):
                    if not self._give_way(0):
                        raise RegistrationError(
                            f"{what} a part of it is registered and in use, and this registrar cannot register memory "
                            "twice; release that first"
                        )
                else:
                    return self._reserve(low, high)

    def _give_way(self, count: int) -> bool:
        """Let go of `count` that are not in use, or wait for others to do so. False: there are none."""
        evicted = self._evict(count)
        self._evictions += evicted
        if not evicted:
            if not self._load()[2]:
                return False
            # Not for ever: what leaves after it was released in C is left to whoever comes first.
            self._changed.wait(0.01)
        return True

    # ---- Deregistering ----

    def _deregister_all(self) -> list[Exception]:
        """Deregister what nobody is to use any more; the errors."""
        count, errors = self._deregister_leaving()
        if count:
            with self._changed:
                self._failed += len(errors)
                self._changed.notify_all()
        return errors

    def _deregister_or_warn(self) -> None:
        if errors := self._deregister_all():
            warnings.warn(str(DeregistrationError(errors)), RuntimeWarning, stacklevel=6)

    def _left(self) -> None:
        if errors := self._deregister_all():
            raise DeregistrationError(errors) from errors[0]

    def collect(self) -> None:
        """Deregister what has changed and is not in use.

        The cache does so by itself when it has to register. Call this where memory that was unmapped should not stay
        pinned until then, and in C when umn_cache_release has returned true.

        Raises DeregistrationError if that fails.
        """
        with self._changed:
            if not self._closed:
                self._drop_stale()
        self._left()

    def flush(self) -> None:
        """Deregister all that is not in use, and try again what failed to be deregistered.

        Raises DeregistrationError if something cannot be; all else is deregistered then.
        """
        self._retry()
        self._evict()
        self._left()

    def invalidate(self, what: object) -> None:
        """Give nobody a registration that overlaps this memory (anything that `acquire` takes).

        It is deregistered now, or when its last user releases it. Raises DeregistrationError if that fails.
        """
        self._drop_range(*self._range(what))
        self._left()

    def close(self) -> None:
        """Deregister all that is not in use, the rest when its last user releases it. May be called more than once.

        Close the registrar after this. Raises DeregistrationError if something cannot be deregistered; to close once
        more tries again.
        """
        self._closed = True
        self._retry()
        self._drop_range()
        try:
            self._left()
        finally:
            if self._opens and self._notifier is not None:
                self._notifier.close()

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def stats(self) -> CacheStats:
        """What it has done and what it holds. Takes time in proportion to the number of registrations."""
        hits, stale, uncached, in_use, in_use_bytes = self._use_stats()
        registrations, total, _, kept = self._load()
        return CacheStats(
            hits=hits,
            misses=self._misses,
            stale=stale,
            evictions=self._evictions,
            merges=self._merges,
            retries=self._retries,
            uncached=uncached,
            failed_deregistrations=self._failed,
            registrations=registrations,
            registered_bytes=total,
            in_use=in_use,
            in_use_bytes=in_use_bytes,
            not_deregistered=kept,
        )

    def _abandon(self) -> None:
        """In the child of a fork. Takes no lock: a thread that is not here may hold it."""
        self._changed = threading.Condition()
        self._pending = []
        self._abandon_table()
        self._reset()
        if self._opens:
            self._notifier = None
            self._must_open = True


_caches: weakref.WeakSet[RegistrationCache[Any]] = weakref.WeakSet()


def _abandon_all() -> None:
    for cache in list(_caches):
        cache._abandon()


os.register_at_fork(after_in_child=_abandon_all)
