"""The feeder of this process's own notifiers: what the daemon is to its clients (ummunotify_feeder.h).

One program for the process and each probe, however many notifiers there are. It lives as long as a connection does.

Nothing here can be torn by a signal handler's exception: `Connection` is native, and a program is loaded by a thread,
as signal handlers run in the main thread only. What an interrupted call has begun is finished without it: the next call
takes it over, or it is closed with the last reference to it. No lock is waited for, so none is left behind, and none is
in a fork's way.
"""

from __future__ import annotations

import _thread
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from .._abi import Probe
from .._bpf import Connection, epoch
from ..errors import DescriptorLostError, UnavailableError
from .program import Program, attached, why

if TYPE_CHECKING:
    from .._stacks import Tracer

TABLES = 64
"""Notifiers in one process that have the same probe. Each that can be costs 16 KiB of kernel memory, and no time."""

_POLL_SECONDS = 0.001


class FeederConnection(Protocol):
    """What `connect` returns: one notifier's partner. One thread at a time; not after a fork."""

    def exchange(self, request: bytes, /) -> tuple[bytes, list[int]]:
        """Answer a struct umn_request: a struct umn_reply, and descriptors that the caller closes.

        To be called from native code, or an exception that a signal handler raises may lose the descriptors. Of the
        statuses there are OK; PROCESS_CLIENTS when all tables are in use, `value` being how many there are; UNSEEN; and
        FAILED with an errno. Raises UnavailableError: the connection cannot be used any more.
        """

    def may_have_missed(self) -> bool:
        """Has the kernel skipped runs of the program since this was last asked?

        OSError, UnavailableError: it is not known.
        """

    def disconnect(self) -> None:
        """The end of the connection. May be called more than once; in the child of a fork it only lets go."""


def _wait_for_thread(done: Callable[[], bool], began: int) -> None:
    """Raises UnavailableError if the process is no longer of that epoch."""
    # No event and no join: a handler that raises inside them would leave their locks locked.
    while not done():
        time.sleep(_POLL_SECONDS)
        if epoch() != began:
            # A signal handler has forked, and the child has no such thread.
            raise UnavailableError("the process was forked while its BPF program was being loaded", "try again")


class _Loading:
    """A program that is being loaded, by one thread for all that want it."""

    def __init__(self, probe: Probe, key: tuple[int, int]) -> None:
        self._probe = probe
        self._key = key
        self._claim = _thread.allocate_lock()
        self._program: Program | None = None
        self._error: UnavailableError | None = None
        self._done = False

    def wait(self) -> Program:
        """Raises UnavailableError."""
        try:
            # Also where another call has begun: if that was interrupted before it had a thread, this one's works.
            _thread.start_new_thread(self._work, ())
        except RuntimeError:  # no more threads for this user, or the interpreter is ending
            return self._load()
        _wait_for_thread(lambda: self._done, self._key[0])
        if self._program is not None:
            return self._program
        assert self._error is not None
        raise self._error

    def _work(self) -> None:
        if not self._claim.acquire(blocking=False):
            return
        try:
            self._program = self._load()
        except UnavailableError as error:
            self._error = error
        finally:
            # In this order: a call that comes in between finds the program.
            _loading.pop(self._key, None)
            self._done = True

    def _load(self) -> Program:
        """What goes wrong here is why the source does not work, also if it is a defect: the next source is tried."""
        try:
            program = attached(self._probe, TABLES)
        except UnavailableError:
            raise
        except OSError as error:
            raise why(error) from error
        except Exception as error:
            raise UnavailableError(f"{type(error).__name__}: {error}", "please report this") from error
        _programs[self._key] = weakref.ref(program)
        return program


# By the process's epoch, so that what was the parent's is not found in a child, and the probe.
_programs: dict[tuple[int, int], weakref.ref[Program]] = {}
_loading: dict[tuple[int, int], _Loading] = {}


def _program(probe: Probe) -> Program:
    # Of numbers: an IntEnum's hash is Python code, and setdefault would not be atomic.
    key = epoch(), int(probe)
    found = _programs.get(key)
    program = found() if found is not None else None
    if program is not None:
        try:
            program.check()
            return program
        except DescriptorLostError:
            # The program's own: notifiers that are open go on with it, and new ones get another.
            pass
    return _loading.setdefault(key, _Loading(probe, key)).wait()


def connect(probe: int) -> FeederConnection:
    """Become a notifier's partner, with this probe (enum umn_probe).

    Raises UnavailableError. Anything else is a signal handler's exception, and no reason to take another source.
    """
    program = _program(Probe(probe))
    try:
        return Connection(program)
    except OSError as error:
        if error.errno is None:  # a signal handler's TimeoutError
            raise
        raise why(error) from error


def trace(probe: Probe) -> Tracer:
    """Take the stacks of this process's changes, as long as the returned object is there.

    By a thread, for the same reason as above. Raises UnavailableError.
    """
    from . import tracing  # here, as few need it, and it takes as long as all else

    program, began = _program(probe), epoch()
    done: list[Tracer | UnavailableError] = []

    def work() -> None:
        try:
            done.append(tracing.trace(program))
        except UnavailableError as error:
            done.append(error)
        except BaseException as error:
            done.append(UnavailableError(f"{type(error).__name__}: {error}", "please report this"))

    try:
        _thread.start_new_thread(work, ())
    except RuntimeError:  # as above
        work()
    _wait_for_thread(lambda: bool(done), began)
    if isinstance(done[0], UnavailableError):
        raise done[0]
    return done[0]
