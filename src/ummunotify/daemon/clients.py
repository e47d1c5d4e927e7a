"""The daemon's connections: accepting them, one request at a time from each, and what a user may do wrong."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import struct
import termios
import time
from collections import Counter
from collections.abc import Callable

from .._abi import REQUEST_SIZE, Reply, Request
from ..bpf import libbpf
from .limits import Usage
from .log import event
from .loop import Loop

CHECK_SECONDS = 5.0
_HANDSHAKE_SECONDS = 10.0
_WARN_SECONDS = 10.0
_ACCEPTS = 256
_REQUESTS_PER_USER = 16
"""In a turn of the loop: a user that floods the daemon delays only itself."""
_USERS_WARNED = 1000
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

_CREDENTIALS = struct.Struct("=iII")  # struct ucred, unix(7)


class Refusal(Exception):
    """What the client did is not in the protocol."""


class Client:
    """A connection; a client once it has a table."""

    def __init__(self, connection: socket.socket, pid: int, uid: int) -> None:
        self.connection = connection
        self.pid = pid
        self.uid = uid
        self.deadline: float | None = time.monotonic() + _HANDSHAKE_SECONDS  # None: its table is bound
        self.busy = False  # it waits for an answer
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

    Requests go to `handle`, which raises Refusal, OSError or BpfError to end the connection; `gone` is told of each
    that has ended.
    """

    def __init__(
        self,
        loop: Loop,
        listener: socket.socket,
        usage: Usage,
        counters: Counter[str],
        handle: Callable[[Client, Request], None],
        gone: Callable[[Client], None],
    ) -> None:
        self._loop = loop
        self._listener = listener
        self._usage = usage
        self._counters = counters
        self._handle = handle
        self._gone = gone
        self._open: dict[int, Client] = {}  # by their descriptors
        self._heard: Counter[int] = Counter()  # requests of each user in this turn
        self._warned: dict[int, float] = {}
        self._deaf_until: float | None = None
        listener.setblocking(False)

    def listen(self) -> None:
        self._loop.watch(self._listener, self._accept)

    @property
    def to_check(self) -> bool:
        """Is `check` to be called now and then?"""
        return bool(self._open) or self._deaf_until is not None

    def check(self, now: float) -> None:
        """End those that did not finish their handshake; accept again after there was no room."""
        for client in list(self._open.values()):
            if client.deadline is not None and client.deadline <= now and not client.busy:
                self.warn(client, "timeout")
                self.drop(client)
        if self._deaf_until is not None and self._deaf_until <= now:
            self._deaf_until = None
            self.listen()

    def next_turn(self) -> None:
        self._heard.clear()

    def _accept(self) -> None:
        for _ in range(_ACCEPTS):
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _NO_ROOM:
                    event(logging.ERROR, "accept", error=errno.errorcode[error.errno])
                    self._loop.unwatch(self._listener)
                    self._deaf_until = time.monotonic() + CHECK_SECONDS
                    return
                continue
            connection.setblocking(False)
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            pid, uid, _ = _CREDENTIALS.unpack(credentials)
            client = Client(connection, pid, uid)
            if not self._usage.connect(uid):
                self.warn(client, "connections")
                connection.close()
                continue
            self._open[connection.fileno()] = client
            self._loop.watch(connection, lambda client=client: self._hear(client))  # type: ignore[misc]

    def _hear(self, client: Client) -> None:
        if client.connection.fileno() < 0:
            return  # dropped in this turn
        self._heard[client.uid] += 1
        if self._heard[client.uid] > _REQUESTS_PER_USER:
            return  # the next turn begins with what is left
        try:
            data = client.connection.recv(REQUEST_SIZE + 1)
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
            self.warn(client, f"protocol:{refusal}")
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

    def warn(self, client: Client, what: str) -> None:
        """Log what one user does wrong, but not so often that it fills the journal."""
        self._counters[what] += 1
        now = time.monotonic()
        if now - self._warned.get(client.uid, -_WARN_SECONDS) >= _WARN_SECONDS:
            if len(self._warned) > _USERS_WARNED:
                self._warned.clear()
            self._warned[client.uid] = now
            event(logging.WARNING, "refused", why=what, uid=client.uid, pid=client.pid)

    def answer(self, client: Client, reply: Reply, fds: list[int] | None = None) -> None:
        """Later than at once. A client that does not take it is dropped."""
        try:
            if client.connection.fileno() >= 0:
                client.answer(reply.pack(), fds)
        except OSError:
            self.drop(client)

    def drop(self, client: Client) -> None:
        fd = client.connection.fileno()
        self._loop.unwatch(client.connection)
        client.connection.close()
        del self._open[fd]
        self._usage.disconnect(client.uid)
        self._gone(client)

    def close(self) -> None:
        """Close all connections; clients whose tables are bound are fed on."""
        for client in self._open.values():
            client.connection.close()
            if client.segment_fd >= 0:
                os.close(client.segment_fd)
