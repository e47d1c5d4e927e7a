"""What a client can see of other users, and cost them: on the real kernel, with tables that are written by hand."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
from daemons import NOBODY, PAGE, Child, Daemon, change, connect
from hostile import PLACE, CraftedTable, subscribe
from support import LONG, map_memory, show_secret, unmap_memory

import ummunotify
from ummunotify import _abi
from ummunotify._abi import FED_TABLE_SIZE, Gives, Op, Probe, Reply, Request, Status, u32, u64
from ummunotify._bpf import Descriptor, create_ring, create_segment, read_map
from ummunotify._core import open_kvm
from ummunotify.bpf.program import Program, attached
from ummunotify.daemon.server import BOUNDS

_libc = ctypes.CDLL(None, use_errno=True)


def change_something() -> None:
    """At PLACE: the process's own change, and known to be."""
    assert map_memory(PAGE, PLACE) == PLACE
    unmap_memory(PLACE, PAGE)


def copy_at_place() -> None:
    """A page fault there, of which all tables are told: a page is copied on write."""
    assert map_memory(PAGE, PLACE) == PLACE
    byte = ctypes.c_ubyte.from_address(PLACE)
    assert byte.value == 0  # the page of zeros
    byte.value = 1


# ---- which address space ----


@pytest.fixture
def program(privileged: None) -> Iterator[Program]:
    """As the daemon has it, in this process."""
    program = attached(Probe.KVM, 8, BOUNDS)
    yield program
    program.close()


class Bound:
    """A table that is bound to the address space of a child, which goes on to do something when told so."""

    def __init__(self, program: Program, then: Callable[[], None], uid: int = 0, *, bind: bool = True) -> None:
        tables = program.tables
        self.number = tables.take()
        tables.allow(self.number, 1)
        segment, ring = create_segment(), create_ring()
        tables.put_segments([(self.number, 0, segment)])
        tables.put_rings([(self.number, ring)])
        self.table = CraftedTable(segment)
        os.close(segment)
        os.close(ring)
        self.secret = secret = tables.expect(self.number)

        kvm = open_kvm()

        def child(pipe: Connection) -> None:
            subscribe(kvm)
            os.setresuid(uid, 0, 0)
            show_secret(secret)
            pipe.send("shown")
            pipe.recv()
            then()

        self.child = Child(child, 0)
        os.close(kvm)
        assert self.child.hear() == "shown"
        if bind:
            assert tables.bind(self.number, secret)
        fed = read_map(program.maps["tables"].number(), u32(self.number), FED_TABLE_SIZE)
        self.space, self.mm = struct.unpack_from("=QQ", fed)  # as struct umn_fed_table begins

    def go_on(self) -> None:
        self.child.pipe.send("go on")
        self.child.result()


def test_an_address_space_is_not_taken_for_an_earlier_one(program: Program) -> None:
    """The next process may get the mm_struct of one that has ended: what it does is not told to the old one's table."""
    earlier: dict[int, Bound] = {}  # by where their mm_struct was
    for _ in range(200):
        other = Bound(program, change_something)
        assert other.space not in [bound.space for bound in earlier.values()]
        other.table.arm()
        other.go_on()
        assert other.table.hit
        assert not any(bound.table.hit for bound in earlier.values())
        if other.mm in earlier:
            break
        # Of many, as the kernel need not give away again what one of them had: another CPU may have it.
        other.table.arm()
        earlier[other.mm] = other
        if len(earlier) > 5:
            program.tables.drop(earlier.pop(next(iter(earlier))).number, 1)
    else:
        pytest.fail("no mm_struct was reused in 200 processes: nothing was tested")
    for bound in (other, *earlier.values()):
        program.tables.drop(bound.number, 1)


def test_a_table_whose_address_space_has_ended_is_found(program: Program) -> None:
    bound = Bound(program, change_something)
    assert list(program.ended()) == []
    bound.go_on()
    deadline = time.monotonic() + LONG
    while list(program.ended()) != [bound.number]:
        assert time.monotonic() < deadline
    program.tables.drop(bound.number, 1)
    assert list(program.ended()) == []


def as_user(uid: int) -> Callable[[], None]:
    def then() -> None:
        os.setresuid(uid, 0, 0)
        change_something()

    return then


def put(map: Descriptor, key: bytes, value: bytes) -> None:
    """Into a BPF map."""
    buffers = ctypes.create_string_buffer(key), ctypes.create_string_buffer(value)
    attribute = struct.pack("=IxxxxQQQ", map.number(), *(ctypes.addressof(buffer) for buffer in buffers), 0)
    assert _libc.syscall(321, 2, attribute, len(attribute)) == 0  # BPF_MAP_UPDATE_ELEM


def test_a_table_that_is_not_bound_yet_takes_no_part(program: Program) -> None:
    """Its client has shown the secret, and says no more: it has no share in a change, so it gets nothing."""
    bound, other = Bound(program, copy_at_place), Bound(program, change_something)
    shown = Bound(program, change_something, bind=False)
    for each in (bound, other, shown):
        each.table.arm()
    bound.go_on()
    assert bound.table.hit
    assert other.table.hit
    assert not shown.table.hit
    assert shown.table.armed
    assert program.tables.bind(shown.number, shown.secret)
    shown.go_on()
    assert shown.table.hit
    other.go_on()
    for each in (bound, other, shown):
        program.tables.drop(each.number, 1)


def test_a_secret_is_taken_for_its_own_table_only(program: Program) -> None:
    """The kernel reuses a hash map's elements at once, so the one that was looked up may lead to another table."""
    tables = program.tables
    mine, others = tables.take(), tables.take()
    secrets = [tables.expect(table) for table in (mine, others)]
    put(program.maps["handshakes"], u64(secrets[0]), u32(others))
    kvm = open_kvm()

    def child(_: Connection) -> None:
        subscribe(kvm)
        show_secret(secrets[0])

    Child(child, 0).result()
    os.close(kvm)
    assert not tables.bind(others, secrets[1])
    for table, secret in zip((mine, others), secrets, strict=True):
        tables.cancel(secret)
        tables.drop(table, 1)


def test_an_owner_that_leads_to_another_address_space(program: Program) -> None:
    """The same of the map of owners: what was looked up may lead to the tables of another. Nothing is missed."""
    first, second = Bound(program, change_something), Bound(program, change_something)
    first.table.arm()
    put(program.maps["owners"], u64(first.space), u32(second.number + 1))
    first.go_on()
    assert first.table.hit
    put(program.maps["owners"], u64(first.space), u32(first.number + 1))
    second.go_on()
    for each in (first, second):
        program.tables.drop(each.number, 1)


def test_another_user_in_the_same_address_space(program: Program) -> None:
    """Its changes are not told, but that something may be invalid."""
    bound = Bound(program, as_user(NOBODY - 1), NOBODY)
    bound.table.arm()
    bound.go_on()
    assert not bound.table.hit
    assert bound.table.overflow > 0
    assert not bound.table.armed
    program.tables.drop(bound.number, 1)


def test_root_may_give_up_its_privileges(daemon: Daemon) -> None:
    def program(_: Connection) -> int:
        with ummunotify.open(source="daemon") as umn:
            change(umn)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            change(umn)
            return umn.stats.overflows

    assert Child(program, 0).result() == 0


def hello(connection: socket.socket) -> tuple[Reply, list[int]]:
    connection.send(Request(Op.HELLO).pack())
    data, fds, _, _ = socket.recv_fds(connection, _abi.REPLY_SIZE, 16)
    reply = Reply.unpack(data)
    assert reply.status == Status.OK
    assert Gives.KVM in Gives(reply.gives)
    return reply, fds


def test_what_an_ended_process_leaves_open_is_closed(daemon: Daemon) -> None:
    """Another process has its connection: it keeps nothing of it."""
    with connect() as connection:
        reply, fds = hello(connection)

        def owner(pipe: Connection) -> None:
            subscribe(fds[2])
            show_secret(reply.value)
            pipe.send("shown")
            pipe.recv()

        child = Child(owner)
        assert child.hear() == "shown"
        connection.send(Request(Op.SETTLE).pack())
        assert Reply.unpack(connection.recv(_abi.REPLY_SIZE)).status == Status.OK
        daemon.settled(1)
        child.pipe.send("end")
        child.result()
        connection.settimeout(LONG)
        assert connection.recv(_abi.REPLY_SIZE) == b""
        for fd in fds:
            os.close(fd)
    daemon.settled()


# ---- what a change costs ----


def test_all_tables_of_a_process_pay_for_its_change_together(daemon: Daemon) -> None:
    """Preemption is off meanwhile: those that come too late count as invalid altogether."""
    notifiers, regions = 8, BOUNDS.steps_own // 5

    def program(_: Connection) -> tuple[list[int], int, list[bool]]:
        umns = [ummunotify.open(source="daemon") for _ in range(notifiers)]
        address = map_memory(regions * PAGE)
        ctypes.c_ubyte.from_address(address).value = 1
        elsewhere = [umn.watch((1 << 20, PAGE)) for umn in umns]
        watched = [umn.watch((address + i * PAGE, PAGE)) for umn in umns for i in range(regions)]
        assert all(region.valid for region in watched)
        unmap_memory(address, regions * PAGE)
        overflows = [umn.stats.overflows for umn in umns if umn.read() or True]
        return overflows, sum(region.valid for region in watched), [region.valid for region in elsewhere]

    overflows, valid, elsewhere = Child(program).result()
    assert valid == 0
    # Some of them had enough: a region takes one step, and so does each node that has more than one.
    assert 0 < overflows.count(0) <= 5
    assert elsewhere == [overflow == 0 for overflow in overflows]


class Waiters:
    """A client whose wake-up is waited for by more than it is sent for at once."""

    def __init__(self, connection: socket.socket) -> None:
        reply, fds = hello(connection)
        self.ring, segment, kvm, *links = fds
        self.machine = subscribe(kvm)
        show_secret(reply.value)
        connection.send(Request(Op.SETTLE).pack())
        assert Reply.unpack(connection.recv(_abi.REPLY_SIZE)).status == Status.OK
        self.table = CraftedTable(segment)
        for fd in (segment, kvm, *links):
            os.close(fd)
        self.consumed = mmap.mmap(self.ring, PAGE)
        self.produced = mmap.mmap(self.ring, PAGE, prot=mmap.PROT_READ, offset=PAGE)
        self.epolls: list[select.epoll] = []

    def close(self) -> None:
        for epoll in self.epolls:
            epoll.close()
        for mapped in (self.table.memory, self.consumed, self.produced):
            mapped.close()
        os.close(self.ring)
        os.close(self.machine)

    def wait_with(self, count: int, *, nested: bool) -> None:
        """`count` epolls for the wake-up; nested: for one that is for the wake-up."""
        for epoll in self.epolls:
            epoll.close()
        self.epolls = [select.epoll()] if nested else []
        for epoll in self.epolls:
            epoll.register(self.ring, select.EPOLLIN)
        target = self.epolls[0].fileno() if nested else self.ring
        for _ in range(count):
            self.epolls.append(select.epoll())
            self.epolls[-1].register(target, select.EPOLLIN)

    def arm(self) -> None:
        self.consumed[:8] = self.produced[:8]
        self.table.arm()

    def woken(self, patience: float) -> bool:
        return bool(select.select([self.ring], [], [], patience)[0])


def copies(pipe: Connection) -> None:
    """Each message makes a change that all tables are told of: a page is copied on write."""
    with ummunotify.open(source="daemon"):
        pipe.send("ready")
        for _ in itertools.repeat(None):
            if pipe.recv() == "end":
                return
            copy_at_place()
            pipe.send("changed")
            unmap_memory(PLACE, PAGE)


@pytest.mark.parametrize("nested", [False, True])
def test_who_waits_for_a_wakeup_does_not_delay_others(daemon: Daemon, nested: bool) -> None:
    """The wake-up of a client for which many wait is not sent by the process that makes the change."""

    def tell(what: str) -> Any:
        other.pipe.send(what)
        return other.hear()

    with connect() as connection, contextlib.closing(Waiters(connection)) as client:
        other = Child(copies)
        try:
            assert other.hear() == "ready"
            os.kill(daemon.pid, signal.SIGSTOP)
            client.wait_with(BOUNDS.waiters_foreign // 2, nested=nested)
            client.arm()
            assert tell("change") == "changed"
            assert client.table.hit
            assert client.woken(0), "few wait, so the change wakes them up"

            client.wait_with(2 * BOUNDS.waiters_foreign, nested=nested)
            client.arm()
            assert tell("change") == "changed"
            assert client.table.hit
            assert not client.table.armed
            assert not client.woken(0.1), "the change has woken up too many"
            os.kill(daemon.pid, signal.SIGCONT)
            assert client.woken(LONG), "the daemon has not sent the wake-up"
            assert all(epoll.poll(LONG) for epoll in client.epolls)

            if not nested:  # the kernel's own limit is 500
                client.wait_with(2 * BOUNDS.waiters_relay, nested=nested)
                client.arm()
                assert tell("change") == "changed"
                deadline = time.monotonic() + LONG
                while not client.table.armed:
                    assert time.monotonic() < deadline
                assert not client.woken(0)
            other.pipe.send("end")
            other.result()
        finally:
            os.kill(daemon.pid, signal.SIGCONT)


def test_changes_of_others_after_a_table_has_given_up(daemon: Daemon) -> None:
    """Each counts, though nothing is walked for it, and is seen again once the owner has acted."""

    def change() -> None:
        other.pipe.send("change")
        assert other.hear() == "changed"

    other = Child(copies)
    assert other.hear() == "ready"
    with ummunotify.open(source="daemon") as umn:
        regions = [umn.watch((PLACE, PAGE)) for _ in range(2 * BOUNDS.steps_foreign)]
        for _ in range(3):
            before = umn.generation
            change()
            assert umn.generation != before
            assert umn.changed
            assert not any(region.valid for region in regions)
        assert {event.region for event in umn.read()} == set(regions)
        assert not umn.changed
        for region in regions[100:]:
            region.close()
        for region in regions[:100]:
            region.renew()
        change()
        assert not any(region.valid for region in regions)
        assert {event.region for event in umn.read()} == set(regions[:100])
    other.pipe.send("end")
    other.result()


def test_more_wakeups_than_a_change_pays_for(daemon: Daemon) -> None:
    """All are sent, if some of them by the daemon."""
    clients = 2 * BOUNDS.waiters_foreign // 8

    def program(pipe: Connection) -> None:
        with ummunotify.open(source="daemon") as umn, mmap.mmap(file, PAGE) as mapped:
            mapped[0]
            umn.watch(mapped)
            assert not umn.read()
            poll = select.poll()
            poll.register(umn.fileno(), select.POLLIN)
            pipe.send("waiting")
            woken = poll.poll(LONG * 1000)
            pipe.send((True, bool(woken)))
            os._exit(0)

    file = os.memfd_create("test")
    os.ftruncate(file, PAGE)
    children = [Child(program) for _ in range(clients)]
    try:
        assert [child.hear() for child in children] == ["waiting"] * clients
        os.ftruncate(file, 0)
        assert [child.result() for child in children] == [True] * clients
        children.clear()
    finally:
        for child in children:
            child.kill()
        os.close(file)
