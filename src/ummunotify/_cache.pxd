# cython: language_level=3
"""For other Cython modules: `from ummunotify cimport CacheTable, umn_cache_acquire, umn_cache_release`."""

from libc.stdint cimport uint64_t

from ._core cimport umn_region

cdef extern from "cache/cache.h" nogil:
    struct umn_cache:
        pass
    struct umn_entry:
        uint64_t start, end
        const umn_region *region
        void *handle
        void *watch
    struct umn_cache_load:
        size_t registrations
        uint64_t bytes
        size_t leaving, kept
    struct umn_cache_stats:
        uint64_t hits, stale, closed
        size_t in_use
        uint64_t in_use_bytes
    umn_entry *umn_cache_acquire(umn_cache *cache, uint64_t start, uint64_t end)
    bint umn_cache_release(umn_cache *cache, umn_entry *entry)
    umn_cache *umn_cache_new()
    void umn_cache_delete(umn_cache *cache)
    void umn_cache_abandon(umn_cache *cache)
    umn_entry *umn_cache_reserve(umn_cache *cache, uint64_t start, uint64_t end)
    void umn_cache_publish(umn_cache *cache, umn_entry *entry, const umn_region *region, void *handle, void *watch,
                           bint open)
    umn_entry *umn_cache_find(umn_cache *cache, uint64_t start, uint64_t end)
    void umn_cache_retire(umn_cache *cache, umn_entry *entry)
    void umn_cache_retire_range(umn_cache *cache, uint64_t start, uint64_t end)
    size_t umn_cache_evict(umn_cache *cache, size_t count)
    size_t umn_cache_merge(umn_cache *cache, uint64_t *start, uint64_t *end, uint64_t max_length, bint all)
    bint umn_cache_overlaps(umn_cache *cache, uint64_t start, uint64_t end)
    umn_entry *umn_cache_take(umn_cache *cache)
    void umn_cache_free(umn_cache *cache, umn_entry *entry)
    void umn_cache_keep(umn_cache *cache, umn_entry *entry)
    void umn_cache_retry(umn_cache *cache)
    void umn_cache_get_load "umn_cache_load"(umn_cache *cache, umn_cache_load *load)
    void umn_cache_get_stats "umn_cache_stats"(umn_cache *cache, umn_cache_stats *stats)
    const char *umn_cache_check(umn_cache *cache)


cdef class CacheTable:
    cdef umn_cache *_cache
    cdef object _register, _deregister
    cdef dict _entries
    cdef object __weakref__

    cdef Registration _use(self, umn_entry *entry, uint64_t start, uint64_t end)


cdef class Registration:
    cdef CacheTable _table
    cdef umn_entry *_entry
    cdef uint64_t _start, _end

    cdef int _check(self) except -1
    cdef int _release(self) except -1
