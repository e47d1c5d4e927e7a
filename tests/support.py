"""Helpers for several test modules."""

import contextlib
import ctypes
import importlib
import mmap
import os
import re
import select
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import pytest

import ummunotify
from ummunotify import Invalidation, Notifier, Region, _core
from ummunotify.bpf import libbpf
from ummunotify.selftest.changes import PAGE, Memory, madvise

SYS = {
    "x86_64": {"bpf": 321, "clone": 56, "madvise": 28, "userfaultfd": 323},
    "aarch64": {"bpf": 280, "clone": 220, "madvise": 233, "userfaultfd": 282},
}[os.uname().machine]
"""Numbers of system calls."""

DUMPS_FRAMES = any(hasattr(ctypes.pythonapi, name) for name in ("PyUnstable_DumpTraceback", "_Py_DumpTraceback"))
"""This Python exports what shows a thread's frames without the GIL: 3.13 does not."""

LONG = 2000.0 if "UMMUNOTIFY_VM" in os.environ else 240.0
"""Seconds in which everything has happened that is going to, on a busy machine too, and in an emulated one."""

SLOW = "UMMUNOTIFY_SLOW" in os.environ
"""Long modes: hours, not seconds."""

# NumPy's threads would come with the import and go with a fork, and tests count threads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@contextlib.contextmanager
def meanwhile(*acts: Callable[[], object]) -> Iterator[None]:
    """Threads do it again and again, one each. It fails if they do."""
    stop = threading.Event()

    def repeat(act: Callable[[], object]) -> None:
        while not stop.is_set():
            act()

    with ThreadPoolExecutor(len(acts)) as pool:
        running = [pool.submit(repeat, act) for act in acts]
        try:
            yield
        finally:
            stop.set()
    for each in running:
        each.result()


def require(feature: str, reason: str, *, always: bool = True) -> NoReturn:
    """Skip the test, because `feature` is missing here.

    It fails instead if UMMUNOTIFY_REQUIRE, a list separated by commas, names the feature or "all"; the latter does not
    mean what not every machine can have (`always` is false).
    """
    required = os.environ.get("UMMUNOTIFY_REQUIRE", "").split(",")
    if feature in required or (always and "all" in required):
        pytest.fail(f"{feature} is required here, but: {reason}", pytrace=False)
    pytest.skip(f"{feature}: {reason}", allow_module_level=True)


def require_root(reason: str) -> None:
    if os.geteuid():
        require("root", reason)


def require_source(source: str) -> None:
    try:
        ummunotify.open(source).close()
    except ummunotify.SourceUnavailableError as error:
        require(source.partition(":")[0], str(error))


def require_module(name: str) -> Any:
    """Import it, or skip the test, or all tests of the module that calls."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        require(name, str(error))


def probes() -> list[str]:
    """The BPF source with each probe that there may be here, or what UMMUNOTIFY_SOURCE insists on."""
    named = _core.SOURCE_ENVIRONMENT in os.environ
    found = [each for each in _core.source_names(None if named else "bpf") if each.startswith("bpf:")]
    # Most tests use them: what is missing for good should not show as a test that was skipped, a thousand times.
    no_kvm = libbpf.btf_available() and libbpf.tracepoints_preemptible()
    able = [each for each in found if (not no_kvm if each == "bpf:kvm" else libbpf.kprobes_available())]
    return able or ["bpf:kvm"]


def in_child(function: Callable[[], object]) -> None:
    """Run `function` in a forked child; it must not raise."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function()
            status = 0
        except BaseException:  # nothing may get back into pytest's copy
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def is_ours(name: str) -> bool:
    """Is this an object of the library's, by its link in /proc/self/fd or its line in /proc/self/maps?

    BPF's and KVM's, the io_uring that keeps them open, and a userfaultfd. (A path may say so too.)
    """
    return re.search(r"anon_inode:\[?(bpf|kvm|io_uring|userfaultfd)|/dev/kvm", name) is not None


def open_fds() -> set[str]:
    """The descriptors that the process has open, without the one that this takes."""
    return {fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")}


def pinned_kib() -> int:
    """How much of the process's memory is pinned, in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmPin:"):
            return int(line.split()[1])
    raise AssertionError("/proc/self/status has no VmPin")


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.restype = ctypes.c_int
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

_MAP_NORESERVE = 0x4000
_MAP_FIXED_NOREPLACE = 0x100000


def map_memory(length: int, address: int | None = None) -> int:
    """Map private anonymous memory, at `address` if given and free; where it is."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | (_MAP_FIXED_NOREPLACE if address else 0)
    mapped = _libc.mmap(address, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if mapped == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(mapped)


def unmap_memory(address: int, length: int) -> None:
    if _libc.munmap(address, length) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def remap(address: int, length: int = PAGE) -> None:
    """Other memory at the same address."""
    unmap_memory(address, length)
    map_memory(length, address)


def hit(memory: Memory, first: int, last: int | None = None) -> None:
    """Change pages, which stay mapped."""
    last = first + 1 if last is None else last
    madvise(memory.at(first), (last - first) * PAGE, mmap.MADV_DONTNEED)


def watch(umn: Notifier, memory: Memory, first: int, last: int | None = None) -> Region:
    last = first + 1 if last is None else last
    return umn.watch((memory.at(first), (last - first) * PAGE))


def ranges(memory: Memory, events: list[Invalidation]) -> list[tuple[float, float, bool]]:
    """In pages of the memory."""
    return [
        ((event.start - memory.address) / PAGE, (event.end - memory.address) / PAGE, event.exact) for event in events
    ]


def later(act: Callable[[], None], seconds: float = 0.1) -> threading.Timer:
    timer = threading.Timer(seconds, act)
    timer.start()
    return timer


def readable(fd: int, timeout: float = 0) -> bool:
    by_select = bool(select.select([fd], [], [], timeout)[0])
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    with select.epoll() as epoll:
        epoll.register(fd, select.EPOLLIN)
        answers = {by_select, poll.poll(0) == [(fd, select.POLLIN)], epoll.poll(0) == [(fd, select.EPOLLIN)]}
    assert len(answers) == 1
    return answers.pop()


class _MapAttribute(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint32) for name in ("type", "key_size", "value_size", "max_entries", "flags"))


def bpf_map() -> int:
    """A BPF map of the kind that tables are in, which nothing feeds. Its descriptor."""
    attribute = _MapAttribute(2, 4, PAGE, 64, 1 << 10)  # BPF_MAP_TYPE_ARRAY, BPF_F_MMAPABLE
    fd: int = _libc.syscall(SYS["bpf"], 0, ctypes.byref(attribute), ctypes.sizeof(attribute))
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return fd


def show_secret(secret: int) -> None:
    """As the library does: by a change of a page of our own, in a register that the system call does not use."""
    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(-1, PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[0] = 1
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        arguments = ctypes.c_void_p(address), PAGE, mmap.MADV_DONTNEED, 0, ctypes.c_uint64(secret)
        assert libc.syscall(SYS["madvise"], *arguments) == 0
