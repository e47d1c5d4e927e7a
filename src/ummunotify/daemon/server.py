"""The daemon's server: nothing that a client does or does not do can block it."""

from __future__ import annotations

import errno
import logging
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
from .._bpf import next_segments, read_map
from ..bpf import libbpf
from ..bpf.program import Program
from .batches import Stock
from .clients import CHECK_SECONDS, Client, Clients, Refusal
from .limits import SEGMENT, TABLE, Limits, Usage
from .log import event
from .loop import Loop

STEPS_FOREIGN = 8192
"""The most that a change takes on behalf of tables that may be other users', some 20 ns each."""
STEPS_OWN = 1 << 18
"""The most that it takes in each table of the process that makes it: 5 ms, in which the CPU does nothing else."""
SEGMENTS_AT_ONCE = 32
"""In an answer, which its client may leave unread. The kernel lets as many descriptors be on their way as the daemon
may open, and then refuses to pass on any more."""

_GATHER_SECONDS = 0.002


class Server:
    """Serves one listening socket with one loaded program."""

    def __init__(self, listener: socket.socket, program: Program, kvm: int, limits: Limits, ready: int) -> None:
        """`program` is attached and has room for `limits.clients` + `ready` tables; `kvm` is -1 if clients get none.

        OSError.
        """
        self.counters: Counter[str] = Counter()
        self.loop = Loop()
        self.address = str(listener.getsockname())
        self._program = program
        self._tables = program.tables
        self._kvm = kvm
        self._usage = Usage(limits)
        self._clients = Clients(self.loop, listener, self._usage, self.counters, self._do, self._gone)
        self._by_table: dict[int, Client] = {}
        self._waiting: list[Client] = []
        self._stock = Stock(program.tables, ready)
        self._started = time.monotonic()
        self._checked = self._started
        self._skipped = libbpf.program_info(program.code.number()).recursion_misses
        self.loop.watch(self._stock.fd, self._built)
        self._build()

    def run(self, started: Callable[[], None]) -> None:
        """Until SIGTERM or SIGINT. In the main thread. Calls `started` when it is ready for either."""
        self._clients.listen()
        self.loop.run(started, self._timeout, self._turn)

    def _timeout(self) -> float | None:
        if self._stock.idle_work() and not self._stock.batch:
            return _GATHER_SECONDS
        return CHECK_SECONDS if self._clients.to_check else None

    def _turn(self, idle: bool) -> None:
        self._clients.next_turn()
        self._check()
        due = self._waiting or self._stock.growing or (idle and self._stock.idle_work())
        if due and not self._stock.batch:
            self._build()

    def _check(self) -> None:
        """What is to be looked at now and then."""
        now = time.monotonic()
        if now - self._checked < CHECK_SECONDS:
            return
        self._checked = now
        self._clients.check(now)
        if self._program.probe != Probe.KVM:
            return  # the kernel may skip others, and clients know at once: see `doubt` in watch.bpf.c
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
        self.loop.close()

    def _gone(self, client: Client) -> None:
        """Its connection has ended."""
        if client in self._waiting:
            self._waiting.remove(client)
            self._usage.leave(client.uid, 1)
        if client.table < 0:
            return
        for growing in [growing for growing in self._stock.growing if growing[0] is client]:
            self._stock.growing.remove(growing)
            self._usage.shrink(client.uid, growing[1])
        if client.secret is not None:
            self._tables.cancel(client.secret)
        self._tables.unlink(client.table)
        del self._by_table[client.table]
        os.close(client.segment_fd)
        self._stock.release(client)
        self.counters["left"] += 1
        event(logging.DEBUG, "left", uid=client.uid, pid=client.pid, table=client.table)

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
        status, limit = self._usage.enter(client.uid)
        if status != Status.OK:
            self._clients.warn(client, f"limit:{status.name}")
            client.answer(Reply(status, value=limit).pack())
            return
        client.busy = True
        if self._stock.ready:
            self._give(client)
        else:
            self._waiting.append(client)

    def _give(self, client: Client) -> None:
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
        event(logging.DEBUG, "came", uid=client.uid, pid=client.pid, table=client.table)

    def _settle(self, client: Client) -> None:
        assert client.secret is not None
        secret, client.secret = client.secret, None
        status = Status.UNSEEN
        try:
            if self._tables.bind(client.table, secret):
                status, client.deadline = Status.OK, None
        except OSError as error:
            if error.errno != errno.E2BIG:
                raise
            status = Status.PROCESS_CLIENTS
        client.answer(Reply(status).pack())

    def _grow(self, client: Client) -> None:
        wanted = next_segments(client.segments, SEGMENTS_AT_ONCE)
        granted, status, limit = self._usage.grow(client.uid, wanted)
        if status != Status.OK:
            self._clients.warn(client, f"limit:{status.name}")
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
            if other is not None and client.uid in (0, os.geteuid(), other.uid):
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

    def _build(self) -> None:
        """Begin to put in and take out everything that is due."""
        shortage = self._stock.begin(len(self._waiting))
        if not shortage.error:
            return
        failed = Reply(Status.FAILED, value=shortage.error)
        for client, count in shortage.growing:
            self._usage.shrink(client.uid, count)
            self._clients.answer(client, failed)
        for client in self._waiting[shortage.made :]:
            self._waiting.remove(client)
            self._usage.leave(client.uid, 1)
            self._clients.answer(client, failed)

    def _built(self) -> None:
        """It is done."""
        batch = self._stock.end()
        for _, count, uid in batch.released:
            if uid is not None:
                self._usage.leave(uid, count)
        for client, _, fds in batch.grown:
            self._clients.answer(client, Reply(Status.OK, len(fds)), fds)
            for fd in fds:
                os.close(fd)
        while self._waiting and self._stock.ready:
            client = self._waiting.pop(0)
            try:
                self._give(client)
            except OSError:
                self._clients.drop(client)
