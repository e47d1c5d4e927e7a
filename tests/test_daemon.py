"""The daemon and its clients: on the real kernel, with clients that are unprivileged users."""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import faulthandler
import grp
import io
import json
import mmap
import os
import random
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from daemons import (
    COMMAND,
    NOBODY,
    PAGE,
    Child,
    Daemon,
    as_nobody,
    change,
    connect,
    held,
    left_of,
    object_fd,
    stress,
)
from support import LONG, SYS, map_memory, require_module, show_secret, unmap_memory

import ummunotify
from ummunotify import _abi, _peers
from ummunotify._abi import Gives, Op, Probe, Reply, Request, Status
from ummunotify.bpf import feeder, libbpf
from ummunotify.cli.daemon import closed_folder
from ummunotify.cli.doctor import doctor
from ummunotify.daemon import batches
from ummunotify.daemon.limits import SEGMENT, TABLE, Limits, Usage
from ummunotify.daemon.loop import Loop
from ummunotify.daemon.server import BOUNDS

# ---- what it is for ----


def test_an_unprivileged_user_takes_it_without_knowing(daemon: Daemon) -> None:
    def program(_: Connection) -> tuple[str, bool, bool, list[tuple[bool, str]]]:
        with ummunotify.open() as umn:
            buf = mmap.mmap(-1, 1 << 20)
            buf[0] = 1
            region = umn.watch(buf)
            before = region.valid
            buf.close()
            events = umn.read()
            return umn.source, before, region.valid, [(event.exact, event.cause.partition(" ")[0]) for event in events]

    assert as_nobody(program) == ("daemon:kvm", True, False, [(True, "munmap")])
    daemon.settled()


def test_the_first_example_of_the_readme(daemon: Daemon) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (example,) = re.findall(r"```python\n(import mmap, ummunotify\n.*?)```", readme, re.DOTALL)

    def program(_: Connection) -> tuple[str, str]:
        names: dict[str, Any] = {}
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(example, names)
        return names["umn"].source, said.getvalue()

    name, said = as_nobody(program)
    assert name == "daemon:kvm"
    assert re.fullmatch(r"0x[0-9a-f]+-0x[0-9a-f]+: munmap by thread \d+\n", said)


def test_root_takes_it_too(daemon: Daemon) -> None:
    """One program for the host instead of one for each process; what was opened before goes on."""
    with ummunotify.open() as umn, ummunotify.open("bpf") as own:
        assert umn.source == "daemon:kvm"
        assert own.source == "bpf:kvm"
        daemon.end()
        with ummunotify.open() as another:
            assert another.source == "bpf:kvm"
            for each in (umn, own, another):
                change(each)


def test_doctor_says_what_many_programs_cost(daemon: Daemon) -> None:
    def find() -> Any:
        return json.loads(subprocess.run([*COMMAND, "doctor", "--json"], capture_output=True, check=True).stdout)

    with ummunotify.open("bpf"):
        found = find()
        assert found["sources"][0]["source"] == "daemon:kvm"
        assert found["machine"]["subscribed by"] == "an empty virtual machine"
        assert int(found["machine"]["BPF programs"].split()[0]) >= 2  # the daemon's, and this process's
        assert not found["advice"]
        daemon.end()
        found = find()
        count = int(found["machine"]["BPF programs"].split()[0])
        assert count >= 1
        assert f"{count} now" in found["advice"]
        assert "ummunotify daemon install" in found["advice"]


def test_only_root_counts_the_programs(directory: Path) -> None:
    def program(_: Connection) -> tuple[str, str]:
        found = json.loads(CliRunner().invoke(doctor, ["--json"]).stdout)
        return found["machine"]["BPF programs"], found["advice"]

    said, advice = as_nobody(program)
    assert "CAP_SYS_ADMIN" in said
    assert not advice


def test_waiting_and_growing(daemon: Daemon) -> None:
    def program(pipe: Connection) -> tuple[int, int, bool]:
        with ummunotify.open() as umn:
            address = map_memory(20_000 * PAGE)
            regions = [umn.watch((address + i * PAGE, PAGE)) for i in range(20_000)]
            assert not umn.read()
            poll = select.poll()
            poll.register(umn.fileno(), select.POLLIN)
            quiet = not poll.poll(0)
            for i in range(0, 20_000, 2):
                ctypes.c_ubyte.from_address(address + i * PAGE).value = 1
            unmap_memory(address, 20_000 * PAGE)
            assert poll.poll(LONG * 1000)
            events = umn.read(timeout=None)
            assert len(events) == 20_000
            return umn.stats.segments, sum(region.valid for region in regions), quiet

    segments, valid, quiet = as_nobody(program)
    assert segments > 4
    assert (valid, quiet) == (0, True)
    daemon.settled()


def test_many_notifiers_in_one_process(daemon: Daemon) -> None:
    def program(_: Connection) -> None:
        notifiers = [ummunotify.open() for _ in range(40)]
        address = map_memory(PAGE)
        ctypes.c_ubyte.from_address(address).value = 1
        regions = [umn.watch((address, PAGE)) for umn in notifiers]
        for umn in notifiers[10:20]:
            umn.close()
        unmap_memory(address, PAGE)
        assert not any(region.valid for region in regions)
        left = notifiers[:10] + notifiers[20:]
        assert all(len(umn.read()) == 1 for umn in left)
        for umn in left:
            umn.close()
        assert not held()

    as_nobody(program)
    daemon.settled()


def test_the_others_changes(daemon: Daemon) -> None:
    """Truncation by a process that has nothing to do with it."""
    with tempfile.TemporaryFile() as file:
        file.truncate(4 * PAGE)

        def program(pipe: Connection) -> list[bool]:
            with ummunotify.open() as umn, mmap.mmap(file.fileno(), 4 * PAGE) as mapped:
                mapped[2 * PAGE] = 1
                address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
                regions = [umn.watch((address + i * PAGE, PAGE)) for i in range(4)]
                pipe.send("watching")
                pipe.recv()
                valid = [region.valid for region in regions]
                pipe.send((True, valid))
                os._exit(0)

        child = Child(program)
        assert child.hear() == "watching"
        file.truncate(2 * PAGE)
        child.pipe.send("truncated")
        assert child.result() == [True, True, False, False]


def test_the_child_of_a_fork_lets_go(daemon: Daemon) -> None:
    def program(_: Connection) -> int:
        umn = ummunotify.open()
        address = map_memory(PAGE)
        region = umn.watch((address, PAGE))
        pid = os.fork()
        if not pid:
            try:
                assert umn.closed
                assert not region.valid
                assert not held()
                with ummunotify.open() as own:
                    change(own)
                os._exit(0)
            except BaseException as error:
                os.write(2, repr(error).encode())
            finally:
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
        assert region.valid
        change(umn)
        return os.waitstatus_to_exitcode(0)

    assert as_nobody(program) == 0
    daemon.settled()


def test_without_a_daemon_it_says_so(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ummunotify.SourceUnavailableError,
        match=r"no daemon runs here: there is no /.*/socket \(from UMMUNOTIFY_SOCKET\); set UMMUNOTIFY_SOCKET",
    ):
        ummunotify.open(source="daemon")
    (directory / "socket").touch()
    with pytest.raises(ummunotify.SourceUnavailableError, match="is no socket"):
        ummunotify.open(source="daemon")
    monkeypatch.setenv(_abi.SOCKET_ENVIRONMENT, str(directory / "socket" / "below"))
    with pytest.raises(ummunotify.SourceUnavailableError, match=r"no socket can be at .*: Not a directory"):
        ummunotify.open(source="daemon")
    monkeypatch.setenv(_abi.SOCKET_ENVIRONMENT, str(directory / "socket"))
    (directory / "socket").unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(directory / "socket"))
        other.listen()
        with pytest.raises(ummunotify.SourceUnavailableError, match="is the socket of another program"):
            ummunotify.open(source="daemon")
    (directory / "socket").unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(directory / "socket"))
        with pytest.raises(ummunotify.SourceUnavailableError, match="it has ended"):
            ummunotify.open(source="daemon")
        os.chmod(directory / "socket", 0o600)
        listener.listen()
        with pytest.raises(RuntimeError, match="not for this user"):
            as_nobody(lambda _: ummunotify.open(source="daemon"))
        os.chmod(directory, 0o700)
        with pytest.raises(RuntimeError, match="may not enter a directory on the way"):
            as_nobody(lambda _: ummunotify.open(source="daemon"))


def test_a_daemon_that_hangs_does_not_hang_its_clients(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(directory / "socket"))
        listener.listen()
        with pytest.raises(ummunotify.SourceUnavailableError, match="does not answer"):
            ummunotify.open(source="daemon")


# ---- the daemon goes ----


SECONDS = 60.0 if "UMMUNOTIFY_SLOW" in os.environ else 2.0
"""How long each client changes mappings at random."""


def random_changes(native: Any) -> Callable[[Connection], tuple[str | None, dict[str, int]]]:
    """What a client does: the differential test, whatever becomes of the daemon."""

    def program(pipe: Connection) -> tuple[str | None, dict[str, int]]:
        with ummunotify.open(source="daemon") as umn:
            pipe.send("begun")
            seed = time.time_ns() % 1_000_000
            found: tuple[str | None, dict[str, int]]
            found = native.run(umn, threads=3, files=True, changes=1 << 62, seconds=SECONDS, seed=seed)
            return found

    return program


def test_the_daemon_ends_and_its_clients_miss_nothing(daemon: Daemon, native: Any) -> None:
    """Killed, stopped, and started again, under stress; and one client sleeps in between."""
    children = []
    objects: set[tuple[str, int]] = set()
    ended = 0
    try:
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
            children.append(Child(random_changes(native)))
            assert children[-1].hear() == "begun"
            objects |= daemon.objects()
            os.kill(children[0].pid, signal.SIGSTOP)
            daemon.end(number)
            with pytest.raises(ummunotify.SourceUnavailableError):
                connect()
            os.kill(children[0].pid, signal.SIGCONT)
            daemon.start()
            ended += 1
        # And from now on whenever it is up again.
        while not all(child.pipe.poll() for child in children):
            daemon.end(signal.SIGKILL)
            daemon.start()
            ended += 1
            time.sleep(0.2)
        results = [child.result() for child in children]
        children.clear()
    finally:
        for child in children:
            child.kill()
    print(f"the daemon ended {ended} times")
    for wrong, totals in results:
        print(", ".join(f"{count:,} {what}" for what, count in totals.items()))
        assert wrong is None, totals
        assert totals["hit"] > 100, totals
        assert totals["valid"] > 100, totals
    daemon.settled()
    # What belonged to those that ended went with their last clients.
    assert not left_of(objects)


def test_old_and_new_do_not_mix_and_nothing_stays(daemon: Daemon) -> None:
    def program(pipe: Connection) -> int:
        with ummunotify.open() as umn:
            address = map_memory(PAGE)
            ctypes.c_ubyte.from_address(address).value = 1
            umn.watch((address, PAGE))
            generation = umn.generation
            pipe.send("watching")
            pipe.recv()
            unmap_memory(address, PAGE)
            (event,) = umn.read()
            assert event.exact
            return umn.generation - generation

    old = Child(program)
    assert old.hear() == "watching"
    objects = daemon.objects()
    links = {(kind, number) for kind, number in objects if kind == "link"}
    assert links
    assert len(objects) > 2 + 6
    daemon.end(signal.SIGKILL)
    daemon.start()
    new = Child(program)
    assert new.hear() == "watching"
    assert not objects & daemon.objects()
    for kind, number in links:
        os.close(object_fd(kind, number))  # the old client's, which keep the program that feeds it
    old.pipe.send("go on")
    assert old.result() == 1
    assert not left_of(objects)
    objects = daemon.objects()
    assert daemon.end() == 0
    new.pipe.send("go on")
    assert new.result() == 1
    assert not left_of(objects)


def fill(umn: ummunotify.Notifier) -> None:
    for i in range(1 << 20):
        umn.watch((0x10000 + i * PAGE, PAGE))


def test_without_its_daemon_a_notifier_cannot_grow_and_says_so(daemon: Daemon) -> None:
    def program(pipe: Connection) -> str:
        umn = ummunotify.open()
        pipe.send("open")
        pipe.recv()
        with pytest.raises(ummunotify.TooManyRegionsError) as caught:
            fill(umn)
        for region in umn.regions[::2]:
            region.close()
        change(umn)
        with ummunotify.open() as new:
            change(new)
        return str(caught.value)

    child = Child(program)
    assert child.hear() == "open"
    daemon.end(signal.SIGKILL)
    daemon.start()
    child.pipe.send("go on")
    assert "open a new one" in child.result()


def test_the_other_side_has_another_version(daemon: Daemon) -> None:
    """After an upgrade of only one of them. What the library says then: tests of the runtime in C."""
    with connect() as connection:
        connection.send(Request(Op.HELLO, _abi.PROTOCOL_VERSION + 1).pack())
        reply = Reply.unpack(connection.recv(100))
        assert (reply.status, reply.value) == (Status.VERSION, _abi.PROTOCOL_VERSION)
    daemon.settled()


def test_a_second_daemon_leaves_the_first_alone(daemon: Daemon) -> None:
    said = subprocess.run([*COMMAND, "daemon", "--socket", daemon.path], capture_output=True, text=True)
    assert said.returncode == 1
    assert "a daemon listens at" in said.stderr
    assert "Traceback" not in said.stderr
    as_nobody(lambda _: ummunotify.open().close())


def activated(listener: socket.socket) -> subprocess.Popen[bytes]:
    """A daemon that is given this socket as systemd gives it."""
    code = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ['LISTEN_PID'] = str(os.getpid()); "
        "from ummunotify.cli import main; main(['daemon', '--ready', '1'])"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(listener.fileno())],
        pass_fds=[listener.fileno()],
        env=os.environ | {"LISTEN_FDS": "1"},
        stderr=subprocess.DEVNULL,
    )


def test_socket_activation(directory: Path) -> None:
    """As systemd does it: the socket is there first, and outlives the daemon."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(directory / "socket"))
        os.chmod(directory / "socket", 0o666)
        listener.listen()
        for _ in range(2):
            child = Child(lambda _: change(ummunotify.open()))
            process = activated(listener)
            child.result()
            process.terminate()
            assert process.wait(LONG) == 0


def test_it_keeps_only_what_it_needs(daemon: Daemon) -> None:
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{daemon.pid}/status").read_text().splitlines())
    assert status["CapPrm"] == status["CapEff"] == status["CapBnd"] == "000000c000000000"
    assert int(status["CapInh"], 16) == int(status["CapAmb"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert set(status["Uid"].split()) == {str(NOBODY)}
    assert not status["Groups"].strip()
    assert status["Threads"] == "2"


# ---- from a container ----

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x20000,
    0x4000000,
    0x8000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
MS_BIND, MS_REC = 4096, 16384
PR_SET_DUMPABLE = 4


def enter_container(path: str) -> None:
    """Become the first process, and root, of new namespaces. In them are /socket, the package, the system's libraries.

    No /dev, above all.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *arguments: bytes | int | None) -> None:
        if getattr(libc, name)(*arguments):
            raise OSError(ctypes.get_errno(), f"{name}{arguments}: {os.strerror(ctypes.get_errno())}")

    call("prctl", PR_SET_DUMPABLE, 1)  # /proc/self is root's since the user changed
    call("unshare", CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {NOBODY} 1")
    Path("/proc/self/gid_map").write_text(f"0 {NOBODY} 1")
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        os._exit(0)
    root = Path("/mnt")
    call("mount", b"tmpfs", bytes(root), b"tmpfs", 0, None)
    (root / "proc").mkdir()
    (root / "socket").touch()
    call("mount", b"proc", bytes(root / "proc"), b"proc", 0, None)
    call("mount", path.encode(), bytes(root / "socket"), None, MS_BIND, None)
    for folder in ("/usr", "/lib", "/lib64", os.path.dirname(ummunotify.__file__)):
        inside = root / folder[1:]
        inside.mkdir(parents=True)
        call("mount", folder.encode(), bytes(inside), None, MS_BIND | MS_REC, None)
    os.chroot(root)
    os.chdir("/")
    os.environ[_abi.SOCKET_ENVIRONMENT] = "/socket"


def test_a_container_with_nothing_but_the_socket(daemon: Daemon) -> None:
    def program(pipe: Connection) -> tuple[str, int, int, bool]:
        enter_container(daemon.path)
        with ummunotify.open() as umn:
            change(umn)
            pipe.send("open")
            pipe.recv()
            return umn.source, os.getpid(), os.getuid(), os.path.exists("/dev")

    child = Child(program)
    assert child.hear() == "open"
    status = json.loads(subprocess.run([*COMMAND, "status", "--json"], capture_output=True, check=True).stdout)
    (client,) = status["clients"]
    child.pipe.send("go on")
    assert child.result() == ("daemon:kvm", 1, 0, False)
    # To the daemon, and its limits, it is the user that it is on the host.
    assert client["uid"] == NOBODY
    assert client["pid"] > child.pid
    daemon.settled()


# ---- clients come and go ----


def test_whatever_becomes_of_a_client_it_gives_everything_back(daemon: Daemon) -> None:
    def opened(pipe: Connection) -> None:
        umn = ummunotify.open()
        umn.watch((1 << 20, PAGE))
        pipe.send("open")
        what = pipe.recv()
        if what == "exec":
            os.execv("/bin/sleep", ["sleep", "1000"])
        if what == "crash":
            faulthandler.disable()  # pytest's, inherited
            os.kill(os.getpid(), signal.SIGSEGV)
        pipe.recv()

    fds = daemon.settled() and daemon.fds()
    children = {what: Child(opened) for what in ("kill", "exec", "crash", "stop")}
    try:
        for child in children.values():
            assert child.hear() == "open"
        daemon.settled(4)
        os.kill(children["kill"].pid, signal.SIGKILL)
        children["exec"].pipe.send("exec")
        children["crash"].pipe.send("crash")
        os.kill(children["stop"].pid, signal.SIGSTOP)
        daemon.settled(1)
        as_nobody(lambda _: change(ummunotify.open()))
        os.kill(children["stop"].pid, signal.SIGKILL)
        daemon.settled(0)
        assert daemon.fds(fds) == fds
    finally:
        for child in children.values():
            child.kill()


def test_clients_that_do_not_finish(daemon: Daemon) -> None:
    """Half-open connections, and answers that nobody reads, are nobody else's problem."""
    silent = [connect() for _ in range(20)]
    half = [connect() for _ in range(20)]
    for connection in half:
        connection.send(Request(Op.HELLO).pack())
    as_nobody(lambda _: change(ummunotify.open()))
    for connection in half:
        connection.send(Request(Op.SETTLE).pack())  # before the answer was read
    as_nobody(lambda _: change(ummunotify.open()))
    for connection in half:
        # Thrown out.
        while connection.recv(100):
            pass
    for connection in silent + half:
        connection.close()
    daemon.settled()


@contextlib.contextmanager
def lingering() -> Iterator[int]:
    """A descriptor that takes an hour to close, where it is the last one; as long as this lasts."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        connection = socket.create_connection(server.getsockname())
        with server.accept()[0]:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 3600))
            connection.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    connection.send(bytes(1 << 16))
            yield connection.detach()


def close_at_once(slow: int) -> None:
    with socket.socket(fileno=slow) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes(8))


def pass_on(connection: socket.socket, message: bytes, fd: int) -> bool:
    """False: the kernel lets nobody send a descriptor there."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
    try:
        connection.sendmsg([message], rights)
    except PermissionError:
        return False
    return True


def test_descriptors_that_take_long_to_close(daemon: Daemon) -> None:
    """The daemon does not close them, where the kernel cannot keep them away: nobody waits."""
    with lingering() as slow:
        os.kill(daemon.pid, signal.SIGSTOP)
        try:
            with connect() as connection:
                passed = pass_on(connection, Request(Op.STATUS, argument=_abi.STATUS_SUMMARY).pack(), slow)
                if passed:
                    os.close(slow)
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
        as_nobody(lambda _: change(ummunotify.open(source="daemon")))
        daemon.settled()
        if not passed:
            close_at_once(slow)


def test_descriptors_that_came_before_the_daemon(directory: Path) -> None:
    """The same where the kernel has let them pass, in each place where a message can be discarded."""
    with contextlib.ExitStack() as undo:
        listener = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        listener.bind(str(directory / "socket"))
        os.chmod(directory / "socket", 0o666)
        listener.listen()
        status = Request(Op.STATUS, argument=_abi.STATUS_SUMMARY).pack()
        for before, end in ((b"", False), (status, False), (b"nonsense" * 9, False), (status, True)):
            slow = undo.enter_context(lingering())
            connection = undo.enter_context(connect())
            if before:
                connection.send(before)
            assert pass_on(connection, status, slow)
            os.close(slow)
            if end:
                connection.close()
        process = activated(listener)
        undo.callback(process.kill)
        as_nobody(lambda _: change(ummunotify.open(source="daemon")))
        process.terminate()
        assert process.wait(LONG) == 0


def test_a_child_closes_what_takes_long(directory: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, lingering() as slow:
        theirs.send(b"first")
        assert pass_on(theirs, b"second", slow)
        os.close(slow)
        fd = ours.detach()
        assert _peers.receive(fd, 100) == b"first"
        assert _peers.receive(fd, 100) is None
        assert _peers.receive(fd, 100) is None
        _peers.close(fd)
        assert theirs.recv(1) == b""
        os.fstat(fd)
        deadline = time.monotonic() + LONG
        while _peers.close_held():
            assert time.monotonic() < deadline
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            os.fstat(fd)
        assert not _peers.close_held()


@pytest.mark.parametrize("hold", [0, 700], ids=["of requests", "of held connections"])
def test_a_flood(hold: int, daemon: Daemon) -> None:
    def flood(pipe: Connection) -> None:
        held = []
        pipe.send("flooding")
        while not pipe.poll():
            with contextlib.suppress(ummunotify.SourceUnavailableError, OSError):
                connection = connect()
                connection.setblocking(False)
                held.append(connection)
                connection.send(Request(Op.HELLO).pack())
                if not hold:
                    for _ in range(10):
                        connection.send(os.urandom(8))
            if len(held) > hold:
                for connection in held:
                    connection.close()
                held.clear()

    child = Child(flood, NOBODY - 1)
    try:
        assert child.hear() == "flooding"
        for _ in range(20):
            as_nobody(lambda _: change(ummunotify.open()))
    finally:
        child.kill()
    daemon.settled()
    # It is not the journal that is flooded.
    assert len(daemon.log.read_text().splitlines()) < 10


def corrupt(pipe: Connection) -> None:
    """Write nonsense all over one's own table."""
    umn = ummunotify.open()
    for i in range(1000):
        umn.watch((0x10000 + i * PAGE, PAGE))
    lines = Path("/proc/self/maps").read_text().splitlines()
    mapped = (line.split()[0].split("-") for line in lines if "bpf-map" in line)
    # The wake-up is mapped too, in pages.
    start, end = max(((int(first, 16), int(last, 16)) for first, last in mapped), key=lambda each: each[1] - each[0])
    memory = (ctypes.c_ubyte * (end - start)).from_address(start)
    rng = random.Random(1)
    pipe.send("corrupt")
    while not pipe.poll():
        for _ in range(200):
            at = rng.randrange(0, len(memory) - 64)
            ctypes.memmove(start + at, rng.randbytes(64), 64)
        # It has a root, and a hull that holds everything.
        ctypes.memmove(start + 128, bytes(8) + b"\xff" * 7 + b"\0", 16)
        address = map_memory(PAGE)
        ctypes.c_ubyte.from_address(address).value = 1
        unmap_memory(address, PAGE)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_corrupt_table_harms_only_its_owner(daemon: Daemon) -> None:
    child = Child(corrupt)
    try:
        assert child.hear() == "corrupt"
        victim = Child(stress)
        assert victim.hear() == "watching"
        for _ in range(10):
            daemon.settled(2)
            assert subprocess.run([*COMMAND, "status"], capture_output=True, check=True).stdout
        victim.pipe.send("stop")
        assert victim.result() > 10
        child.pipe.send("stop")
    finally:
        child.kill()
    daemon.settled()


@pytest.mark.parametrize(("notifiers", "gives_up"), [(2, False), (8, True)])
def test_a_long_walk_is_cut_short_for_its_table_only(daemon: Daemon, notifiers: int, gives_up: bool) -> None:
    """What somebody else's change may take in all is shared among the tables; one that needs more says so."""
    pages = BOUNDS.steps_foreign // 4  # more than an eighth, less than half
    with tempfile.TemporaryFile() as file:
        file.truncate(pages * PAGE)

        def program(pipe: Connection) -> dict[str, Any]:
            umns = [ummunotify.open() for _ in range(notifiers)]
            *large, small = umns
            with mmap.mmap(file.fileno(), pages * PAGE) as mapped:
                assert len(bytes(mapped)) == pages * PAGE  # all of it is there to be taken away
                address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
                elsewhere = [umn.watch((1 << 20, PAGE)) for umn in umns]
                for umn in large:
                    for i in range(pages):
                        umn.watch((address + i * PAGE, PAGE))
                last = small.watch((address + (pages - 1) * PAGE, PAGE))
                poll = select.poll()
                for umn in umns:
                    assert not umn.read()
                    poll.register(umn.fileno(), select.POLLIN)
                pipe.send("watching")
                pipe.recv()
                said = {
                    "woken": len(poll.poll(0)),
                    "valid": [region.valid for region in elsewhere],
                    "told": [len(umn.read()) for umn in large],
                    "gave_up": [umn.stats.overflows > 0 for umn in umns],
                    "small": [event.region is last for event in small.read()],
                }
            pipe.send((True, said))
            os._exit(0)

        child = Child(program)
        assert child.hear() == "watching"
        os.ftruncate(file.fileno(), 0)
        child.pipe.send("truncated")
        said = child.result()
    assert said["woken"] == notifiers
    assert said["small"] == [True]
    assert said["gave_up"] == [gives_up] * (notifiers - 1) + [False]
    assert said["valid"] == [not gives_up] * (notifiers - 1) + [True]
    assert said["told"] == [pages + int(gives_up)] * (notifiers - 1)


@pytest.mark.parametrize(("count", "gives_up"), [(BOUNDS.steps_own // 2, False), (BOUNDS.steps_own, True)])
def test_nobody_keeps_a_cpu_for_long(daemon: Daemon, count: int, gives_up: bool) -> None:
    """A walk through a table has preemption off: it is cut short even on behalf of its owner."""

    def program(_: Connection) -> tuple[bool, int, bool]:
        with ummunotify.open() as umn:
            address = map_memory(count * PAGE)
            ctypes.c_ubyte.from_address(address).value = 1
            elsewhere = umn.watch((1 << 20, PAGE))
            for i in range(count):
                umn.watch((address + i * PAGE, PAGE))
            assert not umn.stats.overflows
            unmap_memory(address, count * PAGE)
            return elsewhere.valid, len(umn.read()), umn.stats.overflows > 0

    assert as_nobody(program) == (not gives_up, count + int(gives_up), gives_up)


def settle(connection: socket.socket) -> Status:
    connection.send(Request(Op.SETTLE).pack())
    return Status(Reply.unpack(connection.recv(100)).status)


def test_a_secret_is_not_enough_to_watch_others(daemon: Daemon) -> None:
    """A table follows who shows the secret; without that there is no table."""
    with connect() as connection:
        connection.send(Request(Op.HELLO).pack())
        data, fds, _, _ = socket.recv_fds(connection, 100, 10)
        assert Reply.unpack(data).fds == len(fds)
        secret = Reply.unpack(data).value
        assert settle(connection) == Status.UNSEEN
        show_secret(secret ^ 1)
        assert settle(connection) == Status.UNSEEN
        # It is not used up: an address space that was not subscribed may be now.
        show_secret(secret)
        assert settle(connection) == Status.OK
        connection.send(Request(Op.SETTLE).pack())
        assert connection.recv(100) == b""
        for fd in fds:
            os.close(fd)
    daemon.settled()


def test_what_a_client_holds_gives_it_no_power(daemon: Daemon) -> None:
    """It gets no program, and can neither detach the link nor change what it runs."""

    def program(_: Connection) -> tuple[list[str], list[int]]:
        connection = connect()
        connection.send(Request(Op.HELLO).pack())
        data, fds = socket.recv_fds(connection, 100, 10)[:2]
        gives = Gives(Reply.unpack(data).gives)
        wake, segment, *links = fds
        if Gives.KVM in gives:
            os.close(links.pop(0))
        kinds = [os.readlink(f"/proc/self/fd/{fd}") for fd in [*links, wake, segment]]
        libc = ctypes.CDLL(None, use_errno=True)
        errors = []
        for command in (29, 34):  # BPF_LINK_UPDATE, BPF_LINK_DETACH
            attribute = (ctypes.c_uint32 * 32)(links[0], links[0])
            assert libc.syscall(SYS["bpf"], command, attribute, ctypes.sizeof(attribute)) == -1
            errors.append(ctypes.get_errno())
        connection.close()
        return kinds, errors

    kinds, errors = as_nobody(program)
    assert kinds == ["anon_inode:bpf_link", "anon_inode:bpf-map", "anon_inode:bpf-map"]
    assert all(errors)


# ---- limits ----


@pytest.mark.parametrize("options", [["--clients", "8", "--clients-per-user", "4"]])
def test_limits_on_clients(daemon: Daemon) -> None:
    def greedy(pipe: Connection) -> str:
        notifiers = []
        try:
            while True:
                notifiers.append(ummunotify.open(source="daemon"))
        except ummunotify.TooManyNotifiersError as error:
            pipe.send((len(notifiers), str(error)))
        pipe.recv()
        for umn in notifiers:
            change(umn)
        return "fine"

    first = Child(greedy)
    count, why = first.hear()
    assert count == 4
    assert "4 notifiers open" in why
    assert "--clients-per-user" in why
    second = Child(greedy, NOBODY - 1)
    count, why = second.hear()
    assert count == 2
    assert "serves 8 notifiers, of which this user has its share" in why
    for child in (first, second):
        child.pipe.send("end")
        assert child.result() == "fine"
    daemon.settled()
    as_nobody(lambda _: change(ummunotify.open()))


@pytest.mark.parametrize("options", [["--memory-per-user", "2"]])
def test_limits_on_memory(daemon: Daemon) -> None:
    def greedy(pipe: Connection) -> tuple[int, str]:
        with ummunotify.open() as umn:
            with pytest.raises(ummunotify.TooManyRegionsError) as caught:
                fill(umn)
            for region in umn.regions[::2]:
                region.close()
            change(umn)
            return umn.stats.bytes, str(caught.value)

    size, why = as_nobody(greedy)
    assert 1 << 20 < size <= 2 << 20
    assert "--memory-per-user" in why
    daemon.settled()


def test_the_kernel_has_no_memory_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked again; and that it never has any does not keep the daemon from ending."""
    monkeypatch.setattr(batches, "_RETRY_SECONDS", 0.01)

    class Poor:
        failures = 2

        def __init__(self) -> None:
            self.put: list[object] = []

        def put_segments(self, items: list[tuple[int, int, int]]) -> None:
            self.put.append(items)
            if len(self.put) <= self.failures:
                raise OSError(errno.ENOMEM, "no memory")

        def put_rings(self, items: list[tuple[int, int]]) -> None:
            self.put.append(items)

    tables = Poor()
    updater = batches.MapUpdater(tables)
    updater.begin([(1, 2, 3)], [(4, 5)])
    assert select.select([updater.fd], [], [], LONG)[0]
    updater.end()
    assert tables.put == [[(1, 2, 3)]] * 3 + [[(4, 5)]]
    tables.failures = 1 << 30
    updater.begin([(1, 2, 3)], [])
    updater.close()


def test_what_cannot_be_allowed_is_not_left_behind() -> None:
    """The kernel refuses to note down a new table, or that one has grown."""

    class Refusing:
        free = 4

        def __init__(self) -> None:
            self.taken = 0

        def take(self) -> int:
            self.taken += 1
            return 7

        def give_back(self, table: int) -> None:
            self.taken -= 1

        def allow(self, table: int, count: int) -> None:
            raise OSError(errno.ENOMEM, "no memory")

        def put_segments(self, items: list[tuple[int, int, int]]) -> None: ...

        def put_rings(self, items: list[tuple[int, int]]) -> None: ...

    tables: Any = Refusing()
    stock = batches.Stock(tables, 1)
    client: Any = SimpleNamespace(table=3, segments=1)
    try:
        before = held()
        for target, growing in ((1, []), (0, [(client, 2)])):
            stock.target, stock.growing = target, list(growing)
            stock.begin(0)
            while (shortage := stock.prepare()) is None:
                assert stock.preparing
            assert (shortage.error, shortage.growing, shortage.made) == (errno.ENOMEM, growing, 0)
            assert select.select([stock.fd], [], [], LONG)[0]
            stock.end()
        assert held() == before
        assert tables.taken == 0
        assert client.segments == 1
    finally:
        stock.close()


def test_usage_counts_back_to_nothing() -> None:
    usage = Usage(Limits(clients=10, clients_per_user=3, memory=8 * TABLE, memory_per_user=3 * TABLE))
    assert [usage.enter(1)[0] for _ in range(4)] == [Status.OK] * 3 + [Status.USER_CLIENTS]
    assert usage.grow(1, 5) == (0, Status.USER_MEMORY, 3 * TABLE)
    usage.leave(1, 1)
    assert usage.grow(1, 5)[0] == 1
    assert usage.enter(1)[0] == Status.USER_MEMORY
    assert usage.enter(2)[0] == Status.OK
    assert usage.grow(2, 5)[0] > 0
    assert usage.grow(2, 5)[1] in (Status.MEMORY, Status.USER_MEMORY)
    assert usage.memory.total() <= 8 * TABLE
    usage.leave(2, 1 + (usage.memory[2] - TABLE) // SEGMENT)
    usage.leave(1, 2)
    usage.leave(1, 1)
    assert not usage.clients
    assert not usage.memory


def test_scale(daemon: Daemon) -> None:
    """256 clients with 1,000 regions each, of a file that somebody else truncates."""
    clients, regions = 256, 1000
    with tempfile.TemporaryFile() as file:
        file.truncate(regions * PAGE)

        def program(pipe: Connection) -> None:
            umn = ummunotify.open()
            mapped = mmap.mmap(file.fileno(), regions * PAGE)
            address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
            for i in range(regions):
                mapped[i * PAGE]
            watched = [umn.watch((address + i * PAGE, PAGE)) for i in range(regions)]
            pipe.send([region.valid for region in watched].count(True))
            pipe.recv()
            valid = [region.valid for region in watched].count(True)
            pipe.send((True, (valid, len(umn.read()))))
            os._exit(0)

        children = []
        try:
            children += [Child(program) for _ in range(clients)]
            assert [child.hear() for child in children] == [regions] * clients
            summary = daemon.settled(clients)
            assert summary.memory < 100 << 20
            os.ftruncate(file.fileno(), 0)
            for child in children:
                child.pipe.send("truncated")
            assert [child.result()[:2] for child in children] == [(0, regions)] * clients
            children.clear()
        finally:
            for child in children:
                child.kill()
    daemon.settled()
    resident = re.search(r"VmRSS:\s*(\d+) kB", Path(f"/proc/{daemon.pid}/status").read_text())
    assert resident
    assert int(resident[1]) < 60 << 10


# ---- looking on ----


def test_status(daemon: Daemon) -> None:
    def program(pipe: Connection) -> None:
        with ummunotify.open() as umn:
            change(umn)
            umn.watch((1 << 20, PAGE))
            pipe.send(umn.generation)
            pipe.recv()

    child = Child(program)
    generation = child.hear()
    status = json.loads(subprocess.run([*COMMAND, "status", "--json"], capture_output=True, check=True).stdout)
    (client,) = status["clients"]
    assert client["pid"] == child.pid
    assert client["uid"] == NOBODY
    assert client["regions"] == 1
    assert client["generation"] == generation > 0
    assert status["daemon"]["clients"] == 1
    text = subprocess.run([*COMMAND, "status"], capture_output=True, text=True, check=True).stdout
    assert str(child.pid) in text

    def others(_: Connection) -> list[bytes]:
        with connect() as connection:
            connection.send(Request(Op.STATUS).pack())
            return [connection.recv(100)]

    (answer,) = Child(others, NOBODY - 1).result()
    assert Reply.unpack(answer).status == Status.END
    child.pipe.send("end")
    child.result()


def test_status_without_a_daemon(directory: Path) -> None:
    said = subprocess.run([*COMMAND, "status"], capture_output=True, text=True)
    assert said.returncode == 1
    assert "no daemon runs here" in said.stderr
    assert "Traceback" not in said.stderr


def test_status_of_another_programs_socket(directory: Path) -> None:
    """Or of a daemon of another version, whose summary has another size."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(directory / "socket"))
        listener.listen()
        for command in ("status", "top"):
            asking = subprocess.Popen([*COMMAND, command], stderr=subprocess.PIPE, text=True)
            with listener.accept()[0] as connection:
                connection.send(Reply(Status.VERSION, value=_abi.PROTOCOL_VERSION + 1).pack())
                _, said = asking.communicate()
            assert asking.returncode == 1
            assert f"what answers at {directory}/socket is no daemon of this version" in said
            assert "Traceback" not in said


def opened(pipe: Connection) -> None:
    """Open a notifier, say so, and wait."""
    with ummunotify.open():
        pipe.send("open")
        pipe.recv()


def scrape(path: Path) -> str:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        return b"".join(iter(lambda: connection.recv(1 << 16), b"")).decode()


def test_metrics(directory: Path) -> None:
    require_module("prometheus_client")
    path = directory / "metrics"
    daemon = Daemon(directory, "--metrics", f"unix:{path}")
    daemon.start()
    try:
        child = Child(opened)
        assert child.hear() == "open"
        with contextlib.ExitStack() as silent:
            for _ in range(20):  # who says nothing delays nobody
                connection = silent.enter_context(socket.socket(socket.AF_UNIX))
                connection.connect(str(path))
            text = scrape(path)
        assert text.startswith("HTTP/1.0 200 OK\r\n")
        assert "\nummunotify_clients 1.0\n" in text
        assert "\nummunotify_clients_served_total 1.0\n" in text
        child.kill()
        deadline = time.monotonic() + LONG
        while "\nummunotify_clients 0.0\n" not in scrape(path):
            assert time.monotonic() < deadline
    finally:
        assert daemon.end() == 0


def test_figures_are_not_made_for_each_that_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = require_module("ummunotify.daemon.metrics")
    made: list[object] = []

    def make(registry: object) -> bytes:
        made.append(registry)
        time.sleep(0.1)
        return b"%d" % len(made)

    monkeypatch.setattr(metrics, "generate_latest", make)
    loop = Loop()
    with contextlib.closing(loop), socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = metrics.Endpoint(SimpleNamespace(loop=loop), listener)
        texts = [endpoint.text() for _ in range(1000)]
        assert len(made) < 1000
        assert texts[0] == b"1"
        deadline = time.monotonic() + LONG
        while endpoint.text() == texts[-1]:
            assert time.monotonic() < deadline


def test_metrics_on_loopback_only() -> None:
    metrics = require_module("ummunotify.daemon.metrics")
    for address in ("127.0.0.1:0", "[::1]:0"):
        with contextlib.suppress(OSError), metrics.listen(address) as listener:  # not everybody has IPv6
            assert listener.getsockname()[0] == address[:-2].strip("[]")
    for address in ("0.0.0.0:1", "[::]:1", "example.org:1", "127.0.0.1", "127.0.0.1:http"):
        with pytest.raises(ValueError, match=r"127\.0\.0\.1:PORT"), metrics.listen(address):
            pass
    said = subprocess.run([*COMMAND, "daemon", "--metrics", "0.0.0.0:1"], capture_output=True, text=True)
    assert said.returncode == 2
    assert "127.0.0.1:PORT" in said.stderr
    assert "Traceback" not in said.stderr


def test_the_log_has_no_addresses(daemon: Daemon) -> None:
    as_nobody(lambda _: change(ummunotify.open()))
    assert "0x" not in daemon.log.read_text()


def test_a_probe_gap_reaches_all_clients(daemon: Daemon) -> None:
    """What the daemon does if the kernel has skipped a run of the program."""
    with ummunotify.open(source="bpf") as umn:
        regions = [umn.watch((address, PAGE)) for address in (1 << 20, 1 << 40)]
        program = feeder._program(Probe.KVM)
        program.invalidate_all()
        assert not any(region.valid for region in regions)
        assert libbpf.program_info(program.code.number()).recursion_misses == 0


def test_install(tmp_path: Path) -> None:
    group = grp.getgrall()[-1].gr_name
    said = subprocess.run(
        [*COMMAND, "daemon", "install", "--directory", str(tmp_path), "--group", group, "--mode", "0660"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "systemctl enable --now ummunotify.socket" in said
    text = "".join(path.read_text() for path in tmp_path.iterdir())
    assert f"SocketGroup={group}" in text
    assert "SocketMode=0660" in text
    assert "@" not in text.replace("@system-service", "").replace("@privileged", "").replace("@resources", "")


def test_install_says_where_a_service_cannot_be() -> None:
    assert closed_folder("/usr/bin/env") is None
    assert closed_folder("/var/tmp/venv/bin/ummunotify") == Path("/var/tmp")
    with tempfile.TemporaryDirectory(dir="/opt") as folder:  # 0700
        assert closed_folder(f"{folder}/bin/ummunotify") == Path(folder)
        os.chmod(folder, 0o755)
        os.mkdir(f"{folder}/bin")
        assert closed_folder(f"{folder}/bin/ummunotify") is None
