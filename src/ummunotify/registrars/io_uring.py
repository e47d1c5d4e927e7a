"""Registers memory as io_uring fixed buffers (Linux 5.19 or later).

It makes the system calls itself. The package `liburing` (2026.3.30) would not do: it cannot update a slot of the buffer
table (the call accepts no value for the tags), it reads and writes bytearrays only and not memory at an address, it
holds the GIL while it waits, and its wheel needs a CPU with AVX-512, without which it kills the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import resource
import struct
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path

from . import (
    RegistrarError,
    RegistrarUnavailableError,
    RegistrationError,
    RegistrationLimitError,
)
from ._owned import Closing

__all__ = ["MAX_SLOTS", "FixedBuffer", "IoUringRegistrar"]

MAX_SLOTS = 1 << 14  # the kernel's limit for one ring

# The opcodes of operations, from <linux/io_uring.h>.
_READ_FIXED = 4
_WRITE_FIXED = 5
_ASYNC_CANCEL = 14


@dataclass(frozen=True, slots=True, eq=False)
class FixedBuffer:
    """A registered buffer: its index in the ring's table, its address and its length in bytes."""

    index: int
    address: int
    length: int

    def __repr__(self) -> str:
        return f"FixedBuffer(index={self.index}, address={self.address:#x}, length={self.length})"


class IoUringRegistrar(Closing):
    """Pins memory as fixed buffers of an io_uring of its own, and reads and writes through them.

    `slots` is how many buffers can be registered at once, 1 to 16384. The kernel takes memory that the process may
    write, up to 1 GiB a buffer, at any address and of any length. Without CAP_IPC_LOCK all that is registered counts
    against RLIMIT_MEMLOCK.

    Like the kernel, it does not notice when the memory behind a handle is unmapped: I/O then goes to the old pages.
    Watch the memory to be told.

    Threads: any thread may call any method, and none holds the GIL in the kernel. One lock serialises register and
    deregister, as the kernel does; another the I/O, which is one operation at a time, to its end. Operations that wait
    for each other need a registrar each.

    Fork: the child's registrar is closed at the fork, without effect on the parent's. Its calls raise RegistrarError,
    but `close` does nothing.

    Raises RegistrarUnavailableError if the kernel refuses io_uring, ValueError for a bad number of slots.
    """

    # For the cache; see Registrar. The kernel pins whole pages.
    granularity = mmap.PAGESIZE
    max_length = 1 << 30
    merge = True

    def __init__(self, slots: int = 1024) -> None:
        if not 1 <= slots <= MAX_SLOTS:
            raise ValueError(f"slots is {slots}; an io_uring has 1 to {MAX_SLOTS} buffer slots")
        self._pid = os.getpid()
        try:
            self._ring = _Ring(slots)
        except OSError as error:
            raise RegistrarUnavailableError(_why_unavailable(error)) from error
        self._release = weakref.finalize(self, self._ring.close, self._pid)
        self._serial = 0
        self._slots: list[FixedBuffer | None] = [None] * slots
        self._free = list(range(slots - 1, -1, -1))
        self._table_lock = threading.Lock()
        self._io_lock = threading.Lock()  # taken before _table_lock
        _registrars.add(self)

    def register(self, address: int, length: int) -> FixedBuffer:
        """Pin the pages of `length` bytes at `address` and put them into a slot of the table.

        Raises RegistrationLimitError if no slot is free or no more memory can be locked, and RegistrationError if the
        kernel cannot pin this memory; nothing is registered then.
        """
        if address <= 0 or length <= 0 or address + length > 1 << 64:
            raise RegistrationError(
                f"cannot register {length} bytes at {address:#x}: both must be positive and the end must not wrap"
            )
        self._check_open()
        with self._table_lock:
            self._check_open()
            if not self._free:
                raise RegistrationLimitError(
                    f"cannot register {length} bytes at {address:#x}: all {len(self._slots)} slots are in use; "
                    f"deregister a buffer or ask for more slots (up to {MAX_SLOTS})"
                )
            index = self._free[-1]
            try:
                self._ring.set_buffer(index, address, length)
            except OSError as error:
                raise _registration_error(address, length, error) from error
            handle = self._slots[index] = FixedBuffer(index, address, length)
            self._free.pop()
            return handle

    def deregister(self, handle: FixedBuffer) -> None:
        """Empty the slot, which unpins the pages.

        The pages stay pinned until I/O in progress on them ends. Kernels before 6.13 may unpin them (and count them as
        locked) up to a second later.

        Raises RegistrarError if `handle` is not registered here, and OSError if the kernel fails; the buffer is still
        registered then.
        """
        self._check_open()
        with self._table_lock:
            self._check_handle(handle)
            self._ring.set_buffer(handle.index, 0, 0)
            self._slots[handle.index] = None
            self._free.append(handle.index)

    def read_fixed(self, fd: int, handle: FixedBuffer, address: int, length: int, offset: int) -> int:
        """Read up to `length` bytes of file `fd`, from byte `offset`, into the registered memory at `address`.

        An offset of -1 is the file's own position. Returns the number of bytes read: 0 at the end of the file.

        Raises OSError if the operation fails, and RegistrarError if `handle` is not registered here or the range is not
        inside it. When an exception (Ctrl-C, say) ends the wait, the operation is first cancelled or waited for, so
        that it does not touch the memory later.
        """
        return self._operate(_READ_FIXED, fd, handle, address, length, offset)

    def write_fixed(self, fd: int, handle: FixedBuffer, address: int, length: int, offset: int) -> int:
        """Write up to `length` bytes of the registered memory at `address` to file `fd`; else like `read_fixed`."""
        return self._operate(_WRITE_FIXED, fd, handle, address, length, offset)

    def close(self) -> None:
        """Unpin everything and close the ring, after I/O in progress has ended. Closing again is harmless."""
        if self._pid != os.getpid():
            return  # a thread that the child does not have may hold the locks
        with self._io_lock, self._table_lock:
            self._release()

    def _check_open(self) -> None:
        if self._pid != os.getpid():
            raise RegistrarError("this registrar belongs to the parent process; open another one in the child")
        if not self._release.alive:
            raise RegistrarError("this registrar is closed")

    def _check_handle(self, handle: FixedBuffer) -> None:
        self._check_open()
        # By identity: a slot is used again, and an old handle must not name what is in it then.
        if handle.index >= len(self._slots) or self._slots[handle.index] is not handle:
            raise RegistrarError(f"{handle} is not registered here (was it deregistered before?)")

    def _operate(self, opcode: int, fd: int, handle: FixedBuffer, address: int, length: int, offset: int) -> int:
        self._check_open()
        with self._io_lock:
            with self._table_lock:
                self._check_handle(handle)
                if length < 0 or not 0 <= address - handle.address <= handle.length - length:
                    raise RegistrarError(f"{length} bytes at {address:#x} are not inside {handle}")
                self._serial += 1
                serial = self._serial
                self._ring.submit(opcode, fd, offset, address, length, serial, handle.index)
            try:
                result = self._wait(serial)
            except BaseException:
                self._serial += 1
                self._ring.submit(_ASYNC_CANCEL, -1, 0, serial, 0, self._serial, 0)
                self._wait(serial)
                self._ring.drop_completion()
                raise
            self._ring.drop_completion()
            if result < 0:
                raise OSError(-result, os.strerror(-result))
            return result

    def _wait(self, serial: int) -> int:
        """Wait for the completion of that operation and return its result.

        It is left in the queue: when an exception ends the wait, it can always be waited for again.
        """
        while True:
            completion = self._ring.completion()
            if completion is None:
                self._ring.wait()
            elif completion[0] == serial:
                return completion[1]
            else:
                self._ring.drop_completion()  # of a cancellation


_registrars: weakref.WeakSet[IoUringRegistrar] = weakref.WeakSet()


def _release_in_child() -> None:
    # The inherited descriptors would keep the parent's memory pinned after the parent has closed.
    for registrar in list(_registrars):
        registrar._release()
    _registrars.clear()


os.register_at_fork(after_in_child=_release_in_child)


def _why_unavailable(error: OSError) -> str:
    reason = f"the kernel refuses io_uring ({error.strerror})"
    if error.errno == errno.EPERM:
        try:
            setting = Path("/proc/sys/kernel/io_uring_disabled").read_text().strip()
        except OSError:
            setting = "0"
        if setting != "0":
            return f"{reason}: kernel.io_uring_disabled is {setting}; as root: sysctl kernel.io_uring_disabled=0"
        return f"{reason}; allow the io_uring system calls in the container's seccomp profile"
    if error.errno == errno.ENOSYS:
        return f"{reason}; it needs a kernel built with CONFIG_IO_URING"
    if error.errno == errno.EINVAL:
        return f"{reason}; it needs Linux 5.19 or later"
    if error.errno == errno.ENOMEM:
        return f"{reason}; {_raise_memlock()}"
    return reason


def _registration_error(address: int, length: int, error: OSError) -> RegistrationError:
    message = f"cannot register {length} bytes at {address:#x} with io_uring: {error.strerror}"
    if error.errno == errno.ENOMEM:
        return RegistrationLimitError(f"{message}; {_raise_memlock()}, or deregister other buffers")
    if error.errno == errno.EFAULT:
        message += "; it takes up to 1 GiB of memory that is mapped and that the process may write"
    elif error.errno == errno.EOPNOTSUPP:
        message += "; it does not take mappings of files"
    return RegistrationError(message)


def _raise_memlock() -> str:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    now = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit >> 10} KiB"
    return f"raise RLIMIT_MEMLOCK (ulimit -l), which is {now}"


# What follows is the kernel's interface, as <linux/io_uring.h> has it.

# The same on every architecture but Alpha.
_IO_URING_SETUP = 425
_IO_URING_ENTER = 426
_IO_URING_REGISTER = 427

_ENTER_GETEVENTS = 1
_UNREGISTER_BUFFERS = 1
_REGISTER_BUFFERS2 = 15
_REGISTER_BUFFERS_UPDATE = 16
_RSRC_REGISTER_SPARSE = 1
_OFFSET_OF_SQES = 0x10000000

# struct io_uring_params, in 32-bit words, and the words of it that are needed
_PARAMS_WORDS = 30
_SQ_HEAD, _SQ_TAIL = 10, 11
_CQ_HEAD, _CQ_TAIL, _CQ_MASK, _CQ_CQES = 20, 21, 22, 25

# opcode, flags, ioprio, fd, off, addr, len, rw_flags, user_data, buf_index, personality, file_index, addr3, pad
_SQE = struct.Struct("@BBHiqQIIQHHIQQ")
_CQE = struct.Struct("@QiI")  # user_data, res, flags
_IOVEC = struct.Struct("@PN")
_RSRC_REGISTER = struct.Struct("@IIQQQ")  # nr, flags, resv, data, tags
_RSRC_UPDATE = struct.Struct("@IIQQII")  # offset, resv, data, tags, nr, resv

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.syscall.argtypes = (ctypes.c_long,) * 7


def _syscall(number: int, a: int, b: int, c: int = 0, d: int = 0, e: int = 0, f: int = 0) -> int:
    """Call the kernel, without the GIL."""
    result: int = _libc.syscall(number, a, b, c, d, e, f)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


class _Ring:
    """An io_uring with a single submission entry, and with a table of buffers.

    The rings' indices are shared with the kernel. It is one thread at a time that uses them, and it enters the kernel
    between writing and reading them, so they need no barriers.
    """

    def __init__(self, slots: int) -> None:
        params = (ctypes.c_uint32 * _PARAMS_WORDS)()
        self._fd = _syscall(_IO_URING_SETUP, 1, ctypes.addressof(params))
        self._words = memoryview(b"")
        self._maps: list[mmap.mmap] = []
        try:
            register = _RSRC_REGISTER.pack(slots, _RSRC_REGISTER_SPARSE, 0, 0, 0)
            self._register(_REGISTER_BUFFERS2, register, len(register))
            # Both rings are in one mapping; with so few entries they take a part of the page.
            self._rings = self._map(0)
            self._sqe = self._map(_OFFSET_OF_SQES)
        except BaseException:
            self._close()
            raise
        self._words = memoryview(self._rings).cast("@I")
        self._sq_head, self._sq_tail = params[_SQ_HEAD] // 4, params[_SQ_TAIL] // 4
        self._cq_head, self._cq_tail = params[_CQ_HEAD] // 4, params[_CQ_TAIL] // 4
        self._cq_mask = self._words[params[_CQ_MASK] // 4]
        self._cqes = params[_CQ_CQES]

    def close(self, owner: int) -> None:
        """Close it; in the process `owner` also empty the table, which a forked child must not do to its parent."""
        try:
            if os.getpid() == owner:
                # Before, because closing alone unpins at some later time.
                self._register(_UNREGISTER_BUFFERS, b"", 0)
        finally:
            self._close()

    def _close(self) -> None:
        self._words.release()
        for mapped in self._maps:
            mapped.close()
        os.close(self._fd)

    def set_buffer(self, index: int, address: int, length: int) -> None:
        """Pin memory into a slot, in place of what was there; address 0 leaves the slot empty."""
        iovec = ctypes.create_string_buffer(_IOVEC.pack(address, length))
        update = _RSRC_UPDATE.pack(index, 0, ctypes.addressof(iovec), 0, 1, 0)
        self._register(_REGISTER_BUFFERS_UPDATE, update, len(update))

    def submit(self, opcode: int, fd: int, offset: int, address: int, length: int, user_data: int, buffer: int) -> None:
        self._sqe[: _SQE.size] = _SQE.pack(opcode, 0, 0, fd, offset, address, length, 0, user_data, buffer, 0, 0, 0, 0)
        # From the head: what an earlier call left in the queue when it failed is replaced.
        self._words[self._sq_tail] = (self._words[self._sq_head] + 1) & 0xFFFFFFFF
        _syscall(_IO_URING_ENTER, self._fd, 1)

    def wait(self) -> None:
        """Wait for a completion, or until a signal arrives."""
        with contextlib.suppress(InterruptedError):
            _syscall(_IO_URING_ENTER, self._fd, 0, 1, _ENTER_GETEVENTS)

    def completion(self) -> tuple[int, int] | None:
        """The user_data and the result of the first completion."""
        head = self._words[self._cq_head]
        if head == self._words[self._cq_tail]:
            return None
        user_data, result, _flags = _CQE.unpack_from(self._rings, self._cqes + (head & self._cq_mask) * _CQE.size)
        return user_data, result

    def drop_completion(self) -> None:
        self._words[self._cq_head] = (self._words[self._cq_head] + 1) & 0xFFFFFFFF

    def _map(self, offset: int) -> mmap.mmap:
        mapped = mmap.mmap(self._fd, mmap.PAGESIZE, offset=offset)
        self._maps.append(mapped)
        return mapped

    def _register(self, opcode: int, argument: bytes, count: int) -> None:
        copy = ctypes.create_string_buffer(argument) if argument else None
        _syscall(_IO_URING_REGISTER, self._fd, opcode, ctypes.addressof(copy) if copy else 0, count)
