# cython: language_level=3, boundscheck=False, wraparound=False, binding=False, autotestdict=False
"""BPF maps and programs once they are loaded: descriptors, the tables that a program feeds, and a table's connection to its owner.

Native because of signals. A Python signal handler can raise an exception between any two bytecodes, but it does not run inside a
function of this module. So each function here is done or has failed, and never half done.

The GIL is the lock of everything here. It is released only around system calls that wait for running programs; what other threads
find then is consistent. No lock is held over a fork: the child of a fork uses nothing of its parent's (epochs), and never writes
its maps, as those are the parent's.
"""

cimport cython
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.errno cimport E2BIG, EBADF, ECHILD, EINVAL, ENOENT, ENOMEM, ENOSPC, ESTALE, errno
from libc.stdint cimport UINT32_MAX, int64_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

import mmap
import os
from typing import NamedTuple

from ._abi import RING_BYTES as _RING_BYTES
from .bpf.libbpf import BpfError
from .errors import DescriptorLostError, UnavailableError

cdef extern from "<fcntl.h>" nogil:
    int fcntl(int fd, int command, int argument)
    int F_DUPFD_CLOEXEC

cdef extern from "<unistd.h>" nogil:
    int c_close "close"(int fd)

cdef extern from "<sys/mman.h>" nogil:
    int munmap(void *address, size_t length)

cdef extern from "<sys/random.h>" nogil:
    ssize_t getrandom(void *buffer, size_t length, unsigned int flags)

cdef extern from "<linux/bpf.h>" nogil:
    enum:
        BPF_MAP_TYPE_ARRAY
        BPF_MAP_TYPE_RINGBUF
        BPF_F_MMAPABLE

cdef extern from "process/process.h" nogil:
    uint32_t umn_process_current()
    bint umn_process_is(uint32_t epoch)

cdef extern from "sources/platform.h" nogil:
    int64_t umn_skipped_runs(int program_fd)

cdef extern from "bpf/objects.h" nogil:
    int umn_bpf_create_map(uint32_t type, const char *name, uint32_t key_size, uint32_t value_size, uint32_t entries, uint32_t flags)
    int umn_bpf_update(int map, const void *key, const void *value)
    int umn_bpf_lookup(int map, const void *key, void *value)
    int umn_bpf_delete(int map, const void *key)
    int umn_bpf_put_maps(int map, const uint32_t *keys, const uint32_t *fds, uint32_t count)
    void *umn_bpf_share(int map, size_t size)
    void umn_bpf_read_words(void *to, const void *shared, size_t size)
    void umn_bpf_write_words(void *shared, const void *source, size_t size)
    int umn_bpf_run(int program, const void *arguments, uint32_t size)
    enum umn_bpf_kind:
        UMN_BPF_MAP
        UMN_BPF_PROGRAM
        UMN_BPF_LINK
    struct umn_bpf_object:
        uint32_t epoch
    int umn_bpf_objects_start()
    int umn_bpf_object_take(umn_bpf_object *object, umn_bpf_kind kind, int fd)
    int umn_bpf_object_fd(umn_bpf_object *object)
    void umn_bpf_object_close(umn_bpf_object *object)

cdef extern from "abi/protocol.h" nogil:
    enum:
        UMN_PROTOCOL_VERSION
        UMN_FDS_MAX
        UMN_OP_HELLO
        UMN_OP_SETTLE
        UMN_OP_GROW
        UMN_STATUS_OK
        UMN_STATUS_VERSION
        UMN_STATUS_PROCESS_CLIENTS
        UMN_STATUS_FAILED
        UMN_STATUS_UNSEEN
        UMN_GIVES_PROBE_GAPS
    struct umn_request:
        uint16_t op, version
        uint32_t argument
    struct umn_reply:
        uint16_t status, fds, gives, probe
        uint64_t value

cdef extern from "abi/maps.h" nogil:
    const uint32_t UMN_PAGE
    const uint32_t UMN_SEGMENT_PAGES
    const uint32_t UMN_SEGMENTS
    const uint32_t UMN_CELLS_PER_SEGMENT
    const uint32_t UMN_TABLES_PER_MM_MAX
    const uint32_t UMN_STEPS_MAX
    struct umn_fed_table:
        uint64_t space
        uint32_t next, cells
        uint32_t pid_namespace, pid_namespace_device
        uint64_t secret, shown
    struct umn_control:
        uint32_t tables, handshakes
        uint64_t space
        uint32_t sole_table, steps_own, steps_foreign, steps_share
        uint32_t waiters_own, waiters_foreign, waiters_relay
        uint32_t page_shift

cdef enum:
    STEPS_LEAST = 8  # enough to find some regions among a million: 1 for each of the 5 levels, 1 for each further hit

cdef int start_error = umn_bpf_objects_start()
if start_error:
    raise OSError(-start_error, os.strerror(-start_error))


def epoch():
    """Of this process; in the child of a fork it is another one, however the fork was made."""
    return umn_process_current()


cdef int check(int result, str doing) except -1:
    """Raises BpfError for a negative result."""
    if result < 0:
        raise BpfError(-result, doing)
    return result


# ---- Single maps ----


def create_segment():
    """Memory for a table. A map's descriptor, which the caller closes; OSError."""
    return check(
        umn_bpf_create_map(BPF_MAP_TYPE_ARRAY, b"umn_segment", 4, UMN_PAGE, UMN_SEGMENT_PAGES, BPF_F_MMAPABLE),
        "make a segment",
    )


def create_ring():
    """A wake-up. A map's descriptor, which the caller closes; OSError."""
    return check(umn_bpf_create_map(BPF_MAP_TYPE_RINGBUF, b"umn_wake", 0, 0, _RING_BYTES, 0), "make a wake-up")


def read_map(int fd, bytes key, size_t value_size):
    """The value under `key`. The sizes have to be the map's. OSError."""
    cdef bytearray value = bytearray(value_size)
    check(umn_bpf_lookup(fd, <const char *>key, <char *>value), "look up in a map")
    return bytes(value)


@cython.final
@cython.no_gc
cdef class Descriptor:
    """A map, program or link that stays open until this object is closed or collected.

    The program may close or replace the descriptor (os.closerange, dup2). It is never used nor closed when it leads to something
    else. In the child of a fork it is closed.
    """

    cdef umn_bpf_object object
    cdef readonly str name

    def __cinit__(self, str name not None, int kind, int fd):
        """Takes `fd` over, of a map (MAP), PROGRAM or LINK; closes it even if it fails. `name`: for errors."""
        cdef int error = umn_bpf_object_take(&self.object, <umn_bpf_kind>kind, fd)
        self.name = name
        if error:
            c_close(fd)
            check(error, f"look at {name}")

    def __dealloc__(self):
        umn_bpf_object_close(&self.object)

    cdef int fd(self) except -1:
        cdef int fd = umn_bpf_object_fd(&self.object)
        if fd == -ESTALE:
            raise DescriptorLostError(
                f"the program has closed a descriptor of this library's ({self.name})",
                "close only descriptors that the program has opened; with CAP_SYS_ADMIN the library would open it again",
            )
        if fd == -ECHILD:
            raise DescriptorLostError("it was opened before a fork, by the parent process", "open another one in the child")
        return check(fd, f"use {self.name}")

    def number(self):
        """The descriptor, which the caller uses at once and does not close. Raises DescriptorLostError."""
        return self.fd()

    def duplicate(self):
        """Another descriptor of the same, which the caller closes. Raises DescriptorLostError, OSError."""
        return duplicate(self)

    def close(self):
        """May be called more than once."""
        umn_bpf_object_close(&self.object)


MAP = UMN_BPF_MAP
PROGRAM = UMN_BPF_PROGRAM
LINK = UMN_BPF_LINK


cdef int duplicate(Descriptor descriptor) except -1:
    cdef int fd = fcntl(descriptor.fd(), F_DUPFD_CLOEXEC, 3)
    if fd < 0:
        raise OSError(errno, os.strerror(errno))
    return fd


def skipped_runs(Descriptor program not None):
    """How often the kernel skipped a run of it. OSError, DescriptorLostError."""
    cdef int64_t count = umn_skipped_runs(program.fd())
    if count < 0:
        raise OSError(-count, os.strerror(-count))
    return count


@cython.final
@cython.no_gc
cdef class Values:
    """An array's values, each written such that a program sees each field of up to 8 bytes before or after."""

    cdef Descriptor map
    cdef char *memory
    cdef size_t size, length
    cdef uint32_t made_in

    def __cinit__(self, Descriptor map not None, size_t size, int count):
        """`size`: of a value, a multiple of 8. OSError, DescriptorLostError."""
        self.map, self.size, self.length, self.made_in = map, size, size * count, umn_process_current()
        self.memory = <char *>umn_bpf_share(map.fd(), self.length)
        if self.memory is NULL:
            raise OSError(errno, os.strerror(errno))

    def __dealloc__(self):
        self.unmap()

    cdef void unmap(self) noexcept:
        # A child of a fork has none of it, and may have something else there.
        if self.memory is not NULL and umn_process_is(self.made_in):
            munmap(self.memory, self.length)
        self.memory = NULL

    cdef char *at(self, uint32_t index) except NULL:
        self.map.fd()  # not in a child, and not after it was closed
        if self.memory is NULL:
            raise OSError(EBADF, os.strerror(EBADF))
        return self.memory + index * self.size

    cdef int get(self, uint32_t index, void *value) except -1:
        umn_bpf_read_words(value, self.at(index), self.size)
        return 0

    cdef int put(self, uint32_t index, const void *value) except -1:
        umn_bpf_write_words(self.at(index), value, self.size)
        return 0


# ---- What one loaded program feeds ----


class Bounds(NamedTuple):
    """What a change may take in tables of several users: see pays() and send_wakeup() in watch.bpf.c."""

    steps_own: int
    steps_foreign: int
    waiters_own: int
    waiters_foreign: int
    waiters_relay: int


@cython.final
cdef class Tables:
    """The tables that one loaded program feeds.

    A table is taken (a number), gets segments and a wake-up, and is expected: the address space that shows the secret becomes its
    own. Then it is bound: fed from now on. At the end it is unlinked, its memory is taken out, and the number is given back.

    `bounds`: what a change may take, if the tables are of several users: Bounds. None: all tables are this process's own, and each may
    take what it needs.

    OSError and DescriptorLostError leave everything as it was, if nothing else is said.
    """

    cdef Descriptor segments, rings, owners, handshakes
    cdef Values tables, control
    cdef Descriptor blank  # a segment that takes the place of those that are taken out
    cdef list unused  # numbers
    cdef dict fed  # table: its address space
    cdef readonly int capacity, used
    cdef int open_handshakes
    cdef object bounds

    def __cinit__(self, dict maps not None, int capacity, bounds=None):
        """`maps`: the program's, by their names."""
        self.segments, self.rings = maps["segments"], maps["rings"]
        self.owners, self.handshakes = maps["owners"], maps["handshakes"]
        self.tables = Values(maps["tables"], sizeof(umn_fed_table), capacity)
        self.control = Values(maps["control"], sizeof(umn_control), 1)
        self.capacity = capacity
        self.unused = list(range(capacity - 1, -1, -1))
        self.fed = {}
        self.bounds = bounds

    def close(self):
        """Give back the memory that is shared with the program: nothing works any more. May be called more than once."""
        self.tables.unmap()
        self.control.unmap()

    @property
    def free(self):
        """How many can be taken."""
        return len(self.unused)

    cdef int get_table(self, uint32_t table, umn_fed_table *value) except -1:
        return self.tables.get(table, value)

    cdef int put_table(self, uint32_t table, umn_fed_table *value) except -1:
        return self.tables.put(table, value)

    cdef uint32_t first_of(self, uint64_t space) except? 0:
        """The address space's first table, plus 1."""
        cdef uint32_t table = 0
        cdef int error = umn_bpf_lookup(self.owners.fd(), &space, &table)
        if error != -ENOENT:
            check(error, "look up an address space")
        return table

    cdef int put_control(self) except -1:
        cdef umn_control value
        memset(&value, 0, sizeof(value))
        value.tables = self.used
        value.handshakes = self.open_handshakes
        value.page_shift = mmap.PAGESIZE.bit_length() - 1
        if len(self.fed) == 1:
            for table, space in self.fed.items():
                value.sole_table, value.space = table + 1, space
        if self.bounds is None:
            value.steps_own = value.steps_foreign = value.steps_share = UMN_STEPS_MAX
            value.waiters_own = value.waiters_foreign = value.waiters_relay = UINT32_MAX
        else:
            value.steps_own, value.steps_foreign = self.bounds.steps_own, self.bounds.steps_foreign
            # Each table has its share, so that none can use up the others'. One that takes more gives up by itself.
            value.steps_share = max(STEPS_LEAST, value.steps_foreign // max(1, len(self.fed)))
            value.waiters_own, value.waiters_foreign = self.bounds.waiters_own, self.bounds.waiters_foreign
            value.waiters_relay = self.bounds.waiters_relay
        return self.control.put(0, &value)

    def take(self):
        """A number for a new table. IndexError if there is none."""
        return self.take_table()

    cdef int take_table(self) except -1:
        cdef int table = self.unused.pop()
        cdef int used = self.used
        cdef umn_fed_table none
        memset(&none, 0, sizeof(none))
        try:
            self.put_table(table, &none)
            if table >= used:
                self.used = table + 1
                self.put_control()
        except:
            self.used = used
            self.unused.append(table)
            raise
        return table

    def give_back(self, int table):
        """The number, of a table whose memory is taken out."""
        self.unused.append(table)

    def allow(self, int table, int count):
        """Let a walk of the table take the steps that `count` more segments need; before they are put in."""
        self.allow_steps(table, count)

    cdef int allow_steps(self, int table, int count) except -1:
        cdef umn_fed_table value
        self.get_table(table, &value)
        value.cells += count * UMN_CELLS_PER_SEGMENT
        return self.put_table(table, &value)

    def put_segments(self, list items not None):
        """Of several tables: (table, number, a map's descriptor), all at the price of one.

        Waits until no program can be using what was there before. After an OSError some may be put in; all may be put in again.
        """
        put_maps(self.segments, [(table * UMN_SEGMENTS + number, fd) for table, number, fd in items])

    def put_rings(self, list items not None):
        """The same for (table, a map's descriptor)."""
        put_maps(self.rings, items)

    def expect(self, int table):
        """Open a handshake: the address space that shows the secret returned here becomes the table's."""
        return self.open_handshake(table)

    cdef object open_handshake(self, uint32_t table):
        cdef umn_fed_table value
        cdef uint64_t secret
        if getrandom(&secret, sizeof(secret), 0) != sizeof(secret):
            raise OSError(errno, os.strerror(errno))
        self.get_table(table, &value)
        value.secret, value.shown = secret, 0
        self.put_table(table, &value)
        check(umn_bpf_update(self.handshakes.fd(), &secret, &table), "open a handshake")
        self.open_handshakes += 1
        try:
            self.put_control()
        except:
            self.open_handshakes -= 1
            umn_bpf_delete(self.handshakes.fd(), &secret)
            raise
        return secret

    def cancel(self, uint64_t secret):
        """Close the handshake, whatever came of it."""
        self.close_handshake(secret)

    cdef int close_handshake(self, uint64_t secret) except -1:
        check(umn_bpf_delete(self.handshakes.fd(), &secret), "close a handshake")
        self.open_handshakes -= 1
        return self.put_control()

    def bind(self, int table, uint64_t secret):
        """Close the handshake and feed the table from now on. False if the secret was not shown: the handshake stays open.

        Raises OSError E2BIG if the address space has as many tables as a change looks at.
        """
        return self.bind_table(table, secret)

    cdef bint bind_table(self, uint32_t table, uint64_t secret) except -1:
        cdef umn_fed_table value
        cdef uint32_t number = table + 1
        self.get_table(table, &value)
        if not value.shown:
            return False
        self.close_handshake(secret)
        value.space = value.shown  # not before: what is not bound has no share of a change
        if list(self.fed.values()).count(value.space) >= <int>UMN_TABLES_PER_MM_MAX:
            raise OSError(E2BIG, "the process has too many tables")
        value.next = self.first_of(value.space)
        # In this order: a program that finds the table finds those behind it too.
        self.put_table(table, &value)
        check(umn_bpf_update(self.owners.fd(), &value.space, &number), "change an address space's tables")
        self.fed[table] = value.space
        self.put_control()
        return True

    def unlink(self, int table):
        """Stop feeding the table. Programs may be on their way through it until its memory is taken out.

        After an error this may be tried again.
        """
        self.unlink_table(table)

    cdef int unlink_table(self, uint32_t table) except -1:
        cdef umn_fed_table value, before
        cdef uint32_t first, previous
        self.get_table(table, &value)
        if value.space:
            first = self.first_of(value.space)
            if first == table + 1:
                if value.next:
                    check(umn_bpf_update(self.owners.fd(), &value.space, &value.next), "change an address space's tables")
                else:
                    check(umn_bpf_delete(self.owners.fd(), &value.space), "forget an address space")
            else:
                while first:
                    previous = first - 1
                    self.get_table(previous, &before)
                    first = before.next
                    if first == table + 1:
                        before.next = value.next
                        self.put_table(previous, &before)
                        break
        self.fed.pop(table, None)
        self.put_control()
        # Not `next`: a program may be on its way through it to another table of this address space.
        value.space, value.cells = 0, 0
        return self.put_table(table, &value)

    def drop(self, int table, int segments):
        """Stop feeding the table, forget its memory and its wake-up, and give its number back. Waits as put_segments does."""
        self.drop_table(table, segments)

    cdef int drop_table(self, uint32_t table, int segments) except -1:
        cdef int fd, error
        self.unlink_table(table)
        # One wait for all: they are replaced together, as they cannot be deleted together.
        if segments > 1:
            if self.blank is None:
                fd = umn_bpf_create_map(BPF_MAP_TYPE_ARRAY, b"umn_segment", 4, UMN_PAGE, UMN_SEGMENT_PAGES, BPF_F_MMAPABLE)
                if fd >= 0:
                    self.blank = Descriptor("a segment", MAP, fd)
            if self.blank is not None:
                try:
                    fd = self.blank.fd()
                    put_maps(self.segments, [(table * UMN_SEGMENTS + number, fd) for number in range(segments)])
                    segments = 0
                except (DescriptorLostError, OSError):
                    self.blank = None  # one by one, then
        for number in range(segments):
            forget(self.segments, table * UMN_SEGMENTS + number)
        forget(self.rings, table)
        self.unused.append(table)
        return 0


cdef int put_maps(Descriptor outer, list items) except -1:
    """(number, a map's descriptor) into a map of maps."""
    cdef uint32_t count = len(items)
    cdef uint32_t *keys
    cdef int fd = outer.fd(), error
    if not count:
        return 0
    keys = <uint32_t *>PyMem_Malloc(2 * count * sizeof(uint32_t))
    if keys is NULL:
        raise MemoryError
    try:
        for i, (number, inner) in enumerate(items):
            keys[i] = number
            keys[count + i] = inner
        with nogil:
            error = umn_bpf_put_maps(fd, keys, keys + count, count)
    finally:
        PyMem_Free(keys)
    check(error, f"put maps into {outer.name}")
    return 0


cdef int forget(Descriptor outer, uint32_t number) except -1:
    cdef int fd = outer.fd(), error
    with nogil:
        error = umn_bpf_delete(fd, &number)
    if error != -ENOENT:
        check(error, f"take a map out of {outer.name}")
    return 0


def next_segments(int segments, int most):
    """How many more a table of this size gets at once: each time waits for running programs, so the steps grow with the table."""
    return min(max(1, segments // 8), most, <int>UMN_SEGMENTS - segments)


# ---- One table's connection to its owner ----


@cython.final
cdef class Connection:
    """A notifier's partner in this process, for one table: what the daemon is to its clients, in the same messages.

    `program` is the loaded and attached program, kept as long as this is. One thread at a time; not in the child of a fork.
    """

    cdef object program
    cdef Tables tables
    cdef Descriptor code, probe_gaps
    cdef list links
    cdef int probe
    cdef uint32_t made_in
    cdef int table, segments  # -1: none
    cdef bint expected, bound
    cdef uint64_t secret
    cdef int64_t skipped

    def __cinit__(self, program not None):
        self.table = -1
        self.made_in = umn_process_current()
        self.program = program
        self.tables, self.code, self.probe_gaps, self.links = program.tables, program.code, program.probe_gaps, program.links
        self.probe = program.probe
        try:
            self.skipped = skipped_runs(self.code)
        except OSError as error:
            raise UnavailableError(f"the runs that the kernel skips cannot be counted ({error})", "") from error

    def exchange(self, bytes request not None):
        """Answer a struct umn_request: a struct umn_reply, and descriptors that the caller closes.

        It either is done or has changed nothing. To be called from native code: an exception that a signal handler raises in
        Python code before it has noted the descriptors down would lose them.

        Raises UnavailableError: this connection cannot be used any more.
        """
        cdef umn_request asked
        cdef umn_reply reply
        cdef list fds = []
        cdef int fd
        if len(request) != sizeof(asked):
            raise ValueError(f"a request has {sizeof(asked)} bytes, not {len(request)}")
        memcpy(&asked, <const char *>request, sizeof(asked))
        memset(&reply, 0, sizeof(reply))
        self.check_process()
        reply.probe = self.probe
        try:
            if asked.version != UMN_PROTOCOL_VERSION:
                reply.status, reply.value = UMN_STATUS_VERSION, UMN_PROTOCOL_VERSION
            elif asked.op == UMN_OP_HELLO and self.table < 0:
                self.hello(&reply, fds)
            elif asked.op == UMN_OP_SETTLE and self.expected:
                self.settle(&reply)
            elif asked.op == UMN_OP_GROW and self.bound:
                self.grow(&reply, fds)
            else:
                reply.status, reply.value = UMN_STATUS_FAILED, EINVAL
            reply.fds = len(fds)
            return (<const char *>&reply)[:sizeof(reply)], fds
        except OSError as error:
            for fd in fds:
                c_close(fd)
            memset(&reply, 0, sizeof(reply))
            reply.status, reply.value = UMN_STATUS_FAILED, error.errno or EINVAL
            return (<const char *>&reply)[:sizeof(reply)], []
        except:
            for fd in fds:
                c_close(fd)
            raise

    cdef int check_process(self) except -1:
        if not umn_process_is(self.made_in):
            raise DescriptorLostError("it was opened before a fork, by the parent process", "open another one in the child")
        if self.program is None:
            raise UnavailableError("this connection is closed", "")
        return 0

    cdef int hello(self, umn_reply *reply, list fds) except -1:
        cdef int table
        cdef Descriptor each
        if not self.tables.unused:
            reply.status, reply.value = UMN_STATUS_PROCESS_CLIENTS, self.tables.capacity
            return 0
        table = self.tables.take_table()
        try:
            fds.append(create_ring())
            fds.append(create_segment())
            if self.probe_gaps is not None:
                reply.gives = UMN_GIVES_PROBE_GAPS
                fds.append(duplicate(self.probe_gaps))
            for each in self.links:
                fds.append(duplicate(each))
            self.tables.allow_steps(table, 1)
            put_maps(self.tables.segments, [(table * UMN_SEGMENTS, fds[1])])
            put_maps(self.tables.rings, [(table, fds[0])])
            self.secret = self.tables.open_handshake(table)
        except:
            # Nothing feeds it yet. What cannot be taken out costs its number.
            try:
                self.tables.drop_table(table, 1)
            except (DescriptorLostError, OSError):
                pass
            raise
        self.table, self.segments, self.expected = table, 1, True
        reply.status, reply.value = UMN_STATUS_OK, self.secret
        return 0

    cdef int settle(self, umn_reply *reply) except -1:
        # Unless it is still to be shown, the secret is used up, whatever becomes of it.
        self.expected = False
        try:
            self.bound = self.tables.bind_table(self.table, self.secret)
            self.expected = not self.bound
        except OSError as error:
            if error.errno != E2BIG:
                raise
            reply.status, reply.value = UMN_STATUS_PROCESS_CLIENTS, UMN_TABLES_PER_MM_MAX
            return 0
        reply.status = UMN_STATUS_OK if self.bound else UMN_STATUS_UNSEEN
        return 0

    cdef int grow(self, umn_reply *reply, list fds) except -1:
        cdef int count = next_segments(self.segments, UMN_FDS_MAX), i
        if not count:
            reply.status, reply.value = UMN_STATUS_FAILED, ENOSPC
            return 0
        for i in range(count):
            fds.append(create_segment())
        self.tables.allow_steps(self.table, count)
        put_maps(
            self.tables.segments,
            [(self.table * UMN_SEGMENTS + self.segments + i, fd) for i, fd in enumerate(fds)],
        )
        self.segments += count
        reply.status = UMN_STATUS_OK
        return 0

    def may_have_missed(self):
        """Has the kernel skipped runs of the program since this was last asked? OSError, UnavailableError: it cannot be known."""
        cdef int64_t before = self.skipped
        self.check_process()
        if self.probe_gaps is not None:
            return False  # the map says so, earlier
        self.skipped = skipped_runs(self.code)
        return self.skipped != before

    def disconnect(self):
        """The end of the connection: the table is fed no more. May be called more than once; waits for running programs.

        In the child of a fork it only lets go. Nothing is raised: what the kernel does not take back, because the program has
        closed our descriptors, it takes back when the program is unloaded.
        """
        cdef int table = self.table, segments = self.segments
        cdef Tables tables = self.tables
        cdef object program = self.program
        cdef bint expected = self.expected
        if program is None:
            return
        # First of all: no second call, from another thread while this one waits, does the same.
        self.table, self.expected, self.bound = -1, False, False
        self.program = self.tables = self.code = self.probe_gaps = self.links = None
        if table < 0 or not umn_process_is(self.made_in):
            return
        try:
            if expected:
                tables.close_handshake(self.secret)
            tables.drop_table(table, segments)
        except (DescriptorLostError, OSError):
            pass

    def __del__(self):
        self.disconnect()
