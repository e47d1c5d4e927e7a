"""Garbage for the daemon, by a generator with a seed: it takes no harm, and loses nothing.

UMMUNOTIFY_FUZZ_MESSAGES says how many messages (1,000,000 take a quarter of an hour), UMMUNOTIFY_FUZZ_SEED which.
"""

from __future__ import annotations

import array
import os
import random
import socket
import time

from daemons import Daemon, as_nobody, change, connect
from support import show_secret

import ummunotify
from ummunotify import _abi
from ummunotify._abi import Op, Reply, Request, Status

MESSAGES = int(os.environ.get("UMMUNOTIFY_FUZZ_MESSAGES", "5000"))
SEED = int(os.environ.get("UMMUNOTIFY_FUZZ_SEED", "0")) or time.time_ns()
FDS_MOST = 253
"""In one message: SCM_MAX_FD."""


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
                    connection.sendmsg([self.message()], self.rights())
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


def resident(pid: int) -> int:
    """In bytes."""
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_garbage(daemon: Daemon) -> None:
    print(f"UMMUNOTIFY_FUZZ_SEED={SEED}")
    fuzzer = Fuzzer(random.Random(SEED))
    daemon.settled()
    fds = daemon.fds()
    with ummunotify.open(source="bpf"):  # its virtual machine makes the kernel tell of the secret
        while fuzzer.sent < 1000:
            fuzzer.converse()
        before = resident(daemon.pid)
        while fuzzer.sent < MESSAGES:
            fuzzer.converse()
    assert fuzzer.settled > 0
    as_nobody(lambda _: change(ummunotify.open()))
    daemon.settled()
    assert daemon.fds(fds) == fds
    assert resident(daemon.pid) - before < 4 << 20
