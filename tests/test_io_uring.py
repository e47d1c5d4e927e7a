"""The io_uring registrar, on the real kernel."""

import ctypes
import errno
import gc
import mmap
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import map_memory, open_fds, pinned_kib, require, unmap_memory

from ummunotify.registrars import (
    RegistrarError,
    RegistrarUnavailableError,
    RegistrationError,
    RegistrationLimitError,
    io_uring,
)
from ummunotify.registrars.io_uring import MAX_SLOTS, FixedBuffer, IoUringRegistrar

PAGE = mmap.PAGESIZE
SIZE = 4 * PAGE
SLOTS = 8
CONTENT = bytes(range(1, 256)) * 100


@pytest.fixture
def registrar() -> Iterator[IoUringRegistrar]:
    try:
        opened = IoUringRegistrar(SLOTS)
    except RegistrarUnavailableError as error:
        require("io_uring", str(error))
    with opened:
        yield opened


@pytest.fixture
def memory() -> Iterator[int]:
    address = map_memory(SIZE)
    yield address
    unmap_memory(address, SIZE)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "content"
    path.write_bytes(CONTENT)
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def in_child(function: Callable[[], None]) -> None:
    """Run `function` in a forked child; it must not raise."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function()
            status = 0
        except BaseException as error:  # nothing may get back into pytest's copy
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def wait_until_pinned(kib: int) -> None:
    """Older kernels unpin in the background."""
    deadline = time.monotonic() + 5
    while pinned_kib() != kib and time.monotonic() < deadline:
        time.sleep(0.02)
    assert pinned_kib() == kib


@pytest.mark.parametrize(
    ("start", "length"),
    [(0, SIZE), (0, 1), (1, 1), (17, 4000), (PAGE - 1, 2), (PAGE + 3, 2 * PAGE), (SIZE - 1, 1)],
)
def test_data_lands_in_the_buffer_and_nowhere_else(
    registrar: IoUringRegistrar, memory: int, file: int, start: int, length: int
) -> None:
    handle = registrar.register(memory + start, length)
    assert (handle.address, handle.length) == (memory + start, length)
    assert registrar.read_fixed(file, handle, memory + start, length, 5) == length
    expected = bytes(start) + CONTENT[5 : 5 + length] + bytes(SIZE - start - length)
    assert ctypes.string_at(memory, SIZE) == expected


def test_a_part_of_the_buffer(registrar: IoUringRegistrar, memory: int, file: int) -> None:
    handle = registrar.register(memory, SIZE)
    assert registrar.read_fixed(file, handle, memory + 100, 50, 0) == 50
    assert ctypes.string_at(memory + 100, 51) == CONTENT[:50] + b"\0"
    for address, length in [(memory - 1, 2), (memory, SIZE + 1), (memory + SIZE, 1), (memory, -1)]:
        with pytest.raises(RegistrarError, match="not inside"):
            registrar.read_fixed(file, handle, address, length, 0)


def test_write_fixed(registrar: IoUringRegistrar, memory: int, file: int) -> None:
    handle = registrar.register(memory, SIZE)
    ctypes.memmove(memory, b"from memory", 11)
    assert registrar.write_fixed(file, handle, memory + 5, 6, 2) == 6
    assert os.pread(file, 10, 0) == CONTENT[:2] + b"memory" + CONTENT[8:10]


def test_end_of_file_and_file_position(registrar: IoUringRegistrar, memory: int, file: int) -> None:
    handle = registrar.register(memory, SIZE)
    assert registrar.read_fixed(file, handle, memory, SIZE, len(CONTENT) - 3) == 3
    assert registrar.read_fixed(file, handle, memory, SIZE, len(CONTENT)) == 0
    os.lseek(file, 10, os.SEEK_SET)
    assert registrar.read_fixed(file, handle, memory, 5, -1) == 5
    assert ctypes.string_at(memory, 5) == CONTENT[10:15]
    assert os.lseek(file, 0, os.SEEK_CUR) == 15


def test_failed_io_raises_oserror(registrar: IoUringRegistrar, memory: int, file: int, pipe: tuple[int, int]) -> None:
    handle = registrar.register(memory, SIZE)
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        registrar.read_fixed(pipe[1], handle, memory, 1, 0)
    assert caught.value.errno == errno.EBADF
    assert registrar.read_fixed(file, handle, memory, 1, 0) == 1


def test_a_handle_leads_to_the_old_pages(registrar: IoUringRegistrar, file: int, tmp_path: Path) -> None:
    a = map_memory(PAGE)
    handle = registrar.register(a, PAGE)
    unmap_memory(a, PAGE)
    assert map_memory(PAGE, a) == a
    assert registrar.read_fixed(file, handle, a, PAGE, 0) == PAGE
    assert ctypes.string_at(a, PAGE) == bytes(PAGE)

    old = tmp_path / "old"
    with old.open("wb") as copy:
        assert registrar.write_fixed(copy.fileno(), handle, a, PAGE, 0) == PAGE
    assert old.read_bytes() == CONTENT[:PAGE]

    registrar.deregister(handle)
    handle = registrar.register(a, PAGE)
    assert registrar.read_fixed(file, handle, a, PAGE, 0) == PAGE
    assert ctypes.string_at(a, PAGE) == CONTENT[:PAGE]
    unmap_memory(a, PAGE)


def test_pins_end_with_deregister_and_close(memory: int, registrar: IoUringRegistrar) -> None:
    before = pinned_kib()
    first = registrar.register(memory, SIZE)
    registrar.register(memory + PAGE - 1, 2)
    assert pinned_kib() - before == (SIZE + 2 * PAGE) >> 10
    registrar.deregister(first)
    wait_until_pinned(before + (2 * PAGE >> 10))
    registrar.close()
    wait_until_pinned(before)


def test_pins_of_unmapped_memory_end(registrar: IoUringRegistrar) -> None:
    before = pinned_kib()
    address = map_memory(SIZE)
    handle = registrar.register(address, SIZE)
    unmap_memory(address, SIZE)
    assert pinned_kib() - before == SIZE >> 10
    registrar.deregister(handle)
    wait_until_pinned(before)


def test_nothing_is_left_open(memory: int, registrar: IoUringRegistrar) -> None:
    fds, pinned = open_fds(), pinned_kib()
    for _ in range(20):
        with IoUringRegistrar(4) as other:
            other.register(memory, SIZE)
            assert open_fds() != fds
        other.close()
    assert open_fds() == fds
    other = IoUringRegistrar(MAX_SLOTS)
    other.register(memory, SIZE)
    del other
    gc.collect()
    assert open_fds() == fds
    wait_until_pinned(pinned)


def test_1000_cycles(registrar: IoUringRegistrar, memory: int, file: int) -> None:
    fds, pinned = open_fds(), pinned_kib()
    for cycle in range(1000):
        handle = registrar.register(memory, SIZE)
        if cycle % 100 == 0:
            assert registrar.read_fixed(file, handle, memory, 1, cycle) == 1
            assert ctypes.string_at(memory, 1) == CONTENT[cycle : cycle + 1]
        registrar.deregister(handle)
    assert open_fds() == fds
    wait_until_pinned(pinned)


def test_slots_run_out(registrar: IoUringRegistrar, memory: int) -> None:
    handles = [registrar.register(memory, PAGE) for _ in range(SLOTS)]
    assert {handle.index for handle in handles} == set(range(SLOTS))
    with pytest.raises(RegistrationLimitError, match=f"all {SLOTS} slots"):
        registrar.register(memory, PAGE)
    registrar.deregister(handles[3])
    assert registrar.register(memory, PAGE).index == 3


def test_memlock_limit(registrar: IoUringRegistrar, memory: int) -> None:
    big = map_memory(1 << 20)

    def register_too_much() -> None:
        if os.geteuid() == 0:
            # CAP_IPC_LOCK lifts the limit. And what nobody's other processes have locked counts too.
            os.setresuid(*[1 << 20 | os.getpid()] * 3)
        limit = 64 << 10
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
        with IoUringRegistrar(2) as limited:
            with pytest.raises(RegistrationLimitError, match=r"RLIMIT_MEMLOCK.*64 KiB"):
                limited.register(big, 1 << 20)
            limited.register(memory, SIZE)

    in_child(register_too_much)
    unmap_memory(big, 1 << 20)


def test_deregister_twice(registrar: IoUringRegistrar, memory: int, file: int) -> None:
    old = registrar.register(memory, PAGE)
    registrar.deregister(old)
    with pytest.raises(RegistrarError, match="not registered"):
        registrar.deregister(old)
    new = registrar.register(memory, PAGE)
    assert (new.index, new.address, new.length) == (old.index, old.address, old.length)
    with pytest.raises(RegistrarError, match="not registered"):
        registrar.deregister(old)
    with pytest.raises(RegistrarError, match="not registered"):
        registrar.read_fixed(file, old, memory, 1, 0)
    assert registrar.read_fixed(file, new, memory, 1, 0) == 1


def test_foreign_handle(registrar: IoUringRegistrar, memory: int) -> None:
    with IoUringRegistrar(SLOTS + 1) as other:
        registrar.register(memory, PAGE)
        foreign = [other.register(memory, PAGE) for _ in range(SLOTS + 1)]
        for handle in foreign:
            with pytest.raises(RegistrarError, match="not registered"):
                registrar.deregister(handle)


@pytest.mark.parametrize(
    ("address", "length"),
    [(0, PAGE), (-PAGE, PAGE), (PAGE, 0), (PAGE, -1), (2**64 - PAGE, PAGE + 1), (2**70, 1)],
)
def test_impossible_ranges(registrar: IoUringRegistrar, address: int, length: int) -> None:
    with pytest.raises(RegistrationError, match=f"cannot register {length} bytes"):
        registrar.register(address, length)


def test_memory_that_cannot_be_pinned(registrar: IoUringRegistrar, memory: int) -> None:
    pinned = pinned_kib()
    hole = map_memory(3 * PAGE)
    unmap_memory(hole + PAGE, PAGE)
    huge = map_memory(2 << 30)
    read_only = mmap.mmap(-1, PAGE)
    libc = ctypes.CDLL(None)
    start = ctypes.addressof(ctypes.c_char.from_buffer(read_only))
    assert libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(PAGE), mmap.PROT_READ) == 0
    for address, length in [(hole, 3 * PAGE), (hole + PAGE, 1), (huge, 2 << 30), (start, PAGE)]:
        with pytest.raises(RegistrationError, match="mapped and that the process may write"):
            registrar.register(address, length)
    for address, length in [(hole, PAGE), (hole + 2 * PAGE, PAGE), (huge, 2 << 30)]:
        unmap_memory(address, length)
    wait_until_pinned(pinned)
    for _ in range(SLOTS):  # no slot was lost
        registrar.register(memory, PAGE)


def test_closed(registrar: IoUringRegistrar, memory: int, file: int) -> None:
    handle = registrar.register(memory, PAGE)
    registrar.close()
    registrar.close()
    for call in (
        lambda: registrar.register(memory, PAGE),
        lambda: registrar.deregister(handle),
        lambda: registrar.read_fixed(file, handle, memory, 1, 0),
    ):
        with pytest.raises(RegistrarError, match="closed"):
            call()


@pytest.mark.parametrize("slots", [0, -1, MAX_SLOTS + 1])
def test_bad_number_of_slots(slots: int) -> None:
    with pytest.raises(ValueError, match=str(slots)):
        IoUringRegistrar(slots)


def test_waiting_does_not_hold_the_gil_or_the_table(
    registrar: IoUringRegistrar, memory: int, pipe: tuple[int, int]
) -> None:
    handle = registrar.register(memory, PAGE)
    results: list[int] = []
    reader = threading.Thread(target=lambda: results.append(registrar.read_fixed(pipe[0], handle, memory, PAGE, 0)))
    reader.start()
    time.sleep(0.05)
    registrar.deregister(registrar.register(memory + PAGE, PAGE))
    os.write(pipe[1], b"late")
    reader.join(10)
    assert results == [4]
    assert ctypes.string_at(memory, 5) == b"late\0"


def test_pins_last_until_io_in_progress_ends(registrar: IoUringRegistrar, pipe: tuple[int, int]) -> None:
    before = pinned_kib()
    address = map_memory(PAGE)
    handle = registrar.register(address, PAGE)
    reader = threading.Thread(target=lambda: registrar.read_fixed(pipe[0], handle, address, PAGE, 0))
    reader.start()
    time.sleep(0.05)
    registrar.deregister(handle)
    time.sleep(0.05)
    assert pinned_kib() - before == PAGE >> 10
    os.write(pipe[1], b"late")
    reader.join(10)
    assert ctypes.string_at(address, 5) == b"late\0"
    wait_until_pinned(before)
    unmap_memory(address, PAGE)


def test_an_interrupted_read_does_not_touch_the_memory_later(
    registrar: IoUringRegistrar, memory: int, file: int, pipe: tuple[int, int]
) -> None:
    class Interruption(Exception):
        pass

    def interrupt(_number: int, _frame: object) -> None:
        raise Interruption

    handle = registrar.register(memory, PAGE)
    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(20):
            signal.setitimer(signal.ITIMER_REAL, 0.005)
            with pytest.raises(Interruption):
                registrar.read_fixed(pipe[0], handle, memory, PAGE, 0)
    finally:
        signal.signal(signal.SIGALRM, previous)
    os.write(pipe[1], b"late")
    assert registrar.read_fixed(file, handle, memory + 10, 5, 0) == 5
    assert ctypes.string_at(memory, 15) == bytes(10) + CONTENT[:5]
    assert os.read(pipe[0], 10) == b"late"


def test_threads(registrar: IoUringRegistrar, file: int) -> None:
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            address = map_memory(PAGE)
            for cycle in range(200):
                offset = number * 1000 + cycle
                handle = registrar.register(address, PAGE)
                assert registrar.read_fixed(file, handle, address, 100, offset) == 100
                assert ctypes.string_at(address, 100) == CONTENT[offset : offset + 100]
                registrar.deregister(handle)
            unmap_memory(address, PAGE)
        except BaseException as error:  # reported by the main thread
            errors.append(error)

    pinned = pinned_kib()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(SLOTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    wait_until_pinned(pinned)


def test_fork(registrar: IoUringRegistrar, memory: int, file: int) -> None:
    handle = registrar.register(memory, PAGE)
    fds = len(open_fds())

    def child() -> None:
        assert len(open_fds()) < fds
        with pytest.raises(RegistrarError, match="parent"):
            registrar.register(memory, PAGE)
        with pytest.raises(RegistrarError, match="parent"):
            registrar.deregister(handle)
        with pytest.raises(RegistrarError, match="parent"):
            registrar.read_fixed(file, handle, memory, 1, 0)
        registrar.close()
        with IoUringRegistrar(1) as own:
            assert own.read_fixed(file, own.register(memory, PAGE), memory, 1, 0) == 1

    in_child(child)
    assert registrar.read_fixed(file, handle, memory, 10, 0) == 10
    assert ctypes.string_at(memory, 10) == CONTENT[:10]


def test_a_child_does_not_keep_the_parents_pins(
    registrar: IoUringRegistrar, memory: int, pipe: tuple[int, int]
) -> None:
    before = pinned_kib()
    registrar.register(memory, PAGE)
    pid = os.fork()
    if pid == 0:
        os.close(pipe[1])
        os.read(pipe[0], 1)  # until the parent has looked
        os._exit(0)
    try:
        registrar.close()
        wait_until_pinned(before)
    finally:
        os.write(pipe[1], b"!")
        os.waitpid(pid, 0)


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EPERM, "seccomp|io_uring_disabled"),
        (errno.ENOSYS, "CONFIG_IO_URING"),
        (errno.EINVAL, r"Linux 5\.19"),
        (errno.ENOMEM, "RLIMIT_MEMLOCK"),
        (errno.EMFILE, "Too many open files"),
    ],
)
@pytest.mark.parametrize("at_call", [1, 2])
def test_kernel_refuses(monkeypatch: pytest.MonkeyPatch, number: int, remedy: str, at_call: int) -> None:
    system_call = io_uring._syscall
    calls = 0

    def refuse(*arguments: int) -> int:
        nonlocal calls
        calls += 1
        if calls == at_call:
            raise OSError(number, os.strerror(number))
        return system_call(*arguments)

    monkeypatch.setattr(io_uring, "_syscall", refuse)
    fds = open_fds()
    with pytest.raises(RegistrarUnavailableError, match=remedy):
        IoUringRegistrar()
    assert open_fds() == fds


def test_failed_deregistration(registrar: IoUringRegistrar, memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = registrar.register(memory, PAGE)

    def fail(*_arguments: int) -> int:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with monkeypatch.context() as patch:
        patch.setattr(io_uring, "_syscall", fail)
        with pytest.raises(OSError, match="Cannot allocate"):
            registrar.deregister(handle)
    registrar.deregister(handle)


def test_a_handle_says_what_it_is() -> None:
    assert repr(FixedBuffer(1, 0x7F00, 3)) == "FixedBuffer(index=1, address=0x7f00, length=3)"
