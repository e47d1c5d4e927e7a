"""The source `daemon`: the bpf source's program and maps, held by a daemon that has the privileges for them.

The kernel feeds the table through the link, which this process holds too, whatever becomes of the daemon.
"""

from __future__ import annotations

import errno
import os
import socket
import struct

from .._abi import FDS_MAX, PROTOCOL_VERSION, REPLY_SIZE, Op, Probe, Reply, Request, Status, socket_path
from .base import UnavailableError
from .client import ClientFeed

_TIMEVAL = struct.Struct("@ll")
_TIMEOUT = 30
"""Seconds without an answer. Nobody else's doing can delay one for long; but the daemon may be stopped."""

_REMEDY = "ask the administrator to look at `ummunotify status` and the daemon's log"


def _refusal(status: int, value: int) -> tuple[str, str]:
    """What and why, and what to do about it."""
    mib = f"{value >> 20} MiB"
    known: dict[int, tuple[str, str]] = {
        Status.VERSION: (
            f"the daemon speaks version {value} of the protocol, this library version {PROTOCOL_VERSION}",
            "install the same version of ummunotify on both sides",
        ),
        Status.CLIENTS: (f"the daemon serves {value} notifiers, as many as it may", "raise its --clients"),
        Status.USER_CLIENTS: (
            f"this user has {value} notifiers open, as many as the daemon allows",
            "close some, or raise the daemon's --clients-per-user",
        ),
        Status.USER_MEMORY: (
            f"this user's tables would take more than the {mib} that the daemon allows",
            "watch fewer regions, or raise the daemon's --memory-per-user",
        ),
        Status.MEMORY: (f"the tables of all users take the {mib} that the daemon allows", "raise its --memory"),
        Status.PROCESS_CLIENTS: ("this process has too many notifiers", "close some of them"),
        Status.UNSEEN: (
            "the daemon's program did not see a change made for it to see",
            "please report this with the kernel's version",
        ),
    }
    return known.get(status, (f"the daemon failed ({os.strerror(value)})", _REMEDY))


def _ask(connection: socket.socket, op: Op) -> tuple[Reply, list[int]]:
    """The answer, and descriptors that the caller closes. OSError."""
    connection.send(Request(op).pack(), socket.MSG_NOSIGNAL)
    data, fds, _, _ = socket.recv_fds(connection, REPLY_SIZE, FDS_MAX, socket.MSG_CMSG_CLOEXEC)
    reply = Reply.unpack(data) if len(data) == REPLY_SIZE else None
    # Fewer of them: this process may not open that many.
    if reply is None or reply.fds != len(fds):
        for fd in fds:
            os.close(fd)
        if reply is None:
            raise ConnectionResetError(errno.ECONNRESET, "the daemon ended the connection")
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return reply, fds


class DaemonFeed(ClientFeed):
    """A table of the daemon's."""

    def __init__(self, connection: socket.socket, reply: Reply, fds: list[int]) -> None:
        """With the answer to HELLO, which was OK. Takes all of it over. Raises UnavailableError."""
        self._socket = connection
        super().__init__("daemon", reply, fds)

    def _ask(self, op: Op) -> tuple[Reply, list[int]]:
        return _ask(self._socket, op)

    def _hang_up(self) -> None:
        # No farewell: the daemon notices when the last copy of the socket is closed. In the child of a fork it is not.
        self._socket.close()

    # The daemon looks at the count of skipped runs, and invalidates everything if it grows. The program's descriptor
    # would let a client look too; but also run the program, and tie maps to it for good (BPF_PROG_BIND_MAP).

    def _refusal(self, status: int, value: int) -> tuple[str, str]:
        return _refusal(status, value)

    def _lost(self, error: OSError) -> UnavailableError:
        return _lost(error)


def open_feed() -> DaemonFeed:
    """Become a client. Raises UnavailableError."""
    connection = connect()
    fds: list[int] = []
    try:
        try:
            reply, fds = _ask(connection, Op.HELLO)
        except OSError as error:
            raise _lost(error) from error
        if reply.status != Status.OK or len(fds) < 3 or reply.probe >= len(Probe):
            raise UnavailableError(*_refusal(reply.status, reply.value))
    except BaseException:
        connection.close()
        for fd in fds:
            os.close(fd)
        raise
    return DaemonFeed(connection, reply, fds)


def connect() -> socket.socket:
    """Raises UnavailableError."""
    path = socket_path()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        # Not settimeout(): without blocking, connect() fails at once where others wait in line.
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            connection.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(_TIMEOUT, 0))
        connection.connect(path)
    except BaseException as error:
        connection.close()
        if not isinstance(error, OSError):
            raise
        raise UnavailableError(*_unreachable(path, error)) from error
    return connection


def _unreachable(path: str, error: OSError) -> tuple[str, str]:
    match error:
        case FileNotFoundError():
            return f"no daemon runs here: there is no {path}", "have an administrator run `ummunotify daemon`"
        case ConnectionRefusedError():
            return f"nobody listens at {path}: the daemon has ended", "have an administrator start it again"
        case PermissionError():
            return f"the daemon's socket {path} is not for this user", "become a member of its group"
        case BlockingIOError():
            return f"the daemon at {path} does not answer", _REMEDY
    return f"cannot connect to the daemon at {path} ({error.strerror or error})", _REMEDY


def _lost(error: OSError) -> UnavailableError:
    if isinstance(error, BlockingIOError):
        return UnavailableError("the daemon does not answer", _REMEDY)
    if isinstance(error, ConnectionError):
        return UnavailableError(
            "the daemon ended the connection: it was stopped, or this user has too many of them", _REMEDY
        )
    return UnavailableError(f"the daemon's help came to nothing ({error.strerror or error})", "")
