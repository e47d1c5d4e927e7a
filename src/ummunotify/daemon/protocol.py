"""What a client and the daemon say to each other: messages of fixed sizes on a SOCK_SEQPACKET Unix socket.

    client                         daemon
    HELLO                   ->
                            <-     OK with a secret, and SCM_RIGHTS: the wake-up, segment 0, what `gives` says, links
    (shows the secret to the program in the kernel)
    SETTLE                  ->
                            <-     OK: the table is fed from now on
    GROW                    ->     whenever the table is full
                            <-     OK, and SCM_RIGHTS: the next segments

A client sends its next request when it has read the answer to the last. Whatever else it sends ends the
connection. Closing the socket gives everything back. Descriptors that a client sends are never received.
"""

from __future__ import annotations

import enum
import os
import struct
from typing import NamedTuple

VERSION = 2
SOCKET = "/run/ummunotify/socket"
ENVIRONMENT = "UMMUNOTIFY_SOCKET"

GROW_MOST = 64
"""Segments in one answer; the kernel passes up to 253 descriptors with a message."""

_REQUEST = struct.Struct("=HHI")
_REPLY = struct.Struct("=HHHHQ")
REQUEST_SIZE = _REQUEST.size
REPLY_SIZE = _REPLY.size


def socket_path() -> str:
    """Where the daemon listens."""
    return os.environ.get(ENVIRONMENT) or SOCKET


class Op(enum.IntEnum):
    """What a client asks for."""

    HELLO = 1
    SETTLE = 2
    GROW = 3
    STATUS = 4
    """A `Summary`, then for each `argument` the `Record` of the first client with at least that table's number."""


class Status(enum.IntEnum):
    """What became of it. `value` is the limit that was reached, or an errno."""

    OK = 0
    END = 1
    """There are no more records."""
    VERSION = 2
    """The daemon speaks version `value`."""
    CLIENTS = 3
    USER_CLIENTS = 4
    USER_MEMORY = 5
    """In bytes."""
    PROCESS_CLIENTS = 6
    FAILED = 7
    UNSEEN = 8
    """The secret was not shown."""
    MEMORY = 9
    """Of all users, in bytes."""


class Gives(enum.IntFlag):
    """What comes after segment 0, in this order. The rest is what keeps the program attached."""

    KVM = 1
    """/dev/kvm, for the virtual machine without which the kernel tells nobody."""
    DOUBTS = 2
    """A map, for the probes that the kernel may skip: see core/doubt.h."""


PROBES = ("kvm", "mmu_notifier", "zap")


class Request(NamedTuple):
    op: int
    version: int = VERSION
    argument: int = 0

    def pack(self) -> bytes:
        return _REQUEST.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> Request:
        return cls(*_REQUEST.unpack(data))


class Reply(NamedTuple):
    status: int
    fds: int = 0
    """How many come with it."""
    gives: int = 0
    """To HELLO: which of them, as in `Gives`."""
    probe: int = 0
    """To HELLO: what feeds the table, as its number in `PROBES`."""
    value: int = 0

    def pack(self) -> bytes:
        return _REPLY.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> Reply:
        return cls(*_REPLY.unpack(data))


_SUMMARY = struct.Struct("=IIIIQQQQQ")
_RECORD = struct.Struct("=IIIIQQQ16s")


class Summary(NamedTuple):
    """The daemon, to STATUS with `argument` SUMMARY."""

    pid: int
    clients: int
    """Of all users."""
    ready: int
    """Tables that wait for clients."""
    tables: int
    """As many clients as there can be."""
    seconds: int
    """Since it started."""
    memory: int
    """Of all tables, in bytes; the ready ones too."""
    run_time_ns: int
    """Of the BPF program, with the next; both 0 while the kernel's statistics are off."""
    runs: int
    skipped: int
    """Runs that the kernel skipped."""

    def pack(self) -> bytes:
        return _SUMMARY.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> Summary:
        return cls(*_SUMMARY.unpack(data))


SUMMARY = (1 << 32) - 1
SUMMARY_SIZE = _SUMMARY.size
RECORD_SIZE = _RECORD.size


class Record(NamedTuple):
    """One client."""

    table: int
    pid: int
    uid: int
    regions: int
    generation: int
    memory: int
    overflows: int
    command: bytes

    def pack(self) -> bytes:
        return _RECORD.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> Record:
        record = cls(*_RECORD.unpack(data))
        return record._replace(command=record.command.rstrip(b"\0"))
