"""The feeder of this process's own notifiers, driven as the library drives it."""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import errno
import gc
import mmap
import operator
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
from support import LONG, SYS, require, show_secret

import ummunotify
from ummunotify import ForkedError, Notifier, SourceUnavailableError, TooManyNotifiersError
from ummunotify._abi import (
    OBJECT_VERSION,
    PAGE,
    PROTOCOL_VERSION,
    REPLY_SIZE,
    Header,
    Op,
    Probe,
    Reply,
    Request,
    Status,
    u32,
)
from ummunotify._bpf import create_segment, read_map
from ummunotify._core import open_notifier
from ummunotify.bpf import feeder, program
from ummunotify.bpf.feeder import FeederConnection
from ummunotify.errors import DescriptorLostError, UnavailableError

HELLO = Request(Op.HELLO).pack()

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


@pytest.fixture(autouse=True, scope="module")
def possible() -> None:
    """Also makes what the library keeps for the process: the virtual machine, and what keeps it open."""
    try:
        Client().end()
    except SourceUnavailableError as error:
        require("bpf", str(error))


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    gc.collect()
    before = ours()
    yield
    for _ in range(1000):  # a thread may still be about to let go
        gc.collect()
        if ours() == before:
            break
        time.sleep(0.01)
    assert ours() == before


def ours() -> list[str]:
    """Open descriptors of BPF objects, and mappings of them."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            name = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
        if "bpf" in name:
            found.append(name)
    return found + [line for line in Path("/proc/self/maps").read_text().splitlines() if "anon_inode:bpf" in line]


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def ask(connection: FeederConnection, op: Op) -> tuple[Reply, list[int]]:
    reply, fds = connection.exchange(Request(op).pack())
    answer = Reply.unpack(reply)
    assert len(reply) == REPLY_SIZE
    assert answer.fds == len(fds)
    return answer, fds


def make_page() -> int:
    page = int(_libc.mmap(None, PAGE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0))
    ctypes.memset(page, 1, 1)
    return page


def unmap(page: int) -> None:
    _libc.munmap(page, PAGE)


class Client:
    """A notifier of the library's, and the connection that feeds it."""

    def __init__(self) -> None:
        self.umn = open_notifier(Notifier, "bpf:kvm", None, self)

    def connect(self, probe: int) -> FeederConnection:
        self.connection = feeder.connect(probe)
        return self.connection

    def grow(self) -> None:
        """As often as it takes for the connection to be asked."""
        segments = self.umn.stats.segments
        page = make_page()
        regions = []
        while self.umn.stats.segments == segments:
            regions.append(self.umn.watch((page, PAGE)))
        for region in regions:
            region.close()
        unmap(page)

    def sees(self) -> bool:
        page = make_page()
        region = self.umn.watch((page, PAGE))
        assert region.valid
        unmap(page)
        seen = not region.valid
        region.close()
        return seen

    def end(self) -> None:
        self.umn.close()


def test_it_feeds_what_was_bound() -> None:
    client = Client()
    assert client.sees()
    client.grow()
    assert client.sees()
    assert not client.connection.may_have_missed()
    client.end()
    with pytest.raises(UnavailableError, match="closed"):
        ask(client.connection, Op.GROW)
    client.connection.disconnect()


def close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def test_a_handshake() -> None:
    for shown in (True, False):
        connection = feeder.connect(Probe.KVM)
        reply, fds = ask(connection, Op.HELLO)
        assert (reply.status, reply.gives, reply.probe, len(fds)) == (Status.OK, 0, Probe.KVM, 3)
        assert Header.unpack(read_map(fds[1], u32(0), PAGE)) == (0, 0, 0)
        for op in (Op.HELLO, Op.GROW):
            assert ask(connection, op)[0].value == errno.EINVAL
        # What was not seen may be shown again: the address space may be subscribed only now.
        assert ask(connection, Op.SETTLE)[0].status == Status.UNSEEN
        if shown:
            show_secret(reply.value)
            assert ask(connection, Op.SETTLE)[0].status == Status.OK
            # The secret is used up.
            assert ask(connection, Op.SETTLE)[0].value == errno.EINVAL
            reply, more = ask(connection, Op.GROW)
            assert (reply.status, reply.fds) == (Status.OK, 1)
            close_all(more)
        close_all(fds)
        connection.disconnect()


def test_requests_in_the_wrong_order() -> None:
    connection = feeder.connect(Probe.KVM)
    for op in (Op.SETTLE, Op.GROW, Op.STATUS):
        assert ask(connection, op)[0].value == errno.EINVAL
    reply, fds = connection.exchange(Request(Op.HELLO, PROTOCOL_VERSION + 1).pack())
    assert Reply.unpack(reply)[:1] == (Status.VERSION,)
    assert not fds
    with pytest.raises(ValueError, match="8 bytes"):
        connection.exchange(bytes(7))


def test_there_is_a_limit_and_a_number_is_used_again() -> None:
    clients = [Client() for _ in range(feeder.TABLES)]
    reply, fds = ask(feeder.connect(Probe.KVM), Op.HELLO)
    assert (reply.status, reply.value, fds) == (Status.PROCESS_CLIENTS, feeder.TABLES, [])
    with pytest.raises(TooManyNotifiersError):
        Client()
    assert all(client.sees() for client in clients)
    clients[7].end()
    clients[7] = Client()
    assert all(client.sees() for client in clients)
    for client in clients:
        client.end()


def test_all_at_once() -> None:
    """Threads that connect, grow and disconnect beside one another share one program, and each is fed."""
    failures: list[BaseException] = []
    programs = set()
    keeper = Client()

    def work() -> None:
        try:
            for _ in range(5):
                client = Client()
                programs.add(feeder._programs[next(iter(feeder._programs))]())
                client.grow()
                assert client.sees()
                client.end()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(programs) == 1
    assert keeper.sees()
    keeper.end()


def test_without_a_connection_nothing_is_loaded() -> None:
    client = Client()
    (reference,) = [each for each in feeder._programs.values() if each() is not None]
    client.end()
    assert reference() is None


# ---- Descriptors that the program closes ----


def replace_all() -> dict[int, tuple[int, int]]:
    """Put an innocent file in the place of each descriptor of a BPF object. What is where now."""
    read, write = os.pipe()
    placed = {}
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        try:
            if "bpf" in os.readlink(f"/proc/self/fd/{fd}"):
                os.dup2(read, fd)
                placed[fd] = identity(fd)
        except FileNotFoundError:
            continue
    os.close(read)
    os.close(write)
    return placed


def identity(fd: int) -> tuple[int, int]:
    stat = os.fstat(fd)
    return stat.st_dev, stat.st_ino


@pytest.mark.parametrize("how", ["closed", "replaced"])
def test_descriptors_are_opened_again_where_that_is_permitted(how: str) -> None:
    client = Client()
    placed = replace_all()
    assert len(placed) > 5
    if how == "closed":
        for fd in placed:
            os.close(fd)
        placed.clear()
    assert client.sees()
    client.grow()
    assert not client.connection.may_have_missed()
    other = Client()
    assert other.sees()
    other.end()
    client.end()
    gc.collect()
    # What was put in their place is the program's.
    for fd, what in placed.items():
        assert identity(fd) == what
        os.close(fd)


def test_descriptors_that_cannot_be_opened_again() -> None:
    """Without CAP_SYS_ADMIN: it is said, and new connections get another program."""
    run(
        """
        from ummunotify.daemon import privileges
        privileges.drop(None)
        client = Client()
        placed = replace_all()
        assert client.sees()
        for call in (lambda: ask(client.connection, Op.GROW), client.connection.may_have_missed):
            with pytest.raises(DescriptorLostError, match="the program has closed a descriptor"):
                call()
        other = Client()
        assert other.sees() and client.sees()
        other.grow()
        client.end()
        assert other.sees()
        other.end()
        gc.collect()
        assert all(identity(fd) == what for fd, what in placed.items())
        """
    )


def run(code: str) -> None:
    """In a process of its own, with everything that is here."""
    prologue = """if True:
        import sys
        sys.path[:0] = ["tests", "."]
        from test_feeder import *
    """
    command = [sys.executable, "-c", prologue + code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert (done.stderr, done.returncode) == ("", 0)


# ---- Forks ----

FORKS: dict[str, Callable[[], int]] = {
    "os.fork": os.fork,
    # ctypes would give the GIL back in the child, to what the parent's other threads left; PyDLL keeps it.
    "fork": lambda: int(ctypes.PyDLL(None).fork()),
    "clone": lambda: int(ctypes.PyDLL(None).syscall(SYS["clone"], signal.SIGCHLD, 0, 0, 0, 0)),
}


@pytest.mark.parametrize("how", FORKS)
def test_the_child_of_a_fork(how: str) -> None:
    """It can use nothing of its parent's, has a feeder of its own, and disturbs the parent in nothing."""
    client = Client()
    client.grow()
    pid = FORKS[how]()
    if not pid:
        result = 1
        try:
            for call in (lambda: ask(client.connection, Op.GROW), client.connection.may_have_missed):
                with pytest.raises(DescriptorLostError, match="fork"):
                    call()
            mine = Client()
            assert mine.sees()
            mine.end()
            client.connection.disconnect()
            del client
            gc.collect()
            result = 0
        finally:
            os._exit(result)
    assert os.waitpid(pid, 0)[1] == 0
    assert client.sees()
    client.grow()
    assert client.sees()
    client.end()


def test_the_child_closes_what_it_has_inherited() -> None:
    connection = feeder.connect(Probe.KVM)
    assert len(ours()) > 5
    pid = os.fork()
    if not pid:
        os._exit(len(ours()))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    connection.disconnect()


def test_fork_while_another_thread_loads() -> None:
    """It does not wait, and the child can load too."""
    thread = threading.Thread(target=lambda: Client().end())
    thread.start()
    while not feeder._loading and thread.is_alive():
        time.sleep(0.0001)
    begun = bool(feeder._loading)
    pid = os.fork()
    if not pid:
        result = 1
        try:
            client = Client()
            result = 0 if client.sees() else 2
        finally:
            os._exit(result)
    assert os.waitpid(pid, 0)[1] == 0
    thread.join()
    assert begun


def fork_while_opening(step: int) -> int:
    """Fork where the feeder executes its opcode number `step` for the first time. The child; 0: there are fewer."""
    executed: set[tuple[CodeType, int]] = set()
    child = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal child
        if frame.f_code.co_filename not in FILES:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            executed.add((frame.f_code, frame.f_lasti))
        if len(executed) == step and not child:
            child = os.fork()
            if not child:
                signal.alarm(int(LONG))
        return trace

    parent = os.getpid()
    sys.settrace(trace)
    try:
        umn = ummunotify.open("bpf:kvm")
    except ForkedError:
        sys.settrace(None)
        assert os.getpid() != parent
        if step % 40 == 1:  # to load takes time
            check_notifier(ummunotify.open("bpf:kvm"))
        os._exit(0)
    finally:
        sys.settrace(None)
        if os.getpid() != parent:
            os._exit(1)
    check_notifier(umn)
    umn.close()
    return child


@pytest.mark.parametrize("loaded", [True, False])
def test_fork_at_every_step_of_opening(loaded: bool) -> None:
    """As a signal handler or a finaliser may. What it has interrupted fails in the child, which can open another."""
    keeper = feeder.connect(Probe.KVM) if loaded else None
    step = 1
    while child := fork_while_opening(step):
        assert os.waitpid(child, 0)[1] == 0
        step += 3 if loaded else 10
    assert step > 20
    if keeper is not None:
        keeper.disconnect()


def check_notifier(umn: Notifier) -> None:
    with mmap.mmap(-1, PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        region = umn.watch(page)
        assert region.valid
    assert not region.valid
    assert [event.region for event in umn.read()] == [region]


# ---- Signals ----


class Interruption(Exception):
    pass


FILES = {feeder.__file__, program.__file__}


def interrupted(call: Callable[[], Any], step: int) -> bool:
    """Raise at the given opcode of the feeder's code in this thread, as a signal handler can. Did it get so far?"""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in FILES:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            count += 1
            if count == step:
                raise Interruption
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Interruption:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("loaded", [False, True])
def test_an_exception_at_every_step(loaded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves nothing behind, and the next call works."""
    # While it waits for the thread, the same few steps come again and again: let them be few.
    monkeypatch.setattr(feeder, "_POLL_SECONDS", 0.1)
    keeper = feeder.connect(Probe.KVM) if loaded else None
    before, running = ours(), threads()
    step = 1
    while interrupted(lambda: feeder.connect(Probe.KVM).disconnect(), step):
        if step % 10 == 1:
            Client().end()
        # The thread that an interrupted call has started loads, and then lets go. The kernel counts it from its start.
        while threads() > running:
            time.sleep(0.001)
        gc.collect()
        assert ours() == before
        step += 1 if "UMMUNOTIFY_SLOW" in os.environ else 3 if step < 120 else 7
    assert step > (20 if loaded else 50)
    if keeper is not None:
        keeper.disconnect()


def test_a_program_is_loaded_although_the_call_was_interrupted() -> None:
    """A second call waits for what the first has begun."""

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code is feeder._wait_for_thread.__code__ and event == "line" and feeder._loading:
            (loading,) = feeder._loading.values()
            if loading._claim.locked():
                raise Interruption
        return trace

    sys.settrace(trace)
    try:
        with pytest.raises(Interruption):
            feeder.connect(Probe.KVM)
    finally:
        sys.settrace(None)
    (loading,) = feeder._loading.values()
    client = Client()
    assert loading._program is feeder._program(Probe.KVM)
    assert client.sees()
    client.end()


def test_signals_at_any_rate() -> None:
    """With a real timer: no table and no descriptor is lost, and what is bound is fed."""
    rng = random.Random(1)
    keeper = Client()
    raised = 0
    armed = False

    def handler(*_: object) -> None:
        nonlocal armed, raised
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.00005, 0.003))
        if armed:
            armed = False
            raised += 1
            raise Interruption

    held: list[tuple[bytes, list[int]]] = []
    connections: list[FeederConnection] = []
    previous = signal.signal(signal.SIGALRM, handler)
    end = time.monotonic() + 5
    signal.setitimer(signal.ITIMER_REAL, 0.0001)
    while time.monotonic() < end:
        with contextlib.suppress(Interruption):
            armed = True
            # Native code calls, and holds the result: there is no bytecode between the answer and the list.
            connections.extend(map(feeder.connect, [Probe.KVM]))
            held.extend(map(operator.methodcaller("exchange", HELLO), connections[-1:]))
            connections[-1].disconnect()
            armed = False
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)
    for _, fds in held:
        for fd in fds:
            os.close(fd)
    held.clear()
    while connections:
        connections.pop().disconnect()
    assert raised > 100
    gc.collect()
    # All tables are there again.
    assert keeper.sees()
    clients = [Client() for _ in range(feeder.TABLES - 1)]
    assert all(client.sees() for client in clients)
    for client in clients:
        client.end()
    keeper.end()


# ---- What goes wrong ----


def test_no_descriptors_are_left() -> None:
    """It fails as a whole: nothing of a table stays."""
    connection = feeder.connect(Probe.KVM)
    spare = os.open("/dev/null", os.O_RDONLY)
    os.close(spare)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    for room in range(3):
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare + room, limits[1]))
        try:
            reply, fds = ask(connection, Op.HELLO)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert (reply.status, reply.value, fds) == (Status.FAILED, errno.EMFILE, [])
    reply, fds = ask(connection, Op.HELLO)
    assert reply.status == Status.OK
    close_all(fds)


def test_a_defect_is_a_reason_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (ZeroDivisionError("oops"), OSError(errno.EIO, "oops"), RuntimeError("oops")):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(feeder, "attached", fail)
        with pytest.raises(UnavailableError, match="oops"):
            feeder.connect(Probe.KVM)


def test_an_object_of_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a package was installed anew, or removed, after the process had begun."""
    for words, data in (("another version", b"ummunotify protocol 0\0"), ("No such file", None)):
        folder = tmp_path / words
        folder.mkdir()
        if data is not None:
            known = (program._OBJECTS / "watch.bpf.o").read_bytes()
            (folder / "watch.bpf.o").write_bytes(known.replace(OBJECT_VERSION + b"\0", data))
        monkeypatch.setattr(program, "_OBJECTS", folder)
        with pytest.raises(UnavailableError, match=f"{words}.*start the process again"):
            feeder.connect(Probe.KVM)


def test_threads_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", fail)
    client = Client()
    assert client.sees()
    client.end()


def test_a_descriptor_that_is_no_bpf_object() -> None:
    from ummunotify._bpf import MAP, Descriptor

    read, write = os.pipe()
    os.close(write)
    with pytest.raises(OSError, match="look at a pipe"):
        Descriptor("a pipe", MAP, read)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(read)
    descriptor = Descriptor("a map", MAP, create_segment())
    fd = descriptor.number()
    descriptor.close()
    descriptor.close()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)
    with pytest.raises(OSError, match="use a map"):
        descriptor.number()
