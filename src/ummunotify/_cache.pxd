# cython: language_level=3
"""For other Cython modules: `from ummunotify cimport RegistrationCache, ummunotify_cache_find`."""

from libc.stdint cimport uint64_t

from ._core cimport ummunotify, ummunotify_options

cdef extern from "ummunotify_cache.h" nogil:
    struct ummunotify_cache:
        pass
    struct ummunotify_registration:
        void *handle
        uint64_t start, end
    struct ummunotify_registrar:
        size_t size
        int (*register_memory)(void *context, uint64_t address, size_t length, void *argument, void **handle) noexcept
        int (*deregister)(void *context, void *handle, void *argument) noexcept
        int (*interrupted)(void *context, void *argument) noexcept
        void *context
        size_t granularity, max_length
        bint merge, no_overlap
    struct ummunotify_cache_options:
        size_t size
        ummunotify *umn
        const ummunotify_options *shared
        uint64_t max_bytes, max_registrations
    struct ummunotify_cache_stats:
        uint64_t hits, misses, stale, evictions, merges, retries, uncached, failed_deregistrations
        uint64_t registrations, registered_bytes, in_use, in_use_bytes, not_deregistered
    enum:
        UMMUNOTIFY_CACHE_CAUSES
    void ummunotify_cache_causes(ummunotify_cache *cache, uint64_t *causes)
    int ummunotify_cache_open(ummunotify_cache **cache, const ummunotify_registrar *registrar,
                              const ummunotify_cache_options *options)
    int ummunotify_cache_shutdown(ummunotify_cache *cache, void *argument)
    void ummunotify_cache_close(ummunotify_cache *cache)
    int ummunotify_cache_acquire(ummunotify_cache *cache, const void *address, size_t length, void *argument,
                                 ummunotify_registration **registration)
    ummunotify_registration *ummunotify_cache_find(ummunotify_cache *cache, const void *address, size_t length)
    int ummunotify_cache_release(ummunotify_cache *cache, ummunotify_registration *registration)
    bint ummunotify_registration_valid(const ummunotify_registration *registration)
    int ummunotify_cache_collect(ummunotify_cache *cache, void *argument)
    int ummunotify_cache_flush(ummunotify_cache *cache, void *argument)
    int ummunotify_cache_invalidate(ummunotify_cache *cache, const void *address, size_t length, void *argument)
    const char *ummunotify_cache_uncached(ummunotify_cache *cache)
    void ummunotify_cache_get_stats "ummunotify_cache_stats"(ummunotify_cache *cache, ummunotify_cache_stats *stats)


cdef struct registrar_calls:
    void *register
    void *deregister
    void *sites  # a Counter of call sites, or NULL
    bint ended  # the interpreter is: what is registered is left to the system


cdef class RegistrationCache:
    cdef ummunotify_cache *_cache  # NULL: never opened
    cdef registrar_calls _calls  # borrowed from the next two
    cdef object _registrar, _register, _deregister
    cdef object _sites  # a Counter, or None
    cdef object _notifier  # that was given, or None
    cdef bint _closed
    cdef bint _warned  # that memory is registered for each use
    cdef object __weakref__

    cdef Registration _miss(self, uint64_t start, uint64_t stop)
    cdef int _warn(self, list errors) except -1
    cdef int _left(self, int error, list state) except -1
    cdef int _check(self) except -1
    cdef int _collect(self) except -1


cdef class Registration:
    cdef RegistrationCache _cache
    cdef ummunotify_registration *_registration  # NULL: released
    cdef uint64_t _start, _end

    cdef int _check(self) except -1
    cdef int _release(self) except -1
