"""The source `bpf`: this process's own BPF program sees the kernel's MMU notifications and writes the tables."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from collections.abc import Iterator

from .._abi import Op, Probe, Reply, Request, Status
from .._core import test_page, unmap
from ..bpf import feeder
from ..bpf.program import why
from ..errors import TooManyNotifiersError
from .base import Exercise, UnavailableError
from .client import ClientFeed

PAGE = mmap.PAGESIZE
_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class BpfFeed(ClientFeed):
    """A table of this process's own, fed by this process's own BPF program."""

    def __init__(self, probe: str = "kvm") -> None:
        """Raises UnavailableError, TooManyNotifiersError."""
        self._connection = feeder.connect(Probe[probe.upper()])
        try:
            reply, fds = self._ask(Op.HELLO)
            if reply.status == Status.PROCESS_CLIENTS:
                raise TooManyNotifiersError(reply.value)
            if reply.status != Status.OK:
                raise UnavailableError(*self._refusal(reply.status, reply.value))
            super().__init__("bpf", reply, fds)
        except BaseException:
            self._connection.disconnect()
            raise

    def _ask(self, op: Op) -> tuple[Reply, list[int]]:
        reply, fds = self._connection.exchange(Request(op).pack())
        return Reply.unpack(reply), fds

    def _hang_up(self) -> None:
        self._connection.disconnect()

    def _refusal(self, status: int, value: int) -> tuple[str, str]:
        if status == Status.UNSEEN:
            return "the probe did not see a change made for it to see", "please report this with the kernel's version"
        error = why(OSError(value, os.strerror(value)))
        return error.reason, error.remedy

    def _lost(self, error: OSError) -> UnavailableError:
        return why(error)

    def doubtful(self) -> bool:
        try:
            return self._connection.may_have_missed()
        except (UnavailableError, OSError):  # the program has closed the descriptor: it is not known
            return True


class ZapFeed(BpfFeed):
    """The same for a probe that sits at many functions, and not all changes pass all of them."""

    def __init__(self) -> None:
        """Raises UnavailableError, TooManyNotifiersError."""
        super().__init__("zap")

    @staticmethod
    def exercises() -> Iterator[Exercise]:
        return zap_exercises()


_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2


def zap_exercises() -> Iterator[Exercise]:
    """A change by each way that a page of our own can go.

    A compiler may have put a function into its caller, if both are in one file, where nobody can attach to it. This is
    how that would be noticed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
    fd = os.memfd_create("ummunotify", os.MFD_CLOEXEC)
    try:
        os.pwrite(fd, b"data", 0)
        os.ftruncate(fd, PAGE)
        for name, flags, act in (
            ("a page was discarded", _ANONYMOUS, lambda memory: memory.madvise(mmap.MADV_DONTNEED)),
            ("a page was freed lazily", _ANONYMOUS, lambda memory: memory.madvise(mmap.MADV_FREE)),
            ("a page was copied on write", mmap.MAP_PRIVATE, lambda memory: memory.write(b"new")),
            ("a file was truncated", mmap.MAP_SHARED, lambda memory: os.ftruncate(fd, 0)),
        ):
            with mmap.mmap(-1 if flags & mmap.MAP_ANONYMOUS else fd, PAGE, flags) as memory:
                page = ctypes.addressof(ctypes.c_char.from_buffer(memory))
                if flags & mmap.MAP_ANONYMOUS:
                    memory[0] = 1
                else:
                    memory[0]  # mapped, but not written
                yield Exercise(name, page, functools.partial(act, memory))
    finally:
        os.close(fd)
    old, new = test_page(), test_page()
    try:
        move = functools.partial(libc.mremap, old, PAGE, PAGE, _MREMAP_MAYMOVE | _MREMAP_FIXED, new)
        yield Exercise("a page was moved", old, move)
    finally:
        unmap(new, PAGE)
