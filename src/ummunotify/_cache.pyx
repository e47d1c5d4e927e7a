# cython: language_level=3, boundscheck=False, wraparound=False, binding=False
"""The native part of the registration cache: what a hit needs, and what must not be torn apart. See core/cache.h."""

cimport cython
from cpython.object cimport PyObject
from cpython.pycapsule cimport PyCapsule_New
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport uint64_t, uintptr_t

from types import GenericAlias

from ._core cimport Region, range_of, umn_no_region, umn_region, umn_region_valid

from .errors import ClosedError

cdef extern from "Python.h":
    int PyErr_ResourceWarning(PyObject *source, Py_ssize_t stack_level, const char *format, ...) except -1


@cython.final
@cython.freelist(64)
cdef class Registration:
    """Memory that is registered, and stays so until `release`. Made by `RegistrationCache.acquire`.

    A context manager: released at the end of the `with` block. It may be released by another thread than the one that
    acquired it. In the child of a fork, to release what the parent acquired does nothing.
    """

    __class_getitem__ = classmethod(GenericAlias)

    def __init__(self):
        raise TypeError("registrations are made by RegistrationCache.acquire")

    def __dealloc__(self):
        # Only marked: what deregisters might take a lock that this thread holds. The cache deregisters it later.
        if self._entry is not NULL:
            umn_cache_release(self._table._cache, self._entry)
            PyErr_ResourceWarning(NULL, 1, "a registration was dropped without release()")

    cdef int _check(self) except -1:
        if self._entry is NULL:
            raise ClosedError("this registration was released")
        return 0

    @property
    def handle(self):
        """What the registrar gave for memory that contains this range. ClosedError once released."""
        self._check()
        return <object>self._entry.handle

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
        return umn_region_valid(self._entry.region)

    def release(self):
        """End the use. May be called more than once.

        If the memory has changed meanwhile and nobody else uses the registration, it is deregistered now; if that fails
        this raises DeregistrationError, and the cache tries again when it is flushed or closed.
        """
        self._release()

    cdef int _release(self) except -1:
        cdef umn_entry *entry = self._entry
        if entry is not NULL:
            self._entry = NULL
            if umn_cache_release(self._table._cache, entry):
                self._table._left()
        return 0

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self._release()

    def __repr__(self):
        if self._entry is NULL:
            state = "released"
        else:
            state = "valid" if self.valid else "stale"
        return f"<Registration {self._start:#x}-{self._end:#x} {state}>"


cdef class CacheTable:
    """The registrations of one cache. `RegistrationCache` decides what is registered and when."""

    __class_getitem__ = classmethod(GenericAlias)

    def __cinit__(self, registrar, *args, **kwargs):
        self._register = registrar.register
        self._deregister = registrar.deregister
        self._entries = {}
        self._cache = umn_cache_new()
        if self._cache is NULL:
            raise MemoryError

    def __dealloc__(self):
        if self._cache is not NULL:
            umn_cache_delete(self._cache)

    # ---- for the subclass ----

    cdef Registration _use(self, umn_entry *entry, uint64_t start, uint64_t end):
        cdef Registration registration = Registration.__new__(Registration)
        registration._table = self
        registration._entry = entry
        registration._start = start
        registration._end = end
        return registration

    def _miss(self, start, end):
        """What `acquire` does when it finds nothing at once. Overridden."""
        raise NotImplementedError

    def _left(self):
        """What `release` does when there is something to deregister. Overridden."""
        raise NotImplementedError

    def _find(self, uint64_t start, uint64_t end):
        """What is registered and valid and contains [start, end), in use now; or None."""
        cdef umn_entry *entry = umn_cache_find(self._cache, start, end)
        return None if entry is NULL else self._use(entry, start, end)

    def _reserve(self, uint64_t start, uint64_t end):
        """Count [start, end) as registered. To be given to `_pin`, just once. MemoryError."""
        cdef umn_entry *entry = umn_cache_reserve(self._cache, start, end)
        if entry is NULL:
            raise MemoryError
        return <uintptr_t>entry

    def _watch(self, address, length):
        """A region of this memory; None if it cannot be watched. Overridden."""
        raise NotImplementedError

    def _pin(self, uintptr_t reserved, uint64_t start, uint64_t end):
        """Watch and register what was reserved, for a use of [start, end).

        Returns the registration, and whether the memory changed while it was registered; then nobody else is given it.
        If the memory cannot be watched, the registration is for this use only. If this raises, nothing is reserved any
        more.
        """
        cdef umn_entry *entry = <umn_entry *>reserved
        cdef const umn_region *watched = &umn_no_region
        cdef Registration registration
        cdef Region region = None

        try:
            # What may fail comes first. After `register` there is nothing that could lose the handle, not even Ctrl-C.
            registration = self._use(NULL, start, end)
            region = self._watch(entry.start, entry.end - entry.start)
            if region is not None:
                watched = region._region
                self._entries[region] = reserved
            handle = self._register(entry.start, entry.end - entry.start)
        except BaseException:
            umn_cache_free(self._cache, entry)
            if region is not None:
                self._entries.pop(region, None)
                region.close()
            raise
        Py_INCREF(handle)
        Py_INCREF(region)
        umn_cache_publish(self._cache, entry, watched, <void *>handle, <void *>region, region is not None)
        registration._entry = entry
        # After it was published: whoever acquires it now finds a change by himself, and an event finds the entry.
        return registration, region is not None and not umn_region_valid(watched)

    def _give_up(self, Registration registration):
        """End the use of what is not to be used; the caller deregisters."""
        cdef umn_entry *entry = registration._entry
        registration._entry = NULL
        umn_cache_release(self._cache, entry)

    def _deregister_leaving(self):
        """Deregister what nobody uses and nobody is to use any more. How many, and the errors of those that failed."""
        cdef umn_entry *entry
        cdef Py_ssize_t count = 0
        cdef list errors = []

        while (entry := umn_cache_take(self._cache)) is not NULL:
            count += 1
            handle = <object>entry.handle
            region = <object>entry.watch
            try:
                self._deregister(handle)
            except BaseException as error:
                umn_cache_keep(self._cache, entry)
                if not isinstance(error, Exception):
                    raise
                errors.append(error)
                continue
            self._entries.pop(region, None)
            umn_cache_free(self._cache, entry)
            Py_DECREF(handle)
            Py_DECREF(region)
            if region is not None:
                (<Region>region).close()
        return count, errors

    def _drop(self, region):
        """Give nobody the registration that `region` watches, if it is not valid."""
        entry = self._entries.get(region)
        if entry is not None and not region.valid:
            umn_cache_retire(self._cache, <umn_entry *><uintptr_t>entry)

    def _drop_range(self, uint64_t start=0, uint64_t end=<uint64_t>-1):
        """Give nobody what overlaps [start, end)."""
        umn_cache_retire_range(self._cache, start, end)

    def _evict(self, size_t count=<size_t>-1):
        """Let go of so many that nobody uses, those used least recently first. How many."""
        return umn_cache_evict(self._cache, count)

    def _merge(self, uint64_t start, uint64_t end, uint64_t max_length, bint all_leave):
        """Let go of what nobody uses and overlaps [start, end). The range, made larger by theirs, and how many.

        It gets no longer than `max_length`; what does not fit stays, unless `all_leave`.
        """
        cdef size_t count = umn_cache_merge(self._cache, &start, &end, max_length, all_leave)
        return start, end, count

    def _overlaps(self, uint64_t start, uint64_t end):
        """Is a part of it registered, by whatever registration?"""
        return umn_cache_overlaps(self._cache, start, end)

    def _retry(self):
        """What failed to be deregistered is to be deregistered again."""
        umn_cache_retry(self._cache)

    def _load(self):
        """What is registered now: registrations, bytes; and of these how many are leaving or failed to be deregistered."""
        cdef umn_cache_load load
        umn_cache_get_load(self._cache, &load)
        return load.registrations, load.bytes, load.leaving, load.kept

    def _use_stats(self):
        """Hits, stale registrations, registrations for one use; registrations in use, and their bytes."""
        cdef umn_cache_stats stats
        umn_cache_get_stats(self._cache, &stats)
        return stats.hits, stats.stale, stats.closed, stats.in_use, stats.in_use_bytes

    def _range(self, what):
        """The bytes of a buffer."""
        cdef uint64_t start, end
        range_of(what, &start, &end)
        return start, end

    def _abandon_table(self):
        """In the child of a fork: forget everything. The handles are never dropped, which might deregister."""
        umn_cache_abandon(self._cache)
        self._entries = {}

    def _check_table(self):
        """For tests: what is wrong, or None."""
        cdef const char *wrong = umn_cache_check(self._cache)
        return None if wrong is NULL else wrong.decode()

    # ---- for the user ----

    def acquire(self, what):
        """Use the memory that a buffer occupies now, or a pair (address, length): registered, until it is released.

        Takes what is registered and has not changed since, or else registers it. The buffer is not kept alive: it must
        stay mapped until the transfer is done. From any thread.

        Raises RegistrationError if it cannot be registered, RegistrationLimitError (one of these) if that is because of a
        limit and there is nothing left to deregister; InvalidRangeError, InvalidBufferError, TypeError; ClosedError.
        What else the registrar raises is passed on.
        """
        cdef uint64_t start, end
        cdef umn_entry *entry

        range_of(what, &start, &end)
        entry = umn_cache_acquire(self._cache, start, end)
        if entry is NULL:
            return self._miss(start, end)
        return self._use(entry, start, end)

    @property
    def capsule(self):
        """A capsule named "ummunotify.cache" with the `struct umn_cache *` of core/cache.h.

        It is there as long as this object is; once the cache is closed everything is a miss.
        """
        return PyCapsule_New(<void *>self._cache, "ummunotify.cache", NULL)
