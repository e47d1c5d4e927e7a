"""The daemon's connections: accepting them, one request at a time from each, and what a user may do wrong."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import termios
import time
from collections import Counter, deque
from collections.abc import Callable

from .._abi import REQUEST_SIZE, Reply, Request
from .._peers import accept, close, close_held, hold, receive
from ..bpf import libbpf
from .limits import Usage
from .log import event
from .loop import Loop

CHECK_SECONDS = 5.0
_HANDSHAKE_SECONDS = 10.0
_WARN_SECONDS = 10.0
_REQUESTS = 4
"""In a turn of the loop, of all users together: some 0.3 ms. Each user has a share, and delays itself by a flood."""
_USERS_WARNED = 1000
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Refusal(Exception):
    """What the client did is not in the protocol."""


class Client:
    """A connection; a client once it has a table."""

    def __init__(self, connection: socket.socket, pid: int, uid: int, user: int) -> None:
        self.connection = connection
        self.pid = pid
        self.uid = uid
        self.user = user
        """To whom it counts."""
        self.deadline: float | None = time.monotonic() + _HANDSHAKE_SECONDS  # None: its table is bound
        self.busy = False  # it waits for an answer
        self.late = False  # it waits for the next turn
        self.table = -1
        self.segments = 0
        self.segment_fd = -1  # its first
        self.secret: int | None = None

    def answer(self, reply: bytes, fds: list[int] | None = None) -> None:
        """Raises OSError, also if it does not read its answers."""
        self.busy = False
        socket.send_fds(self.connection, [reply], fds or [], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


class Clients:
    """All connections to one listening socket.

    `who`: the program that tells to whom a connection counts, or -1. Requests go to `handle`, which raises Refusal,
    OSError or BpfError to end the connection; `gone` is told of each that has ended.
    """

    def __init__(
        self,
        loop: Loop,
        listener: socket.socket,
        who: int,
        usage: Usage,
        counters: Counter[str],
        handle: Callable[[Client, Request], None],
        gone: Callable[[Client], None],
    ) -> None:
        self._loop = loop
        self._listener = listener
        self._who = who
        self._usage = usage
        self._counters = counters
        self._handle = handle
        self._gone = gone
        self._open: dict[int, Client] = {}  # by their descriptors
        self._heard: Counter[int] = Counter()  # requests of each user in this turn
        self._share = _REQUESTS
        self._late: dict[int, deque[Client]] = {}
        self._warned: dict[int, float] = {}
        self._deaf_until: float | None = None
        listener.setblocking(False)

    def listen(self) -> None:
        self._loop.watch(self._listener, self._accept)

    @property
    def to_check(self) -> bool:
        """Is `check` to be called now and then?"""
        return bool(self._open) or hold() or self._deaf_until is not None

    def check(self, now: float) -> None:
        """End those that did not finish their handshake; accept again after there was no room."""
        close_held()
        for client in list(self._open.values()):
            if client.deadline is not None and client.deadline <= now and not client.busy:
                self.warn("timeout", client.pid, client.uid, client.user)
                self.drop(client)
        if self._deaf_until is not None and self._deaf_until <= now:
            self._deaf_until = None
            self.listen()

    @property
    def late(self) -> bool:
        """Does a client wait for the next turn?"""
        return bool(self._late)

    def next_turn(self) -> None:
        """Each user has a share of the requests in a turn; those beyond it wait for the next, and come first there."""
        late, self._late = self._late, {}
        # As many users as in the last turn.
        self._share = max(1, _REQUESTS // max(1, len(self._heard.keys() | late.keys())))
        self._heard.clear()
        for user, clients in late.items():
            while clients and self._heard[user] < self._share:
                client = clients.popleft()
                client.late = False
                if client.connection.fileno() >= 0:  # not dropped meanwhile
                    self._watch(client)
                    self._hear(client)
            if clients:
                self._late[user] = clients

    def _accept(self) -> None:
        try:
            peers = accept(self._listener.fileno(), self._who)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno in _NO_ROOM:
                event(logging.ERROR, "accept", error=errno.errorcode[error.errno])
                self._loop.unwatch(self._listener)
                self._deaf_until = time.monotonic() + CHECK_SECONDS
            return
        for fd, pid, uid, user in peers:
            self._welcome(fd, pid, uid, user)

    def _welcome(self, fd: int, pid: int, uid: int, user: int) -> None:
        if not self._usage.connect(user):
            close(fd)
            self.warn("connections", pid, uid, user)
            return
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fd)
        client = Client(connection, pid, uid, user)
        self._open[fd] = client
        self._watch(client)

    def _watch(self, client: Client) -> None:
        self._loop.watch(client.connection, lambda: self._hear(client))

    def _hear(self, client: Client) -> None:
        if client.connection.fileno() < 0:
            return  # dropped in this turn
        if self._heard[client.user] >= self._share:
            # Not watched meanwhile, or each turn would look at all of them.
            self._loop.unwatch(client.connection)
            client.late = True
            self._late.setdefault(client.user, deque()).append(client)
            return
        self._heard[client.user] += 1
        try:
            data = receive(client.connection.fileno(), REQUEST_SIZE + 1)
            if data is None:
                raise Refusal("descriptors")
            if not data:
                self.drop(client)
                return
            if len(data) != REQUEST_SIZE:
                raise Refusal("size")
            if client.busy or self._unread(client):
                raise Refusal("impatience")
            self._handle(client, Request.unpack(data))
        except BlockingIOError:
            pass
        except Refusal as refusal:
            self.warn(f"protocol:{refusal}", client.pid, client.uid, client.user)
            self.drop(client)
        except libbpf.BpfError as error:
            event(logging.ERROR, "bpf", error=str(error).splitlines()[0])
            self.drop(client)
        except OSError:
            self.drop(client)

    @staticmethod
    def _unread(client: Client) -> bool:
        """Answers that it has not read: they would pile up, with descriptors in them."""
        return any(fcntl.ioctl(client.connection, termios.TIOCOUTQ, bytes(4)))

    def warn(self, what: str, pid: int, uid: int, user: int) -> None:
        """Log what a client does wrong, but not so often for one user that it fills the journal."""
        self._counters[what] += 1
        now = time.monotonic()
        if now - self._warned.get(user, -_WARN_SECONDS) >= _WARN_SECONDS:
            if len(self._warned) > _USERS_WARNED:
                self._warned.clear()
            self._warned[user] = now
            event(logging.WARNING, "refused", why=what, uid=uid, user=user, pid=pid)

    def answer(self, client: Client, reply: Reply, fds: list[int] | None = None) -> None:
        """Later than at once. A client that does not take it is dropped."""
        try:
            if client.connection.fileno() >= 0:
                client.answer(reply.pack(), fds)
        except OSError:
            self.drop(client)

    def drop(self, client: Client) -> None:
        fd = client.connection.fileno()
        if not client.late:
            self._loop.unwatch(client.connection)
        close(client.connection.detach())
        del self._open[fd]
        self._usage.disconnect(client.user)
        self._gone(client)

    def close(self) -> None:
        """Close all connections; clients whose tables are bound are fed on."""
        for client in self._open.values():
            close(client.connection.detach())
            if client.segment_fd >= 0:
                os.close(client.segment_fd)
        close_held()
