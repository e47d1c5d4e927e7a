"""What `Notifier` and `RegistrationCache` return."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ._core import Region
    from ._stacks import Stack

_NUMBERS = {
    "write": (1, 64),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "ioctl": (16, 29),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "shmat": (30, 196),
    "shmdt": (67, 197),
    "truncate": (76, 45),
    "ftruncate": (77, 46),
    "fallocate": (285, 47),
    "process_vm_writev": (311, 271),
    "io_uring_enter": (426, 426),
    "process_madvise": (440, 440),
}
"""On x86-64; on the architectures that came later."""
_CALLS = {numbers[os.uname().machine != "x86_64"]: name for name, numbers in _NUMBERS.items()}
_CALLS[-1] = "a page fault or the kernel itself"

NO_CALL = "no system call, or not known"
"""What changed memory, where a count has this instead of a number."""


def call_name(number: int) -> str:
    """Of a system call; -1: none, or not known."""
    return _CALLS.get(number, f"system call {number}")


class NotifierStats(NamedTuple):
    """Numbers about a notifier's table."""

    regions: int
    """Watched now."""
    bytes: int
    """Of shared memory."""
    free_bytes: int
    """Of these not in use."""
    segments: int
    """The parts of 256 KiB that it consists of."""
    levels: int
    """Of the index."""
    overflows: int
    """How often everything had to be invalidated."""


class CacheStats(NamedTuple):
    """What a cache has done, and what it holds. Counts begin at 0, also in the child of a fork."""

    hits: int
    """Calls of `acquire` that were given what was registered already, by Python or C."""
    misses: int
    """Calls that had to register."""
    stale: int
    """Registrations that were used for nothing new, because their memory had changed."""
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
    """Of these registrations."""
    in_use: int
    """Of the registrations."""
    in_use_bytes: int
    """Of the registrations in use."""
    not_deregistered: int
    """Of the registrations: those that the registrar failed to deregister."""


class Invalidation(NamedTuple):
    """One region that was hit since it was last reported."""

    region: Region
    """The one that was hit."""
    cookie: int
    """The region's."""
    start: int
    """What was invalidated, in bytes, clipped to the region: exactly that, or the whole region."""
    end: int
    """The first address after it."""
    exact: bool
    """Just one change hit the region, and `start` and `end` are its range."""
    thread: int
    """The thread that made the first of the changes, by its number in the pid namespace of the process that watches
    (gettid, threading.get_native_id); 0: not known, or it has none there."""
    syscall: int
    """The number of the system call that it was in; -1: a page fault, or not known."""
    stack: Stack | None = None
    """Of that change, with the names of its process and thread, and when it was. None: the notifier was not opened with
    stacks=True, or this one was lost."""

    @property
    def cause(self) -> str:
        """What invalidated the region, in words: `munmap by thread 4711`."""
        call = call_name(self.syscall)
        if self.thread:
            return f"{call} by thread {self.thread}"
        return call if self.syscall >= 0 else "not known"
