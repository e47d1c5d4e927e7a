"""What `Notifier` and `RegistrationCache` return."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ._core import Region

_CALLS = {
    -1: "a page fault or the kernel itself",
    1: "write",
    9: "mmap",
    10: "mprotect",
    11: "munmap",
    12: "brk",
    16: "ioctl",
    25: "mremap",
    28: "madvise",
    30: "shmat",
    67: "shmdt",
    76: "truncate",
    77: "ftruncate",
    285: "fallocate",
    311: "process_vm_writev",
    426: "io_uring_enter",
    440: "process_madvise",
}


class NotifierStats(NamedTuple):
    """Numbers about a notifier's table."""

    regions: int
    """Watched now."""
    bytes: int
    """Of shared memory."""
    free_bytes: int
    """Of these not in use."""
    segments: int
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
    in_use: int
    """Of the registrations."""
    in_use_bytes: int
    not_deregistered: int
    """Of the registrations: those that the registrar failed to deregister."""


class Invalidation(NamedTuple):
    """One region that was hit since it was last reported."""

    region: Region
    cookie: int
    start: int
    """What was invalidated, in bytes, clipped to the region: exactly that, or the whole region."""
    end: int
    exact: bool
    """Just one change hit the region, and `start` and `end` are its range."""
    thread: int
    """The thread that made the first of the changes, by its number in the pid namespace of the process that watches
    (gettid, threading.get_native_id); 0: not known, or it has none there."""
    syscall: int
    """The number of the system call that it was in; -1: a page fault, or not known."""

    @property
    def cause(self) -> str:
        """What invalidated the region, in words: `munmap by thread 4711`."""
        call = _CALLS.get(self.syscall, f"system call {self.syscall}")
        if self.thread:
            return f"{call} by thread {self.thread}"
        return call if self.syscall >= 0 else "not known"
