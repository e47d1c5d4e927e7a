# cython: language_level=3, boundscheck=False, wraparound=False, binding=False, embedsignature=True, embedsignature.format=clinic
"""The registration cache: the binding of libummunotify (ummunotify_cache.h), and the registrar's calls back.

The library holds no lock while it calls the registrar, and is never interrupted by Python's signal handlers otherwise. What
the registrar raises is for the library a number that is returned; so whatever is raised, at any moment, leaves nothing half
done.
"""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from cpython.object cimport PyObject
from cpython.pycapsule cimport PyCapsule_New
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.errno cimport EAGAIN, EDQUOT, EIO, EMFILE, ENFILE, ENOBUFS, ENOMEM, ENOSPC
from libc.stdint cimport uint64_t
from libc.string cimport memset

import sys
import warnings
from collections import Counter
from types import GenericAlias

from ._core cimport (
    UMMUNOTIFY_LIMIT,
    UMMUNOTIFY_NO_MEMORY,
    UMMUNOTIFY_REGISTRAR,
    Notifier,
    _Feeder,
    failure,
    raise_pending,
    range_of,
    ummunotify_error,
    ummunotify_get_failure,
    ummunotify_options,
)

from .bpf import feeder as python_feeder
from .errors import (
    ClosedError,
    DeregistrationError,
    ForkedError,
    RegistrationError,
    RegistrationLimitError,
)
from .types import NO_CALL as _NO_CALL
from .types import CacheStats, call_name

cdef extern from "Python.h":
    ctypedef struct PyFrameObject:
        pass
    PyFrameObject *PyEval_GetFrame()
    int PyErr_ResourceWarning(PyObject *source, Py_ssize_t stack_level, const char *format, ...) except -1

cdef tuple LIMITS = (EAGAIN, EDQUOT, EMFILE, ENFILE, ENOBUFS, ENOMEM, ENOSPC)
cdef uint64_t NO_LIMIT = <uint64_t>-1

# How the notifier that caches share is opened.
cdef _Feeder feeder = _Feeder(python_feeder)
cdef ummunotify_options shared
memset(&shared, 0, sizeof(shared))
shared.size = sizeof(shared)
shared.feeder = &feeder._feeder

# ---- The registrar ----

# Each call that may come to the registrar has a list as its argument.
cdef enum:
    FAILED  # the last exception because of which `register` failed
    ERRORS  # a list: because of which `deregister` did
    RAISED  # what ends the call
    NESTED  # this call must not come to the registrar

cdef list running = []
"""Of the calls that may be in a registrar's method: the frame that has called, and the registrar."""


cdef list begin(object registrar):
    """The argument of a call. To be followed by `end`.

    A registrar's method may hold a lock of the registrar when a signal handler interrupts it. Were the registrar called by
    the handler, that lock would never be released. So the frames below this one are looked at, not the thread: a green
    thread that the registrar has switched to may call it.
    """
    frame = <object><PyObject *>PyEval_GetFrame() if PyEval_GetFrame() is not NULL else None
    nested = False
    if running:
        mine = [caller for caller, other in running if other is registrar]
        below = frame
        while below is not None and mine and not nested:
            nested = any([below is caller for caller in mine])
            below = below.f_back
    running.append((frame, registrar))
    return [None, [], None, nested]


cdef int end(object registrar) except -1:
    """The last of this frame's calls is over."""
    cdef Py_ssize_t i
    frame = <object><PyObject *>PyEval_GetFrame() if PyEval_GetFrame() is not NULL else None
    for i in range(len(running) - 1, -1, -1):
        if running[i][0] is frame and running[i][1] is registrar:
            del running[i]
            break
    return raise_pending()


cdef int register_memory(void *context, uint64_t address, size_t length, void *argument, void **handle) noexcept with gil:
    cdef list state = <list>argument
    cdef registrar_calls *calls
    try:
        if state[NESTED]:
            state[RAISED] = RegistrationError(
                f"cannot register {length} bytes at {address:#x}: this call comes from within a method of the same registrar, or "
                "from a signal handler that has interrupted one"
            )
            return 1
        calls = <registrar_calls *>context
        result = (<object>calls.register)(address, length)
        if calls.sites is not NULL and PyEval_GetFrame() is not NULL:
            caller = <object><PyObject *>PyEval_GetFrame()
            (<object>calls.sites)[caller.f_code.co_qualname, caller.f_code.co_filename, caller.f_lineno] += 1
        Py_INCREF(result)
        handle[0] = <void *>result
        return 0
    except RegistrationLimitError as error:
        state[FAILED] = error
        return -ENOSPC
    except OSError as error:
        state[FAILED] = error
        return -error.errno if type(error.errno) is int and 0 < error.errno < 4096 else -EIO
    except RegistrationError as error:
        state[FAILED] = error
        return -EIO
    except BaseException as error:
        state[RAISED] = error
        return 1


cdef int deregister(void *context, void *handle, void *argument) noexcept with gil:
    cdef registrar_calls *calls = <registrar_calls *>context
    if calls.ended:
        return 0
    if argument is not NULL and (<list>argument)[NESTED]:
        return 1  # later
    try:
        (<object>calls.deregister)(<object>handle)
    except Exception as error:
        if argument is not NULL:
            (<list>(<list>argument)[ERRORS]).append(error)
        return -EIO
    except BaseException as error:
        if argument is NULL:
            return -EIO
        (<list>argument)[RAISED] = error
        return 1
    Py_DECREF(<object>handle)
    return 0


cdef int interrupted(void *context, void *argument) noexcept with gil:
    try:
        PyErr_CheckSignals()
        return 0
    except BaseException as error:
        (<list>argument)[RAISED] = error
        return 1


cdef object refusal(int error, list state, uint64_t start, uint64_t length):
    """The exception for an `acquire` that failed, not because of RAISED."""
    cdef object code = ummunotify_get_failure().code
    if code == UMMUNOTIFY_REGISTRAR:
        cause = state[FAILED]
        if isinstance(cause, RegistrationError):
            return cause
        kind = RegistrationLimitError if -error in LIMITS else RegistrationError
        refused = kind(ummunotify_error().decode(errors="replace"))
        refused.__cause__ = cause
        return refused
    if code in (UMMUNOTIFY_LIMIT, UMMUNOTIFY_NO_MEMORY):
        return RegistrationLimitError(ummunotify_error().decode(errors="replace"))
    return failure(start, length)


# ---- Registrations ----


# Never cleared by the garbage collector, nor is the cache: to release it needs both.
@cython.final
@cython.no_gc_clear
@cython.freelist(64)
cdef class Registration:
    """Memory that is registered, and stays so until `release`. Made by `RegistrationCache.acquire`.

    A context manager: released at the end of the `with` block. It may be released by another thread than the one that
    acquired it. In the child of a fork, to release what the parent acquired does nothing.
    """

    __class_getitem__ = classmethod(GenericAlias)

    def __init__(self):
        raise TypeError("registrations are made by RegistrationCache.acquire")

    def __reduce__(self):
        raise TypeError("a registration cannot be pickled: it belongs to this process")

    def __dealloc__(self):
        # Not deregistered: that might take a lock that this thread holds. The cache does so later.
        if self._registration is not NULL:
            ummunotify_cache_release(self._cache._cache, self._registration)
            PyErr_ResourceWarning(NULL, 1, "a registration was dropped without release()")

    cdef int _check(self) except -1:
        if self._registration is NULL:
            raise ClosedError("this registration was released")
        return 0

    @property
    def handle(self):
        """What the registrar gave for memory that contains this range. ClosedError once released, ForkedError in a child."""
        self._check()
        if self._registration.handle is NULL:
            raise ForkedError("this registration was acquired before a fork: it is the parent's")
        return <object>self._registration.handle

    @property
    def address(self):
        """Of the first byte that was asked for."""
        return self._start

    @property
    def length(self):
        """How many bytes were asked for."""
        return self._end - self._start

    @property
    def valid(self):
        """Nothing has changed the mapping since the memory was registered.

        If this is False after a transfer, the program changed the buffer's mapping during the transfer. Always False
        without a source of invalidations. ClosedError once released.
        """
        self._check()
        return ummunotify_registration_valid(self._registration)

    def release(self):
        """End the use. May be called more than once.

        If the memory has changed meanwhile and nothing else uses the registration, it is deregistered now; if that fails
        this raises DeregistrationError, and the cache tries again when it is flushed or closed.
        """
        self._release()

    cdef int _release(self) except -1:
        cdef ummunotify_registration *registration = self._registration
        if registration is not NULL:
            self._registration = NULL
            if ummunotify_cache_release(self._cache._cache, registration):
                self._cache._collect()
        return 0

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self._release()

    def __repr__(self):
        if self._registration is NULL:
            state = "released"
        else:
            state = "valid" if self.valid else "stale"
        return f"<Registration {self._start:#x}-{self._end:#x} {state}>"


# ---- The cache ----


@cython.no_gc_clear
cdef class RegistrationCache:
    """Registers memory when it is first used, and keeps it registered for the next use.

    It uses no registration whose memory was unmapped or otherwise changed since: it watches what it registers.

    `registrar` is what registers; see `ummunotify.registrars.Registrar`. `notifier` is what it watches with, and reads:
    nothing else should read from it. Left out, the cache shares one with all such caches of the process. Memory whose
    changes no source can see here is registered for each use; the cache says so once, with a warning (RuntimeWarning).

    At most `max_registrations` are registered at a time, with at most `max_bytes` in all (both at least 1). Before that
    is exceeded those are deregistered that are not in use, the least recently used ones first. The order of use is
    known to within one miss: what was used between two misses may be given up in any order.

    With `call_sites` it counts which lines of Python make it register, for `explain`. Hits cost nothing more.

    Threads: any thread may call any method. Hits take no lock. The registrar's methods are called without any lock
    held, by several threads at once; two threads that want the same memory register it once.

    Signals: a handler may use the cache, and may raise out of any method. Where it has interrupted a method of the same
    registrar, the registrar is not called: what is registered already is found, any other `acquire` raises
    RegistrationError, and what is to be deregistered is left to the next call.

    Fork: however it was made, the cache is empty in the child, and never deregisters what belongs to the parent. It
    works there if the registrar does, unless `notifier` was given, which does not.
    """

    __class_getitem__ = classmethod(GenericAlias)

    def __init__(self, registrar, *, notifier=None, max_bytes=None, max_registrations=None, call_sites=False):
        """Raises ValueError for a limit below 1."""
        cdef ummunotify_registrar native
        cdef ummunotify_cache_options options
        cdef int error

        if self._cache is not NULL:
            raise TypeError("this registration cache is open already")
        for name, limit in (("max_bytes", max_bytes), ("max_registrations", max_registrations)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name} must be at least 1, not {limit}")
        granularity = getattr(registrar, "granularity", 1)
        if granularity < 1 or granularity & (granularity - 1):
            raise ValueError(f"the registrar's granularity must be a power of two, not {granularity}")
        self._registrar = registrar
        self._register = registrar.register
        self._deregister = registrar.deregister
        self._calls.register = <void *>self._register
        self._calls.deregister = <void *>self._deregister
        self._sites = Counter() if call_sites else None
        self._calls.sites = <void *>self._sites if call_sites else NULL
        memset(&native, 0, sizeof(native))
        native.size = sizeof(native)
        native.register_memory = register_memory
        native.deregister = deregister
        native.interrupted = interrupted
        native.context = &self._calls
        native.granularity = granularity
        native.max_length = min(getattr(registrar, "max_length", NO_LIMIT), NO_LIMIT)
        native.merge = bool(getattr(registrar, "merge", False))
        native.no_overlap = not getattr(registrar, "overlap", True)
        memset(&options, 0, sizeof(options))
        options.size = sizeof(options)
        options.shared = &shared
        options.max_bytes = 0 if max_bytes is None else min(max_bytes, NO_LIMIT)
        options.max_registrations = 0 if max_registrations is None else min(max_registrations, NO_LIMIT)
        if notifier is not None:
            (<Notifier?>notifier)._check()
            options.umn = (<Notifier>notifier)._umn
        self._notifier = notifier
        with nogil:
            error = ummunotify_cache_open(&self._cache, &native, &options)
        raise_pending()
        if error:
            raise failure()
        self._warn([])

    def __reduce__(self):
        raise TypeError("a registration cache cannot be pickled: it belongs to this process")

    def __del__(self):
        # At the interpreter's end the registrar may be in pieces, and the system takes back what is registered.
        self._calls.ended = sys is None or sys.is_finalizing()
        if self._cache is not NULL and not self._closed and not self._calls.ended:
            self.close()

    def __dealloc__(self):
        # What failed to be deregistered stays registered: the objects behind the handles are never dropped.
        self._calls.ended = True
        if self._cache is not NULL:
            with nogil:
                ummunotify_cache_close(self._cache)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self.close()

    def __repr__(self):
        if self._closed or self._cache is NULL:
            return "<RegistrationCache closed>"
        stats = self.stats
        return f"<RegistrationCache {stats.registrations} registrations, {stats.registered_bytes} bytes>"

    cdef int _check(self) except -1:
        if self._cache is NULL:
            raise ClosedError("this registration cache was never opened: call its __init__")
        return 0

    # ---- Using memory ----

    def acquire(self, what):
        """Use the memory that a buffer occupies now, or a pair (address, length): registered, until it is released.

        Takes what is registered and has not changed since, or else registers it. The buffer is not kept alive: it must
        stay mapped until the transfer is done. From any thread.

        Raises RegistrationError if it cannot be registered, RegistrationLimitError (one of these) if that is because of a
        limit and there is nothing left to deregister; InvalidRangeError, InvalidBufferError, TypeError; ClosedError.
        What else the registrar raises is passed on.
        """
        cdef uint64_t start, stop
        cdef ummunotify_registration *found
        cdef Registration registration

        range_of(what, &start, &stop)
        if self._cache is NULL:
            self._check()
        found = ummunotify_cache_find(self._cache, <void *>start, stop - start)
        if found is NULL:
            return self._miss(start, stop)
        registration = Registration.__new__(Registration)
        registration._cache = self
        registration._registration = found
        registration._start = start
        registration._end = stop
        return registration

    cdef Registration _miss(self, uint64_t start, uint64_t stop):
        cdef list state
        cdef ummunotify_registration *found = NULL
        cdef int error
        # Made first: once it is registered there is nothing that could fail.
        cdef Registration registration = Registration.__new__(Registration)

        registration._cache = self
        registration._start = start
        registration._end = stop
        state = begin(self._registrar)
        with nogil:
            error = ummunotify_cache_acquire(self._cache, <void *>start, stop - start, <void *>state, &found)
        registration._registration = found
        try:
            end(self._registrar)
            if error > 0:
                raise state[RAISED]
            if error:
                raise refusal(error, state, start, stop - start)
            self._warn(state[ERRORS])
        except BaseException:
            registration._release()
            raise
        return registration

    cdef int _warn(self, list errors) except -1:
        """Warn at the caller's line of what is no error of the call."""
        cdef const char *reason
        if errors:
            warnings.warn(str(DeregistrationError(errors)), RuntimeWarning, stacklevel=1)
        if not self._warned:
            reason = ummunotify_cache_uncached(self._cache)
            if reason is not NULL:
                self._warned = True
                text = reason.decode(errors="replace")
                warnings.warn(f"memory is registered anew for each use, because {text}", RuntimeWarning, stacklevel=1)
        return 0

    # ---- Housekeeping ----

    cdef int _left(self, int error, list state) except -1:
        """After a call that deregisters."""
        end(self._registrar)
        if state[RAISED] is not None:
            raise state[RAISED]
        if state[ERRORS]:
            raise DeregistrationError(state[ERRORS]) from state[ERRORS][0]
        if error < 0:
            raise failure()
        return 0

    cdef int _collect(self) except -1:
        """Deregister what `release` has left over."""
        cdef list state
        cdef int error
        state = begin(self._registrar)
        with nogil:
            error = ummunotify_cache_collect(self._cache, <void *>state)
        # Whatever else is wrong, the release has not failed.
        return self._left(0, state)

    def collect(self):
        """Deregister what has changed and is not in use.

        The cache does so by itself when it has to register. Call this where memory that was unmapped should not stay
        pinned until then.

        Raises DeregistrationError if that fails.
        """
        cdef list state
        cdef int error
        self._check()
        state = begin(self._registrar)
        with nogil:
            error = ummunotify_cache_collect(self._cache, <void *>state)
        self._left(error, state)

    def flush(self):
        """Deregister all that is not in use, and try again what failed to be deregistered.

        Raises DeregistrationError if something cannot be; all else is deregistered then.
        """
        cdef list state
        cdef int error
        self._check()
        state = begin(self._registrar)
        with nogil:
            error = ummunotify_cache_flush(self._cache, <void *>state)
        self._left(error, state)

    def invalidate(self, what):
        """Use no registration any more that overlaps this memory (anything that `acquire` takes).

        It is deregistered now, or when its last user releases it. Raises DeregistrationError if that fails.
        """
        cdef uint64_t start, stop
        cdef list state
        cdef int error
        range_of(what, &start, &stop)
        self._check()
        state = begin(self._registrar)
        with nogil:
            error = ummunotify_cache_invalidate(self._cache, <void *>start, stop - start, <void *>state)
        self._left(error, state)

    def close(self):
        """Deregister all that is not in use, the rest when its last user releases it. May be called more than once.

        Close the registrar after this. Raises DeregistrationError if something cannot be deregistered; to close once
        more tries again.
        """
        cdef list state
        cdef int error
        self._closed = True
        if self._cache is NULL:
            return
        state = begin(self._registrar)
        with nogil:
            error = ummunotify_cache_shutdown(self._cache, <void *>state)
        self._left(error, state)

    @property
    def closed(self):
        return self._closed or self._cache is NULL

    @property
    def stats(self):
        """What it has done and what it holds, a CacheStats. Takes time in proportion to the number of registrations."""
        cdef ummunotify_cache_stats stats
        self._check()
        ummunotify_cache_get_stats(self._cache, &stats)
        return CacheStats(
            hits=stats.hits,
            misses=stats.misses,
            stale=stats.stale,
            evictions=stats.evictions,
            merges=stats.merges,
            retries=stats.retries,
            uncached=stats.uncached,
            failed_deregistrations=stats.failed_deregistrations,
            registrations=stats.registrations,
            registered_bytes=stats.registered_bytes,
            in_use=stats.in_use,
            in_use_bytes=stats.in_use_bytes,
            not_deregistered=stats.not_deregistered,
        )

    @property
    def causes(self):
        """Of the registrations that `stats.stale` counts: how many each system call made so, by its name; the most frequent first."""
        cdef uint64_t counts[UMMUNOTIFY_CACHE_CAUSES]
        cdef int i
        self._check()
        ummunotify_cache_causes(self._cache, counts)
        found = {_NO_CALL if i == UMMUNOTIFY_CACHE_CAUSES - 1 else call_name(i): counts[i]
                 for i in range(UMMUNOTIFY_CACHE_CAUSES) if counts[i]}
        return dict(sorted(found.items(), key=lambda cause: -cause[1]))

    def explain(self):
        """Why the hit rate is what it is, in a few lines of text: what was registered again for which reason, and what helps."""
        from .explain import explain  # here, as few programs need it

        return explain(self.stats, self.causes, self._sites)

    @property
    def capsule(self):
        """A capsule named "ummunotify.cache" with the `struct ummunotify_cache *` of ummunotify_cache.h.

        It is there as long as this object is. C may acquire what is registered already (`ummunotify_cache_find`),
        release and ask for statistics; the rest calls the registrar, and is done here.
        """
        self._check()
        return PyCapsule_New(<void *>self._cache, "ummunotify.cache", NULL)
