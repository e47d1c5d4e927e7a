# cython: language_level=3
"""For other Cython modules: `from ummunotify._core cimport Notifier, Region`."""

from libc.stdint cimport int32_t, uint32_t, uint64_t

cdef extern from "ummunotify_feeder.h" nogil:
    struct ummunotify_feeder:
        pass

cdef extern from "ummunotify.h" nogil:
    struct ummunotify:
        pass
    struct ummunotify_region:
        pass
    struct ummunotify_options:
        size_t size
        const char *source
        uint64_t max_regions
        const ummunotify_feeder *feeder
    struct ummunotify_event:
        ummunotify_region *region
        uint64_t cookie
        uint64_t start, end
        bint exact
        uint32_t thread
        int32_t syscall
    struct ummunotify_stats:
        uint64_t regions, bytes, free_bytes
        uint32_t segments, levels, overflows
    enum ummunotify_code:
        UMMUNOTIFY_OK
        UMMUNOTIFY_ARGUMENT
        UMMUNOTIFY_RANGE
        UMMUNOTIFY_UNSUPPORTED
        UMMUNOTIFY_LIMIT
        UMMUNOTIFY_NO_MEMORY
        UMMUNOTIFY_UNKNOWN_SOURCE
        UMMUNOTIFY_UNAVAILABLE
        UMMUNOTIFY_CLOSED
        UMMUNOTIFY_FORKED
        UMMUNOTIFY_DESCRIPTOR
        UMMUNOTIFY_REGISTRAR
    struct ummunotify_failure:
        ummunotify_code code
        int error
        const char *what
        const char *why
        const char *remedy
        const char *mapping
    struct ummunotify_tried:
        const char *source
        const char *why
        const char *remedy
    int ummunotify_sources(const char *wanted, const char **names, size_t room)
    int ummunotify_open_with(ummunotify **umn, const ummunotify_options *options)
    void ummunotify_close(ummunotify *umn)
    void ummunotify_shutdown(ummunotify *umn)
    const char *ummunotify_source(const ummunotify *umn)
    int ummunotify_watch(ummunotify *umn, const void *address, size_t length, uint64_t cookie, ummunotify_region **region)
    int ummunotify_unwatch(ummunotify *umn, ummunotify_region *region)
    bint ummunotify_valid(const ummunotify_region *region)
    int ummunotify_valid_now(const ummunotify_region *region)
    int ummunotify_renew(ummunotify *umn, ummunotify_region *region)
    bint ummunotify_changed(const ummunotify *umn)
    uint64_t ummunotify_generation(ummunotify *umn)
    int ummunotify_check(ummunotify *umn)
    ptrdiff_t ummunotify_read(ummunotify *umn, ummunotify_event *events, size_t room)
    ptrdiff_t ummunotify_dispatch(ummunotify *umn, int (*callback)(const ummunotify_event *event, void *context) noexcept,
                                  void *context)
    int ummunotify_wait(ummunotify *umn, int milliseconds)
    int ummunotify_fd(ummunotify *umn)
    int ummunotify_get_stats "ummunotify_stats"(ummunotify *umn, ummunotify_stats *stats)
    const ummunotify_failure *ummunotify_get_failure "ummunotify_failure"()
    const ummunotify_tried *ummunotify_get_tried "ummunotify_tried"(size_t i)
    const char *ummunotify_error()
    const char *ummunotify_version()


cdef int range_of(object what, uint64_t *start, uint64_t *end) except -1
cdef object failure(uint64_t start=*, uint64_t length=*)
cdef int raise_pending() except -1


cdef class _Feeder:
    cdef ummunotify_feeder _feeder
    cdef object _python


cdef class Region:
    cdef Notifier _notifier
    cdef ummunotify_region *_region  # NULL: not watched any more, or not yet
    cdef readonly object cookie
    cdef uint64_t _start, _end
    cdef uint64_t _since  # when it was last reported, in nanoseconds; for the notifier's tracer


cdef class Notifier:
    cdef ummunotify *_umn  # NULL: never opened
    cdef dict _regions  # by cookie
    cdef uint64_t _next_cookie
    cdef object _feeder  # keeps what _umn calls
    cdef list _waiters  # to be woken by close()
    cdef object _tracer  # has the stacks of changes; None: not wanted
    cdef object __weakref__

    cdef int _check(self) except -1
    cdef uint64_t _now(self)
    cdef int _unwatch(self, Region region) except -1
    cdef list _read(self, bint one=*)
