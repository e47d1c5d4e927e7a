"""The table of cases: every way in which the kernel changes a mapping, and what must not count as one.

It knows nothing of notifiers: whoever can tell which pages were invalidated can run it against a source.

    with Memory() as memory:
        case.prepare(memory)
        ...  # watch memory.count units of memory.unit bytes at memory.address
        case.run(memory)
        ...  # case.expected: the ranges of units that must have been invalidated, and no others
"""

from __future__ import annotations

import _ctypes
import contextlib
import ctypes
import errno
import mmap
import os
import platform
import signal
import struct
import subprocess
import tempfile
import threading
import time
from _ctypes import dlclose
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

PAGE = mmap.PAGESIZE
HUGE_PAGE = PAGE * PAGE // 8
"""What a page table maps, which has 8 bytes for each page."""
COUNT = 8

PROT_NONE = 0
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
MAP_FIXED = 0x10
MAP_NORESERVE = 0x4000
MAP_HUGETLB = 0x40000
MAP_FIXED_NOREPLACE = 0x100000
MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4
MADV_POPULATE_READ, MADV_POPULATE_WRITE, MADV_DONTNEED_LOCKED, MADV_COLLAPSE = 22, 23, 24, 25
MADV_WIPEONFORK, MADV_KEEPONFORK = 18, 19
MADV_COLD, MADV_PAGEOUT, MADV_SOFT_OFFLINE, MADV_GUARD_INSTALL = 20, 21, 101, 102
SHM_REMAP = 0o40000
PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE, INSERT_RANGE = 0x03, 0x08, 0x10, 0x20
CLONE_VM, CLONE_PIDFD, CLONE_VFORK, CLONE_PARENT_SETTID = 0x100, 0x1000, 0x4000, 0x100000
CLONE_CHILD_CLEARTID, CLONE_CHILD_SETTID = 0x200000, 0x1000000

# System calls that libc has no function for, or whose number matters here.
_X86 = platform.machine() == "x86_64"
NR_MUNMAP, NR_REMAP_FILE_PAGES, NR_PKEY_MPROTECT = (11, 216, 329) if _X86 else (215, 234, 288)
NR_PROCESS_MADVISE, NR_IO_URING_SETUP, NR_IO_URING_ENTER = 440, 425, 426
NR_MPROTECT, NR_TGKILL, NR_SECCOMP = (10, 234, 317) if _X86 else (226, 131, 277)
NR_BRK, NR_GETPPID, NR_MBIND, NR_PERF_EVENT_OPEN = (12, 110, 237, 298) if _X86 else (214, 173, 235, 241)
NR_USERFAULTFD, NR_MEMFD_SECRET = (323 if _X86 else 282), 447
NR_FORK = 57 if _X86 else 220  # arm64 has only clone
NR32_MADVISE, NR32_MUNMAP, NR32_MMAP2 = 219, 91, 192  # of x86 only


class MissingError(Exception):
    """The case cannot be made on this machine; the message says why."""


# ---- System calls ----

_libc = ctypes.CDLL(None, use_errno=True)
_NAMES = ("mmap", "mremap", "syscall", "shmat", "sbrk", "read", "recv", "malloc", "signal")
_LONGS = {name: getattr(_libc, name) for name in _NAMES}
for _function in _LONGS.values():
    _function.restype = ctypes.c_long


def call(name: str, *arguments: int) -> int:
    """A function of libc that takes numbers and addresses, and fails with -1."""
    function = _LONGS.get(name) or getattr(_libc, name)
    result = int(function(*(ctypes.c_long(argument) for argument in arguments)))
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def syscall(number: int, *arguments: int) -> int:
    if platform.machine() not in ("x86_64", "aarch64"):
        raise MissingError("the numbers of system calls are not known here")
    return call("syscall", number, *arguments)


@contextlib.contextmanager
def missing_if(*numbers: int) -> Iterator[None]:
    """A kernel that does not know how to do this answers with one of these errors."""
    try:
        yield
    except OSError as error:
        if error.errno in numbers:
            raise MissingError(str(error)) from error
        raise


UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def map_at(address: int, length: int, flags: int = ANONYMOUS, fd: int = -1, prot: int = READ_WRITE) -> None:
    """Map there, over what is there."""
    call("mmap", address, length, prot, flags | MAP_FIXED, fd, 0)


def madvise(address: int, length: int, advice: int) -> None:
    with missing_if(errno.EINVAL) if advice > 20 else contextlib.nullcontext():
        call("madvise", address, length, advice)


def free(address: int) -> None:
    _libc.free(ctypes.c_void_p(address))


def load(address: int) -> int:
    return ctypes.c_ubyte.from_address(address).value


def store(address: int, value: int = 1) -> None:
    ctypes.c_ubyte.from_address(address).value = value


_CANNOT = 77
"""The exit status of a child that met a MissingError."""


def forked(act: Callable[[], object]) -> int:
    """Start a child that does this. It ends there whatever happens: nothing gets back into what is the caller's."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        act()
        status = 0
    except MissingError:
        status = _CANNOT
    except BaseException as error:
        os.write(2, f"{error!r}\n".encode())
    finally:
        os._exit(status)


def check_end(pid: int) -> None:
    """Wait for it."""
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status == _CANNOT:
        raise MissingError("the child was not able to do it")
    assert status == 0, status


def machine_code(code: str) -> Callable[..., int]:
    """A function in machine code, given in hexadecimal. It stays mapped."""
    function: Callable[..., int] = ctypes.CFUNCTYPE(ctypes.c_long, *[ctypes.c_long] * 5)(code_address(code))
    return lambda *arguments: function(*arguments, *[0] * (5 - len(arguments)))


_codes: dict[str, int] = {}


def code_address(code: str) -> int:
    if not code:
        raise MissingError("this kernel has no 32-bit system calls")
    if code not in _codes:
        data = bytes.fromhex(code)
        address = call("mmap", 0, PAGE, READ_WRITE, ANONYMOUS, -1, 0)
        ctypes.memmove(address, data, len(data))
        # Executable only now: at its first use as code the kernel makes arm64's instruction cache read it anew.
        call("mprotect", address, PAGE, mmap.PROT_READ | mmap.PROT_EXEC)
        _codes[code] = address
    return _codes[code]


def run_code(code: str, *arguments: int) -> int:
    """Its result. Raises OSError."""
    result = machine_code(code)(*arguments)
    if -4096 < result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


# x86's 32-bit system call: a number, a, b, c, d; its fifth argument is -1:
# mov eax, edi; push rbx; mov ebx, esi; mov r10d, edx; mov edx, ecx; mov ecx, r10d; mov esi, r8d; mov edi, -1; int 0x80;
# pop rbx; ret
INT_80 = "89f853 89f3 4189d2 89ca 4489d1 4489c6 bfffffffff cd80 5b c3" if _X86 else ""
# vfork, and munmap(a, b) in the child, which then exits:
# mov eax, 58; syscall; test eax, eax; jnz out; mov eax, 11; syscall; xor edi, edi; mov eax, 60; syscall; out: ret
# mov x9, x0; mov x10, x1; mov x0, 0x4111 (clone's flags); mov x1 to x4, 0; mov x8, 220; svc 0; cbnz x0, out;
# mov x0, x9; mov x1, x10; mov x8, 215; svc 0; mov x0, 0; mov x8, 93; svc 0; out: ret
VFORK_MUNMAP = (
    "b83a000000 0f05 85c0 7510 b80b000000 0f05 31ff b83c000000 0f05 c3"
    if _X86
    else "e90300aa ea0301aa 202288d2 010080d2 020080d2 030080d2 040080d2 881b80d2 010000d4 000100b5 e00309aa "
    "e1030aaa e81a80d2 010000d4 000080d2 a80b80d2 010000d4 c0035fd6"
)
# munmap(a, b):
# mov eax, 11; syscall; ret
# mov x8, 215; svc 0; ret
MUNMAP = "b80b000000 0f05 c3" if _X86 else "e81a80d2 010000d4 c0035fd6"
# clone(flags, stack, parent_tid, child_tid), and the child exits; with a stack of 0 it does not need one:
# mov r10, rcx; xor r8d, r8d; mov eax, 56; syscall; test eax, eax; jnz out; xor edi, edi; mov eax, 60; syscall; out: ret
# mov x4, x3; mov x3, 0; mov x8, 220; svc 0; cbnz x0, out; mov x0, 0; mov x8, 93; svc 0; out: ret
CLONE_EXIT = (
    "4989ca 4531c0 b838000000 0f05 85c0 7509 31ff b83c000000 0f05 c3"
    if _X86
    else "e40303aa 030080d2 881b80d2 010000d4 800000b5 000080d2 a80b80d2 010000d4 c0035fd6"
)
# fork, and the child does nothing until it is killed. Unlike os.fork this leaves all of the parent's memory alone:
# mov eax, 57; syscall; test eax, eax; jnz out; again: mov eax, 34; syscall; jmp again; out: ret
# mov x0, 17; mov x1 to x4, 0; mov x8, 220; svc 0; cbnz x0, out; again: mov x0 to x4, 0; mov x8, 73; svc 0; b again;
# out: ret
FORK_PAUSE = (
    "b839000000 0f05 85c0 7509 b822000000 0f05 ebf7 c3"
    if _X86
    else "200280d2 010080d2 020080d2 030080d2 040080d2 881b80d2 010000d4 200100b5 000080d2 010080d2 020080d2 "
    "030080d2 040080d2 280980d2 010000d4 f9ffff17 c0035fd6"
)
# A system call (number, a, b, c) with a sixth argument that it does not use:
# mov eax, edi; mov rdi, rsi; mov rsi, rdx; mov rdx, rcx; xor r10d, r10d; xor r8d, r8d; mov r9d, MARK; syscall; ret
# mov x8, x0; mov x0, x1; mov x1, x2; mov x2, x3; mov x3, 0; mov x4, 0; movz and movk x5, MARK; svc 0; ret
MARKED_CALL = (
    "89f8 4889f7 4889d6 4889ca 4531d2 4531c0 41b978563412 0f05 c3"
    if _X86
    else "e80300aa e00301aa e10302aa e20303aa 030080d2 040080d2 05cf8ad2 8546a2f2 010000d4 c0035fd6"
)
MARK = 0x12345678
# ret: what a signal handler does that only leaves its frame
RETURN = "c3" if _X86 else "c0035fd6"


# ---- Memory to be changed ----


class Memory:
    """`count` units of memory, with room that is reserved on both sides."""

    def __init__(self) -> None:
        self.undo = contextlib.ExitStack()
        self.unit = PAGE
        self.count = COUNT
        self.address = 0
        self.fd = -1
        """The file that is mapped, or a userfaultfd."""
        self.group = Path()
        """A control group."""
        self.elsewhere = 0
        """`count` units that are mapped and not watched."""
        self._held = contextlib.ExitStack()
        self._reserved = range(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo.close()

    @property
    def length(self) -> int:
        return self.count * self.unit

    def at(self, unit: int) -> int:
        return self.address + unit * self.unit

    def reserve(self) -> None:
        """Find the addresses, with as much room on both sides."""
        length = 3 * self.length
        base = call("mmap", 0, length + self.unit, PROT_NONE, ANONYMOUS | MAP_NORESERVE, -1, 0)
        self.undo.callback(call, "munmap", base, length + self.unit)
        base = -(-base // self.unit) * self.unit
        self.address = base + self.length
        self._reserved = range(base, base + length, self.unit)

    def map(self, flags: int = ANONYMOUS, fd: int = -1, prot: int = READ_WRITE) -> None:
        map_at(self.address, self.length, flags, fd, prot)

    def touch(self) -> None:
        for unit in range(self.count):
            store(self.at(unit), unit + 1)

    def fill(self) -> None:
        """Reserve again what is unmapped now, or somebody else may be given those addresses."""
        for address in self._reserved:
            with contextlib.suppress(FileExistsError):
                flags = ANONYMOUS | MAP_FIXED_NOREPLACE | MAP_NORESERVE
                call("mmap", address, self._reserved.step, PROT_NONE, flags, -1, 0)

    def open(self, fd: int) -> int:
        self.undo.callback(os.close, fd)
        return fd

    def until(self, end: Callable[[], object]) -> None:
        """What ends the memory's use: `end` calls it once, and if nobody does, it is called on leaving."""
        self._held.callback(end)
        self.undo.callback(self._held.close)

    def end(self) -> None:
        self._held.close()

    def child(self, pid: int) -> int:
        """Kill it in the end."""

        def kill() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

        self.undo.callback(kill)
        return pid


Act = Callable[[Memory], None]


def private(m: Memory) -> None:
    """Private anonymous memory, in use."""
    untouched(m)
    m.touch()


def untouched(m: Memory) -> None:
    m.reserve()
    m.map()
    # Or the kernel's choice of huge pages would decide what a change is.
    with contextlib.suppress(OSError):
        call("madvise", m.address, m.length, mmap.MADV_NOHUGEPAGE)


def shared(m: Memory) -> None:
    """Shared anonymous memory."""
    m.reserve()
    m.map(mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    m.touch()


def memfd(m: Memory) -> None:
    """A file in memory, mapped shared."""
    m.reserve()
    m.fd = m.open(os.memfd_create("changes"))
    os.ftruncate(m.fd, m.length)
    m.map(mmap.MAP_SHARED, m.fd)
    m.touch()


def private_file(m: Memory) -> None:
    """A file in memory, mapped privately and read."""
    m.reserve()
    m.fd = m.open(os.memfd_create("changes"))
    os.write(m.fd, b"content" * m.length)
    os.ftruncate(m.fd, m.length)
    m.map(mmap.MAP_PRIVATE, m.fd)
    for unit in range(m.count):
        load(m.at(unit))


def written_file(m: Memory) -> None:
    """A file on a disk, written back and not mapped."""
    m.reserve()
    m.fd, name = tempfile.mkstemp(dir="/var/tmp")
    m.undo.callback(os.close, m.fd)
    os.unlink(name)
    os.write(m.fd, b"\x90" * m.length)
    os.fsync(m.fd)


def disk_file(m: Memory) -> None:
    """A file on a disk, mapped shared and read."""
    written_file(m)
    m.map(mmap.MAP_SHARED, m.fd)
    for unit in range(m.count):
        load(m.at(unit))


def program_file(m: Memory) -> None:
    """A program of instructions that do nothing, mapped as programs are."""
    written_file(m)
    m.map(mmap.MAP_PRIVATE, m.fd, mmap.PROT_READ | mmap.PROT_EXEC)
    for unit in range(m.count):
        load(m.at(unit))


def program_in_part(m: Memory) -> None:
    """The same, with the units from 3 on still writable, as a loader or a compiler has them meanwhile."""
    written_file(m)
    m.map(mmap.MAP_PRIVATE, m.fd)
    for unit in range(m.count):
        load(m.at(unit))
    call("mprotect", m.address, 3 * m.unit, mmap.PROT_READ | mmap.PROT_EXEC)


def file_of_a_group(m: Memory) -> None:
    """A file on a disk whose pages count as those of another control group, m.group."""
    written_file(m)
    roots = [Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")]
    root = next((root for root in roots if (root / "cgroup.procs").exists()), roots[0])
    m.group = root / f"ummunotify-{os.getpid()}"
    with missing_if(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT):
        m.group.mkdir()
    m.undo.callback(m.group.rmdir)
    if not any((m.group / name).exists() for name in ("memory.reclaim", "memory.force_empty")):
        raise MissingError("control groups cannot be told to reclaim memory here")

    def read(m: Memory) -> None:
        (m.group / "cgroup.procs").write_text(str(os.getpid()))
        os.pread(m.fd, m.length, 0)

    os.posix_fadvise(m.fd, 0, 0, os.POSIX_FADV_DONTNEED)  # or they would be charged to this process
    in_child(read)(m)
    m.map(mmap.MAP_SHARED, m.fd)
    for unit in range(m.count):
        load(m.at(unit))


def secret(m: Memory) -> None:
    """Memory that the kernel itself has not mapped."""
    m.reserve()
    with missing_if(errno.ENOSYS, errno.ENOMEM):
        m.fd = m.open(syscall(NR_MEMFD_SECRET, 0))
    os.ftruncate(m.fd, m.length)
    with missing_if(errno.EAGAIN):  # it counts as locked
        m.map(mmap.MAP_SHARED, m.fd)
    m.touch()


def read_only(prepare: Act) -> Act:
    """Memory that may not be written."""

    def both(m: Memory) -> None:
        prepare(m)
        call("mprotect", m.address, m.length, mmap.PROT_READ)

    return both


UFFD_FEATURE_WP, UFFD_FEATURE_MOVE = 1 << 0, 1 << 16
UFFD_MISSING, UFFD_WP = 1, 2
UFFDIO_API, UFFDIO_REGISTER, UFFDIO_MOVE, UFFDIO_WRITEPROTECT = 0xC018AA3F, 0xC020AA00, 0xC028AA05, 0xC018AA06


def control(fd: int, request: int, *words: int) -> None:
    """ioctl, with a structure of 64-bit words."""
    structure = (ctypes.c_uint64 * len(words))(*words)
    call("ioctl", fd, request, ctypes.addressof(structure))


def userfaultfd(m: Memory, feature: int) -> int:
    with missing_if(errno.ENOSYS, errno.EPERM, errno.EINVAL):
        fd = m.open(syscall(NR_USERFAULTFD, os.O_CLOEXEC | 1))
        control(fd, UFFDIO_API, 0xAA, feature, 0)
    return fd


def room_to_move_to(prepare: Act) -> Act:
    """As much room that a userfaultfd, m.fd, can move pages to."""

    def both(m: Memory) -> None:
        prepare(m)
        base = call("mmap", 0, 2 * HUGE_PAGE, READ_WRITE, ANONYMOUS | MAP_NORESERVE, -1, 0)
        m.undo.callback(call, "munmap", base, 2 * HUGE_PAGE)
        m.elsewhere = -(-base // HUGE_PAGE) * HUGE_PAGE
        m.fd = userfaultfd(m, UFFD_FEATURE_MOVE)
        control(m.fd, UFFDIO_REGISTER, m.elsewhere, m.length, UFFD_MISSING, 0)

    return both


def write_protectable(m: Memory) -> None:
    """Memory that a userfaultfd, m.fd, can protect."""
    private(m)
    m.fd = userfaultfd(m, UFFD_FEATURE_WP)
    with missing_if(errno.EINVAL):
        control(m.fd, UFFDIO_REGISTER, m.address, m.length, UFFD_WP, 0)


def shared_with_child(prepare: Act) -> Act:
    """Memory that a child shares until one of the two writes to it."""

    def both(m: Memory) -> None:
        prepare(m)
        m.child(run_code(FORK_PAUSE))

    return both


def locked_read_only(prepare: Act) -> Act:
    """Locked memory that may be written only after mprotect."""

    def both(m: Memory) -> None:
        prepare(m)
        call("mprotect", m.address, m.length, mmap.PROT_READ)
        with missing_if(errno.ENOMEM, errno.EPERM):
            call("mlock", m.address, m.length)

    return both


def zero_page(m: Memory) -> None:
    """Private memory that was read and never written."""
    untouched(m)
    for unit in range(m.count):
        load(m.at(unit))


def two_mappings(m: Memory) -> None:
    private(m)
    call("mprotect", m.at(3), 2 * m.unit, mmap.PROT_READ)


def locked(m: Memory) -> None:
    private(m)
    with missing_if(errno.ENOMEM, errno.EPERM):
        call("mlock", m.address, m.length)


def with_elsewhere(prepare: Act) -> Act:
    """As much memory more."""

    def both(m: Memory) -> None:
        prepare(m)
        m.elsewhere = call("mmap", 0, m.length, READ_WRITE, ANONYMOUS, -1, 0)
        m.undo.callback(call, "munmap", m.elsewhere, m.length)

    return both


def with_neighbours(m: Memory) -> None:
    """Memory on both sides, too."""
    private(m)
    for address in (m.at(-1), m.at(m.count)):
        map_at(address, m.unit)
        store(address)


def with_room(m: Memory) -> None:
    """Nothing behind it, so that it can grow."""
    private(m)
    call("munmap", m.at(m.count), 2 * m.unit)


def system_v(m: Memory) -> None:
    """A System V segment."""
    m.reserve()
    segment = call("shmget", 0, m.length, 0o600)
    try:
        call("munmap", m.address, m.length)
        call("shmat", segment, m.address, 0)
    finally:
        call("shmctl", segment, 0, 0)
    m.touch()


def huge(m: Memory) -> None:
    """One transparent huge page; the units are parts of it."""
    m.unit = HUGE_PAGE
    m.count = 1
    m.reserve()
    m.map()
    with missing_if(errno.EINVAL):
        call("madvise", m.address, m.length, mmap.MADV_HUGEPAGE)
    store(m.address)
    require_huge_pages(m)
    m.unit = HUGE_PAGE // COUNT
    m.count = COUNT


def small_pages(m: Memory) -> None:
    """Pages that a huge page could replace."""
    m.unit = HUGE_PAGE
    m.count = 1
    m.reserve()
    m.map()
    with missing_if(errno.EINVAL):
        call("madvise", m.address, m.length, mmap.MADV_NOHUGEPAGE)
    ctypes.memset(m.address, 1, m.length)
    m.unit = HUGE_PAGE // COUNT
    m.count = COUNT


def require_huge_pages(m: Memory, kind: str = "AnonHugePages") -> None:
    smaps = Path("/proc/self/smaps").read_text()
    here = smaps[smaps.index(f"\n{m.address:x}-") :]
    if int(here[here.index(f"{kind}:") :].split()[1]) * 1024 < HUGE_PAGE:
        raise MissingError("the kernel gave no transparent huge page")


LARGE_UNIT = (1 << 20) + PAGE
"""No multiple of a huge page's size: nearly all ends of units are amid 2 MiB that a huge page could occupy."""


def large(m: Memory) -> None:
    """Megabytes without huge pages."""
    m.unit = LARGE_UNIT
    private(m)


def large_huge(m: Memory) -> None:
    """Megabytes with transparent huge pages."""
    m.unit = LARGE_UNIT
    m.reserve()
    m.map()
    with missing_if(errno.EINVAL):
        call("madvise", m.address, m.length, mmap.MADV_HUGEPAGE)
    m.touch()
    require_huge_pages(m)


def huge_file(m: Memory) -> None:
    """One huge page of a file in memory, mapped shared; the units are parts of it."""
    m.unit = HUGE_PAGE
    m.count = 1
    m.reserve()
    m.fd = m.open(os.memfd_create("changes"))
    os.ftruncate(m.fd, HUGE_PAGE)
    m.map(mmap.MAP_SHARED, m.fd)
    ctypes.memset(m.address, 1, HUGE_PAGE)
    with missing_if(errno.EINVAL, errno.EAGAIN, errno.EBUSY, errno.ENOMEM):
        call("madvise", m.address, HUGE_PAGE, MADV_COLLAPSE)
    require_huge_pages(m, "ShmemPmdMapped")
    m.unit = HUGE_PAGE // COUNT
    m.count = COUNT


def huge_zero_page(m: Memory) -> None:
    """Locked memory, read since its pages were discarded: the huge page of zeros, where the kernel has it."""
    huge(m)
    with missing_if(errno.ENOMEM, errno.EPERM):
        call("mlock", m.address, m.length)
    madvise(m.address, m.length, MADV_DONTNEED_LOCKED)
    load(m.address)


def hugetlb(flags: int, spare: int = 0) -> Act:
    """Huge pages of the reserved ones, of which `spare` more are free."""

    def prepare(m: Memory) -> None:
        reserved = Path("/proc/sys/vm/nr_hugepages")
        m.unit = HUGE_PAGE
        m.count = 3
        before = int(reserved.read_text())
        with contextlib.suppress(PermissionError):
            reserved.write_text(str(before + m.count + spare))
            m.undo.callback(reserved.write_text, str(before))
        m.reserve()
        with missing_if(errno.ENOMEM, errno.EINVAL):
            if flags & mmap.MAP_ANONYMOUS:
                m.map(flags | MAP_HUGETLB)
            else:
                m.fd = m.open(os.memfd_create("changes", os.MFD_HUGETLB))
                os.ftruncate(m.fd, m.length)
                m.map(flags, m.fd)
        m.touch()

    return prepare


def below_4_gib(m: Memory) -> None:
    """Mapped by a 32-bit system call."""
    getpid = machine_code(INT_80)
    if os.waitpid(forked(lambda: getpid(20)), 0)[1]:
        raise MissingError("this kernel has no 32-bit system calls")
    with missing_if(errno.ENOSYS):
        base = run_code(INT_80, NR32_MMAP2, 0, 3 * m.length, READ_WRITE, ANONYMOUS) & 0xFFFFFFFF
    m.undo.callback(call, "munmap", base, 3 * m.length)
    m.address = base + m.length
    assert m.address < 1 << 32
    m.touch()


def program_break(m: Memory) -> None:
    """Memory at the end of the heap."""
    end = call("sbrk", 0)
    # A unit more, so that the neighbour is not the allocator's.
    m.address = -(-end // PAGE) * PAGE + m.unit
    with missing_if(errno.ENOMEM):
        call("brk", m.at(m.count))
    with contextlib.suppress(OSError):
        call("madvise", m.at(-1), m.length + m.unit, mmap.MADV_NOHUGEPAGE)

    def restore() -> None:
        if call("sbrk", 0) == m.address:
            call("brk", end)

    m.undo.callback(restore)
    m.touch()


def large_program_break(m: Memory) -> None:
    """The same, of megabytes."""
    m.unit = LARGE_UNIT
    m.count = 3
    program_break(m)


def large_block(m: Memory) -> None:
    """Inside a block of malloc's, so large that it is a mapping of its own and always unmapped by free()."""
    m.unit = 5 << 20
    block = call("malloc", (m.count + 2) * m.unit - 64)
    m.until(lambda: free(block))
    if block % PAGE != 16:
        raise MissingError("this allocator does not map large blocks by themselves")
    m.address = block - 16 + m.unit


def small_block(m: Memory) -> None:
    """Inside a block of malloc's amid others."""
    m.count = 1
    length = 3 * m.unit
    blocks = {call("malloc", length) for _ in range(100)}
    # What is freed at the heap's end is given back to the kernel, so let another block be behind ours.
    block = next((block for block in blocks if block + length + 16 in blocks), None)
    for other in blocks - {block}:
        m.undo.callback(free, other)
    if block is None:
        raise MissingError("this allocator does not put equal blocks side by side")
    m.until(lambda: free(block))
    m.address = -(-block // PAGE) * PAGE
    ctypes.memset(block, 1, length)


def library(m: Memory) -> None:
    """A part of a shared library that was just loaded."""
    with tempfile.NamedTemporaryFile(dir="/var/tmp", suffix=".so") as copy:
        copy.write(Path(_ctypes.__file__).read_bytes())
        copy.flush()
        handle = ctypes.CDLL(copy.name)._handle
        m.until(lambda: dlclose(handle))
        maps = Path("/proc/self/maps").read_text().splitlines()
        parts = [line.split()[0].split("-") for line in maps if line.endswith(copy.name)]
    base, end = int(parts[0][0], 16), int(parts[-1][1], 16)
    m.address = base + m.unit
    assert m.at(m.count + 1) <= end


def thread_stack(m: Memory) -> None:
    """The far end of a thread's stack, while the thread waits."""
    ready, finish = threading.Event(), threading.Event()

    def work() -> None:
        attributes = ctypes.create_string_buffer(256)  # a pthread_attr_t has 56 bytes
        stack, size = ctypes.c_void_p(), ctypes.c_size_t()
        _libc.pthread_getattr_np(ctypes.c_void_p(threading.get_ident()), attributes)
        _libc.pthread_attr_getstack(attributes, ctypes.byref(stack), ctypes.byref(size))
        _libc.pthread_attr_destroy(attributes)
        m.address = stack.value or 0
        ready.set()
        finish.wait()

    thread = threading.Thread(target=work)
    thread.start()
    ready.wait()

    def end() -> None:
        finish.set()
        thread.join()
        while os.path.exists(f"/proc/self/task/{thread.native_id}"):
            time.sleep(0.001)

    m.until(end)


def vast(m: Memory) -> None:
    """Gigabytes, hardly used."""
    m.unit = 1 << 30
    m.reserve()
    m.map(ANONYMOUS | MAP_NORESERVE)
    call("madvise", m.address, m.length, mmap.MADV_NOHUGEPAGE)
    store(m.at(4) + 7 * PAGE)


# ---- What is done to it ----


def in_thread(act: Act) -> Act:
    """By another thread."""

    def run(m: Memory) -> None:
        errors: list[BaseException] = []

        def work() -> None:
            try:
                act(m)
                m.fill()
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]

    return run


def in_signal_handler(act: Act) -> Act:
    """By a handler that runs on top of whatever the thread was doing."""

    def run(m: Memory) -> None:
        errors: list[BaseException] = []

        def handle(_: int) -> None:
            try:
                act(m)
            except BaseException as error:
                errors.append(error)

        handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
        before = call("signal", signal.SIGURG, ctypes.cast(handler, ctypes.c_void_p).value or 0)
        try:
            call("raise", signal.SIGURG)
        finally:
            call("signal", signal.SIGURG, before)
        if errors:
            raise errors[0]

    return run


class _SignalStack(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("length", ctypes.c_size_t))


class _SignalAction(ctypes.Structure):
    """libc's."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_uint64 * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


SA_ONSTACK = 0x08000000


@contextlib.contextmanager
def signal_stack(m: Memory) -> Iterator[None]:
    """SIGURG puts its frame at the end of the memory, in this thread, and nothing else happens."""
    stack, before = _SignalStack(m.address, 0, m.length), _SignalStack()
    action, old = _SignalAction(code_address(RETURN), flags=SA_ONSTACK), _SignalAction()
    with missing_if(errno.ENOMEM):  # this CPU's registers are too many
        call("sigaltstack", ctypes.addressof(stack), ctypes.addressof(before))
    try:
        call("sigaction", signal.SIGURG, ctypes.addressof(action), ctypes.addressof(old))
        try:
            yield
        finally:
            call("sigaction", signal.SIGURG, ctypes.addressof(old), 0)
    finally:
        call("sigaltstack", ctypes.addressof(before), 0)


def take_signal(m: Memory) -> None:
    with signal_stack(m):
        call("raise", signal.SIGURG)


class _Filter(ctypes.Structure):
    """An instruction of a seccomp filter."""

    _fields_ = (("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("filter", ctypes.c_void_p))


PR_SET_NO_NEW_PRIVS = 38
SECCOMP_SET_MODE_FILTER = 1
SECCOMP_FILTER_FLAG_NEW_LISTENER, SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV = 1 << 3, 1 << 5
SECCOMP_RET_USER_NOTIF, SECCOMP_RET_ALLOW = 0x7FC00000, 0x7FFF0000
SECCOMP_NOTIF_RECV, SECCOMP_NOTIF_SEND = 0xC0502100, 0xC0182101


def refused(number: int, *arguments: Callable[[Memory], int]) -> Act:
    """A system call that a seccomp filter's supervisor refuses as unknown. A signal is delivered on the way out."""

    def run(m: Memory) -> None:
        listening: list[int] = []
        errors: list[BaseException] = []
        ready = threading.Event()

        def caller() -> None:
            # A filter is for good, but this one is only for this thread.
            instructions = (_Filter * 6)(
                _Filter(0x20, 0, 0, 0),  # load the number
                _Filter(0x15, 0, 3, number),  # if it is another, skip three (sigreturn has the same sixth argument)
                _Filter(0x20, 0, 0, 56),  # load the lower half of the sixth argument
                _Filter(0x15, 0, 1, MARK),  # if it is not that, skip one
                _Filter(0x06, 0, 0, SECCOMP_RET_USER_NOTIF),
                _Filter(0x06, 0, 0, SECCOMP_RET_ALLOW),
            )
            program = _Program(len(instructions), ctypes.addressof(instructions))
            # The signal must not make the kernel ask once more.
            flags = SECCOMP_FILTER_FLAG_NEW_LISTENER | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
            try:
                with signal_stack(m), missing_if(errno.EACCES, errno.EPERM, *UNKNOWN):
                    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
                    listening.append(syscall(NR_SECCOMP, SECCOMP_SET_MODE_FILTER, flags, ctypes.addressof(program)))
                    ready.set()
                    result = machine_code(MARKED_CALL)(number, *(argument(m) for argument in arguments))
                    assert result == -errno.ENOSYS, result
            except BaseException as error:
                errors.append(error)
            finally:
                ready.set()

        run_code(RETURN)  # maps the code before a source is asked
        thread = threading.Thread(target=caller)
        thread.start()
        ready.wait()
        if listening:
            fd = m.open(listening[0])
            notice = ctypes.create_string_buffer(80)
            call("ioctl", fd, SECCOMP_NOTIF_RECV, ctypes.addressof(notice))
            assert thread.native_id is not None
            syscall(NR_TGKILL, os.getpid(), thread.native_id, signal.SIGURG)
            # struct seccomp_notif_resp: the notice's number, the call's result, its error
            answer = bytearray(notice.raw[:8]) + struct.pack("=qiI", 0, -errno.ENOSYS, 0)
            call("ioctl", fd, SECCOMP_NOTIF_SEND, ctypes.addressof(ctypes.c_char.from_buffer(answer)))
        thread.join()
        if errors:
            raise errors[0]

    return run


class _Vector(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("address", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Registers:
    """Those of a thread that is stopped at a system call, as its debugger reads and writes them."""

    # Where struct user_regs_struct, or arm64's user_pt_regs, has the result, and the first, second and last argument.
    _COUNT, _RESULT, _FIRST, _SECOND, _SIXTH = (27, 10, 14, 13, 8) if _X86 else (34, 0, 0, 1, 5)
    _ORIG_RAX = 15
    """On x86-64 the call's number is among them."""

    def __init__(self, thread: int) -> None:
        self._thread = thread
        self._values = (ctypes.c_uint64 * self._COUNT)()
        self._transfer(PTRACE_GETREGSET, NT_PRSTATUS, self._values)

    def _transfer(
        self, request: int, which: int, values: ctypes.Array[ctypes.c_uint64] | ctypes.Array[ctypes.c_int]
    ) -> None:
        vector = _Vector(ctypes.addressof(values), ctypes.sizeof(values))
        call("ptrace", request, self._thread, which, ctypes.addressof(vector))

    def _write(self, number: int) -> None:
        if _X86:
            self._values[self._ORIG_RAX] = number
        else:
            self._transfer(PTRACE_SETREGSET, NT_ARM_SYSTEM_CALL, (ctypes.c_int * 1)(number))
        self._transfer(PTRACE_SETREGSET, NT_PRSTATUS, self._values)

    @property
    def sixth(self) -> int:
        return int(self._values[self._SIXTH])

    def make_call(self, number: int, first: int, second: int) -> None:
        self._values[self._FIRST], self._values[self._SECOND] = first, second
        self._write(number)

    def make_result(self, number: int, result: int) -> None:
        """Of that call."""
        self._values[self._RESULT] = result & (1 << 64) - 1
        self._write(number)


PTRACE_CONT, PTRACE_SYSCALL, PTRACE_GETREGSET, PTRACE_SETREGSET = 7, 24, 0x4204, 0x4205
PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_O_TRACESYSGOOD = 0x4206, 0x4207, 1
NT_PRSTATUS, NT_ARM_SYSTEM_CALL = 1, 0x404
PR_SET_PTRACER, WAIT_ALL = 0x59616D61, 0x40000000


def debug(
    thread: int, ready: int, enter: Callable[[_Registers], None], leave: Callable[[_Registers], None] | None
) -> None:
    """Trace a thread until its marked call; `enter` and `leave` change its registers. Then it gets a signal."""

    def trace(request: int, data: int = 0) -> None:
        call("ptrace", request, thread, 0, data)

    signal.alarm(60)
    with missing_if(errno.EPERM):
        trace(PTRACE_SEIZE, PTRACE_O_TRACESYSGOOD)
    trace(PTRACE_INTERRUPT)
    os.waitpid(thread, WAIT_ALL)
    trace(PTRACE_SYSCALL)
    os.write(ready, b".")
    entered = False
    while True:
        stop = os.WSTOPSIG(os.waitpid(thread, WAIT_ALL)[1])
        if stop == signal.SIGTRAP | 0x80:
            registers = _Registers(thread)
            if registers.sixth == MARK and not entered:
                entered = True
                enter(registers)
                if leave is None:
                    break
            elif entered:
                assert leave is not None
                leave(registers)
                syscall(NR_TGKILL, os.getppid(), thread, signal.SIGURG)
        trace(PTRACE_SYSCALL, stop if stop == signal.SIGURG else 0)
        if stop == signal.SIGURG:
            return  # still attached, when the signal's frame is made or soon before
    trace(PTRACE_CONT)


def debugged(
    enter: Callable[[Memory, _Registers], None], leave: Callable[[Memory, _Registers], None] | None = None
) -> Act:
    """A system call that a debugger makes another one, or gives another result."""

    def run(m: Memory) -> None:
        if platform.machine() not in ("x86_64", "aarch64"):
            raise MissingError("the registers are not known here")
        thread = threading.get_native_id()
        ready, theirs = os.pipe()
        run_code(RETURN)  # maps the code before a source is asked
        machine_code(MARKED_CALL)
        pid = forked(lambda: debug(thread, theirs, lambda r: enter(m, r), (lambda r: leave(m, r)) if leave else None))
        os.close(theirs)
        with contextlib.suppress(OSError):  # there is no Yama
            call("prctl", PR_SET_PTRACER, pid, 0, 0, 0)
        try:
            with signal_stack(m) if leave else contextlib.nullcontext():
                if os.read(ready, 1):
                    machine_code(MARKED_CALL)(NR_GETPPID, CLONE_FLAGS)
        finally:
            os.close(ready)
            check_end(pid)

    return run


def become_munmap(m: Memory, registers: _Registers) -> None:
    registers.make_call(NR_MUNMAP, m.at(2), 2 * m.unit)


CLONE_FLAGS = CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID | signal.SIGCHLD
"""The first argument that libc forks with."""


def refuse_fork(m: Memory, registers: _Registers) -> None:
    """What the registers are inside a call: on arm64 the first argument stays until the result takes its place."""
    registers.make_result(NR_FORK, -errno.ENOSYS if _X86 else CLONE_FLAGS)


def in_child(act: Act) -> Act:
    """By a child process, which has a copy of everything."""

    return lambda m: check_end(forked(lambda: act(m)))


def fallocate(m: Memory, mode: int, first: int, last: int) -> None:
    with missing_if(errno.EOPNOTSUPP, errno.ENOSYS):
        call("fallocate", m.fd, mode, first * m.unit, (last - first) * m.unit)


def read_into(m: Memory) -> None:
    """The kernel writes to unit 3."""
    source, sink = os.pipe()
    try:
        os.write(sink, b"data")
        assert call("read", source, m.at(3) + 100, 4) == 4
    finally:
        os.close(source)
        os.close(sink)


def direct_read(m: Memory) -> None:
    """A device writes to unit 3."""
    fd, name = tempfile.mkstemp(dir="/var/tmp")
    try:
        os.write(fd, b"data" * PAGE)
        os.fsync(fd)
        with missing_if(errno.EINVAL):
            direct = os.open(name, os.O_RDONLY | os.O_DIRECT)
        try:
            assert call("read", direct, m.at(3), PAGE) == PAGE
        finally:
            os.close(direct)
    finally:
        os.close(fd)
        os.unlink(name)


def direct_write(m: Memory) -> None:
    """Past the page cache, into unit 3 of the file."""
    with missing_if(errno.EINVAL):
        fd = os.open(f"/proc/self/fd/{m.fd}", os.O_RDWR | os.O_DIRECT)
    try:
        with mmap.mmap(-1, m.unit) as data:
            data.write(b"new" * (m.unit // 3))
            assert os.pwritev(fd, [data], 3 * m.unit) == m.unit
    finally:
        os.close(fd)
    cached = ctypes.c_ubyte()
    call("mincore", m.at(3), 1, ctypes.addressof(cached))
    if cached.value & 1:
        raise MissingError("this file system writes into its page cache, where the page stays")  # tmpfs


def clone_exit(flags: int, tid_address: int) -> None:
    """A fork that gets the child's number written to an address."""
    pid = run_code(CLONE_EXIT, flags | signal.SIGCHLD, 0, tid_address, tid_address)
    os.waitpid(pid, 0)
    if flags & CLONE_PIDFD:
        os.close(ctypes.c_int.from_address(tid_address).value)


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def write_to(pid: int, address: int) -> None:
    """process_vm_writev."""
    data = ctypes.create_string_buffer(b"data")
    ours, theirs = _IoVec(ctypes.addressof(data), 4), _IoVec(address, 4)
    with missing_if(errno.EPERM, errno.ENOSYS):
        call("process_vm_writev", pid, ctypes.addressof(ours), 1, ctypes.addressof(theirs), 1, 0)


def write_to_parent(m: Memory) -> None:
    write_to(os.getppid(), m.at(3))


def poke_parent(m: Memory) -> None:
    """As a debugger does."""
    try:
        fd = os.open(f"/proc/{os.getppid()}/mem", os.O_RDWR)
    except PermissionError as error:
        raise MissingError(str(error)) from error
    with contextlib.suppress(OSError):  # some kernels let nobody else write past a protection
        call("ptrace", PTRACE_SEIZE, os.getppid(), 0, 0)
    with missing_if(errno.EIO):
        os.pwrite(fd, b"data", m.at(3))


def process_madvise(pid: int, address: int, length: int, advice: int) -> None:
    pidfd = os.pidfd_open(pid)
    try:
        vector = _IoVec(address, length)
        with missing_if(errno.EPERM, *UNKNOWN):
            syscall(NR_PROCESS_MADVISE, pidfd, ctypes.addressof(vector), 1, advice, 0)
    finally:
        os.close(pidfd)


PR_SET_MM, PR_SET_MM_START_BRK, PR_SET_MM_BRK = 35, 6, 7


def shrink_placed_heap(m: Memory) -> None:
    """The heap is where the memory is, for a moment."""
    start, end = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[44]), syscall(NR_BRK, 0)
    try:
        with missing_if(errno.EPERM, errno.EINVAL):
            call("prctl", PR_SET_MM, PR_SET_MM_BRK, m.at(m.count), 0, 0)
            call("prctl", PR_SET_MM, PR_SET_MM_START_BRK, m.address, 0, 0)
        assert syscall(NR_BRK, m.at(3)) == m.at(3)
    finally:
        with contextlib.suppress(OSError):
            call("prctl", PR_SET_MM, PR_SET_MM_START_BRK, start, 0, 0)
            call("prctl", PR_SET_MM, PR_SET_MM_BRK, end, 0, 0)


def present(m: Memory) -> bool:
    """Is any page still mapped?"""
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(m.address // PAGE * 8)
        entries = pagemap.read(m.length // PAGE * 8)
    return any(byte & 0x80 for byte in entries[7::8])


def reclaim_group(m: Memory) -> None:
    reclaim = m.group / "memory.reclaim"
    for _ in range(100):
        if not present(m):
            return
        with contextlib.suppress(OSError):  # it is not content with what it got
            if reclaim.exists():
                reclaim.write_text("1G")
            else:
                (m.group / "memory.force_empty").write_text("0")
    raise MissingError("the kernel does not reclaim it")


def require_swap(wanted: bool) -> None:
    if (len(Path("/proc/swaps").read_text().splitlines()) > 1) != wanted:
        raise MissingError("there is swap space" if not wanted else "there is no swap space")


def page_out(m: Memory) -> None:
    require_swap(True)
    for _ in range(100):
        madvise(m.address, m.length, MADV_PAGEOUT)
        if not present(m):
            return
    raise MissingError("the kernel does not reclaim it")


def page_out_in_vain(m: Memory) -> None:
    require_swap(False)
    madvise(m.address, m.length, MADV_PAGEOUT)


def collapse(m: Memory) -> None:
    call("madvise", m.address, m.length, mmap.MADV_HUGEPAGE)
    with missing_if(errno.EINVAL, errno.EAGAIN, errno.EBUSY, errno.ENOMEM):
        call("madvise", m.address, m.length, MADV_COLLAPSE)
    require_huge_pages(m)


def move_out(m: Memory, first: int, last: int) -> None:
    """By another userfaultfd than a source's."""
    with missing_if(errno.EBUSY, errno.EAGAIN):
        control(m.fd, UFFDIO_MOVE, m.elsewhere, m.at(first), (last - first) * m.unit, 0, 0)


def set_uprobe(m: Memory) -> int:
    """At unit 3, until the descriptor is closed."""
    try:
        kind = int(Path("/sys/bus/event_source/devices/uprobe/type").read_text())
    except FileNotFoundError as error:
        raise MissingError("the kernel has no uprobes") from error
    path = ctypes.create_string_buffer(f"/proc/self/fd/{m.fd}".encode())
    attributes = bytearray(112)  # struct perf_event_attr: type, size, ..., config1, config2
    struct.pack_into("=II", attributes, 0, kind, len(attributes))
    struct.pack_into("=QQ", attributes, 56, ctypes.addressof(path), 3 * m.unit)
    address = ctypes.addressof(ctypes.c_char.from_buffer(attributes))
    with missing_if(errno.EACCES, errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP):
        return syscall(NR_PERF_EVENT_OPEN, address, 0, -1, -1, 0)


def probe_user(m: Memory) -> None:
    """A uprobe is set, and removed."""
    os.close(set_uprobe(m))


def set_uprobe_by_mprotect(m: Memory) -> None:
    """The kernel sets it only when the unit becomes part of the mapping before, which is not writable."""
    m.open(set_uprobe(m))
    call("mprotect", m.at(3), m.unit, mmap.PROT_READ | mmap.PROT_EXEC)
    if load(m.at(3)) == 0x90:
        raise MissingError("the kernel has not set the uprobe")


def protect_by_userfaultfd(m: Memory) -> None:
    for mode in (1, 0):
        control(m.fd, UFFDIO_WRITEPROTECT, m.address, m.length, mode)


def clear_refs(what: int) -> Act:
    def run(m: Memory) -> None:
        with missing_if(errno.EINVAL, errno.EACCES):
            Path("/proc/self/clear_refs").write_text(str(what))

    return run


MPOL_DEFAULT, MPOL_BIND, MPOL_MF_MOVE = 0, 2, 2


def policy(address: int, length: int, mode: int, flags: int = 0) -> None:
    """Where pages of this range are to be placed: on node 0, or anywhere."""
    nodes = ctypes.c_ulong(1)
    with missing_if(errno.ENOSYS, errno.EPERM):
        bound = mode == MPOL_BIND
        syscall(NR_MBIND, address, length, mode, ctypes.addressof(nodes) if bound else 0, 64 if bound else 0, flags)


def bind_parts(m: Memory) -> None:
    for mode in (MPOL_BIND, MPOL_DEFAULT):
        policy(m.at(2) + PAGE, PAGE, mode)
        policy(m.at(5), m.unit, mode)


def register_parts(m: Memory) -> None:
    fd = userfaultfd(m, 0)
    with missing_if(errno.EINVAL, errno.EBUSY):
        control(fd, UFFDIO_REGISTER, m.at(2) + PAGE, PAGE, UFFD_MISSING, 0)
    control(fd, 0x8010AA01, m.at(2) + PAGE, PAGE)


def write_back(m: Memory) -> None:
    os.fsync(m.fd)


def written_disk_file(m: Memory) -> None:
    """A file on a disk that was changed through its mapping."""
    disk_file(m)
    m.touch()


def shrink_heap(m: Memory) -> None:
    if call("sbrk", 0) != m.at(m.count):
        raise MissingError("the allocator has moved the heap's end meanwhile")
    call("brk", m.address)


def attach_over(m: Memory) -> None:
    segment = call("shmget", 0, 2 * m.unit, 0o600)
    try:
        call("shmat", segment, m.at(3), SHM_REMAP)
    finally:
        call("shmctl", segment, 0, 0)


def frame(m: Memory, unit: int) -> int:
    """The page frame that is mapped there. Only root may know."""
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(m.at(unit) // PAGE * 8)
        number = int.from_bytes(pagemap.read(8), "little") & (1 << 55) - 1
    if not number:
        raise MissingError("only root may know where pages are")
    return number


def merge(m: Memory) -> None:
    """Kernel samepage merging finds that all units are equal."""
    settings = {name: Path("/sys/kernel/mm/ksm", name) for name in ("run", "pages_to_scan")}
    for unit in range(m.count):
        ctypes.memset(m.at(unit), 0x5A, m.unit)
    with missing_if(errno.EINVAL):
        call("madvise", m.address, m.length, mmap.MADV_MERGEABLE)
    m.undo.callback(call, "madvise", m.address, m.length, mmap.MADV_UNMERGEABLE)
    for path, value in ((settings["pages_to_scan"], "10000"), (settings["run"], "1")):
        with missing_if(errno.EACCES, errno.ENOENT):
            m.undo.callback(path.write_text, path.read_text())
            path.write_text(value)
    while len({frame(m, unit) for unit in range(m.count)}) > 1:
        time.sleep(0.01)


def merged(m: Memory) -> None:
    private(m)
    merge(m)


def collapse_in_background(m: Memory) -> None:
    """khugepaged finds that they could be a huge page."""
    settings = Path("/sys/kernel/mm/transparent_hugepage/khugepaged")
    call("madvise", m.address, m.length, mmap.MADV_HUGEPAGE)
    for name, value in (("scan_sleep_millisecs", "10"), ("pages_to_scan", "4096")):
        with missing_if(errno.EACCES, errno.ENOENT):
            m.undo.callback((settings / name).write_text, (settings / name).read_text())
            (settings / name).write_text(value)
    deadline = time.monotonic() + 60
    while True:
        try:
            return require_huge_pages(m)
        except MissingError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def soft_offline(m: Memory) -> None:
    """The page frame of unit 3 is not used any more, until the machine is started again."""
    with missing_if(errno.EINVAL, errno.EPERM, errno.EOPNOTSUPP):
        call("madvise", m.at(3), m.unit, MADV_SOFT_OFFLINE)


def soft_offline_frame(m: Memory) -> None:
    """The same by its physical address."""
    with missing_if(errno.EACCES, errno.ENOENT, errno.ENXIO, errno.EOPNOTSUPP):
        Path("/sys/devices/system/memory/soft_offline_page").write_text(hex(frame(m, 3) * PAGE))


def balance(m: Memory) -> None:
    """The kernel takes the right to use pages, to find out which processor uses them."""
    path = Path("/proc/sys/kernel/numa_balancing")
    with missing_if(errno.EACCES, errno.ENOENT):
        m.undo.callback(path.write_text, path.read_text())
        path.write_text("1")
    updates = "numa_pte_updates "

    def count() -> int:
        text = Path("/proc/vmstat").read_text()
        return int(text[text.index(updates) + len(updates) :].split()[0])

    before, deadline = count(), time.monotonic() + 20
    while count() == before and time.monotonic() < deadline:
        use(m)
    if count() == before:
        raise MissingError("the kernel does not balance")


def there_and_back(m: Memory) -> None:
    for protection in (mmap.PROT_READ, PROT_NONE, READ_WRITE):
        call("mprotect", m.address, m.length, protection)
        call("mprotect", m.at(2), m.unit, READ_WRITE)


def with_key(m: Memory) -> None:
    for protection in (mmap.PROT_READ, READ_WRITE):
        with missing_if(errno.ENOSYS):
            syscall(NR_PKEY_MPROTECT, m.address, m.length, protection, -1)


def use(m: Memory) -> None:
    for unit in range(m.count):
        store(m.at(unit), load(m.at(unit)) + 1)


def advise_harmlessly(m: Memory) -> None:
    for advice in (
        mmap.MADV_NORMAL,
        mmap.MADV_RANDOM,
        mmap.MADV_SEQUENTIAL,
        mmap.MADV_WILLNEED,
        mmap.MADV_DONTFORK,
        mmap.MADV_DOFORK,
        MADV_WIPEONFORK,
        MADV_KEEPONFORK,
        mmap.MADV_DONTDUMP,
        mmap.MADV_DODUMP,
        mmap.MADV_HUGEPAGE,
        mmap.MADV_NOHUGEPAGE,
        MADV_COLD,
        MADV_POPULATE_READ,
        MADV_POPULATE_WRITE,
    ):
        with contextlib.suppress(OSError):
            call("madvise", m.address, m.length, advice)


def lock_and_unlock(m: Memory) -> None:
    with missing_if(errno.ENOMEM, errno.EPERM):
        call("mlock", m.address, m.length)
    call("munlock", m.address, m.length)


def protect_parts(m: Memory) -> None:
    for protection in (mmap.PROT_READ, PROT_NONE, READ_WRITE):
        call("mprotect", m.at(2) + PAGE, PAGE, protection)
        call("mprotect", m.at(5), m.unit, protection)


def lock_parts(m: Memory) -> None:
    with missing_if(errno.ENOMEM, errno.EPERM):
        call("mlock", m.at(2) + PAGE, PAGE)
        call("mlock", m.at(5), m.unit)
    call("munlock", m.at(2) + PAGE, PAGE)
    call("munlock", m.at(5), m.unit)


def advise_parts(m: Memory) -> None:
    for advice in (
        mmap.MADV_RANDOM,
        mmap.MADV_NORMAL,
        mmap.MADV_DONTFORK,
        mmap.MADV_DOFORK,
        MADV_WIPEONFORK,
        MADV_KEEPONFORK,
        mmap.MADV_DONTDUMP,
        mmap.MADV_DODUMP,
        mmap.MADV_NOHUGEPAGE,
        mmap.MADV_HUGEPAGE,
    ):
        with contextlib.suppress(OSError):
            call("madvise", m.at(2) + PAGE, PAGE, advice)
            call("madvise", m.at(5), m.unit, advice)


def change_neighbours(m: Memory) -> None:
    for address in (m.at(-1), m.at(m.count)):
        madvise(address, m.unit, mmap.MADV_DONTNEED)
        call("munmap", address, m.unit)


def fail(m: Memory) -> None:
    """Calls that the kernel refuses."""
    for name, *arguments in (
        ("munmap", m.address + 1, m.length),
        ("mremap", m.address, m.length, m.length, MREMAP_FIXED, m.elsewhere),
        ("mmap", m.address, m.length, READ_WRITE, ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0),
        ("madvise", m.address, m.length, 99),
        ("mprotect", m.address, m.length, 1 << 20),
        ("shmat", -1, m.address, SHM_REMAP),
    ):
        try:
            call(str(name), *(int(argument) for argument in arguments))
        except OSError:
            continue
        raise AssertionError(f"{name} did not fail")


def map_and_unmap(m: Memory) -> None:
    for _ in range(10):
        address = call("mmap", 0, m.length, READ_WRITE, ANONYMOUS, -1, 0)
        store(address)
        call("munmap", address, m.length)


def start_process(m: Memory) -> None:
    subprocess.run(["/bin/true"], check=True)
    os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)
    subprocess.run(["/bin/true"], check=True, preexec_fn=os.getpid)


def start_thread(m: Memory) -> None:
    thread = threading.Thread(target=use, args=(m,))
    thread.start()
    thread.join()


def remap_elsewhere(m: Memory, first: int, last: int, flags: int = 0) -> None:
    length = (last - first) * m.unit
    with missing_if(errno.EINVAL) if flags else contextlib.nullcontext():
        call("mremap", m.at(first), length, length, MREMAP_MAYMOVE | MREMAP_FIXED | flags, m.elsewhere)


# ---- io_uring, as little of it as does one operation ----


class _Sqe(ctypes.Structure):
    _fields_ = (
        ("opcode", ctypes.c_ubyte),
        ("flags", ctypes.c_ubyte),
        ("ioprio", ctypes.c_uint16),
        ("fd", ctypes.c_int32),
        ("off", ctypes.c_uint64),
        ("addr", ctypes.c_uint64),
        ("len", ctypes.c_uint32),
        ("advice", ctypes.c_uint32),
        ("rest", ctypes.c_uint64 * 4),
    )


def io_uring(sqe: _Sqe) -> None:
    """One operation, done by a worker thread of the kernel if it likes."""
    params = (ctypes.c_uint32 * 30)()
    with missing_if(errno.ENOSYS, errno.EPERM):
        ring = syscall(NR_IO_URING_SETUP, 1, ctypes.addressof(params))
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, ring)
        # struct io_uring_params: sq_off begins at word 10, cq_off at word 20
        submissions = undo.enter_context(mmap.mmap(ring, 4096, mmap.MAP_SHARED, offset=0))
        completions = undo.enter_context(mmap.mmap(ring, 4096, mmap.MAP_SHARED, offset=0x8000000))
        entries = undo.enter_context(mmap.mmap(ring, 4096, mmap.MAP_SHARED, offset=0x10000000))
        entries[: ctypes.sizeof(sqe)] = bytes(sqe)
        tail, array = params[11], params[16]
        submissions[array : array + 4] = bytes(4)
        submissions[tail : tail + 4] = (1).to_bytes(4, "little")
        assert syscall(NR_IO_URING_ENTER, ring, 1, 1, 1, 0, 0) == 1
        at = params[25] + 8  # the first completion's result
        result = int.from_bytes(completions[at : at + 4], "little", signed=True)
    if result < 0:
        with missing_if(errno.EINVAL, errno.EOPNOTSUPP):
            raise OSError(-result, os.strerror(-result))


def uring_madvise(m: Memory) -> None:
    io_uring(_Sqe(opcode=25, addr=m.at(2), len=2 * m.unit, advice=mmap.MADV_DONTNEED))


def uring_punch(m: Memory) -> None:
    io_uring(_Sqe(opcode=17, fd=m.fd, off=2 * m.unit, addr=2 * m.unit, len=PUNCH_HOLE))


def uring_read(m: Memory) -> None:
    """A worker thread writes to unit 3."""
    source, sink = os.pipe()
    try:
        os.write(sink, b"data")
        io_uring(_Sqe(opcode=22, flags=1 << 4, fd=source, off=-1 & (1 << 64) - 1, addr=m.at(3), len=4))
    finally:
        os.close(source)
        os.close(sink)


# ---- The table ----

ALL = ((0, COUNT),)


class Case(NamedTuple):
    name: str
    prepare: Act
    act: Act
    expected: tuple[tuple[int, int], ...]
    """The ranges of units that are invalidated; unit -1 is the one before, `count` the one behind the memory."""
    exact: bool = True
    """The kernel makes one change of each range; else more, with the same outcome."""
    needless: tuple[tuple[int, int], ...] = ()
    """What the kernel may invalidate together with it."""

    def run(self, memory: Memory) -> None:
        self.act(memory)
        memory.fill()


CHANGES = (
    # by an unmapping call of the process itself
    Case("munmap", private, lambda m: void(call("munmap", m.address, m.length)), ALL),
    Case("munmap, never touched", untouched, lambda m: void(call("munmap", m.address, m.length)), ALL),
    Case("munmap, the system call", private, lambda m: void(syscall(NR_MUNMAP, m.address, m.length)), ALL),
    Case("munmap by an inline instruction", private, lambda m: void(run_code(MUNMAP, m.address, m.length)), ALL),
    Case("munmap by another thread", private, in_thread(lambda m: void(call("munmap", m.address, m.length))), ALL),
    Case(
        "munmap in a signal handler",
        private,
        in_signal_handler(lambda m: void(call("munmap", m.address, m.length))),
        ALL,
    ),
    Case("munmap of a part", private, lambda m: void(call("munmap", m.at(2), 2 * m.unit)), ((2, 4),)),
    Case("munmap of less than a page", private, lambda m: void(call("munmap", m.at(2), 100)), ((2, 3),)),
    Case("munmap of several mappings", two_mappings, lambda m: void(call("munmap", m.at(1), 6 * m.unit)), ((1, 7),)),
    Case("munmap and more around it", private, lambda m: void(call("munmap", m.at(-1), 12 * m.unit)), ((-1, 9),)),
    Case("munmap of shared memory", shared, lambda m: void(call("munmap", m.address, m.length)), ALL),
    Case("munmap of a file", memfd, lambda m: void(call("munmap", m.at(1), m.unit)), ((1, 2),)),
    Case("munmap of locked memory", locked, lambda m: void(call("munmap", m.at(1), m.unit)), ((1, 2),)),
    Case(
        "munmap of a page amid gigabytes",
        vast,
        lambda m: void(call("munmap", m.at(4) + 7 * PAGE, PAGE)),
        ((4, 5),),
        exact=False,
    ),
    Case("munmap by a vfork child", private, lambda m: void(run_code(VFORK_MUNMAP, m.at(2), 2 * m.unit)), ((2, 4),)),
    Case(
        "munmap, a 32-bit system call",
        below_4_gib,
        lambda m: void(run_code(INT_80, NR32_MUNMAP, m.at(2), 2 * m.unit)),
        ((2, 4),),
    ),
    Case("mremap moves it", with_elsewhere(private), lambda m: remap_elsewhere(m, 0, m.count), ALL, exact=False),
    Case("mremap moves a part", with_elsewhere(private), lambda m: remap_elsewhere(m, 2, 4), ((2, 4),), exact=False),
    Case(
        "mremap leaves it mapped",
        with_elsewhere(private),
        lambda m: remap_elsewhere(m, 2, 4, MREMAP_DONTUNMAP),
        ((2, 4),),
    ),
    Case(
        "mremap moves other memory over it",
        with_elsewhere(private),
        lambda m: void(call("mremap", m.elsewhere, 2 * m.unit, 2 * m.unit, MREMAP_MAYMOVE | MREMAP_FIXED, m.at(2))),
        ((2, 4),),
    ),
    Case(
        "mremap shrinks it",
        private,
        lambda m: void(call("mremap", m.address, m.length, 5 * m.unit, 0)),
        ((5, COUNT),),
    ),
    Case("mmap over it", private, lambda m: map_at(m.at(2), 2 * m.unit), ((2, 4),)),
    Case(
        "mmap of shared memory over it",
        private,
        lambda m: map_at(m.at(2), 2 * m.unit, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS),
        ((2, 4),),
    ),
    Case("mmap of a file over it", memfd, lambda m: map_at(m.at(2), 2 * m.unit, mmap.MAP_SHARED, m.fd), ((2, 4),)),
    Case(
        "remap_file_pages",
        shared,
        lambda m: void(syscall(NR_REMAP_FILE_PAGES, m.at(2), m.unit, 0, 5, 0)),
        ((2, 3),),
    ),
    Case("free() of a large block", large_block, Memory.end, ((-1, COUNT + 1),)),
    Case("a library is unloaded", library, Memory.end, ((-1, COUNT + 1),), exact=False),
    Case(
        "a thread ends, its stack",
        thread_stack,
        Memory.end,
        ALL,
        exact=False,
        needless=((-1, 0), (COUNT, COUNT + 1)),
    ),
    Case("brk", program_break, shrink_heap, ALL),
    Case("shmdt", system_v, lambda m: void(call("shmdt", m.address)), ALL),
    Case("shmat over it", private, attach_over, ((3, 5),)),
    # by advice
    Case("madvise DONTNEED", private, lambda m: madvise(m.at(2), 2 * m.unit, mmap.MADV_DONTNEED), ((2, 4),)),
    Case(
        "madvise FREE",
        private,
        lambda m: madvise(m.at(2), 2 * m.unit, mmap.MADV_FREE),
        ((2, 4),),
        exact=False,  # the probe zap tells of it once for each page table
    ),
    Case("madvise REMOVE", memfd, lambda m: madvise(m.at(2), 2 * m.unit, mmap.MADV_REMOVE), ((2, 4),), exact=False),
    Case(
        "madvise DONTNEED_LOCKED",
        locked,
        lambda m: madvise(m.at(2), 2 * m.unit, MADV_DONTNEED_LOCKED),
        ((2, 4),),
    ),
    Case("madvise PAGEOUT", private_file, lambda m: madvise(m.at(2), 2 * m.unit, MADV_PAGEOUT), ((2, 4),), exact=False),
    Case("madvise GUARD_INSTALL", private, lambda m: madvise(m.at(2), 2 * m.unit, MADV_GUARD_INSTALL), ((2, 4),)),
    Case(
        "madvise DONTNEED, a 32-bit system call",
        below_4_gib,
        lambda m: void(run_code(INT_80, NR32_MADVISE, m.at(2), 2 * m.unit, mmap.MADV_DONTNEED)),
        ((2, 4),),
    ),
    Case(
        "process_madvise by itself",
        private,
        lambda m: process_madvise(os.getpid(), m.at(2), 2 * m.unit, mmap.MADV_DONTNEED),
        ((2, 4),),
    ),
    Case(
        "process_madvise by another process",
        private_file,
        in_child(lambda m: process_madvise(os.getppid(), m.at(2), 2 * m.unit, MADV_PAGEOUT)),
        ((2, 4),),
        exact=False,
    ),
    Case("io_uring madvise", private, uring_madvise, ((2, 4),)),
    # by others' hands, or on the way
    Case("a debugger makes another call of it", private, debugged(become_munmap), ((2, 4),)),
    Case("brk, where prctl has placed the heap", private, shrink_placed_heap, ((3, COUNT),)),
    Case("munmap of secret memory", secret, lambda m: void(call("munmap", m.at(1), m.unit)), ((1, 2),)),
    Case("reclaim of a control group", file_of_a_group, reclaim_group, ALL, exact=False),
    Case("madvise PAGEOUT of private memory", private, page_out, ALL, exact=False),
    Case("UFFDIO_MOVE", room_to_move_to(private), lambda m: move_out(m, 3, 5), ((3, 5),), exact=False),
    Case("UFFDIO_MOVE of a huge page", room_to_move_to(huge), lambda m: move_out(m, 0, COUNT), ALL, exact=False),
    Case("madvise COLLAPSE", small_pages, collapse, ALL, exact=False),
    Case(
        "mbind moves pages",
        private,
        lambda m: policy(m.at(3), 2 * m.unit, MPOL_DEFAULT, MPOL_MF_MOVE),
        ((3, 5),),
        exact=False,
    ),
    Case("a uprobe", program_file, probe_user, ((3, 4),), exact=False),
    Case("a uprobe that mprotect sets", program_in_part, set_uprobe_by_mprotect, ((3, 4),), exact=False),
    # by a change of the file
    Case("ftruncate", memfd, lambda m: os.ftruncate(m.fd, 5 * m.unit), ((5, COUNT),), exact=False),
    Case("ftruncate within a page", memfd, lambda m: os.ftruncate(m.fd, 5 * m.unit + 9), ((6, COUNT),), exact=False),
    Case(
        "ftruncate by another process",
        memfd,
        in_child(lambda m: os.ftruncate(m.fd, 5 * m.unit)),
        ((5, COUNT),),
        exact=False,
    ),
    Case("ftruncate of a private mapping", private_file, lambda m: os.ftruncate(m.fd, 0), ALL, exact=False),
    Case(
        "truncate by opening",
        memfd,
        lambda m: os.close(os.open(f"/proc/self/fd/{m.fd}", os.O_RDWR | os.O_TRUNC)),
        ALL,
        exact=False,
    ),
    Case("a hole is punched", memfd, lambda m: fallocate(m, PUNCH_HOLE, 2, 4), ((2, 4),), exact=False),
    Case(
        "a hole is punched by another process",
        memfd,
        in_child(lambda m: fallocate(m, PUNCH_HOLE, 2, 4)),
        ((2, 4),),
        exact=False,
    ),
    Case("io_uring punches a hole", memfd, uring_punch, ((2, 4),), exact=False),
    Case("ftruncate on a disk", disk_file, lambda m: os.ftruncate(m.fd, 5 * m.unit), ((5, COUNT),), False, ALL),
    Case("a hole is punched on a disk", disk_file, lambda m: fallocate(m, PUNCH_HOLE, 2, 4), ((2, 4),), False, ALL),
    Case(
        "a hole is punched on a disk by another process",
        disk_file,
        in_child(lambda m: fallocate(m, PUNCH_HOLE, 2, 4)),
        ((2, 4),),
        False,
        ALL,
    ),
    Case("a range collapses", disk_file, lambda m: fallocate(m, COLLAPSE_RANGE, 2, 4), ((2, COUNT),), False, ALL),
    Case("a range is inserted", disk_file, lambda m: fallocate(m, INSERT_RANGE, 2, 4), ((2, COUNT),), False, ALL),
    Case("a range is zeroed", disk_file, lambda m: fallocate(m, ZERO_RANGE, 2, 4), ((2, 4),), False, ALL),
    Case("a direct write to the file", disk_file, direct_write, ((3, 4),), False, ALL),
    Case("a direct write by another process", disk_file, in_child(direct_write), ((3, 4),), False, ALL),
    # by copying on write
    Case("a write after a fork", shared_with_child(private), lambda m: store(m.at(3)), ((3, 4),)),
    Case("read() after a fork", shared_with_child(private), read_into, ((3, 4),)),
    Case("a direct read after a fork", shared_with_child(private), direct_read, ((3, 4),)),
    Case("io_uring reads after a fork", shared_with_child(private), uring_read, ((3, 4),)),
    Case(
        "clone writes the child's number",
        private,
        lambda m: clone_exit(CLONE_PARENT_SETTID, m.at(3)),
        ((3, 4),),
        False,
        ALL,
    ),
    Case(
        "clone writes the child's pidfd",
        private,
        lambda m: clone_exit(CLONE_PIDFD, m.at(3) + 8),
        ((3, 4),),
        False,
        ALL,
    ),
    Case(
        "process_vm_writev on itself", shared_with_child(private), lambda m: write_to(os.getpid(), m.at(3)), ((3, 4),)
    ),
    Case("process_vm_writev by a child", private, in_child(write_to_parent), ((3, 4),)),
    Case("a debugger's write", private, in_child(poke_parent), ((3, 4),)),
    Case("a debugger's write to a private mapping", read_only(private_file), in_child(poke_parent), ((3, 4),)),
    Case(
        "clone writes the child's number, from the child",
        shared_with_child(private),
        lambda m: clone_exit(CLONE_VM | CLONE_VFORK | CLONE_CHILD_SETTID, m.at(3)),
        ((3, 4),),
        exact=False,
    ),
    Case(
        "the child's number is cleared at its end",
        shared_with_child(private),
        lambda m: clone_exit(CLONE_VM | CLONE_VFORK | CLONE_CHILD_CLEARTID, m.at(3)),
        ((3, 4),),
        exact=False,
    ),
    Case(
        "madvise POPULATE_WRITE after a fork",
        shared_with_child(private),
        lambda m: madvise(m.at(3), m.unit, MADV_POPULATE_WRITE),
        ((3, 4),),
    ),
    Case("mlock after a fork", shared_with_child(private), lambda m: void(call("mlock", m.at(3), m.unit)), ((3, 4),)),
    Case(
        "mprotect of locked memory after a fork",
        shared_with_child(locked_read_only(private)),
        lambda m: void(call("mprotect", m.at(2), 2 * m.unit, READ_WRITE)),
        ((2, 4),),
        exact=False,
    ),
    Case("a signal's frame after a fork", shared_with_child(private), take_signal, ((7, 8),), False, ALL),
    Case(
        "a signal's frame after a fork, on the way out of a refused fork",
        shared_with_child(private),
        refused(NR_FORK),
        ((7, 8),),
        False,
        ALL,
    ),
    Case(
        "a signal's frame after a fork, on the way out of a refused mprotect",
        shared_with_child(private),
        refused(NR_MPROTECT, lambda m: m.address, lambda m: m.length, lambda m: READ_WRITE),
        ((7, 8),),
        False,
        ALL,
    ),
    Case(
        "a signal's frame after a fork, when a debugger has refused a fork",
        shared_with_child(private),
        debugged(lambda m, registers: None, refuse_fork),
        ((7, 8),),
        False,
        ALL,
    ),
    Case("the first write to the zero page", zero_page, lambda m: store(m.at(3)), ((3, 4),)),
    Case("the first write to a private mapping", private_file, lambda m: store(m.at(3)), ((3, 4),)),
    # huge pages
    Case("munmap of a part of a huge page", huge, lambda m: void(call("munmap", m.at(2), m.unit)), ((2, 3),)),
    Case("mmap over a part of a huge page", huge, lambda m: map_at(m.at(2), m.unit), ((2, 3),)),
    Case("munmap of a part of large memory", large, lambda m: void(call("munmap", m.at(2), m.unit)), ((2, 3),)),
    Case("munmap of a part of huge pages", large_huge, lambda m: void(call("munmap", m.at(2), m.unit)), ((2, 3),)),
    Case(
        "mremap shrinks large memory",
        large,
        lambda m: void(call("mremap", m.address, m.length, 5 * m.unit, 0)),
        ((5, COUNT),),
    ),
    Case(
        "mremap shrinks huge pages",
        large_huge,
        lambda m: void(call("mremap", m.address, m.length, 5 * m.unit, 0)),
        ((5, COUNT),),
    ),
    Case(
        "mremap moves a part of large memory",
        with_elsewhere(large),
        lambda m: remap_elsewhere(m, 2, 4),
        ((2, 4),),
        exact=False,
    ),
    Case(
        "mremap moves a part of huge pages",
        with_elsewhere(large_huge),
        lambda m: remap_elsewhere(m, 2, 4),
        ((2, 4),),
        exact=False,
    ),
    Case(
        "mremap moves other memory over a part of huge pages",
        with_elsewhere(large_huge),
        lambda m: void(call("mremap", m.elsewhere, 2 * m.unit, 2 * m.unit, MREMAP_MAYMOVE | MREMAP_FIXED, m.at(2))),
        ((2, 4),),
    ),
    Case("brk within a huge page", large_program_break, shrink_heap, ((0, 3),)),
    Case(
        "a write to a huge page after a fork",
        shared_with_child(huge),
        lambda m: store(m.at(3)),
        ((3, 4),),
        False,
        ALL,  # the kernel reports that it splits the huge page
    ),
    Case(
        "mlock of a part of a huge page after a fork",
        shared_with_child(huge),
        lambda m: void(call("mlock", m.at(3), m.unit)),
        ((3, 4),),
        exact=False,
    ),
    Case(
        "mlock of a part of huge pages after a fork",
        shared_with_child(large_huge),
        lambda m: void(call("mlock", m.at(3), m.unit)),
        ((3, 4),),
        exact=False,
    ),
    Case(
        "mlock of a part of the huge zero page",
        huge_zero_page,
        lambda m: void(call("mlock", m.at(3), m.unit)),
        ((3, 4),),
        False,
        ALL,  # kernels since 6.14 replace all of it
    ),
    Case(
        "mprotect of a part of a locked huge page after a fork",
        shared_with_child(locked_read_only(huge)),
        lambda m: void(call("mprotect", m.at(2), 2 * m.unit, READ_WRITE)),
        ((2, 4),),
        exact=False,
    ),
    Case(
        "madvise DONTNEED of a part of a huge page",
        huge,
        lambda m: madvise(m.at(2), m.unit, mmap.MADV_DONTNEED),
        ((2, 3),),
        False,
        ALL,
    ),
    Case(
        "mprotect of a part of a huge page of a file",  # the kernel unmaps all of it
        huge_file,
        lambda m: void(call("mprotect", m.at(3), m.unit, mmap.PROT_READ)),
        ALL,
        exact=False,
    ),
    Case("munmap of a huge page", huge, lambda m: void(call("munmap", m.address, m.length)), ALL),
    Case(
        "munmap of hugetlb memory",
        hugetlb(ANONYMOUS),
        lambda m: void(call("munmap", m.at(1), m.unit)),
        ((1, 2),),
        exact=False,  # older kernels tell of it twice
    ),
    Case(
        "madvise DONTNEED of hugetlb memory",
        hugetlb(ANONYMOUS),
        lambda m: madvise(m.at(1), m.unit, mmap.MADV_DONTNEED),
        ((1, 2),),
        exact=False,  # older kernels tell of it twice
    ),
    Case(
        "clone writes the child's number into hugetlb memory",
        shared_with_child(hugetlb(ANONYMOUS, spare=1)),
        lambda m: clone_exit(CLONE_PARENT_SETTID, m.at(1)),
        ((1, 2),),
        exact=False,
    ),
    Case(
        "a write to hugetlb memory after a fork",
        shared_with_child(hugetlb(ANONYMOUS, spare=1)),
        lambda m: store(m.at(1)),
        ((1, 2),),
        exact=False,
    ),
    Case(
        "mlock of a part of hugetlb memory after a fork",
        shared_with_child(hugetlb(ANONYMOUS, spare=1)),
        lambda m: void(call("mlock", m.at(1) + PAGE, PAGE)),
        ((1, 2),),
        exact=False,
    ),
    Case(
        "a hole is punched in hugetlb memory",
        hugetlb(mmap.MAP_SHARED),
        lambda m: fallocate(m, PUNCH_HOLE, 1, 2),
        ((1, 2),),
        exact=False,
    ),
    Case(
        "ftruncate of hugetlb memory",
        hugetlb(mmap.MAP_SHARED),
        lambda m: os.ftruncate(m.fd, m.unit),
        ((1, 3),),
        exact=False,
    ),
)


def void(_: object) -> None:
    """For a lambda: no result."""


NO_CHANGES = (
    Case("reading and writing", private, use, ()),
    Case("reading and writing a file", memfd, use, ()),
    Case("the first use", untouched, Memory.touch, ()),
    Case("fork", private, in_child(lambda m: None), ()),
    Case("fork, and the child writes", private, in_child(use), ()),
    Case("fork, and the child unmaps it", private, in_child(lambda m: void(call("munmap", m.address, m.length))), ()),
    Case("fork, of hugetlb memory", hugetlb(ANONYMOUS), lambda m: clone_exit(0, 0), ()),
    Case("fork, of huge pages", large_huge, lambda m: clone_exit(0, 0), ()),
    Case("fork, without libc", private, lambda m: clone_exit(0, 0), ()),
    Case("vfork", with_neighbours, lambda m: void(run_code(VFORK_MUNMAP, m.at(-1), m.unit)), ((-1, 0),)),
    Case("other processes", private, start_process, ()),
    Case("a thread", private, start_thread, ()),
    Case("mprotect there and back", private, there_and_back, ()),
    Case("mprotect there and back of a file", memfd, there_and_back, ()),
    Case("pkey_mprotect there and back", private, with_key, ()),
    Case("mlock and munlock", private, lock_and_unlock, ()),
    Case("harmless advice", private, advise_harmlessly, ()),
    Case("mprotect of parts of large memory", large, protect_parts, ()),
    Case("mprotect of parts of a huge page", huge, protect_parts, ()),
    Case("mprotect of parts of huge pages", large_huge, protect_parts, ()),
    Case("mlock and munlock of parts of large memory", large, lock_parts, ()),
    Case("mlock and munlock of parts of a huge page", huge, lock_parts, ()),
    Case("mlock and munlock of parts of huge pages", large_huge, lock_parts, ()),
    Case("harmless advice for parts of large memory", large, advise_parts, ()),
    Case("harmless advice for parts of a huge page", huge, advise_parts, ()),
    Case("harmless advice for parts of huge pages", large_huge, advise_parts, ()),
    Case("changes of the neighbours", with_neighbours, change_neighbours, ((-1, 0), (8, 9))),
    Case("calls that fail", with_elsewhere(private), fail, ()),
    Case("free() of a small block", small_block, Memory.end, ()),
    Case("mmap and munmap elsewhere", private, map_and_unmap, ()),
    Case(
        "mremap elsewhere", with_elsewhere(private), lambda m: void(call("mremap", m.elsewhere, m.unit, m.unit, 1)), ()
    ),
    Case(
        "mremap lets it grow", with_room, lambda m: void(call("mremap", m.address, m.length, m.length + m.unit, 0)), ()
    ),
    Case(
        "mremap makes a second mapping",
        with_elsewhere(shared),
        lambda m: void(call("mremap", m.address, 0, m.length, MREMAP_MAYMOVE | MREMAP_FIXED, m.elsewhere)),
        (),
    ),
    Case("read() into it", private, read_into, ()),
    Case("process_vm_writev into it", private, lambda m: write_to(os.getpid(), m.at(3)), ()),
    Case("a child writes to shared memory", shared, in_child(write_to_parent), ()),
    Case("the file grows", memfd, lambda m: os.ftruncate(m.fd, 2 * m.length), ()),
    Case("the file is written", memfd, lambda m: void(os.pwrite(m.fd, b"data", 3 * m.unit)), ()),
    Case("the file's blocks are allocated", memfd, lambda m: fallocate(m, 0, 0, COUNT), ()),
    Case("the file is unmapped by others", memfd, in_child(lambda m: void(call("munmap", m.address, m.length))), ()),
    Case("msync", memfd, lambda m: void(call("msync", m.address, m.length, 4)), ()),
    Case("mremap to the same size", private, lambda m: void(call("mremap", m.address, m.length, m.length, 0)), ()),
    Case("madvise PAGEOUT, without swap space", private, page_out_in_vain, ()),
    Case("a file on a disk is written back", written_disk_file, write_back, (), needless=ALL),
    Case("userfaultfd protects it, there and back", write_protectable, protect_by_userfaultfd, (), needless=ALL),
    Case("soft-dirty bits are cleared", private, clear_refs(4), (), needless=((-1, COUNT + 1),)),
    Case("referenced bits are cleared", private, clear_refs(1), ()),
    Case("a policy for parts of large memory", large, bind_parts, (), needless=ALL),
    Case("a policy for parts of huge pages", large_huge, bind_parts, (), needless=ALL),
    Case("a userfaultfd for parts of huge pages", large_huge, register_parts, (), needless=ALL),
)

SLOW_CHANGES = (
    # by the kernel itself: slow, and with settings that concern everybody
    Case("equal pages are merged", private, merge, ALL, exact=False),
    Case(
        "merged pages are taken apart",
        merged,
        lambda m: void(call("madvise", m.address, m.length, mmap.MADV_UNMERGEABLE)),
        ALL,
        exact=False,
    ),
    Case("khugepaged", small_pages, collapse_in_background, ALL, exact=False),
    Case("madvise SOFT_OFFLINE", private, soft_offline, ((3, 4),), exact=False),
    Case("a page frame is taken out of use", private, soft_offline_frame, ((3, 4),), exact=False),
    Case("NUMA balancing", private, balance, (), needless=((-1, COUNT + 1),)),
)

CASES = CHANGES + NO_CHANGES
