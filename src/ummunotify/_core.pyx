# cython: language_level=3, boundscheck=False, wraparound=False, binding=False, autotestdict=False
"""The native part: a watch table and its regions. See core/table.h for what it rests on."""

cimport cython
from cpython.buffer cimport (
    PyBUF_ANY_CONTIGUOUS,
    PyBuffer_Release,
    PyObject_GetBuffer,
    Py_buffer,
)
from cpython.object cimport PyObject, PyObject_GenericGetAttr
from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.errno cimport EBADF, EDQUOT, ENOSPC, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memset

import os
import sys

from .errors import (
    ClosedError,
    CookieInUseError,
    ForkedError,
    InvalidBufferError,
    InvalidCookieError,
    InvalidRangeError,
    TooManyRegionsError,
    UnknownRegionError,
)
from .types import Invalidation

cdef extern from "Python.h":
    # Not int(): an address is not 1.5.
    object operator_index "PyNumber_Index"(object o)

cdef extern from "sys/mman.h" nogil:
    void *mmap(void *addr, size_t length, int prot, int flags, int fd, long offset)
    int munmap(void *addr, size_t length)
    void *MAP_FAILED
    int PROT_READ, PROT_WRITE, MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS

cdef extern from "sources/platform.h" nogil:
    uint64_t umn_user_limit()
    int umn_show_secret(uint64_t secret)
    void *umn_test_page()
    int64_t umn_skipped_runs(int program_fd)
    struct umn_ring:
        pass
    int umn_ring_map(umn_ring *ring, int fd)
    void umn_ring_clear(umn_ring *ring)
    void umn_ring_unmap(umn_ring *ring)

cdef extern from "sources/probe_gap.h" nogil:
    struct umn_doubt:
        pass
    int umn_doubt_open(umn_doubt *doubt, int fd)
    int umn_doubt_show_secret(umn_doubt *doubt, uint64_t secret)
    void umn_doubt_abandon(umn_doubt *doubt)
    void umn_doubt_close(umn_doubt *doubt)

cdef enum:
    PAGE = 4096
    ROOM = 128
    FIRST_OWN_COOKIE_BIT = 63
    DL_CPU = 1
    DL_CUDA_HOST = 3

cdef str CHANGED = sys.intern("changed")
cdef str VALID = sys.intern("valid")
cdef uint64_t user_limit = umn_user_limit()


cdef struct dl_tensor:
    void *data
    int32_t device_type, device_id
    int32_t ndim
    uint8_t code, bits
    uint16_t lanes
    int64_t *shape
    int64_t *strides  # in elements; may be NULL
    uint64_t byte_offset


cdef uint64_t compact_length(shape, strides, uint64_t item) except? 0:
    """In bytes; all of them next to each other, in whatever order. `strides` are in bytes; None: in C's order."""
    cdef uint64_t length = item
    for stride, n in sorted(zip(strides or shape, shape)):
        if strides is not None and n > 1 and stride != length:
            raise InvalidBufferError("its elements do not lie next to each other")
        length *= n
    return length


cdef bint array_range(object what, uint64_t *address, uint64_t *length) except -1:
    """The same for what is not a buffer but has __array_interface__ or is a DLPack tensor. False: it is neither."""
    cdef dl_tensor *tensor
    cdef uint64_t item

    interface = getattr(what, "__array_interface__", None)
    if interface is not None:
        data, kind = interface.get("data"), interface["typestr"]
        if type(data) is not tuple:
            raise InvalidBufferError("its __array_interface__ does not say where its data is")
        item = int(kind[2:].partition("[")[0])
        if kind[1] == "U":
            item *= 4
        address[0] = data[0]
        length[0] = compact_length(interface["shape"], interface.get("strides"), item)
        return True
    if hasattr(what, "__dlpack_device__"):
        device = what.__dlpack_device__()[0]
        if device not in (DL_CPU, DL_CUDA_HOST):
            raise InvalidBufferError(f"it is not in this process's memory but on a device (of DLPack's type {device:d})")
        capsule = what.__dlpack__()
        tensor = <dl_tensor *>PyCapsule_GetPointer(capsule, "dltensor")
        item = tensor.bits * tensor.lanes // 8
        shape = [tensor.shape[i] for i in range(tensor.ndim)]
        strides = [tensor.strides[i] * item for i in range(tensor.ndim)] if tensor.strides is not NULL else None
        address[0] = <uintptr_t>tensor.data + tensor.byte_offset
        length[0] = compact_length(shape, strides, item)
        return True
    return False


cdef int range_of(object what, uint64_t *start, uint64_t *end) except -1:
    """The bytes that a buffer, an array, or a pair (address, length) occupies now."""
    cdef Py_buffer view
    cdef uint64_t address, length

    if type(what) is tuple:
        if len(<tuple>what) != 2:
            raise TypeError(f"expected a buffer or a pair (address, length), not {what!r}")
        try:
            address = operator_index((<tuple>what)[0])
            length = operator_index((<tuple>what)[1])
        except OverflowError:
            raise InvalidRangeError(
                operator_index(what[0]), operator_index(what[1]), "not an address and a length in 64 bits"
            ) from None
    else:
        try:
            try:
                PyObject_GetBuffer(what, &view, PyBUF_ANY_CONTIGUOUS)
                address = <uintptr_t>view.buf
                length = view.len
                # Released at once: watching neither keeps the memory alive nor hinders its owner from freeing it.
                PyBuffer_Release(&view)
            except (BufferError, TypeError, ValueError):
                # Not a buffer, or of a kind of elements that buffers cannot have.
                if not array_range(what, &address, &length):
                    raise
        except TypeError:
            raise TypeError(f"expected a buffer or a pair (address, length), not {type(what).__name__}") from None
        except Exception as error:
            raise InvalidBufferError(f"cannot watch this {type(what).__name__}: {error}") from error
    if not length:
        raise InvalidRangeError(address, length, "it is empty")
    if address + length < address:
        raise InvalidRangeError(address, length, "it wraps round the end of the address space")
    if address + length > user_limit or not address:
        raise InvalidRangeError(address, length, "it is not in user space")
    start[0] = address
    end[0] = address + length
    return 0


# Never cleared by the garbage collector: what `_region` points to lives as long as the table does.
@cython.final
@cython.no_gc_clear
@cython.freelist(256)
cdef class Region:
    """A watched range of addresses. Made by `Notifier.watch`.

    `valid` may be asked from any thread at any time, also after `close`, after the notifier was closed and in the
    child of a fork; it then is False.
    """

    # With an argument, so that no caller of Region.__new__ gets one without.
    def __cinit__(self, WatchTable table not None):
        self._table = table
        self._region = &umn_no_region
        self.cookie = 0

    def __init__(self, *args, **kwargs):
        raise TypeError("regions are made by Notifier.watch")

    def __getattribute__(self, name):
        # What users ask for all the time is answered before the type is searched for it: a third faster.
        if name is VALID:
            return umn_region_untouched(self._region) and (self._region.source is NULL or self._settled())
        return PyObject_GenericGetAttr(self, name)

    @property
    def valid(self):
        """Nothing has changed the mapping since the region was watched or last renewed.

        No lock, and no system call, but one with the source `uffd`, and rarely a wait of up to 10 ms. True and False
        are both exact at the moment of the call, but for a region that may be invalidated without need. False once
        it is no longer watched.
        """
        return umn_region_untouched(self._region) and (self._region.source is NULL or self._settled())

    cdef bint _settled(self) except -1:
        """umn_source.confirm, but that other threads can run while this one waits."""
        cdef umn_region *region = self._region
        cdef bint valid
        if region.source.delivered(region.source):
            return umn_region_untouched(region)
        with nogil:
            valid = umn_region_valid(region)
        # It may have been unwatched meanwhile, and its place given to another.
        return valid and self._region is region

    @property
    def address(self):
        """Of the first byte."""
        return self._start

    @property
    def length(self):
        """In bytes."""
        return self._end - self._start

    def renew(self):
        """Make the region valid again, until the next change after this call.

        Pin the memory anew *after* this. An invalidation that was not read yet is still reported.
        Raises UnknownRegionError if the region is no longer watched, ClosedError if the notifier is closed. With the
        source `uffd` also what `watch` raises, if memory is there now that cannot be watched; it then stays invalid.
        """
        cdef int error
        self._table._check_open()
        if self._region is &umn_no_region:
            raise UnknownRegionError(f"{self!r} is no longer watched")
        error = umn_table_renew(self._table._table, self._region)
        if error:
            raise self._table._refusal(error, self._start, self._end)

    def close(self):
        """Stop watching. Nothing is reported for the region afterwards. May be called more than once."""
        if self._region is not &umn_no_region and not self._table._closed:
            self._table._unwatch(self)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def __repr__(self):
        state = "valid" if self.valid else "unwatched" if self._region is &umn_no_region else "invalid"
        return f"<Region {self._start:#x}-{self._end:#x} cookie={self.cookie:#x} {state}>"


cdef class WatchTable:
    """The owner's side of one watch table. `Notifier` adds what feeds it."""

    def __cinit__(self, *args, max_regions=None, **kwargs):
        cdef uint64_t limit = <uint64_t>-1
        if max_regions is not None:
            max_regions = operator_index(max_regions)
            if max_regions < 1:
                raise ValueError(f"max_regions must be at least 1, not {max_regions}")
            limit = min(max_regions, limit - 1)
        self._max_regions = limit
        self._regions = {}
        self._next_cookie = <uint64_t>1 << FIRST_OWN_COOKIE_BIT
        self._closed = True  # until there is a segment
        self._table = umn_table_new(limit + (limit < <uint64_t>-1))  # one more for _nudge
        if self._table is NULL:
            raise MemoryError

    def __dealloc__(self):
        if self._table is not NULL:
            umn_table_delete(self._table)

    def __getattribute__(self, name):
        if name is CHANGED and not umn_table_changed(self._table):
            return False
        return PyObject_GenericGetAttr(self, name)

    cdef int _check_open(self) except -1:
        if self._closed:
            if self._forked:
                raise ForkedError()
            raise ClosedError("this notifier is closed")
        return 0

    # ---- for the subclass ----

    def _next_pages(self):
        return umn_table_next_pages(self._table)

    def _add_segment(self, uintptr_t address, uint32_t pages):
        """Take over the mapping at `address`, which feeders know already."""
        cdef int error = umn_table_add_segment(self._table, <void *>address, pages)
        if error:
            raise OSError(-error, os.strerror(-error))
        if self._header is NULL:
            self._header = umn_table_header(self._table)
            self._closed = False

    def _grow(self):
        """Add a segment. Overridden."""
        raise TooManyRegionsError("the table is full")

    def _set_source(self, uintptr_t address):
        """Where the struct umn_source is that this table needs; before anything is watched."""
        self._source = <umn_source *>address
        umn_table_set_source(self._table, self._source)

    def _refusal(self, number, start, end):
        """The exception for what the source refuses to watch. Overridden."""
        return OSError(number, os.strerror(number))

    def _arm(self):
        """The next change that hits a region sends a wake-up. To be called before `_drain`."""
        umn_table_arm(self._table)

    def _nudge(self):
        """Make a change that sends a wake-up, and that nobody is told of."""
        cdef umn_region *region
        cdef void *page
        cdef int error = -ENOSPC
        while error == -ENOSPC:
            page = umn_test_page()
            if page is NULL:
                raise OSError(errno, os.strerror(errno))
            # In one go, with the GIL: so no other thread can drain it.
            error = umn_table_watch(self._table, <uintptr_t>page, <uintptr_t>page + PAGE, 0, NULL, &region)
            munmap(page, PAGE)
            if not error:
                umn_region_valid(region)  # waits for the news, if it comes late
                umn_table_unwatch(self._table, region)
            elif error == -ENOSPC:
                self._grow()
            else:
                self._check_open()
                raise OSError(abs(error), os.strerror(abs(error)))

    def _doubt(self):
        """Something may have been missed: invalidate every region."""
        umn_table_doubt(self._table)

    def _drain(self):
        """Every event there is; the regions in the order in which they were first hit."""
        cdef umn_event events[ROOM]
        cdef PyObject *regions[ROOM]
        cdef size_t n = ROOM, i
        cdef list result = []

        self._check_open()
        while n == ROOM:
            n = umn_table_drain(self._table, events, ROOM)
            # Making objects below may run the garbage collector, and that may unwatch what was just drained.
            for i in range(n):
                regions[i] = <PyObject *>events[i].region.user
                Py_INCREF(<object>regions[i])
            for i in range(n):
                region = <Region>regions[i]
                Py_DECREF(region)
                result.append(
                    Invalidation(
                        region,
                        (<Region>region).cookie,
                        events[i].start,
                        events[i].end,
                        events[i].exact,
                        events[i].thread,
                        events[i].syscall,
                    )
                )
        return result

    def _close_table(self):
        """Let go of the shared memory; regions stay readable and are not valid."""
        self._closed = True
        if self._source is NULL:
            umn_table_close(self._table)
        else:
            with nogil:
                umn_table_close(self._table)
        self._regions = {}

    def _abandon_table(self):
        """The same, in the child of a fork."""
        if not self._closed:
            self._closed = self._forked = True
            umn_table_abandon(self._table)

    def _check_table(self):
        """For tests: what is wrong with the index, or None."""
        cdef const char *wrong
        self._check_open()
        wrong = umn_table_check(self._table)
        return None if wrong is NULL else wrong.decode()

    cdef int _unwatch(self, Region region) except -1:
        cdef umn_region *watched = region._region
        region._region = &umn_no_region
        del self._regions[region.cookie]
        if self._source is NULL:
            umn_table_unwatch(self._table, watched)
        else:
            with nogil:
                umn_table_unwatch(self._table, watched)
        return 0

    # ---- for the user ----

    @property
    def closed(self):
        """Closed, or inherited through a fork."""
        return self._closed

    @property
    def generation(self):
        """The number of changes so far that hit at least one region. To be compared for inequality only.

        Read from mapped memory: no system call, but one with the source `uffd`.
        """
        self._check_open()
        return umn_table_generation(self._table)

    @property
    def changed(self):
        """Has anything been invalidated since `read` last returned everything there was?

        Two loads from memory: no lock, and no system call, but one with the source `uffd`. Never False when
        something was; it may be True with nothing to read.
        """
        if umn_table_changed(self._table):
            self._check_open()
            return True
        return False

    def watch(self, what, *, cookie=None):
        """Watch the memory that a buffer occupies now, or a pair (address, length).

        The range is any number of bytes at least 1, anywhere in user space, mapped or not; ranges may overlap,
        nest and repeat. What is watched are the addresses: the buffer is neither kept alive nor exported.
        `cookie` is a number from 0 to 2**64 - 1 that no other watched region has; left out, one with the top bit
        set is chosen.

        The region stays watched until it is closed, also if the returned object is dropped.
        Raises InvalidRangeError, InvalidBufferError, InvalidCookieError, CookieInUseError, TooManyRegionsError,
        ClosedError; and with the source `uffd`, which can watch mapped private anonymous memory only,
        UnsupportedMemoryError. From any thread.
        """
        cdef uint64_t start, end, number
        cdef Region region
        cdef int error

        self._check_open()
        range_of(what, &start, &end)
        if cookie is None:
            while True:
                number = self._next_cookie
                self._next_cookie = (number + 1) | (<uint64_t>1 << FIRST_OWN_COOKIE_BIT)
                cookie = number
                if cookie not in self._regions:
                    break
        else:
            try:
                number = operator_index(cookie)
            except (OverflowError, TypeError):
                raise InvalidCookieError(cookie) from None
            cookie = number
            if cookie in self._regions:
                raise CookieInUseError(number)
        if <uint64_t>len(self._regions) >= self._max_regions:
            raise TooManyRegionsError(f"{len(self._regions)} regions are watched, and max_regions allows for no more")
        region = Region.__new__(Region, self)
        region.cookie = cookie
        region._start = start
        region._end = end
        # Known before it is watched: no failure in between can leave the table with a region that nobody has.
        self._regions[cookie] = region
        try:
            while True:
                if self._source is NULL:
                    error = umn_table_watch(self._table, start, end, number, <void *>region, &region._region)
                else:
                    with nogil:
                        error = umn_table_watch(self._table, start, end, number, <void *>region, &region._region)
                if not error:
                    return region
                if error > 0:
                    raise self._refusal(error, start, end)
                if error == -ENOSPC:
                    self._grow()
                elif error == -EDQUOT:
                    raise TooManyRegionsError(f"the index of {len(self._regions) - 1} regions is as deep as it can be")
                elif error == -EBADF:
                    self._check_open()
                else:
                    raise MemoryError
        except BaseException:
            self._regions.pop(cookie, None)
            raise

    def unwatch(self, Region region not None):
        """Stop watching. Nothing is reported for the region once this has returned.

        Raises UnknownRegionError if it is not watched through this notifier, ClosedError.
        """
        self._check_open()
        if region._table is not self or region._region is &umn_no_region:
            raise UnknownRegionError(f"{region!r} is not watched through this notifier")
        self._unwatch(region)

    @property
    def regions(self):
        """The watched regions, a new list."""
        self._check_open()
        return list(self._regions.values())

    @property
    def stats(self):
        """Numbers about the table: regions, bytes and free_bytes of shared memory, segments, levels of the index,
        overflows (how often everything had to be invalidated)."""
        cdef umn_table_stats stats
        self._check_open()
        umn_table_get_stats(self._table, &stats)
        return stats


# ---- for the sources ----


def map_shared(int fd, size_t length):
    """Map a BPF map's memory. The address; OSError."""
    cdef void *p = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
    if p is MAP_FAILED:
        raise OSError(errno, os.strerror(errno))
    return <uintptr_t>p


def unmap(uintptr_t address, size_t length):
    """Undo a mapping that no table has taken over."""
    munmap(<void *>address, length)


def show_secret(uint64_t secret):
    """Change a page of our own, showing `secret` to the feeder in the kernel. OSError."""
    cdef int error = umn_show_secret(secret)
    if error:
        raise OSError(-error, os.strerror(-error))


def skipped_runs(int program_fd):
    """How often the kernel skipped a run of this BPF program. OSError."""
    cdef int64_t count = umn_skipped_runs(program_fd)
    if count < 0:
        raise OSError(-count, os.strerror(-count))
    return count


def test_page():
    """The address of a new page with something in it."""
    cdef void *p = umn_test_page()
    if p is NULL:
        raise OSError(errno, os.strerror(errno))
    return <uintptr_t>p


@cython.final
cdef class Ring:
    """A BPF ring buffer's positions, mapped: poll the fd, then `clear`."""

    cdef umn_ring _ring

    def __cinit__(self, int fd):
        memset(&self._ring, 0, sizeof(umn_ring))
        cdef int error = umn_ring_map(&self._ring, fd)
        if error:
            raise OSError(-error, os.strerror(-error))

    def __dealloc__(self):
        umn_ring_unmap(&self._ring)

    def clear(self):
        """What is in it has been seen."""
        umn_ring_clear(&self._ring)

    def close(self):
        """Unmap it. May be called more than once."""
        umn_ring_unmap(&self._ring)


@cython.final
cdef class Doubt:
    """What a table needs whose probe the kernel may skip at times: see core/doubt.h."""

    cdef umn_doubt _doubt

    def __cinit__(self, int fd):
        memset(&self._doubt, 0, sizeof(umn_doubt))
        cdef int error = umn_doubt_open(&self._doubt, fd)
        if error:
            raise OSError(-error, os.strerror(-error))

    def __dealloc__(self):
        umn_doubt_close(&self._doubt)

    @property
    def address(self):
        """Of the struct umn_source, which is there as long as this object."""
        return <uintptr_t>&self._doubt

    def show_secret(self, uint64_t secret):
        """As the function, but so that the kernel has not skipped the probe; it tries for some seconds. OSError."""
        cdef int error
        with nogil:
            error = umn_doubt_show_secret(&self._doubt, secret)
        if error:
            raise OSError(-error, os.strerror(-error))

    def abandon(self):
        """Let go of the map; from then on there is no doubt. May be called more than once."""
        umn_doubt_abandon(&self._doubt)
