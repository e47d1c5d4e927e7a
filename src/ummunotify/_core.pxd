# cython: language_level=3
"""For other Cython modules: `from ummunotify._core cimport Region, WatchTable`."""

from libc.stdint cimport int32_t, uint32_t, uint64_t

cdef extern from "table/table.h" nogil:
    """
    /* What a Region that is no longer watched looks at: never valid. */
    static const struct umn_slot umn_no_slot;
    static const struct umn_header umn_no_header;
    static struct umn_region umn_no_region = {.slot = &umn_no_slot, .header = &umn_no_header};
    """
    struct umn_table:
        pass
    struct umn_header:
        pass
    struct umn_source:
        bint (*delivered)(umn_source *source) nogil
        bint (*wait_delivered)(umn_source *source, unsigned int milliseconds) nogil
    struct umn_region:
        umn_source *source
        uint64_t start, end
        void *user
    struct umn_event:
        umn_region *region
        uint64_t start, end
        bint exact
        uint32_t thread
        int32_t syscall
    struct umn_table_stats:
        uint64_t regions, bytes, free_bytes
        uint32_t segments, levels, overflows
    umn_region umn_no_region
    umn_table *umn_table_new(uint64_t max_regions)
    void umn_table_set_source(umn_table *table, umn_source *source)
    uint32_t umn_table_next_pages(umn_table *table)
    int umn_table_add_segment(umn_table *table, void *memory, uint32_t pages)
    const umn_header *umn_table_header(const umn_table *table)
    int umn_table_watch(umn_table *table, uint64_t start, uint64_t end, uint64_t cookie, void *user, umn_region **region)
    void umn_table_unwatch(umn_table *table, umn_region *region)
    int umn_table_renew(umn_table *table, umn_region *region)
    size_t umn_table_drain(umn_table *table, umn_event *events, size_t room)
    bint umn_table_changed(const umn_table *table)
    void umn_table_arm(umn_table *table)
    void umn_table_doubt(umn_table *table)
    void umn_table_get_stats "umn_table_stats"(umn_table *table, umn_table_stats *stats)
    void umn_table_close(umn_table *table)
    void umn_table_abandon(umn_table *table)
    void umn_table_delete(umn_table *table)
    const char *umn_table_check(umn_table *table)
    uint64_t umn_table_generation(umn_table *table)
    bint umn_region_untouched(const umn_region *region)
    bint umn_region_valid(const umn_region *region)
    uint64_t umn_generation(const umn_header *header)


cdef int range_of(object what, uint64_t *start, uint64_t *end) except -1


cdef class Region:
    cdef WatchTable _table
    cdef umn_region *_region
    cdef readonly object cookie
    cdef uint64_t _start, _end

    cdef bint _settled(self) except -1


cdef class WatchTable:
    cdef umn_table *_table
    cdef umn_source *_source
    cdef const umn_header *_header
    cdef bint _closed
    cdef bint _forked
    cdef dict _regions
    cdef uint64_t _next_cookie
    cdef uint64_t _max_regions
    cdef object __weakref__

    cdef int _check_open(self) except -1
    cdef int _unwatch(self, Region region) except -1
