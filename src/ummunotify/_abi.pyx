# cython: language_level=3, binding=False, autotestdict=False
"""What crosses the daemon's socket and the BPF maps, from the C headers that define it (libummunotify's abi/): no number and no
layout is written in Python."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

import enum
import mmap
import os
from collections import namedtuple

cdef extern from "abi/protocol.h":
    const char *UMN_OBJECT_VERSION
    enum:
        UMN_PROTOCOL_VERSION
        UMN_FDS_MAX
        UMN_OP_HELLO
        UMN_OP_SETTLE
        UMN_OP_GROW
        UMN_OP_STATUS
        UMN_STATUS_OK
        UMN_STATUS_END
        UMN_STATUS_VERSION
        UMN_STATUS_CLIENTS
        UMN_STATUS_USER_CLIENTS
        UMN_STATUS_USER_MEMORY
        UMN_STATUS_PROCESS_CLIENTS
        UMN_STATUS_FAILED
        UMN_STATUS_UNSEEN
        UMN_STATUS_MEMORY
        UMN_STATUSES
        UMN_PROBE_KVM
        UMN_PROBE_MMU_NOTIFIER
        UMN_PROBE_ZAP
        UMN_PROBES
        UMN_GIVES_KVM
        UMN_GIVES_PROBE_GAPS
    const uint32_t UMN_STATUS_SUMMARY
    const char *UMN_SOCKET_PATH
    const char *UMN_SOCKET_ENVIRONMENT
    struct umn_request:
        uint16_t op, version
        uint32_t argument
    struct umn_reply:
        uint16_t status, fds, gives, probe
        uint64_t value
    struct umn_summary:
        uint32_t pid, clients, ready, tables
        uint64_t seconds, memory, run_time_ns, runs, skipped
    struct umn_record:
        uint32_t table, pid, uid, regions
        uint64_t generation, memory, overflows
        char command[16]

cdef extern from "abi/maps.h":
    const uint32_t UMN_PAGE
    const uint32_t UMN_SEGMENT_PAGES
    const uint32_t UMN_SEGMENTS
    const uint32_t UMN_CELLS_PER_PAGE
    const uint32_t UMN_TABLES_PER_MM_MAX
    const uint32_t UMN_RING_BYTES
    const uint32_t UMN_STEPS_MAX
    enum:
        UMN_CALL_MEMBERS
        UMN_CALL_ARGUMENTS
        UMN_OF_MM
        UMN_OF_HOLDER
        UMN_OF_SPAN
        UMN_TO_END
        UMN_TO_LENGTH
        UMN_TO_PAGE
        UMN_TO_PMD
        UMN_TO_PUD
        UMN_TO_FOLIO
        UMN_TO_SPAN
    struct umn_header:
        uint64_t generation
        uint32_t overflow, regions
    struct umn_fed_table:
        uint64_t space, mm
        uint32_t uid, next, cells
    struct umn_control:
        uint32_t tables, handshakes
        uint64_t space
        uint32_t sole_table, steps_own, steps_foreign, steps_share
        uint32_t waiters_own, waiters_foreign, waiters_relay
    struct umn_call:
        uint8_t whose, type, start, last, extent
        uint8_t members[UMN_CALL_MEMBERS]

PAGE = UMN_PAGE
SEGMENT_PAGES = UMN_SEGMENT_PAGES
SEGMENTS = UMN_SEGMENTS
CELLS_PER_SEGMENT = UMN_SEGMENT_PAGES * UMN_CELLS_PER_PAGE
TABLES_PER_MM_MAX = UMN_TABLES_PER_MM_MAX
RING_BYTES = max(UMN_RING_BYTES, mmap.PAGESIZE)
STEPS_MAX = UMN_STEPS_MAX
CALL_ARGUMENTS = UMN_CALL_ARGUMENTS

PROTOCOL_VERSION = UMN_PROTOCOL_VERSION
OBJECT_VERSION = <bytes>UMN_OBJECT_VERSION
FDS_MAX = UMN_FDS_MAX
STATUS_SUMMARY = UMN_STATUS_SUMMARY
SOCKET_PATH = UMN_SOCKET_PATH.decode()
SOCKET_ENVIRONMENT = UMN_SOCKET_ENVIRONMENT.decode()

REQUEST_SIZE = sizeof(umn_request)
REPLY_SIZE = sizeof(umn_reply)
SUMMARY_SIZE = sizeof(umn_summary)
RECORD_SIZE = sizeof(umn_record)
HEADER_SIZE = sizeof(umn_header)
FED_TABLE_SIZE = sizeof(umn_fed_table)
CONTROL_SIZE = sizeof(umn_control)


def socket_path():
    """Where the daemon listens."""
    return os.environ.get(SOCKET_ENVIRONMENT) or SOCKET_PATH


class Op(enum.IntEnum):
    """What a client asks for."""

    HELLO = UMN_OP_HELLO
    SETTLE = UMN_OP_SETTLE
    GROW = UMN_OP_GROW
    STATUS = UMN_OP_STATUS


class Status(enum.IntEnum):
    """What became of it."""

    OK = UMN_STATUS_OK
    END = UMN_STATUS_END
    VERSION = UMN_STATUS_VERSION
    CLIENTS = UMN_STATUS_CLIENTS
    USER_CLIENTS = UMN_STATUS_USER_CLIENTS
    USER_MEMORY = UMN_STATUS_USER_MEMORY
    PROCESS_CLIENTS = UMN_STATUS_PROCESS_CLIENTS
    FAILED = UMN_STATUS_FAILED
    UNSEEN = UMN_STATUS_UNSEEN
    MEMORY = UMN_STATUS_MEMORY


class Probe(enum.IntEnum):
    """Where a BPF program is attached; numbers on the wire, not in order of preference."""

    KVM = UMN_PROBE_KVM
    MMU_NOTIFIER = UMN_PROBE_MMU_NOTIFIER
    ZAP = UMN_PROBE_ZAP

    @property
    def label(self):
        """As users write it: `mmu_notifier`."""
        return self.name.lower()


class Gives(enum.IntFlag):
    """What comes after segment 0, in this order. The rest is what keeps the program attached."""

    KVM = UMN_GIVES_KVM
    PROBE_GAPS = UMN_GIVES_PROBE_GAPS


if len(Status) != UMN_STATUSES or len(Probe) != UMN_PROBES:
    raise AssertionError("_abi.pyx lacks some of abi/protocol.h")


class CallType(enum.IntEnum):
    """What says whose address space it is: umn_call.type."""

    MM = UMN_OF_MM
    HOLDER = UMN_OF_HOLDER
    SPAN = UMN_OF_SPAN


class Extent(enum.IntEnum):
    """How the last argument says how far it goes: umn_call.extent."""

    END = UMN_TO_END
    LENGTH = UMN_TO_LENGTH
    PAGE = UMN_TO_PAGE
    PMD = UMN_TO_PMD
    PUD = UMN_TO_PUD
    FOLIO = UMN_TO_FOLIO
    SPAN = UMN_TO_SPAN


cdef bytes packed(const void *what, size_t size):
    return (<const char *>what)[:size]


cdef int copy(void *to, bytes data, size_t size) except -1:
    """The first `size` bytes. ValueError."""
    if <size_t>len(data) < size:
        raise ValueError(f"expected {size} bytes, not {len(data)}")
    memcpy(to, <const char *>data, size)
    return 0


class Request(namedtuple("Request", "op version argument", defaults=(PROTOCOL_VERSION, 0))):
    """struct umn_request."""

    __slots__ = ()

    def pack(self):
        cdef umn_request c
        c.op, c.version, c.argument = self
        return packed(&c, sizeof(c))

    @classmethod
    def unpack(cls, bytes data):
        cdef umn_request c
        copy(&c, data, sizeof(c))
        return cls(c.op, c.version, c.argument)


class Reply(namedtuple("Reply", "status fds gives probe value", defaults=(0, 0, 0, 0))):
    """struct umn_reply."""

    __slots__ = ()

    def pack(self):
        cdef umn_reply c
        c.status, c.fds, c.gives, c.probe, c.value = self
        return packed(&c, sizeof(c))

    @classmethod
    def unpack(cls, bytes data):
        cdef umn_reply c
        copy(&c, data, sizeof(c))
        return cls(c.status, c.fds, c.gives, c.probe, c.value)


class Summary(namedtuple("Summary", "pid clients ready tables seconds memory run_time_ns runs skipped")):
    """struct umn_summary: the daemon."""

    __slots__ = ()

    def pack(self):
        cdef umn_summary c
        c.pid, c.clients, c.ready, c.tables, c.seconds, c.memory, c.run_time_ns, c.runs, c.skipped = self
        return packed(&c, sizeof(c))

    @classmethod
    def unpack(cls, bytes data):
        cdef umn_summary c
        copy(&c, data, sizeof(c))
        return cls(c.pid, c.clients, c.ready, c.tables, c.seconds, c.memory, c.run_time_ns, c.runs, c.skipped)


class Record(namedtuple("Record", "table pid uid regions generation memory overflows command")):
    """struct umn_record: one client."""

    __slots__ = ()

    def pack(self):
        cdef umn_record c
        cdef bytes command = self.command[: sizeof(c.command)]
        c.table, c.pid, c.uid, c.regions, c.generation, c.memory, c.overflows = self[:7]
        memset(c.command, 0, sizeof(c.command))
        memcpy(c.command, <const char *>command, len(command))
        return packed(&c, sizeof(c))

    @classmethod
    def unpack(cls, bytes data):
        cdef umn_record c
        copy(&c, data, sizeof(c))
        command = packed(c.command, sizeof(c.command)).rstrip(b"\0")
        return cls(c.table, c.pid, c.uid, c.regions, c.generation, c.memory, c.overflows, command)


class Header(namedtuple("Header", "generation regions overflows")):
    """What others may want to know of a table's struct umn_header, which its owner can write."""

    __slots__ = ()

    @classmethod
    def unpack(cls, bytes page):
        cdef umn_header c
        copy(&c, page, sizeof(c))
        return cls(c.generation, c.regions, c.overflow)


class Control(
    namedtuple(
        "Control",
        "tables handshakes space sole_table steps_own steps_foreign steps_share waiters_own waiters_foreign waiters_relay",
    )
):
    """struct umn_control."""

    __slots__ = ()

    def pack(self):
        cdef umn_control c
        memset(&c, 0, sizeof(c))
        c.tables, c.handshakes, c.space, c.sole_table = self[:4]
        c.steps_own, c.steps_foreign, c.steps_share = self[4:7]
        c.waiters_own, c.waiters_foreign, c.waiters_relay = self[7:]
        return packed(&c, sizeof(c))

    @classmethod
    def unpack(cls, bytes data):
        cdef umn_control c
        copy(&c, data, sizeof(c))
        return cls(
            c.tables,
            c.handshakes,
            c.space,
            c.sole_table,
            c.steps_own,
            c.steps_foreign,
            c.steps_share,
            c.waiters_own,
            c.waiters_foreign,
            c.waiters_relay,
        )


def call_cookie(whose, type, start, last, extent, members=()):
    """A struct umn_call as the cookie of an attachment. OverflowError for what does not fit."""
    cdef umn_call c
    cdef uint64_t cookie
    memset(&c, 0, sizeof(c))
    c.whose, c.type, c.start, c.last, c.extent = whose, type, start, last, extent
    if len(members) > UMN_CALL_MEMBERS:
        raise ValueError(f"a call has at most {UMN_CALL_MEMBERS} members")
    for i, member in enumerate(members):
        c.members[i] = member
    memcpy(&cookie, &c, sizeof(cookie))
    return cookie


def u32(uint32_t number):
    """A key or a value of a map."""
    return packed(&number, sizeof(number))


def u64(uint64_t number):
    """A key of a map."""
    return packed(&number, sizeof(number))
