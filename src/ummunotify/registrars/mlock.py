"""Registers memory by locking it (mlock): it stays resident. Needs nothing, so it is what to try the cache with."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from . import RegistrarError, RegistrationError, RegistrationLimitError

__all__ = ["LockedRange", "MlockRegistrar"]

_PAGE = mmap.PAGESIZE
_MS_ASYNC = 1


@dataclass(frozen=True, slots=True, eq=False)
class LockedRange:
    """A range of locked memory, in bytes."""

    address: int
    length: int


class MlockRegistrar:
    """Locks memory into RAM.

    munlock unlocks a page however often it was locked; this counts, and unlocks a page when the last range that touches
    it is deregistered. Pages that other code locks too are unlocked with it. What is locked counts against
    RLIMIT_MEMLOCK, but for CAP_IPC_LOCK.

    Threads: any thread may call any method; one lock serialises them. Fork: the kernel does not inherit locked memory,
    so in the child nothing is registered.
    """

    # For the cache; see Registrar.
    granularity = _PAGE
    merge = True

    def __init__(self) -> None:
        self._reset()
        _registrars.add(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._live: set[LockedRange] = set()
        self._count: dict[int, int] = {}
        """Of the ranges that touch a page, by its number."""

    def register(self, address: int, length: int) -> LockedRange:
        """Lock the pages of `length` bytes at `address`; they are made resident first.

        Raises RegistrationLimitError if that would exceed RLIMIT_MEMLOCK or if there is no memory, and
        RegistrationError if some of it is not mapped or may not be accessed.
        """
        pages = _pages(address, length)
        with self._lock:
            try:
                # Those that are locked already too: other memory may have been mapped there since.
                _call("mlock", address, length)
            except OSError as error:
                for start, end in _others(pages, self._count):
                    _unlock(start, end)
                raise _registration_error(address, length, error) from error
            for page in pages:
                self._count[page] = self._count.get(page, 0) + 1
            locked = LockedRange(address, length)
            self._live.add(locked)
            return locked

    def deregister(self, handle: LockedRange) -> None:
        """Unlock what no other range touches. RegistrarError if `handle` is not registered here."""
        with self._lock:
            if handle not in self._live:
                raise RegistrarError(f"{handle} is not registered here (was it deregistered before, or before a fork?)")
            self._live.remove(handle)
            free = []
            for page in _pages(handle.address, handle.length):
                self._count[page] -= 1
                if not self._count[page]:
                    del self._count[page]
                    free.append(page)
            for start, end in _runs(iter(free)):
                _unlock(start, end)


_registrars: weakref.WeakSet[MlockRegistrar] = weakref.WeakSet()


def _reset_all() -> None:
    for registrar in list(_registrars):
        registrar._reset()


os.register_at_fork(after_in_child=_reset_all)


def _pages(address: int, length: int) -> range:
    return range(address // _PAGE, (address + length - 1) // _PAGE + 1)


def _runs(pages: Iterator[int]) -> Iterator[tuple[int, int]]:
    """Pages, by number and in order, as ranges of addresses."""
    first = last = -1
    for page in pages:
        if first >= 0 and page != last + 1:
            yield first * _PAGE, (last + 1) * _PAGE
            first = -1
        if first < 0:
            first = page
        last = page
    if first >= 0:
        yield first * _PAGE, (last + 1) * _PAGE


def _others(pages: range, counted: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Those that are not counted, as ranges of addresses. A length by mistake may be that of billions of pages."""
    start = pages.start
    for page in sorted(page for page in counted if page in pages):
        if start < page:
            yield start * _PAGE, page * _PAGE
        start = page + 1
    if start < pages.stop:
        yield start * _PAGE, pages.stop * _PAGE


def _unlock(start: int, end: int) -> None:
    """Unlock what is mapped there. What is not mapped is not locked."""
    try:
        _call("munlock", start, end - start)
        return
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
    # There is a hole, and munlock stops there.
    with open("/proc/self/maps", errors="surrogateescape") as maps:
        lines = list(maps)
    for line in lines:
        low, high = (int(address, 16) for address in line.split(maxsplit=1)[0].split("-"))
        low, high = max(low, start), min(high, end)
        if low < high:
            with contextlib.suppress(OSError):  # unmapped just now
                _call("munlock", low, high - low)


def _registration_error(address: int, length: int, error: OSError) -> RegistrationError:
    message = f"cannot lock {length} bytes at {address:#x}"
    if error.errno == errno.ENOMEM:
        start = address & -_PAGE
        try:
            _call("msync", start, address + length - start, _MS_ASYNC)  # does nothing but look whether it is mapped
        except OSError:
            return RegistrationError(f"{message}: some of it is not mapped, or may not be accessed")
    if error.errno in (errno.ENOMEM, errno.EAGAIN, errno.EPERM):
        return RegistrationLimitError(
            f"{message}: {error.strerror}; raise RLIMIT_MEMLOCK (ulimit -l), or deregister other memory"
        )
    return RegistrationError(f"{message}: {error.strerror}")


_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, address: int, length: int, *rest: int) -> None:
    """Call the kernel, without the GIL."""
    if getattr(_libc, name)(ctypes.c_void_p(address), ctypes.c_size_t(length), *rest):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
