"""The daemon's server: nothing that a client does or does not do can block it."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import socket
import time
from collections import Counter
from collections.abc import Callable

from .._abi import (
    PAGE,
    PROTOCOL_VERSION,
    STATUS_SUMMARY,
    Gives,
    Header,
    Op,
    Probe,
    Record,
    Reply,
    Request,
    Status,
    Summary,
)
from .._bpf import Bounds, next_segments, read_map
from ..bpf import libbpf
from ..bpf.program import Program
from .batches import Stock
from .clients import CHECK_SECONDS, Client, Clients, Refusal
from .limits import SEGMENT, TABLE, Limits, Usage
from .log import event
from .loop import Loop

BOUNDS = Bounds(
    # Some 5 ms, in which the CPU does nothing else: a region that is hit takes 50 to 150 ns.
    steps_own=1 << 15,
    # Some 200 us: at least 8 for each table that is concerned, some 45 ns each.
    steps_foreign=3072,
    # Some 100 us: each thread that waits takes up to 1 us, and each wake-up as such as much as 8.
    waiters_own=4096,
    waiters_foreign=128,
    waiters_relay=512,
)
"""What a change may take of its CPU, on behalf of its process's tables and of others'.

A notifier for which more than `waiters_relay` - 8 wait is not woken up by others' changes.
"""
SEGMENTS_AT_ONCE = 32
"""In an answer, which its client may leave unread. The kernel lets as many descriptors be on their way as the daemon
may open, and then refuses to pass on any more."""

_GATHER_SECONDS = 0.002


class Relay:
    """By which the BPF program says that wake-ups are due: a ring buffer of which only this is the reader."""

    def __init__(self, fd: int) -> None:
        """OSError. The descriptor stays the caller's."""
        self.fd = fd
        self._consumed = mmap.mmap(fd, mmap.PAGESIZE)
        self._produced = mmap.mmap(fd, mmap.PAGESIZE, prot=mmap.PROT_READ, offset=mmap.PAGESIZE)

    def clear(self) -> None:
        """It is readable no more, until the program says so again."""
        self._consumed[:8] = self._produced[:8]

    def close(self) -> None:
        self._consumed.close()
        self._produced.close()


class Server:
    """Serves one listening socket with one loaded program."""

    def __init__(
        self, listener: socket.socket, program: Program, kvm: int, limits: Limits, ready: int, who: int = -1
    ) -> None:
        """`program` is attached and has room for `limits.clients` + `ready` tables; `kvm` is -1 if clients get none.

        `who`: the program that tells to whom a connection counts; -1: to its uid.

        OSError.
        """
        self.counters: Counter[str] = Counter()
        self.loop = Loop()
        self.address = str(listener.getsockname())
        self._program = program
        self._tables = program.tables
        self._kvm = kvm
        self._usage = Usage(limits)
        self._clients = Clients(self.loop, listener, who, self._usage, self.counters, self._do, self._gone)
        self._by_table: dict[int, Client] = {}
        self._waiting = Queue()
        self._giving = False
        """May tables be ready for clients that wait?"""
        self._taken: Counter[int] = Counter()  # tables, by each user since the last batch
        self._stock = Stock(program.tables, ready)
        self._started = time.monotonic()
        self._checked = self._started
        self._skipped = libbpf.program_info(program.code.number()).recursion_misses
        self.loop.watch(self._stock.fd, self._built)
        self._relay = Relay(program.relay.number())
        self._to_wake: int | None = None
        """From this table on wake-ups may be due."""
        self.loop.watch(self._relay.fd, self._wake)
        self._stock.begin(0)

    def run(self, started: Callable[[], None]) -> None:
        """Until SIGTERM or SIGINT. In the main thread. Calls `started` when it is ready for either."""
        self._clients.listen()
        self.loop.run(started, self._timeout, self._turn)

    def _wake(self) -> None:
        self._relay.clear()
        self._to_wake = 0

    def _timeout(self) -> float | None:
        if self._to_wake is not None or self._clients.late or self._giving or self._stock.preparing:
            return 0
        if self._stock.idle_work() and not self._stock.batch:
            return _GATHER_SECONDS
        return CHECK_SECONDS if self._clients.to_check else None

    def _turn(self, idle: bool) -> None:
        self._clients.next_turn()
        if self._to_wake is not None:
            # A run keeps its CPU for some 100 us, so one for each turn.
            self._to_wake = self._program.wake_due(self._to_wake) or None
        self._check()
        idle = idle and not self._clients.late
        self._give_on()
        due = self._waiting or self._stock.growing or (idle and self._stock.idle_work())
        if due and not self._stock.batch:
            self._stock.begin(len(self._waiting))
        if self._stock.preparing:
            self._prepare()

    def _check(self) -> None:
        """What is to be looked at now and then."""
        now = time.monotonic()
        if now - self._checked < CHECK_SECONDS:
            return
        self._checked = now
        self._clients.check(now)
        for table in self._program.ended():
            # Its connection is kept by another process: a child of a fork, or one that was given a copy.
            if (client := self._by_table.get(table)) is not None and not client.busy:
                self._clients.drop(client)
        if self._program.probe != Probe.KVM:
            return  # the kernel may skip others, and clients know at once: see `probe_gap` in watch.bpf.c
        skipped = libbpf.program_info(self._program.code.number()).recursion_misses
        if skipped != self._skipped:
            # Cannot be, as a raw tracepoint's programs do not nest. If it can, all clients have to be told.
            event(logging.ERROR, "skipped", runs=skipped - self._skipped)
            self._skipped = skipped
            self._program.invalidate_all()

    def close(self) -> None:
        """Close what it has; clients whose tables are bound are fed on."""
        self._clients.close()
        self._stock.close()
        self._relay.close()
        self.loop.close()

    def _gone(self, client: Client) -> None:
        """Its connection has ended."""
        if self._waiting.remove(client):
            self._usage.leave(client.user, 1)
        if client.table < 0:
            return
        for growing in [growing for growing in self._stock.growing if growing[0] is client]:
            self._stock.growing.remove(growing)
            self._usage.shrink(client.user, growing[1])
        if client.secret is not None:
            self._tables.cancel(client.secret)
        self._tables.unlink(client.table)
        del self._by_table[client.table]
        os.close(client.segment_fd)
        self._stock.release(client)
        self.counters["left"] += 1
        event(logging.DEBUG, "left", uid=client.uid, user=client.user, pid=client.pid, table=client.table)

    # ---- requests ----

    def _do(self, client: Client, request: Request) -> None:
        if request.op == Op.HELLO and client.table < 0:
            self._hello(client, request)
        elif request.op == Op.SETTLE and client.secret is not None:
            self._settle(client)
        elif request.op == Op.GROW and client.table >= 0 and client.deadline is None:
            self._grow(client)
        elif request.op == Op.STATUS:
            self._status(client, request.argument)
        else:
            raise Refusal("request")

    def _hello(self, client: Client, request: Request) -> None:
        if request.version != PROTOCOL_VERSION:
            client.answer(Reply(Status.VERSION, value=PROTOCOL_VERSION).pack())
            return
        status, limit = self._usage.enter(client.user)
        if status != Status.OK:
            self._clients.warn(f"limit:{status.name}", client.pid, client.uid, client.user)
            client.answer(Reply(status, value=limit).pack())
            return
        client.busy = True
        if self._may_take(client.user) and not self._waiting.has(client.user):
            self._give(client)
        else:
            self._waiting.add(client)

    def _may_take(self, user: int) -> bool:
        """Is there a ready table for this user? As many as it took since the last batch are left to others, but no more
        than a quarter."""
        return len(self._stock.ready) > min(self._taken[user], self._stock.target // 4)

    def _give(self, client: Client) -> None:
        self._taken[client.user] += 1
        client.table, client.segment_fd, ring = self._stock.ready.pop()
        client.segments = 1
        self._by_table[client.table] = client
        try:
            client.secret = self._tables.expect(client.table)
            gives = Gives(0)
            fds = [ring, client.segment_fd]
            if self._kvm >= 0:
                gives |= Gives.KVM
                fds.append(self._kvm)
            if self._program.probe_gaps is not None:
                gives |= Gives.PROBE_GAPS
                fds.append(self._program.probe_gaps.number())
            fds += [link.number() for link in self._program.links]
            client.answer(Reply(Status.OK, len(fds), gives, self._program.probe, client.secret).pack(), fds)
        finally:
            os.close(ring)
        self.counters["came"] += 1
        event(logging.DEBUG, "came", uid=client.uid, user=client.user, pid=client.pid, table=client.table)

    def _settle(self, client: Client) -> None:
        assert client.secret is not None
        secret, client.secret = client.secret, None
        status = Status.UNSEEN
        try:
            if self._tables.bind(client.table, secret):
                status, client.deadline = Status.OK, None
            else:
                client.secret = secret  # it may be shown until the deadline
        except OSError as error:
            if error.errno != errno.E2BIG:
                raise
            status = Status.PROCESS_CLIENTS
        client.answer(Reply(status).pack())

    def _grow(self, client: Client) -> None:
        wanted = next_segments(client.segments, SEGMENTS_AT_ONCE)
        granted, status, limit = self._usage.grow(client.user, wanted)
        if status != Status.OK:
            self._clients.warn(f"limit:{status.name}", client.pid, client.uid, client.user)
            client.answer(Reply(status, value=limit).pack())
            return
        client.busy = True
        self._stock.growing.append((client, granted))

    def _status(self, client: Client, first: int) -> None:
        if first == STATUS_SUMMARY:
            client.answer(self.summary().pack())
            return
        for table in range(first, self._tables.used):
            other = self._by_table.get(table)
            # Of others' clients only root learns.
            if other is not None and client.uid in (0, other.uid):
                client.answer(self._record(other).pack())
                return
        client.answer(Reply(Status.END).pack())

    def summary(self) -> Summary:
        program = libbpf.program_info(self._program.code.number())
        return Summary(
            os.getpid(),
            len(self._by_table),
            len(self._stock.ready),
            self._usage.limits.clients,
            int(time.monotonic() - self._started),
            self._usage.memory.total() + len(self._stock.ready) * TABLE,
            program.run_time_ns,
            program.run_cnt,
            program.recursion_misses,
        )

    def records(self) -> list[Record]:
        """All clients."""
        return [self._record(client) for client in self._by_table.values()]

    def _record(self, client: Client) -> Record:
        # The client writes this page too: nothing but numbers to be shown.
        page = read_map(client.segment_fd, bytes(4), PAGE)
        header = Header.unpack(page)
        try:
            with open(f"/proc/{client.pid}/comm", "rb") as file:
                command = file.read().rstrip(b"\n")
        except OSError:
            command = b"?"
        return Record(
            client.table,
            client.pid,
            client.uid,
            header.regions,
            header.generation,
            TABLE + (client.segments - 1) * SEGMENT,
            header.overflows,
            command,
        )

    # ---- what waits for running programs ----

    def _prepare(self) -> None:
        """A part of what is put in and taken out next."""
        shortage = self._stock.prepare()
        if shortage is None:
            return
        failed = Reply(Status.FAILED, value=shortage.error)
        for client, count in shortage.growing:
            self._usage.shrink(client.user, count)
            self._clients.answer(client, failed)
        while len(self._waiting) > shortage.made + len(self._stock.ready):
            client = self._waiting.take_last()
            self._usage.leave(client.user, 1)
            self._clients.answer(client, failed)

    def _built(self) -> None:
        """It is done."""
        batch = self._stock.end()
        for _, count, user in batch.released:
            if user is not None:
                self._usage.leave(user, count)
        for client, _, fds in batch.grown:
            self._clients.answer(client, Reply(Status.OK, len(fds)), fds)
            for fd in fds:
                os.close(fd)
        self._taken.clear()
        self._giving = True

    def _give_on(self) -> None:
        """Give a table that has become ready to a client that waits for one. One in a turn: it takes some 0.3 ms."""
        if not self._giving:
            return
        waiting = self._waiting.next(self._taken)
        if waiting is None or not self._may_take(waiting.user):
            self._giving = False
            return
        self._waiting.remove(waiting)
        try:
            self._give(waiting)
        except OSError:
            self._clients.drop(waiting)


class Queue:
    """Clients that wait for tables: the users take turns."""

    def __init__(self) -> None:
        self._by_user: dict[int, dict[Client, None]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def has(self, user: int) -> bool:
        """Does a client of this user wait?"""
        return user in self._by_user

    def add(self, client: Client) -> None:
        self._by_user.setdefault(client.user, {})[client] = None
        self._count += 1

    def remove(self, client: Client) -> bool:
        """False: it did not wait."""
        clients = self._by_user.get(client.user, {})
        if client not in clients:
            return False
        del clients[client]
        self._count -= 1
        if not clients:
            del self._by_user[client.user]
        return True

    def next(self, taken: Counter[int]) -> Client | None:
        """The first of the user that has taken the fewest tables. None: no client waits."""
        user = min(self._by_user, key=lambda user: taken[user], default=None)
        return None if user is None else next(iter(self._by_user[user]))

    def take_last(self) -> Client:
        """The last of the user for which most wait."""
        clients = max(self._by_user.values(), key=len)
        client = next(reversed(clients))
        self.remove(client)
        return client
