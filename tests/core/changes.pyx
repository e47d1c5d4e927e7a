# cython: language_level=3
"""changes.c on a notifier, without Python's taking part."""

from libc.stdint cimport uint32_t, uint64_t

from ummunotify._core cimport Notifier, ummunotify


cdef extern from "changes.h" nogil:
    struct changes_options:
        uint32_t threads
        bint files
        uint64_t changes
        double seconds
        uint64_t seed
    struct changes_totals:
        uint64_t changes, checks, valid, hit, false_alarms, taken, watched, renewed, refused, events
    const char *changes_run(ummunotify *umn, const changes_options *options, changes_totals *totals)


def run(Notifier umn not None, *, uint32_t threads, bint files, uint64_t changes, double seconds, uint64_t seed):
    """What went wrong first (None: nothing), and the totals."""
    cdef changes_options options
    cdef changes_totals totals
    cdef const char *wrong
    options.threads = threads
    options.files = files
    options.changes = changes
    options.seconds = seconds
    options.seed = seed
    with nogil:
        wrong = changes_run(umn._umn, &options, &totals)
    return (None if wrong is NULL else wrong.decode()), totals
