"""The daemon's event loop: one thread, and nothing that a client does or does not do can block it.

Only what waits for running BPF programs takes long (`Tables.put_segments`: 8 to 16 ms however much is put in). So
tables are made in advance; whatever is to be put in or taken out is collected and done together, one such batch at a
time, and a thread that does nothing else waits for it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import queue
import selectors
import signal
import socket
import struct
import termios
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from .._abi import (
    PAGE,
    PROTOCOL_VERSION,
    REQUEST_SIZE,
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
from .._bpf import create_ring, create_segment, next_segments, read_map
from ..bpf import libbpf
from ..bpf.program import Program
from .limits import SEGMENT, TABLE, Limits, Usage

STEPS_FOREIGN = 8192
"""The most that a change takes on behalf of tables that may be other users', some 20 ns each."""
STEPS_OWN = 1 << 18
"""The most that it takes in each table of the process that makes it: 5 ms, in which the CPU does nothing else."""

_HANDSHAKE_SECONDS = 10.0
_CHECK_SECONDS = 5.0
_GATHER_SECONDS = 0.002
_WARN_SECONDS = 10.0
_ACCEPTS = 256
SEGMENTS_AT_ONCE = 32
"""In an answer, which its client may leave unread. The kernel lets as many descriptors be on their way as the daemon
may open, and then refuses to pass on any more."""
_RETRY_SECONDS = 1.0
_REQUESTS_PER_USER = 16
"""In a turn of the loop: whoever floods the daemon waits for himself."""

_CREDENTIALS = struct.Struct("=iII")  # struct ucred, unix(7)

log = logging.getLogger("ummunotify.daemon")


def event(level: int, what: str, **fields: object) -> None:
    """Log it with its fields: as key=value, and as they are for who can tell them apart. Never with addresses."""
    text = " ".join([what, *(f"{name}={value}" for name, value in fields.items())])
    log.log(level, "%s", text, extra={"fields": {"event": what, **fields}})


class Refusal(Exception):
    """What the client did is not in the protocol."""


class Client:
    """A connection; a client once it has a table."""

    def __init__(self, connection: socket.socket, pid: int, uid: int) -> None:
        self.connection = connection
        self.pid = pid
        self.uid = uid
        self.deadline: float | None = time.monotonic() + _HANDSHAKE_SECONDS  # None: it has settled
        self.busy = False  # it waits for an answer
        self.table = -1
        self.segments = 0
        self.segment_fd = -1  # its first
        self.secret: int | None = None

    def answer(self, reply: bytes, fds: list[int] | None = None) -> None:
        """Raises OSError, also if it does not read its answers."""
        self.busy = False
        socket.send_fds(self.connection, [reply], fds or [], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


class Server:
    """Serves one listening socket with one loaded program."""

    def __init__(self, listener: socket.socket, program: Program, kvm: int, limits: Limits, ready: int) -> None:
        """`program` is attached and has room for `limits.clients` + `ready` tables; `kvm` is -1 if clients get none.

        OSError.
        """
        self.program = program
        self.tables = program.tables
        self.counters: Counter[str] = Counter()
        self._listener = listener
        self._kvm = kvm
        self._usage = Usage(limits)
        self._target = ready
        self._selector = selectors.DefaultSelector()
        self._clients: dict[int, Client] = {}  # by their connections' descriptors
        self._by_table: dict[int, Client] = {}
        self._ready: list[tuple[int, int, int]] = []  # table, its first segment, its ring
        self._waiting: list[Client] = []
        self._growing: list[tuple[Client, int]] = []
        self._released: list[tuple[int, int, int | None]] = []  # as in _Batch
        self._blank = create_segment(), create_ring()  # what takes the place of what is taken out
        self._started = time.monotonic()
        self._checked = self._started
        self._skipped = libbpf.program_info(program.code.number()).recursion_misses
        self._warned: dict[int, float] = {}
        self._heard: Counter[int] = Counter()  # requests of each user in this turn
        self._deaf_until: float | None = None
        self._poor_until = 0.0
        self._stop = False
        self._batch: _Batch | None = None
        listener.setblocking(False)
        self._updater = _MapUpdater(program.tables)
        self.watch(self._updater.fd, self._built)
        self._build()

    # ---- the loop ----

    def watch(self, fd: int | socket.socket, callback: Callable[[], None], mask: int = selectors.EVENT_READ) -> None:
        """Call back whenever it is readable."""
        self._selector.register(fd, mask, callback)

    def unwatch(self, fd: int | socket.socket) -> None:
        self._selector.unregister(fd)

    def run(self, started: Callable[[], None]) -> None:
        """Until SIGTERM or SIGINT. In the main thread. Calls `started` when it is ready for either."""
        with self._signals():
            self.watch(self._listener, self._accept)
            started()
            while not self._stop:
                events = self._selector.select(self._timeout())
                self._heard.clear()
                for key, _ in events:
                    key.data()
                self._check()
                if not self._batch and (self._waiting or self._growing or (not events and self._work())):
                    self._build()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        awake, alarm = socket.socketpair()
        with awake, alarm:
            awake.setblocking(False)
            alarm.setblocking(False)
            self.watch(awake, lambda: void(awake.recv(64)))
            before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
            fd = signal.set_wakeup_fd(alarm.fileno())
            try:
                yield
            finally:
                signal.set_wakeup_fd(fd)
                for number, handler in before.items():
                    signal.signal(number, handler)

    def stop(self) -> None:
        """Called back in the loop: end it."""
        self._stop = True

    def _on_signal(self, *_: object) -> None:
        self.stop()

    def _work(self) -> bool:
        if len(self._ready) < self._target:
            return time.monotonic() >= self._poor_until
        return bool(self._released) or len(self._ready) > self._target

    def _timeout(self) -> float | None:
        if self._work() and not self._batch:
            return _GATHER_SECONDS
        if self._clients or self._deaf_until is not None:
            return _CHECK_SECONDS
        return None

    def _check(self) -> None:
        """What is to be looked at now and then."""
        now = time.monotonic()
        if now - self._checked < _CHECK_SECONDS:
            return
        self._checked = now
        for client in list(self._clients.values()):
            if client.deadline is not None and client.deadline <= now and not client.busy:
                self._warn(client, "timeout")
                self._drop(client)
        if self._deaf_until is not None and self._deaf_until <= now:
            self._deaf_until = None
            self.watch(self._listener, self._accept)
        if self.program.probe != Probe.KVM:
            return  # the kernel may skip others, and whoever is concerned knows at once: see `doubt` in watch.bpf.c
        skipped = libbpf.program_info(self.program.code.number()).recursion_misses
        if skipped != self._skipped:
            # Cannot be, as a raw tracepoint's programs do not nest; if it can, then nobody must be in the dark.
            event(logging.ERROR, "skipped", runs=skipped - self._skipped)
            self._skipped = skipped
            self.program.invalidate_all()

    def close(self) -> None:
        """Close what it has; clients that have settled are fed on."""
        self._updater.close()
        for client in list(self._clients.values()):
            client.connection.close()
            if client.segment_fd >= 0:
                os.close(client.segment_fd)
        batch = self._batch or _Batch([], [], [])
        for _, *fds in [*self._ready, *batch.made, *((0, *fds) for _, _, fds in batch.grown)]:
            for fd in fds:
                os.close(fd)
        for fd in self._blank:
            os.close(fd)
        self._selector.close()

    # ---- connections ----

    def _accept(self) -> None:
        for _ in range(_ACCEPTS):
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    event(logging.ERROR, "accept", error=errno.errorcode[error.errno])
                    self.unwatch(self._listener)
                    self._deaf_until = time.monotonic() + _CHECK_SECONDS
                    return
                continue
            connection.setblocking(False)
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            pid, uid, _ = _CREDENTIALS.unpack(credentials)
            client = Client(connection, pid, uid)
            if not self._usage.connect(uid):
                self._warn(client, "connections")
                connection.close()
                continue
            self._clients[connection.fileno()] = client
            self.watch(connection, lambda client=client: self._hear(client))  # type: ignore[misc]

    def _hear(self, client: Client) -> None:
        if client.connection.fileno() < 0:
            return  # dropped in this turn
        self._heard[client.uid] += 1
        if self._heard[client.uid] > _REQUESTS_PER_USER:
            return  # the next turn begins with what is left
        try:
            data = client.connection.recv(REQUEST_SIZE + 1)
            if not data:
                self._drop(client)
                return
            if len(data) != REQUEST_SIZE:
                raise Refusal("size")
            if client.busy or self._unread(client):
                raise Refusal("impatience")
            self._do(client, Request.unpack(data))
        except BlockingIOError:
            pass
        except Refusal as refusal:
            self._warn(client, f"protocol:{refusal}")
            self._drop(client)
        except libbpf.BpfError as error:
            event(logging.ERROR, "bpf", error=str(error).splitlines()[0])
            self._drop(client)
        except OSError:
            self._drop(client)

    @staticmethod
    def _unread(client: Client) -> bool:
        """Answers that it has not read: they would pile up, with descriptors in them."""
        return any(fcntl.ioctl(client.connection, termios.TIOCOUTQ, bytes(4)))

    def _warn(self, client: Client, what: str) -> None:
        """Log what one user does wrong, but not so often that it fills the journal."""
        self.counters[what] += 1
        now = time.monotonic()
        if now - self._warned.get(client.uid, -_WARN_SECONDS) >= _WARN_SECONDS:
            if len(self._warned) > 1000:
                self._warned.clear()
            self._warned[client.uid] = now
            event(logging.WARNING, "refused", why=what, uid=client.uid, pid=client.pid)

    def _drop(self, client: Client) -> None:
        fd = client.connection.fileno()
        self.unwatch(client.connection)
        client.connection.close()
        del self._clients[fd]
        self._usage.disconnect(client.uid)
        if client in self._waiting:
            self._waiting.remove(client)
            self._usage.leave(client.uid, 1)
        if client.table < 0:
            return
        for growing in [growing for growing in self._growing if growing[0] is client]:
            self._growing.remove(growing)
            self._usage.shrink(client.uid, growing[1])
        if client.secret is not None:
            self.tables.cancel(client.secret)
        self.tables.unlink(client.table)
        del self._by_table[client.table]
        os.close(client.segment_fd)
        self._released.append((client.table, client.segments, client.uid))
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
            self._warn(client, f"limit:{status.name}")
            client.answer(Reply(status, value=limit).pack())
            return
        client.busy = True
        if self._ready:
            self._give(client)
        else:
            self._waiting.append(client)

    def _give(self, client: Client) -> None:
        client.table, client.segment_fd, ring = self._ready.pop()
        client.segments = 1
        self._by_table[client.table] = client
        try:
            client.secret = self.tables.expect(client.table)
            gives = Gives(0)
            fds = [ring, client.segment_fd]
            if self._kvm >= 0:
                gives |= Gives.KVM
                fds.append(self._kvm)
            if self.program.probe_gaps is not None:
                gives |= Gives.PROBE_GAPS
                fds.append(self.program.probe_gaps.number())
            fds += [link.number() for link in self.program.links]
            client.answer(Reply(Status.OK, len(fds), gives, self.program.probe, client.secret).pack(), fds)
        finally:
            os.close(ring)
        self.counters["came"] += 1
        event(logging.DEBUG, "came", uid=client.uid, pid=client.pid, table=client.table)

    def _settle(self, client: Client) -> None:
        assert client.secret is not None
        secret, client.secret = client.secret, None
        status = Status.UNSEEN
        try:
            if self.tables.bind(client.table, secret):
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
            self._warn(client, f"limit:{status.name}")
            client.answer(Reply(status, value=limit).pack())
            return
        client.busy = True
        self._growing.append((client, granted))

    def _status(self, client: Client, first: int) -> None:
        if first == STATUS_SUMMARY:
            client.answer(self.summary().pack())
            return
        for table in range(first, self.tables.used):
            other = self._by_table.get(table)
            # Of others' clients only root learns.
            if other is not None and client.uid in (0, os.geteuid(), other.uid):
                client.answer(self._record(other).pack())
                return
        client.answer(Reply(Status.END).pack())

    def summary(self) -> Summary:
        program = libbpf.program_info(self.program.code.number())
        return Summary(
            os.getpid(),
            len(self._by_table),
            len(self._ready),
            self._usage.limits.clients,
            int(time.monotonic() - self._started),
            self._usage.memory.total() + len(self._ready) * TABLE,
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
        while len(self._ready) > self._target and not self._waiting:
            # Made for clients that did not stay.
            table, *fds = self._ready.pop()
            for fd in fds:
                os.close(fd)
            self._released.append((table, 1, None))
        batch = _Batch(self._released, [], [])
        growing, self._released, self._growing = self._growing, [], []
        failure = 0
        try:
            while self.tables.free and len(batch.made) < self._target + len(self._waiting) - len(self._ready):
                segment, ring = _create_table()
                table = self.tables.take()
                self.tables.allow(table, 1)
                batch.made.append((table, segment, ring))
            for client, count in growing:
                fds = _create_segments(count)
                self.tables.allow(client.table, count)
                batch.grown.append((client, client.segments, fds))
                client.segments += count
        except OSError as error:
            failure = error.errno or errno.ENOMEM
            self._poor_until = time.monotonic() + 1
            event(logging.ERROR, "memory", error=errno.errorcode.get(failure))
        for client, count in growing[len(batch.grown) :]:
            self._usage.shrink(client.uid, count)
            self._answer(client, Reply(Status.FAILED, value=failure))
        if failure:
            for client in self._waiting[len(batch.made) :]:
                self._waiting.remove(client)
                self._usage.leave(client.uid, 1)
                self._answer(client, Reply(Status.FAILED, value=failure))
        self._batch = batch
        self._updater.begin(batch.segments(self._blank[0]), batch.rings(self._blank[1]))

    def _built(self) -> None:
        """It is done."""
        self._updater.end()
        assert self._batch is not None
        batch, self._batch = self._batch, None
        self._ready += batch.made
        for table, count, uid in batch.released:
            self.tables.give_back(table)
            if uid is not None:
                self._usage.leave(uid, count)
        for client, _, fds in batch.grown:
            self._answer(client, Reply(Status.OK, len(fds)), fds)
            for fd in fds:
                os.close(fd)
        while self._waiting and self._ready:
            client = self._waiting.pop(0)
            try:
                self._give(client)
            except OSError:
                self._drop(client)

    def _answer(self, client: Client, reply: Reply, fds: list[int] | None = None) -> None:
        try:
            if client.connection.fileno() >= 0:
                client.answer(reply.pack(), fds)
        except OSError:
            self._drop(client)


class _Batch(NamedTuple):
    """What goes into the maps of maps and out of them together."""

    released: list[tuple[int, int, int | None]]
    """A table, how many segments, and whose it was."""
    made: list[tuple[int, int, int]]
    grown: list[tuple[Client, int, list[int]]]
    """The number of the first new segment, and their descriptors."""

    def segments(self, blank: int) -> list[tuple[int, int, int]]:
        out = [(table, number, blank) for table, count, _ in self.released for number in range(count)]
        new = [(table, 0, segment) for table, segment, _ in self.made]
        more = [(client.table, first + i, fd) for client, first, fds in self.grown for i, fd in enumerate(fds)]
        return out + new + more

    def rings(self, blank: int) -> list[tuple[int, int]]:
        return [(table, blank) for table, _, _ in self.released] + [(table, ring) for table, _, ring in self.made]


class PutsMaps(Protocol):
    """What waits for the kernel: see Tables."""

    def put_segments(self, items: list[tuple[int, int, int]], /) -> None: ...
    def put_rings(self, items: list[tuple[int, int]], /) -> None: ...


class _MapUpdater:
    """A thread that waits for the kernel, so that the loop does not."""

    def __init__(self, tables: PutsMaps) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """Readable when what was begun is done."""
        self._tables = tables
        self._orders: queue.SimpleQueue[tuple[list[tuple[int, int, int]], list[tuple[int, int]]] | None]
        self._orders = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="map updater")
        self._thread.start()

    def begin(self, segments: list[tuple[int, int, int]], rings: list[tuple[int, int]]) -> None:
        self._orders.put((segments, rings))

    def end(self) -> None:
        """Raises what went wrong."""
        os.eventfd_read(self.fd)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self._closing.set()
        self._orders.put(None)
        self._thread.join()
        os.close(self.fd)

    def _work(self) -> None:
        while (order := self._orders.get()) is not None:
            try:
                while not self._done(*order):
                    if self._closing.wait(_RETRY_SECONDS):
                        return
            except BaseException as error:
                self._error = error
            os.eventfd_write(self.fd, 1)

    def _done(self, segments: list[tuple[int, int, int]], rings: list[tuple[int, int]]) -> bool:
        """False: the kernel had no memory for it; what was put in already may be put in again."""
        try:
            if segments:
                self._tables.put_segments(segments)
            if rings:
                self._tables.put_rings(rings)
        except OSError as error:
            if error.errno not in (errno.ENOMEM, errno.EAGAIN):
                raise
            event(logging.ERROR, "memory", error=errno.errorcode[error.errno])
            return False
        return True


def _create_segments(count: int) -> list[int]:
    """OSError, with none left behind."""
    fds: list[int] = []
    try:
        while len(fds) < count:
            fds.append(create_segment())
    except OSError:
        for fd in fds:
            os.close(fd)
        raise
    return fds


def _create_table() -> tuple[int, int]:
    """Its first segment and its ring. OSError."""
    segment = create_segment()
    try:
        return segment, create_ring()
    except OSError:
        os.close(segment)
        raise


def void(_: object) -> None:
    """For a lambda: no result."""
