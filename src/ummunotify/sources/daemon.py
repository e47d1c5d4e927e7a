"""The source `daemon`: the bpf source's program and maps, held by a daemon that has the privileges for them.

After `bind` the daemon is on no path but growing: the kernel feeds the table through the link, which this process
holds too, whatever becomes of the daemon. Of its own the process has an empty virtual machine, as the bpf source has.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading

from .._abi import FDS_MAX, PAGE, PROTOCOL_VERSION, REPLY_SIZE, Gives, Op, Probe, Reply, Request, Status, socket_path
from .._core import Doubt, Ring, map_shared, show_secret
from .base import UnavailableError
from .bpf import create_vm, open_kvm

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


class _Machine:
    """The process's empty virtual machine; made for the first notifier and closed with the last."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.fd = -1

    def enter(self, kvm: int | None) -> None:
        """`kvm` is a descriptor of /dev/kvm. Raises UnavailableError."""
        with self.lock:
            if not self.users:
                if kvm is not None:
                    self.fd = create_vm(kvm)
                else:
                    kvm = open_kvm()
                    try:
                        self.fd = create_vm(kvm)
                    finally:
                        os.close(kvm)
            self.users += 1

    def leave(self) -> None:
        with self.lock:
            self.users -= 1
            if not self.users:
                self.close()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


_machine = _Machine()


def _forget() -> None:
    """In the child of a fork: the machine is the parent's."""
    global _machine
    machine, _machine = _machine, _Machine()
    machine.close()


os.register_at_fork(after_in_child=_forget)


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


class DaemonFeed:
    """A table of the daemon's, for this process's own changes."""

    def __init__(self, connection: socket.socket, reply: Reply, fds: list[int]) -> None:
        """With the answer to HELLO, which was OK. Takes all of it over. Raises UnavailableError."""
        self._socket = connection
        self._secret = reply.value
        self._machine: _Machine | None = None
        self._ring: Ring | None = None
        self._wake = fds.pop(0)
        self._segments = [fds.pop(0)]  # descriptors of those that are not mapped yet, the last one first
        self._links = fds
        kvm = fds.pop(0) if reply.gives & Gives.KVM else None
        try:
            self._probe(fds, reply)
            # A machine that is closed at once would do for mmu_notifier. But it costs little, and some kernel may
            # tell of more while there is one.
            if reply.probe != Probe.ZAP:
                machine = _machine
                machine.enter(kvm)
                self._machine = machine
        except BaseException:
            self.close()
            raise
        finally:
            if kvm is not None:
                os.close(kvm)

    def _probe(self, fds: list[int], reply: Reply) -> None:
        self.name = f"daemon:{Probe(reply.probe).label}"

    def _ask(self, op: Op) -> tuple[Reply, list[int]]:
        return _ask(self._socket, op)

    def add_segment(self, pages: int) -> int:
        if not self._segments:
            try:
                reply, fds = self._ask(Op.GROW)
            except ConnectionError as error:
                raise OSError(
                    error.errno, "the daemon that this notifier was opened with has ended; open a new one"
                ) from error
            if reply.status != Status.OK:
                raise OSError(errno.ENOSPC, "; ".join(_refusal(reply.status, reply.value)))
            self._segments = fds[::-1]
        fd = self._segments.pop()
        try:
            # The mapping keeps the map: one descriptor less.
            return map_shared(fd, pages * PAGE)
        finally:
            os.close(fd)

    def bind(self) -> None:
        try:
            self._show_secret()
            reply, _ = self._ask(Op.SETTLE)
        except OSError as error:
            raise _lost(error) from error
        if reply.status != Status.OK:
            raise UnavailableError(*_refusal(reply.status, reply.value))

    def _show_secret(self) -> None:
        show_secret(self._secret)

    def wake_fd(self) -> int:
        if self._ring is None:
            self._ring = Ring(self._wake)
        return self._wake

    def acknowledge(self) -> None:
        if self._ring is not None:
            self._ring.clear()

    def doubtful(self) -> bool:
        # The daemon looks at the count of skipped runs, and invalidates everything if it grows. The program's
        # descriptor would let a client look too; but also run the program, and tie maps to it for good
        # (BPF_PROG_BIND_MAP).
        return False

    def close(self) -> None:
        self.abandon()
        machine, self._machine = self._machine, None
        if machine is not None:
            machine.leave()

    def abandon(self) -> None:
        # No farewell: the daemon notices when the last copy of the socket is closed. In the child of a fork it is not.
        self._socket.close()
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1
        for fds in (self._links, self._segments):
            while fds:
                os.close(fds.pop())


class DoubtedDaemonFeed(DaemonFeed):
    """The same with a probe that the kernel may skip, and which knows when: see core/doubt.h."""

    def _probe(self, fds: list[int], reply: Reply) -> None:
        super()._probe(fds, reply)
        try:
            self._doubt = Doubt(fds[0])
        except OSError as error:
            raise UnavailableError(f"the daemon's map cannot be mapped ({error})", "") from error
        self.source_address = self._doubt.address

    def refusal(self, number: int, start: int, end: int) -> Exception:
        raise AssertionError("it refuses nothing")

    def _show_secret(self) -> None:
        self._doubt.show_secret(self._secret)

    def abandon(self) -> None:
        super().abandon()
        if hasattr(self, "_doubt"):
            self._doubt.abandon()


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
    return (DoubtedDaemonFeed if reply.gives & Gives.PROBE_GAPS else DaemonFeed)(connection, reply, fds)


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
