# cython: language_level=3, boundscheck=False, wraparound=False, binding=False, autotestdict=False, embedsignature=True, embedsignature.format=clinic
"""Notifiers and regions: the binding of libummunotify (ummunotify.h).

What changes state is one call of the library. Python runs signal handlers between bytecodes only, never inside these
functions, so an exception that a handler raises leaves nothing half done. The library's locks are never held while
Python code runs, but for what `dispatch` calls back.
"""

cimport cython
from cpython.buffer cimport PyBUF_ANY_CONTIGUOUS, PyBuffer_Release, PyObject_GetBuffer, Py_buffer
from cpython.exc cimport PyErr_CheckSignals
from cpython.object cimport PyObject, PyObject_GenericGetAttr
from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.errno cimport EINTR, EIO
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memset

import contextlib
import os
import select
import sys
import time
from threading import get_ident
from types import BuiltinFunctionType

from .errors import (
    ClosedError,
    CookieInUseError,
    DescriptorClosedError,
    ForkedError,
    InvalidBufferError,
    InvalidCookieError,
    InvalidRangeError,
    SourceUnavailableError,
    TooManyNotifiersError,
    TooManyRegionsError,
    UmmunotifyError,
    UnavailableError,
    UnknownRegionError,
    UnknownSourceError,
    UnsupportedMemoryError,
)
from .types import Invalidation, NotifierStats

cdef extern from "<time.h>" nogil:
    enum:
        CLOCK_MONOTONIC
    struct timespec:
        long tv_sec, tv_nsec
    int clock_gettime(int clock, timespec *now)

cdef extern from "Python.h":
    # Not int(): an address is not 1.5.
    object operator_index "PyNumber_Index"(object o)

cdef extern from "ummunotify_feeder.h" nogil:
    struct umn_request:
        pass
    struct umn_reply:
        pass
    int ummunotify_failed(const char *why, const char *remedy)
    int ummunotify_daemon_socket()
    int ummunotify_open_kvm()
    const char *ummunotify_subscribed_by()

cdef extern from *:
    """
    #include "ummunotify_feeder.h"
    #include "abi/protocol.h"
    """
    size_t REQUEST_SIZE "sizeof(struct umn_request)"
    size_t REPLY_SIZE "sizeof(struct umn_reply)"
    int UMN_FDS_MAX

cdef extern from "ummunotify.h":
    const char *UMMUNOTIFY_SOURCE_ENVIRONMENT

cdef enum:
    ROOM = 128
    FIRST_OWN_COOKIE_BIT = 63
    DL_CPU = 1
    DL_CUDA_HOST = 3

_new_tuple = tuple.__new__

cdef str CHANGED = sys.intern("changed")
cdef str VALID = sys.intern("valid")

cdef str EPOLL = "anon_inode:[eventpoll]"

WAIT_MAX = 86400.0
"""Seconds; the library takes a number of milliseconds in 32 bits."""

version = ummunotify_version().decode()
SOURCE_ENVIRONMENT = UMMUNOTIFY_SOURCE_ENVIRONMENT.decode()


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
            given, size = operator_index(what[0]), operator_index(what[1])
            raise InvalidRangeError(
                f"cannot watch {size} bytes at {given:#x}: not an address and a length in 64 bits", given, size
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
    start[0] = address
    end[0] = address + length
    return 0



# ---- Errors ----

cdef object failure(uint64_t start=0, uint64_t length=0):
    """The exception for what the library has just failed with; its words are the library's."""
    cdef const ummunotify_failure *failed = ummunotify_get_failure()
    cdef ummunotify_code code = failed.code
    message = ummunotify_error().decode(errors="replace")
    why = failed.why.decode(errors="replace")
    mapping = failed.mapping.decode(errors="replace") or None
    remedy = failed.remedy.decode(errors="replace")
    if code == UMMUNOTIFY_RANGE:
        return InvalidRangeError(message, start, length)
    if code == UMMUNOTIFY_UNSUPPORTED:
        return UnsupportedMemoryError(message, start, length, mapping, f"{why}; {remedy}" if remedy else why)
    if code in (UMMUNOTIFY_LIMIT, UMMUNOTIFY_UNAVAILABLE):
        return TooManyRegionsError(message)
    if code == UMMUNOTIFY_NO_MEMORY:
        return MemoryError(message)
    if code == UMMUNOTIFY_CLOSED:
        return ClosedError(message)
    if code == UMMUNOTIFY_FORKED:
        return ForkedError(message)
    if code == UMMUNOTIFY_DESCRIPTOR:
        return DescriptorClosedError(failed.error, message)
    if code == UMMUNOTIFY_UNKNOWN_SOURCE:
        return UnknownSourceError(message)
    return UmmunotifyError(message)


cdef dict raised = {}
"""What Python code that the library has called raised and may not be swallowed (Ctrl-C, ...), by thread."""


cdef int raise_pending() except -1:
    if raised:
        error = raised.pop(get_ident(), None)
        if error is not None:
            raise error
    return 0


# ---- The feeder of the source bpf ----

cdef int note(error, int number) noexcept:
    """It is why this source does not work; the next may. Other than UnavailableError it is a signal handler's, and passed on."""
    try:
        if not isinstance(error, (UnavailableError, OSError)) or getattr(error, "errno", 0) is None:
            raised[get_ident()] = error
        reason = getattr(error, "reason", None)
        if reason is None:
            reason = str(error) if isinstance(error, (OSError, UmmunotifyError)) else f"{type(error).__name__}: {error}"
        ummunotify_failed(str(reason).encode(), str(getattr(error, "remedy", "")).encode())
    except BaseException as second:
        ummunotify_failed(b"an exception could not be reported", b"")
        try:
            raised[get_ident()] = second
        except BaseException:
            pass  # the interpreter is ending, and this module has lost its globals: nobody asks any more
    return -number


cdef void *feeder_connect(void *context, int probe) noexcept with gil:
    try:
        connection = (<object>context).connect(probe)
        Py_INCREF(connection)
        return <void *><PyObject *>connection
    except BaseException as error:
        note(error, 0)
        return NULL


cdef int feeder_exchange(void *connection, const umn_request *request, umn_reply *reply, int *fds) noexcept with gil:
    cdef bytes data
    try:
        data, handed = (<object>connection).exchange((<const char *>request)[:REQUEST_SIZE])
        memcpy(reply, <const char *>data, REPLY_SIZE)
        for i, fd in enumerate(handed):
            fds[i] = fd
        return 0
    except BaseException as error:
        return note(error, 19)  # ENODEV


cdef int feeder_may_have_missed(void *connection) noexcept with gil:
    try:
        return bool((<object>connection).may_have_missed())
    except BaseException as error:
        note(error, 0)
        # A signal handler's exception is passed on, and the next call knows again.
        return 1 if get_ident() in raised else -EIO


cdef void feeder_disconnect(void *connection) noexcept with gil:
    try:
        (<object>connection).disconnect()
    except BaseException as error:
        note(error, 0)
    Py_DECREF(<object>connection)


cdef extern from *:
    """
    static struct ummunotify_feeder umn_make_feeder(void *(*connect)(void *, int), int (*exchange)(void *, const struct umn_request *,
        struct umn_reply *, int *), int (*may_have_missed)(void *), void (*disconnect)(void *), void *context)
    {
        return (struct ummunotify_feeder){connect, exchange, may_have_missed, disconnect, context};
    }
    """
    ummunotify_feeder umn_make_feeder(void *connect, void *exchange, void *may_have_missed, void *disconnect, void *context)


cdef class _Feeder:
    """A Python feeder as the library calls it. It lives as long as the notifiers that it feeds."""

    def __cinit__(self, python):
        self._python = python
        self._feeder = umn_make_feeder(<void *>feeder_connect, <void *>feeder_exchange, <void *>feeder_may_have_missed,
                                       <void *>feeder_disconnect, <void *>python)


# ---- Sources ----


cdef bytes _encoded(source):
    """None is the default. Of an argument that is no text, an error can show this much."""
    if source is None:
        return b""
    if not isinstance(source, str):
        raise TypeError(f"a source is named by a string, not by an object of type {type(source).__name__}")
    return source.encode(errors="backslashreplace")


def source_names(wanted=None):
    """The sources that `wanted` names (None: the environment, or all), best first. UnknownSourceError."""
    cdef const char *names[16]
    cdef bytes encoded = _encoded(wanted)
    cdef int count = ummunotify_sources(encoded, names, 16)
    if count < 0:
        raise failure()
    return [names[i].decode() for i in range(count)]


def open_notifier(type kind, source, max_regions, feeder):
    """A notifier of this class, fed by the first source that `source` names and that works.

    Raises SourceUnavailableError, TooManyNotifiersError, UnknownSourceError, MemoryError, ValueError.
    """
    cdef Notifier notifier
    cdef ummunotify_options options
    cdef _Feeder native = _Feeder(feeder)
    cdef bytes encoded = _encoded(source)
    cdef const ummunotify_tried *tried
    cdef int error

    memset(&options, 0, sizeof(options))
    options.size = sizeof(options)
    options.source = encoded
    options.feeder = &native._feeder
    if max_regions is not None:
        max_regions = operator_index(max_regions)
        if max_regions < 1:
            raise ValueError(f"max_regions must be at least 1, not {max_regions}")
        options.max_regions = min(max_regions, <uint64_t>-1)
    notifier = kind.__new__(kind)
    notifier._feeder = native
    with nogil:
        error = ummunotify_open_with(&notifier._umn, &options)
    raise_pending()
    if not error:
        return notifier
    if ummunotify_get_failure().code not in (UMMUNOTIFY_UNAVAILABLE, UMMUNOTIFY_LIMIT):
        raise failure()
    message = ummunotify_error().decode(errors="replace")
    reasons = {}
    i = 0
    while (tried := ummunotify_get_tried(i)) is not NULL:
        why, remedy = tried.why.decode(errors="replace"), tried.remedy.decode(errors="replace")
        reasons[tried.source.decode()] = f"{why}; {remedy}" if remedy else why
        i += 1
    if ummunotify_get_failure().code == UMMUNOTIFY_LIMIT:
        raise TooManyNotifiersError(message)
    raise SourceUnavailableError(message, reasons)


def connect_to_daemon():
    """A connected descriptor; SourceUnavailableError."""
    cdef int fd
    with nogil:
        fd = ummunotify_daemon_socket()
    if fd < 0:
        message = ummunotify_error().decode(errors="replace")
        raise SourceUnavailableError(message, {"daemon": message})
    return fd


def open_kvm():
    """A descriptor of /dev/kvm; UnavailableError."""
    cdef int fd = ummunotify_open_kvm()
    if fd < 0:
        raise UnavailableError(
            ummunotify_get_failure().why.decode(errors="replace"), ummunotify_get_failure().remedy.decode()
        )
    return fd


def subscribed_by():
    """What has subscribed this process to the kernel's notifications, as far as an open notifier has needed that; or None."""
    cdef const char *by = ummunotify_subscribed_by()
    return None if by is NULL else by.decode()


def why_not():
    """What the last failed open of this thread tried: (source, why, remedy) of each."""
    cdef const ummunotify_tried *tried
    cdef size_t i = 0
    cdef list found = []
    while (tried := ummunotify_get_tried(i)) is not NULL:
        found.append((tried.source.decode(), tried.why.decode(errors="replace"), tried.remedy.decode(errors="replace")))
        i += 1
    return found


# ---- Regions ----


# Never cleared by the garbage collector: what `_region` points to lives as long as the notifier does.
@cython.final
@cython.no_gc_clear
@cython.freelist(256)
cdef class Region:
    """A watched range of addresses. Made by `Notifier.watch`.

    `valid` may be asked from any thread at any time, also after `close`, after the notifier was closed and in the
    child of a fork; it then is False.
    """

    # With an argument, so that no caller of Region.__new__ gets one without.
    def __cinit__(self, Notifier notifier not None):
        self._notifier = notifier
        self.cookie = 0

    def __init__(self, *args, **kwargs):
        raise TypeError("regions are made by Notifier.watch")

    def __reduce__(self):
        raise TypeError("a region cannot be pickled: it belongs to this process")

    def __getattribute__(self, name):
        # What users ask for all the time is answered before the type is searched for it: a third faster.
        if name is VALID:
            return self._region is not NULL and is_valid(self)
        return PyObject_GenericGetAttr(self, name)

    @property
    def valid(self):
        """Nothing has changed the mapping since the region was watched or last renewed.

        No lock, and no system call, but one with the source `uffd`, and rarely a wait of up to 10 ms. True and False
        are both exact at the moment of the call, but for a region that may be invalidated without need. False once
        it is no longer watched.
        """
        return self._region is not NULL and is_valid(self)

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
        cdef ummunotify_region *region = self._region
        cdef ummunotify *umn = self._notifier._umn
        cdef int error
        self._notifier._check()
        if region is NULL:
            raise UnknownRegionError(f"{self!r} is no longer watched")
        with nogil:
            error = ummunotify_renew(umn, region)
        if error:
            raise failure(self._start, self._end - self._start)

    def close(self):
        """Stop watching. Nothing is reported for the region afterwards. May be called more than once."""
        if self._region is not NULL:
            self._notifier._unwatch(self)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def __repr__(self):
        state = "unwatched" if self._region is NULL else "valid" if self.valid else "invalid"
        return f"<Region {self._start:#x}-{self._end:#x} cookie={self.cookie:#x} {state}>"


cdef inline bint is_valid(Region region) except -1:
    cdef ummunotify_region *watched = region._region
    cdef int now = ummunotify_valid_now(watched)
    if now >= 0:
        return now
    # Its source's news may be on their way: other threads can run while this one waits for them.
    cdef bint valid
    with nogil:
        valid = ummunotify_valid(watched)
    # It may have been unwatched meanwhile, and its place given to another.
    return valid and region._region is watched


# ---- Notifiers ----


cdef int call_back(const ummunotify_event *event, void *context) noexcept with gil:
    cdef list state = <list>context
    try:
        region = (<Notifier>state[0])._regions.get(event.cookie)
        if region is not None and is_same(<Region>region, event.region):
            state[1](invalidation(<Region>region, event, (<Notifier>state[0])._now()))
        return 0
    except BaseException as error:
        state[2] = error
        return 1


cdef inline bint is_same(Region region, ummunotify_region *watched):
    # NULL: another thread is just about to learn that it is watched. Another one: it was unwatched since, and the cookie is another's.
    return region._region is NULL or region._region is watched


cdef inline object invalidation(Region region, const ummunotify_event *event, uint64_t now):
    # Not by Invalidation's own __new__, which is Python code: a signal handler could raise in it, and the event would be lost.
    return _new_tuple(
        Invalidation,
        (
            region,
            region.cookie,
            event.start,
            event.end,
            event.exact,
            event.thread,
            event.syscall,
            stack_of(region._notifier._tracer, region, event, now),
        ),
    )


cdef inline object stack_of(object tracer, Region region, const ummunotify_event *event, uint64_t now):
    """The stack of what was reported at `now`; None. The event was taken, so nothing is raised."""
    if tracer is None:
        return None
    try:
        stack = tracer.find(region._since, event.start, event.end, event.thread)
        # Changes that were reported together have one stack, the first one's.
        region._since = stack.nanoseconds if stack is not None and event.exact else now
        return stack
    except MemoryError:
        return None


# Never cleared by the garbage collector: closing it calls its feeder. Cycles through its regions are cleared at the dictionary.
@cython.no_gc_clear
cdef class Notifier:
    """Tells which of the watched ranges of this process's memory were changed. Made by `ummunotify.open`.

    All methods may be called from any number of threads. None holds the GIL while it waits. A signal handler may call
    them too, and may raise out of them: nothing is left half done.

    In the child of a fork, however it was made, it is closed, and its methods raise ForkedError; the parent does not
    notice.
    """

    def __cinit__(self, *args, **kwargs):
        self._regions = {}
        self._waiters = []
        self._next_cookie = <uint64_t>1 << FIRST_OWN_COOKIE_BIT

    def __init__(self, *args, **kwargs):
        raise TypeError("notifiers are made by ummunotify.open")

    def __reduce__(self):
        raise TypeError("a notifier cannot be pickled: it belongs to this process")

    def __dealloc__(self):
        if self._umn is not NULL:
            with nogil:
                ummunotify_close(self._umn)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def __repr__(self):
        if self.closed:
            return "<Notifier closed>"
        return f"<Notifier {self.source} {len(self._regions)} regions>"

    def __getattribute__(self, name):
        if name is CHANGED and self._umn is not NULL and not ummunotify_changed(self._umn):
            return False
        return PyObject_GenericGetAttr(self, name)

    cdef int _check(self) except -1:
        """Raises ClosedError, ForkedError."""
        if self._umn is NULL:
            raise ClosedError("this notifier was never opened: call ummunotify.open")
        if ummunotify_check(self._umn):
            raise failure()
        return 0

    cdef uint64_t _now(self):
        """In nanoseconds; 0 where nobody wants to know."""
        cdef timespec now
        if self._tracer is None:
            return 0
        clock_gettime(CLOCK_MONOTONIC, &now)
        return <uint64_t>now.tv_sec * 1_000_000_000 + now.tv_nsec

    cdef int _unwatch(self, Region region) except -1:
        cdef ummunotify_region *watched = region._region
        # In this order: from here on nothing finds it, and no other thread unwatches it.
        region._region = NULL
        self._regions.pop(region.cookie, None)
        with nogil:
            ummunotify_unwatch(self._umn, watched)  # it can only fail where everything is unwatched
        return 0

    cdef list _read(self, bint one=False):
        """What there is, or not more than one. Once an event was taken, nothing is raised that would lose it."""
        cdef ummunotify_event events[ROOM]
        cdef ptrdiff_t room = 1 if one else ROOM
        cdef ptrdiff_t n = room, i
        cdef list result = []
        cdef uint64_t now

        while n == room and not (one and result):
            now = self._now()
            with nogil:
                n = ummunotify_read(self._umn, events, room)
            if n < 0:
                if result:
                    return result
                raise_pending()
                raise failure()
            for i in range(n):
                region = self._regions.get(events[i].cookie)
                if region is not None and is_same(<Region>region, events[i].region):
                    result.append(invalidation(<Region>region, &events[i], now))
        if not result:
            raise_pending()
        return result

    @property
    def source(self):
        """What feeds it: `bpf:kvm`, ... `ummunotify.open(source=...)` takes it back."""
        if self._umn is NULL:
            self._check()
        return ummunotify_source(self._umn).decode()

    @property
    def closed(self):
        """Closed, or inherited through a fork."""
        return self._umn is NULL or ummunotify_check(self._umn) != 0

    @property
    def generation(self):
        """The number of changes so far that hit at least one region. To be compared for inequality only.

        Read from mapped memory: no system call, but one with the source `uffd`.
        """
        self._check()
        return ummunotify_generation(self._umn)

    @property
    def changed(self):
        """Has anything been invalidated that neither `read` nor `dispatch` has delivered?

        Some loads from memory: no lock, and no system call, but one with the source `uffd`. Never False when something
        was; it may be True with nothing to read. What `read` has returned counts as delivered, to whichever thread: with
        several threads use `dispatch`, during which this stays True for all of them.
        """
        if self._umn is NULL:
            self._check()
        if ummunotify_changed(self._umn):
            self._check()
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
        cdef ummunotify_region *watched
        cdef Region region
        cdef int error

        self._check()
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
        region = Region.__new__(Region, self)
        region.cookie = cookie
        region._start = start
        region._end = end
        region._since = self._now()
        # Now, as making the region may have run the garbage collector, and finalisers that watch something.
        if cookie in self._regions:
            raise CookieInUseError(number)
        # Found before it is watched: an event that comes at once has its region.
        self._regions[cookie] = region
        with nogil:
            error = ummunotify_watch(self._umn, <void *>start, end - start, number, &watched)
        if not error:
            region._region = watched
            return region
        self._regions.pop(cookie, None)
        raise_pending()
        raise failure(start, end - start)

    def unwatch(self, Region region not None):
        """Stop watching. Nothing is reported for the region once this has returned.

        Raises UnknownRegionError if it is not watched through this notifier, ClosedError.
        """
        self._check()
        if region._notifier is not self or region._region is NULL:
            raise UnknownRegionError(f"{region!r} is not watched through this notifier")
        self._unwatch(region)

    def read(self, timeout=0.0):
        """Take what was invalidated: each region once, in the order in which they were first hit.

        A region stays watched and will be reported again when it is hit again. If several threads read, each
        invalidation goes to one of them. Takes time in proportion to what it returns.

        `timeout` is how long to wait for something, in seconds; None: for as long as it takes. Without
        anything in time the list is empty. Where gevent or eventlet have replaced select.select, green threads run meanwhile.
        Raises ClosedError, also when it is closed meanwhile, ValueError for a timeout that is not a number, and
        DescriptorClosedError if it cannot wait, or if the source can see no more.
        """
        cdef double deadline = 0, left = 0
        cdef int milliseconds, result
        cdef bint forever = timeout is None

        self._check()
        if not forever:
            left = timeout
            if left != left:
                raise ValueError("timeout is not a number")
        events = self._read()
        if events or (not forever and left <= 0):
            return events
        if not forever:
            deadline = time.monotonic() + left
        while True:
            milliseconds = <int>(min(WAIT_MAX if forever else left, WAIT_MAX) * 1000) + 1
            if type(select.select) is not BuiltinFunctionType:
                # Replaced by gevent's or eventlet's, in which other green threads run meanwhile.
                with self._copy() as copy:
                    select.select([copy], [], [], milliseconds / 1000)
            else:
                with nogil:
                    result = ummunotify_wait(self._umn, milliseconds)
                if result < 0 and result != -EINTR:
                    raise failure()
                PyErr_CheckSignals()
            events = self._read()
            if events:
                return events
            if not forever:
                left = deadline - time.monotonic()
                if left <= 0:
                    return events

    def dispatch(self, callback):
        """Call `callback` with each Invalidation there is, one after the other; how many there were.

        Unlike `read`, `changed` stays True for every thread until the callbacks are done, and other threads that
        dispatch wait for them. So a thread that has dispatched, or has found `changed` False, uses nothing that was
        invalidated before. What a callback raises is passed on: it has not acted on its invalidation then, which is the
        first one of the next call, and `changed` stays True. A callback, or a signal handler that interrupts it, may
        call everything here; a dispatch inside it returns 0 at once.

        Raises ClosedError.
        """
        cdef ptrdiff_t result
        cdef list state = [self, callback, None]
        self._check()
        with nogil:
            result = ummunotify_dispatch(self._umn, call_back, <void *>state)
        raise_pending()
        if state[2] is not None:
            raise state[2]
        if result < 0:
            raise failure()
        return result

    def fileno(self):
        """A descriptor that polls readable when there may be something to read.

        For select, poll, epoll and event loops; do not read from it or close it. It stays readable until `read`
        is called, and `read` may then find nothing. Before it is first asked for, changes send no wake-ups and
        cost less. Raises ClosedError, DescriptorClosedError.
        """
        cdef int fd
        self._check()
        fd = ummunotify_fd(self._umn)
        if fd < 0:
            raise failure()
        return fd

    @property
    def regions(self):
        """The watched regions, a new list."""
        self._check()
        return list(self._regions.values())

    @property
    def stats(self):
        """Numbers about the table, a NotifierStats."""
        cdef ummunotify_stats stats
        self._check()
        if ummunotify_get_stats(self._umn, &stats):
            raise failure()
        return NotifierStats(
            stats.regions, stats.bytes, stats.free_bytes, stats.segments, stats.levels, stats.overflows
        )

    def close(self):
        """Stop watching and release everything. May be called more than once, and while other threads read.

        Those get ClosedError; regions stay around and are not valid.
        """
        error = None
        if self._umn is NULL:
            return
        with nogil:
            ummunotify_shutdown(self._umn)
        self._regions = {}
        self._tracer = None
        # They stay there until they have gone themselves: what is interrupted here is done by the next close().
        for wake in list(self._waiters):
            try:
                wake()
            except BaseException as caught:
                error = caught  # an event loop that is closed, or a signal handler's; the others are to be woken too
        raise_pending()
        if error is not None:
            raise error

    # ---- for the subclass, and for `open` ----

    def _trace(self, tracer):
        """Events have their stacks from this one (_stacks.Tracer)."""
        self._tracer = tracer

    def _take_one(self):
        """A list of one invalidation, or of none."""
        self._check()
        return self._read(True)

    @contextlib.contextmanager
    def _copy(self):
        """A copy of the descriptor."""
        copy = os.dup(self.fileno())
        try:
            yield copy
        finally:
            # Unless the program has replaced it. Where there is no /proc that is not known.
            try:
                name = os.readlink(f"/proc/self/fd/{copy}")
            except FileNotFoundError:
                name = "" if os.path.exists("/proc/self") else EPOLL
            if name == EPOLL:
                os.close(copy)

    @contextlib.contextmanager
    def _waiter(self, wake):
        """`wake` is called when the notifier is closed meanwhile."""
        self._waiters.append(wake)
        try:
            self._check()
            yield
        finally:
            if wake in self._waiters:
                self._waiters.remove(wake)
