# cython: language_level=3
"""changes.c on a notifier's table, which is filled and emptied here without Python's taking part."""

from libc.stdint cimport uint32_t, uint64_t

from ummunotify._core cimport WatchTable, umn_source, umn_table


cdef extern from "changes.h" nogil:
    struct changes_options:
        umn_source *source
        uint32_t threads
        bint files
        uint64_t changes
        double seconds
        uint64_t seed
    struct changes_totals:
        uint64_t changes, checks, valid, hit, false_alarms, taken, watched, renewed, refused, events
    const char *changes_run(umn_table *table, const changes_options *options, changes_totals *totals)


def run(WatchTable table not None, *, uint32_t threads, bint files, uint64_t changes, double seconds, uint64_t seed):
    """What went wrong first (None: nothing), and the totals."""
    cdef changes_options options
    cdef changes_totals totals
    cdef const char *wrong
    options.source = table._source
    options.threads = threads
    options.files = files
    options.changes = changes
    options.seconds = seconds
    options.seed = seed
    with nogil:
        wrong = changes_run(table._table, &options, &totals)
    return (None if wrong is NULL else wrong.decode()), totals
