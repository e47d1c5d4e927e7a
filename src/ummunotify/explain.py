"""Why a cache's hit rate is what it is."""

from __future__ import annotations

from collections import Counter

from .types import NO_CALL, CacheStats

_GIVES_BACK = "an allocator gives the memory back to the kernel: have it keep more, or keep the buffers"
_FILE = "the file is cut or punched under its mapping"
_CURES = {
    "munmap": "the memory is freed between uses: keep the buffers, or have malloc keep them "
    "(glibc: MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_)",
    "brk": "malloc gives the end of the heap back: MALLOC_TRIM_THRESHOLD_, MALLOC_TOP_PAD_",
    "mremap": "realloc moves or shrinks the buffer: allocate it at its final size",
    "mmap": "other memory is mapped over it (MAP_FIXED)",
    "madvise": _GIVES_BACK,
    "process_madvise": _GIVES_BACK,
    "truncate": _FILE,
    "ftruncate": _FILE,
    "fallocate": _FILE,
    NO_CALL: "with userfaultfd mostly munmap, which it cannot tell (another source can); else copies on write after a "
    "fork: MADV_DONTFORK keeps the buffers out of children",
}
_SITES = 5


def explain(stats: CacheStats, causes: dict[str, int], sites: Counter[tuple[str, str, int]] | None) -> str:
    """`sites`: which lines made the cache register, how often."""
    uses = stats.hits + stats.misses
    if not uses:
        return "nothing was acquired so far"
    lines = [f"{stats.hits / uses:.1%} of {uses:,} uses were hits, {stats.misses:,} had to register"]
    if stats.stale:
        lines.append(f"{stats.stale:,} registrations went stale, as their memory was changed:")
        for cause, count in causes.items():
            lines.append(f"  {count:,} by {cause}" + (f": {_CURES[cause]}" if cause in _CURES else ""))
    for count, what in (
        (stats.evictions, "were given up for others: raise max_bytes, max_registrations or the registrar's own limit"),
        (stats.merges, "became part of a larger one"),
        (stats.uncached, "were for one use, as nothing tells of changes of that memory here: see `ummunotify doctor`"),
    ):
        if count:
            lines.append(f"{count:,} registrations {what}")
    if stats.retries:
        lines.append(f"{stats.retries:,} times memory changed while it was being registered")
    # Each of these is the reason for one miss at most.
    first = stats.misses - stats.stale - stats.evictions - stats.merges - stats.uncached
    if first > 0:
        lines.append(f"at least {first:,} were of memory that was not registered before, or not all of it")
    if sites:
        lines.append("most registrations were made at:")
        lines += [f"  {count:,} {path}:{line}, {name}" for (name, path, line), count in sites.most_common(_SITES)]
    return "\n".join(lines)
