"""Builds bare.c and uffd.c and binds them."""

from __future__ import annotations

import atexit
import ctypes
import functools
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_HERE = Path(__file__).parent
_CFLAGS = ("-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-I", str(_HERE.parent / "src" / "libummunotify"))


class _Timing(ctypes.Structure):
    _fields_ = (("cpu", ctypes.c_uint64), ("wall", ctypes.c_uint64), ("switches", ctypes.c_uint64))


class Timing(NamedTuple):
    """Nanoseconds for each of the things that were timed together."""

    cpu: float
    wall: float
    disturbed: bool
    """The thread had to wait for others meanwhile, and found its caches changed."""


@functools.cache
def _library() -> ctypes.CDLL:
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    path = Path(folder, "bare.so")
    subprocess.run(
        ["gcc", *_CFLAGS, *(str(_HERE / name) for name in ("bare.c", "uffd.c")), "-o", str(path)], check=True
    )
    library = ctypes.CDLL(str(path))
    library.bench_check.restype = ctypes.c_uint64
    library.bench_uffd_seen.restype = ctypes.c_uint64
    return library


def _timing(raw: _Timing, n: int) -> Timing:
    return Timing(raw.cpu / n, raw.wall / n, raw.switches != 0)


Addresses = ctypes.Array[ctypes.c_uint64]


def addresses(values: Sequence[int]) -> Addresses:
    return (ctypes.c_uint64 * len(values))(*values)


def churn(where: Addresses) -> Timing:
    """Map, touch and unmap a page at each of these addresses, which have to be free."""
    timing = _Timing()
    if _library().bench_churn(where, len(where), ctypes.byref(timing)):
        raise RuntimeError("an address is not free")
    return _timing(timing, len(where))


def map_each(where: Addresses) -> None:
    """A page at each of these addresses, which have to be free, in use."""
    if _library().bench_map_each(where, len(where)):
        raise RuntimeError("an address is not free")


def unmap_each(where: Addresses) -> Timing:
    """For each of the pages."""
    timing = _Timing()
    _library().bench_unmap_each(where, len(where), ctypes.byref(timing))
    return _timing(timing, len(where))


class Reader:
    """A bare userfaultfd, and a thread that reads its events and does nothing with them. A process's only one."""

    def __init__(self) -> None:
        if _library().bench_uffd_open():
            raise RuntimeError("userfaultfd is not available")

    def register(self, where: Addresses) -> None:
        if _library().bench_uffd_register(where, len(where)):
            raise RuntimeError("userfaultfd refuses these pages")

    @property
    def seen(self) -> int:
        """How many events it has read."""
        return int(_library().bench_uffd_seen())

    def ask(self, times: int) -> float:
        """What it costs to ask the kernel whether a change is under way: ns of CPU time each."""
        begun = time.thread_time_ns()
        _library().bench_uffd_ask(times)
        return (time.thread_time_ns() - begun) / times


def reserve(address: int, length: int) -> None:
    if _library().bench_reserve(ctypes.c_uint64(address), ctypes.c_uint64(length)):
        raise RuntimeError("an address is not free")


def unmap(address: int, length: int) -> Timing:
    timing = _Timing()
    _library().bench_unmap(ctypes.c_uint64(address), ctypes.c_uint64(length), ctypes.byref(timing))
    return _timing(timing, 1)


def check(rounds: int) -> Timing:
    """The inline check of core/table.h, of 1024 regions in turn."""
    timing = _Timing()
    valid = _library().bench_check(rounds, ctypes.byref(timing))
    if valid != rounds:
        raise RuntimeError("a region was not valid")
    return _timing(timing, rounds * 1024)


def probes() -> int:
    """How many BPF programs, anybody's, are attached where ours are: each costs every watching process some time."""
    return int(_library().bench_probes())
