"""A client of the daemon's that wishes it and other users ill: what it says, and the tables that it writes by hand."""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import mmap
import os
import random
import socket
import struct
from collections.abc import Iterator
from multiprocessing.connection import Connection

from daemons import PAGE, connect
from support import map_memory, show_secret, unmap_memory

from ummunotify import _abi
from ummunotify._abi import Op, Reply, Request, Status

LIVE, INVALID = 1, 2
PLACE = 0x3ABC_DEF1_2000
"""Where nothing else on this machine changes its memory."""
FDS_MOST = 253
"""In one message: SCM_MAX_FD."""
_KVM_CREATE_VM = 0xAE01
_SEGMENT = 64 * PAGE
_CELL, _NODE, _FANOUT = 32, 512, 25
_STARTS, _ENDS, _REFS = 8, 8 + 8 * _FANOUT, 8 + 16 * _FANOUT
_HEAD, _LOW, _ROOT, _PHASE, _ZERO, _OVERFLOW, _ARMED = 80, 128, 144, 148, 152, 192, 196
_EVERYWHERE = 1 << 62


class CraftedTable:
    """One with a single region, the page at PLACE."""

    NODE, SLOT = PAGE, 2 * PAGE

    def __init__(self, segment: int) -> None:
        """Of this process, not of a child's. The descriptor stays the caller's."""
        self.memory = mmap.mmap(segment, _SEGMENT)
        self.reset()

    def reset(self, address: int = PLACE) -> None:
        self.memory[self.NODE : self.NODE + _NODE] = bytes(_NODE)
        self.memory[self.SLOT : self.SLOT + _CELL] = bytes(_CELL)
        for at in (_HEAD, _PHASE, _ZERO, _OVERFLOW):
            struct.pack_into("=I", self.memory, at, 0)
        struct.pack_into("=Q", self.memory, self.NODE + _STARTS, address)
        struct.pack_into("=Q", self.memory, self.NODE + _ENDS, address + PAGE)
        struct.pack_into("=I", self.memory, self.NODE + _REFS, self.SLOT // _CELL)
        struct.pack_into("=I", self.memory, self.SLOT, LIVE)
        struct.pack_into("=QQ", self.memory, _LOW, address, address + PAGE)
        struct.pack_into("=I", self.memory, _ROOT, self.NODE // _CELL)

    def _number(self, at: int) -> int:
        return int(struct.unpack_from("=I", self.memory, at)[0])

    @property
    def hit(self) -> bool:
        return bool(self._number(self.SLOT) & INVALID)

    @property
    def overflow(self) -> int:
        return self._number(_OVERFLOW)

    @property
    def armed(self) -> int:
        return self._number(_ARMED)

    def arm(self) -> None:
        struct.pack_into("=I", self.memory, self.SLOT, LIVE)
        struct.pack_into("=I", self.memory, _ARMED, 1)

    def scramble(self, rng: random.Random) -> None:
        """Any table: nodes that refer to each other in circles, to themselves, to nothing that there is."""
        memory = self.memory

        def ref() -> int:
            if rng.random() < 0.05:
                return rng.getrandbits(32)
            return rng.randrange(PAGE // _CELL, _SEGMENT // _CELL) & rng.choice((-1, -(_NODE // _CELL)))

        if rng.random() < 0.05:
            memory[PAGE:] = rng.randbytes(_SEGMENT - PAGE)
        for _ in range(rng.randrange(1, 40)):
            node = rng.randrange(PAGE, _SEGMENT, _NODE)
            used = rng.choice((0, 1, _FANOUT, rng.randrange(256)))
            struct.pack_into("=BBB", memory, node, rng.randrange(10), used, rng.randrange(3))
            everywhere = rng.random() < 0.7
            bounds = [0 if everywhere else rng.getrandbits(48) for _ in range(_FANOUT)]
            bounds += [_EVERYWHERE if everywhere else rng.getrandbits(48) for _ in range(_FANOUT)]
            struct.pack_into(f"={2 * _FANOUT}Q", memory, node + _STARTS, *bounds)
            target = node // _CELL
            refs = [target if rng.random() < 0.1 else ref() for _ in range(_FANOUT)]
            struct.pack_into(f"={_FANOUT}I", memory, node + _REFS, *refs)
            if rng.random() < 0.5:
                struct.pack_into("=I", memory, _ROOT, target)
        low, high = (0, _EVERYWHERE) if rng.random() < 0.9 else (rng.getrandbits(64), rng.getrandbits(64))
        struct.pack_into("=QQ", memory, _LOW, low, high)
        for at in (_HEAD, _PHASE, _ZERO, _OVERFLOW):
            if rng.random() < 0.2:
                struct.pack_into("=I", memory, at, rng.choice((0, 1, ref(), rng.getrandbits(32))))
        struct.pack_into("=I", memory, _ARMED, 1)


def subscribe(kvm: int) -> int:
    """Let the kernel tell of this process's changes, until the descriptor is closed."""
    return fcntl.ioctl(kvm, _KVM_CREATE_VM, 0)


@contextlib.contextmanager
def crafted_tables(count: int) -> Iterator[list[CraftedTable]]:
    """So many, each of a connection of its own, all bound to this process."""
    with contextlib.ExitStack() as undo:
        tables: list[CraftedTable] = []
        for _ in range(count):
            connection = undo.enter_context(connect())
            connection.send(Request(Op.HELLO).pack())
            data, fds, _, _ = socket.recv_fds(connection, _abi.REPLY_SIZE, FDS_MOST)
            ring, segment, kvm, *links = fds
            reply = Reply.unpack(data)
            assert reply.status == Status.OK
            if not tables:
                undo.callback(os.close, subscribe(kvm))
            show_secret(reply.value)
            connection.send(Request(Op.SETTLE).pack())
            assert Reply.unpack(connection.recv(_abi.REPLY_SIZE)).status == Status.OK
            tables.append(CraftedTable(segment))
            undo.callback(tables[-1].memory.close)
            for fd in (ring, segment, kvm, *links):
                os.close(fd)
        yield tables


class Fuzzer:
    """What one connection says."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.sent = 0
        self.settled = 0

    def message(self) -> bytes:
        rng = self.rng
        match rng.randrange(4):
            case 0:
                return rng.randbytes(rng.randrange(41))
            case 1:
                return rng.randbytes(_abi.REQUEST_SIZE)
            case 2:
                return Request(rng.randrange(7), rng.randrange(3), rng.choice((0, 1, 20, rng.getrandbits(32)))).pack()
        return Request(rng.choice(list(Op))).pack()

    def rights(self) -> list[tuple[int, int, array.array[int]]]:
        count = self.rng.choice((0, 0, 0, 0, 0, 1, 3, FDS_MOST))
        return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * count))] if count else []

    def read(self, connection: socket.socket, wait: bool) -> Reply | None:
        data, fds, _, _ = socket.recv_fds(connection, 100, FDS_MOST, 0 if wait else socket.MSG_DONTWAIT)
        for fd in fds:
            os.close(fd)
        return Reply.unpack(data) if len(data) == _abi.REPLY_SIZE else None

    def converse(self) -> None:
        """Until the daemon has had enough, or this one."""
        rng = self.rng
        with connect() as connection:
            try:
                if rng.random() < 0.2:
                    self.become_a_client(connection)
                for _ in range(rng.randrange(1, 20)):
                    message, rights = self.message(), self.rights()
                    try:
                        connection.sendmsg([message], rights)
                    except PermissionError:  # the kernel keeps descriptors away from the daemon
                        connection.send(message)
                    self.sent += 1
                    if rng.random() < 0.5:
                        self.read(connection, wait=False)
            except (BlockingIOError, ConnectionError):
                pass

    def become_a_client(self, connection: socket.socket) -> None:
        connection.send(Request(Op.HELLO).pack())
        reply = self.read(connection, wait=True)
        if reply is not None and reply.status == Status.OK:
            show_secret(reply.value)
            connection.send(Request(Op.SETTLE).pack())
            reply = self.read(connection, wait=True)
            self.settled += reply is not None and reply.status == Status.OK
        self.sent += 2


def change_anybody() -> None:
    """All tables are told of it: a page is copied on write."""
    address = map_memory(PAGE)
    byte = ctypes.c_ubyte.from_address(address)
    byte.value += 1  # the page of zeros is read first
    unmap_memory(address, PAGE)


def misbehave(pipe: Connection) -> tuple[int, int]:
    """Scramble tables and say nonsense, until told to stop. How often."""
    rng = random.Random(os.getpid())
    crafted = 0
    pipe.send("misbehaving")
    fuzzer = Fuzzer(rng)
    with crafted_tables(8) as tables:
        while not pipe.poll():
            for table in tables:
                table.scramble(rng)
                crafted += 1
            change_anybody()
            if crafted % 64 == 0:
                fuzzer.converse()
    return crafted, fuzzer.sent
