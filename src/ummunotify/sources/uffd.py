"""The source `uffd`: the kernel's userfaultfd tells this process of changes of its own private anonymous memory.

For where BPF is out of reach: it needs no privileges and no daemon. What it cannot see it refuses to watch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from .. import _uffd
from ..errors import SourceUnavailableError, TooManyRegionsError, UmmunotifyError, UnsupportedMemoryError
from .base import UnavailableError

_SETTLE_MILLISECONDS = 100
"""How long `read` waits for changes under way before it lets everything be invalid instead."""


def _why(failure: _uffd.Failure) -> UnavailableError:
    said = os.strerror(failure.error)
    match failure.step:
        case _uffd.OPEN:
            return UnavailableError(
                f"the system call userfaultfd is refused ({said}), "
                f"and so is /dev/userfaultfd ({os.strerror(failure.device_error)})",
                "allow userfaultfd in the container's seccomp profile, or give this user access to /dev/userfaultfd; "
                "the kernel needs CONFIG_USERFAULTFD",
            )
        case _uffd.IOCTL:
            return UnavailableError(
                f"the ioctl of a userfaultfd is refused ({said})", "allow ioctl in the process's seccomp filter"
            )
        case _uffd.FEATURES:
            return UnavailableError(
                "this kernel's userfaultfd cannot watch memory without protecting it, or not reliably",
                "use Linux 5.18 or later, on an architecture with write-protecting userfaultfd (x86-64, arm64)",
            )
        case _uffd.MEMORY:
            return UnavailableError(
                f"there is no memory for it ({said})",
                "raise RLIMIT_AS, or after mlockall(MCL_FUTURE) RLIMIT_MEMLOCK: it needs some 2 MiB",
            )
        case _uffd.THREAD:
            return UnavailableError(
                f"the thread that reads the events cannot be started ({said})",
                "raise RLIMIT_NPROC (ulimit -u) and the cgroup's pids.max; a seccomp filter that refuses clone3 must do so "
                "with ENOSYS",
            )
        case _uffd.READER:
            return UnavailableError(
                f"the thread that reads the events did not get its copy of the userfaultfd ({said})",
                "allow pidfd_open and pidfd_getfd in the process's seccomp filter, or refuse close_range too",
            )
        case _uffd.PROOF:
            return UnavailableError(
                "the kernel's userfaultfd did not tell of an unmapped page as it should",
                "please report this with the kernel's version",
            )
        case _uffd.TABLES:
            return UnavailableError(
                "this process has as many notifiers as it can have", "close notifiers that are no longer needed"
            )
    return UnavailableError(said, "")


class Mapping(NamedTuple):
    """A line of /proc/self/maps."""

    start: int
    end: int
    permissions: str
    inode: int
    name: str

    def __str__(self) -> str:
        return f"{self.start:#x}-{self.end:#x} {self.permissions} {self.name or '(anonymous)'}"


def _mappings(start: int, end: int) -> list[Mapping]:
    """Those that overlap [start, end), in order."""
    found = []
    try:
        lines = Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
    for line in lines:
        addresses, permissions, _, _, inode, *name = line.split(maxsplit=5)
        first, last = (int(address, 16) for address in addresses.split("-"))
        if first < end and last > start:
            found.append(Mapping(first, last, permissions, int(inode), "".join(name)))
    return found


def _hole(start: int, end: int, mappings: list[Mapping]) -> str:
    for mapping in mappings:
        if mapping.start > start:
            break
        start = mapping.end
    if start >= end:
        return "some of it was not mapped"
    return f"nothing is mapped at {start:#x}"


def _kind(mapping: Mapping) -> str | None:
    """Why changes of such memory cannot be seen, if it is known."""
    if mapping.permissions[3] == "s":
        if mapping.name.startswith("/SYSV"):
            return "a System V shared memory segment"
        return "shared memory"
    if mapping.inode and not mapping.name.startswith("/anon_hugepage"):
        return "a file's"
    if mapping.name in ("[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]"):
        return "the kernel's own"
    return None


def refusal(number: int, start: int, end: int) -> UmmunotifyError:
    """Why [start, end) cannot be watched, from what libummunotify/sources/uffd.h's functions fail with."""
    mappings = _mappings(start, end)
    length = end - start

    def unsupported(mapping: Mapping | None, reason: str) -> UnsupportedMemoryError:
        return UnsupportedMemoryError(start, length, str(mapping) if mapping else None, reason)

    match number:
        case _uffd.UNMAPPED:
            return unsupported(mappings[0] if mappings else None, _hole(start, end, mappings))
        case _uffd.KIND:
            for mapping in mappings:
                if kind := _kind(mapping):
                    return unsupported(
                        mapping,
                        f"it is {kind}, and userfaultfd tells only of private anonymous memory; "
                        "the source bpf sees this too",
                    )
            return unsupported(mappings[0] if mappings else None, "the kernel refuses to register it")
        case _uffd.OTHER:
            return unsupported(
                mappings[0] if mappings else None,
                "another userfaultfd of this process has registered some of it, and memory can have only one; "
                "let its user unregister it, or use the source bpf",
            )
        case _uffd.OWN:
            return unsupported(None, "some of it is what ummunotify itself works with")
        case _uffd.MAPPINGS:
            return TooManyRegionsError(
                "the kernel has no memory for another region, or the process too many mappings "
                "(raise the sysctl vm.max_map_count)"
            )
        case _uffd.NO_PROC:
            return unsupported(None, "it is huge pages, and without /proc it cannot be told of which kind; mount /proc")
        case _uffd.CLOSED:
            return SourceUnavailableError(
                {
                    "uffd": "the program has closed or replaced a descriptor of ummunotify's, so this notifier sees no more "
                    "changes, and all its regions are invalid; close it, and open another after descriptors were closed"
                }
            )
        case _uffd.START:
            return SourceUnavailableError({"uffd": f"watching cannot begin: {_why(_uffd.start_failure())}"})
    return SourceUnavailableError({"uffd": f"watching failed: {os.strerror(number)}"})


class UffdFeed:
    """A table of this process's own memory, fed by this process's own thread."""

    name = "uffd"

    def __init__(self) -> None:
        """Raises UnavailableError."""
        try:
            self._uffd = _uffd.Uffd()
        except _uffd.Failure as failure:
            raise _why(failure) from None
        self.source_address = self._uffd.address

    def add_segment(self, pages: int) -> int:
        return self._uffd.add_segment(pages)

    def bind(self) -> None:
        """Nothing to do: it feeds what is watched, from when it is watched."""

    def refusal(self, number: int, start: int, end: int) -> UmmunotifyError:
        return refusal(number, start, end)

    def wake_fd(self) -> int:
        return self._uffd.wake_fd()

    def acknowledge(self) -> None:
        self._uffd.acknowledge()

    def doubtful(self) -> bool:
        return not self._uffd.settle(_SETTLE_MILLISECONDS)

    def close(self) -> None:
        self._uffd.close()

    def abandon(self) -> None:
        self._uffd.close()
