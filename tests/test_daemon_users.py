"""To whom the daemon's clients count, and what users leave to each other."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from daemons import NOBODY, PAGE, Child, Daemon, change, connect
from support import LONG

import ummunotify
from ummunotify import _abi
from ummunotify._abi import Op, Reply, Request, Status
from ummunotify.daemon.clients import Client, Clients
from ummunotify.daemon.limits import SEGMENT, SPARE, TABLE, Limits, Usage
from ummunotify.daemon.loop import Loop
from ummunotify.daemon.server import Queue

CLONE_NEWUSER = 0x10000000
PR_SET_DUMPABLE = 4
OWNER, RANGE = 1234, 100_000
LIMIT = 4
CLIENTS = 20


@pytest.fixture
def options() -> list[str]:
    return ["--clients", str(CLIENTS), "--clients-per-user", str(LIMIT)]


def take_all() -> int:
    """How many notifiers this process gets. They stay open."""
    taken = 0
    with contextlib.suppress(ummunotify.TooManyNotifiersError):
        while taken <= CLIENTS:
            kept.append(ummunotify.open("daemon"))
            taken += 1
    return taken


kept: list[ummunotify.Notifier] = []


def hold(pipe: Connection) -> None:
    """Take all that there is, and keep it."""
    pipe.send(take_all())
    pipe.recv()


def new_namespace(pipe: Connection) -> None:
    """Enter a new user namespace, of which the other side writes the maps."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # or /proc/self is root's, since the user changed
    assert libc.unshare(CLONE_NEWUSER) == 0
    pipe.send(os.getpid())
    pipe.recv()


def in_namespace(uids: list[int]) -> Callable[[Connection], None]:
    """What each of these uids gets in a new user namespace."""

    def program(pipe: Connection) -> None:
        new_namespace(pipe)
        taken = []
        for uid in uids:
            children.append(Child(hold, uid))
            taken.append(children[-1].hear())
        pipe.send(taken)
        pipe.recv()

    return program


def in_namespace_of_a_subordinate(uids: list[int]) -> Callable[[Connection], None]:
    """The namespace is made by a subordinate uid, in a namespace of the user's."""

    def program(pipe: Connection) -> None:
        new_namespace(pipe)
        children.append(Child(in_namespace(uids), 10))
        write_maps(children[-1], "0 1000 1000")
        pipe.send(children[-1].hear())
        pipe.recv()

    return program


children: list[Child] = []


def write_maps(child: Child, extents: str) -> None:
    pid = child.hear()
    for kind in ("uid", "gid"):
        Path(f"/proc/{pid}/{kind}_map").write_text(extents)
    child.pipe.send("mapped")


@pytest.mark.parametrize("program", [in_namespace, in_namespace_of_a_subordinate])
def test_subordinate_uids_count_as_the_user(
    daemon: Daemon, program: Callable[[list[int]], Callable[[Connection], None]]
) -> None:
    child = Child(program(list(range(1, 8))), OWNER)
    try:
        write_maps(child, f"0 {RANGE} 65536")
        assert child.hear() == [LIMIT, 0, 0, 0, 0, 0, 0]
        # So does the user itself; others do not.
        assert Child(lambda _: take_all(), OWNER).result() == 0
        assert Child(lambda _: take_all()).result() == LIMIT
    finally:
        child.kill()
    daemon.settled()


@pytest.mark.parametrize(
    ("extents", "expected"),
    [
        (f"0 {RANGE} 65536", [LIMIT, 0, 0]),  # a container's: root in it has all of them
        (f"0 {RANGE} 2\n2 {RANGE + 70_000} 2", [LIMIT, LIMIT, 0]),  # uids 1, 2, 3
        ("".join(f"{uid} {RANGE + 10 * uid} 1\n" for uid in range(8)), [LIMIT, LIMIT, LIMIT]),
        ("0 0 4294967295", [LIMIT, LIMIT, LIMIT]),  # these are the host's users
    ],
)
def test_in_a_namespace_of_roots(daemon: Daemon, extents: str, expected: list[int]) -> None:
    child = Child(in_namespace([1, 2, 3]), 0)
    try:
        write_maps(child, extents)
        assert child.hear() == expected
    finally:
        child.kill()
    daemon.settled()


def test_two_users_leave_something_to_others(daemon: Daemon) -> None:
    """Limits that would let them take everything."""
    holders = []
    try:
        for uid in (1, 2, 3):
            for _ in range(6):
                holders.append(Child(hold, NOBODY - uid))
                holders[-1].hear()
        assert Child(lambda _: change(ummunotify.open("daemon"))).result() is None
    finally:
        for holder in holders:
            holder.kill()
    daemon.settled()


def test_connections_are_shared_out_too(daemon: Daemon) -> None:
    """Without becoming clients, two users hold all that they get."""

    def hold(pipe: Connection) -> None:
        connections = []
        for _ in range(CLIENTS + SPARE + 1):
            connections.append(connect())
            connections[-1].setblocking(False)
        # Those that were refused are closed, when the daemon has come to it.
        poll = select.poll()
        poll.register(connections[-1], select.POLLHUP)
        assert poll.poll(LONG * 1000)
        pipe.send("full")
        pipe.recv()

    holders = [Child(hold, NOBODY - 1), Child(hold, NOBODY - 2)]
    try:
        assert [holder.hear() for holder in holders] == ["full", "full"]
        assert Child(lambda _: change(ummunotify.open("daemon"))).result() is None
    finally:
        for holder in holders:
            holder.kill()
    daemon.settled()


# ---- in turns ----


def test_usage_of_several_users() -> None:
    usage = Usage(Limits(clients=64, clients_per_user=40, memory=1 << 40, memory_per_user=1 << 40))
    got = [sum(usage.enter(user)[0] == Status.OK for _ in range(100)) for user in range(8)]
    assert got == [32, 16, 8, 4, 2, 1, 1, 0]
    for user, count in enumerate(got):
        for _ in range(count):
            usage.leave(user, 1)
    assert not usage.clients
    assert not usage.memory
    # A limit of its own, and an only user.
    usage = Usage(Limits(clients=64, clients_per_user=16))
    assert [usage.enter(1)[0] for _ in range(17)] == [Status.OK] * 16 + [Status.USER_CLIENTS]
    usage = Usage(Limits(clients=64, clients_per_user=64))
    assert [usage.enter(1)[0] for _ in range(65)] == [Status.OK] * 64 + [Status.USER_CLIENTS]


def test_memory_of_several_users() -> None:
    usage = Usage(Limits(clients=64, clients_per_user=40, memory=TABLE + 64 * SEGMENT, memory_per_user=1 << 40))
    assert usage.enter(1)[0] == Status.OK
    granted, status, _ = usage.grow(1, 1000)
    assert (status, granted) == (Status.OK, 31)
    assert usage.grow(1, 1)[1] == Status.MEMORY
    assert usage.enter(2)[0] == Status.OK
    assert usage.grow(2, 1000)[0] == 15
    usage.leave(1, 32)
    assert usage.grow(2, 1000)[0] > 0


def test_users_take_turns_for_tables() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        queue = Queue()
        clients = {name: Client(ours, 1, ord(name[0]), ord(name[0])) for name in ("a1", "a2", "a3", "b1", "c1", "c2")}
        names = {client: name for name, client in clients.items()}
        for client in clients.values():
            queue.add(client)
        assert queue.remove(clients["a2"])
        assert not queue.remove(clients["a2"])
        assert len(queue) == 5
        assert names[queue.take_last()] in ("a3", "c2")
        queue.add(clients["a2"])
        taken: Counter[int] = Counter()
        order = []
        while (each := queue.next(taken)) is not None:
            taken[each.user] += 1
            queue.remove(each)
            order.append(names[each])
        assert {name[0] for name in order[:3]} == {"a", "b", "c"}
        assert len(order) == 5


@pytest.fixture
def listener(directory: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(directory / "socket"))
        os.chmod(directory / "socket", 0o666)
        listener.listen(128)
        yield listener


def test_one_with_many_requests_delays_itself(listener: socket.socket) -> None:
    """While a user has 60 requests ready at any time, another's are answered one each turn."""
    many, requests = 60, 20

    def program(connections: int) -> Callable[[Connection], None]:
        def send(pipe: Connection) -> None:
            made = [connect() for _ in range(connections)]
            for connection in made:
                for _ in range(requests):
                    connection.send(Request(Op.STATUS).pack())
            pipe.send("sent")
            pipe.recv()

        return send

    greedy, modest = Child(program(many), NOBODY - 1), Child(program(1), NOBODY - 2)
    handled: Counter[int] = Counter()
    when_done: list[int] = []
    loop = Loop()

    def handle(client: Client, request: Request) -> None:
        handled[client.uid] += 1
        if handled[NOBODY - 2] == requests and not when_done:
            when_done.append(handled[NOBODY - 1])
        if handled.total() == (many + 1) * requests:
            loop.stop()

    clients = Clients(loop, listener, -1, Usage(Limits()), Counter(), handle, lambda _: None)
    try:
        for child in (greedy, modest):
            assert child.hear() == "sent"
        clients.listen()
        loop.run(lambda: None, lambda: 0 if clients.late else LONG, lambda _: clients.next_turn())
    finally:
        clients.close()
        loop.close()
        for child in (greedy, modest):
            child.kill()
    assert handled == {NOBODY - 1: many * requests, NOBODY - 2: requests}
    # Half of each turn's share, and before the other came all of it.
    assert when_done[0] < many * requests // 2


# ---- a daemon that does not answer ----


def test_a_fork_does_not_wait_for_the_daemon(listener: socket.socket) -> None:
    """While another thread opens a notifier."""
    failed: list[BaseException] = []

    def open_one() -> None:
        try:
            ummunotify.open("daemon")
        except ummunotify.SourceUnavailableError as error:
            failed.append(error)

    thread = threading.Thread(target=open_one)
    thread.start()
    try:
        connection, _ = listener.accept()
        with connection:
            assert Request.unpack(connection.recv(100)).op == Op.HELLO
            # It has asked, and waits for the answer, also when the child is there.
            pid = os.fork()
            if not pid:
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
            assert thread.is_alive()
            assert not failed
    finally:
        thread.join()
    assert "ended the connection" in str(failed[0])


def test_a_fork_does_not_wait_for_a_table_to_grow(daemon: Daemon, directory: Path) -> None:
    """Through a go-between, which lets everything pass but what makes it grow."""
    proxy = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    asked, done = threading.Event(), threading.Event()

    def pass_on() -> None:
        theirs, _ = proxy.accept()
        with theirs, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as ours:
            ours.connect(daemon.path)
            while data := theirs.recv(100):
                if Request.unpack(data).op == Op.GROW:
                    asked.set()
                    done.wait(LONG)
                    return
                ours.send(data)
                answer, fds, _, _ = socket.recv_fds(ours, 100, 64)
                assert Reply.unpack(answer).status == Status.OK
                socket.send_fds(theirs, [answer], fds)
                for fd in fds:
                    os.close(fd)

    refused: list[BaseException] = []

    def fill(umn: ummunotify.Notifier) -> None:
        try:
            for i in range(1 << 20):
                umn.watch((0x10000 + i * PAGE, PAGE))
        except ummunotify.TooManyRegionsError as error:
            refused.append(error)

    with proxy, pytest.MonkeyPatch.context() as patch:
        proxy.bind(str(directory / "proxy"))
        proxy.listen()
        patch.setenv(_abi.SOCKET_ENVIRONMENT, str(directory / "proxy"))
        between = threading.Thread(target=pass_on)
        between.start()
        with ummunotify.open("daemon") as umn:
            growing = threading.Thread(target=fill, args=(umn,))
            growing.start()
            assert asked.wait(LONG)
            pid = os.fork()
            if not pid:
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
            assert growing.is_alive()
            done.set()
            growing.join()
            assert umn.regions[0].valid
        between.join()
    assert "has ended" in str(refused[0])
