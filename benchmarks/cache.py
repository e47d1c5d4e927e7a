"""What the registration cache costs, beside the caches of UCX, and what it saves."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from . import report
from .rcache import calls, files, hits, libfabric

TITLE = "The registration cache"


def section(quick: bool, folder: Path) -> str:
    native = hits.measure(quick)
    python = calls.measure(quick)
    reading = files.measure(quick)
    told = hits.measure_told(quick)
    fabric = libfabric.measure(quick)
    return "\n".join(
        [_native(native), _threads(native), _told(told), _libfabric(fabric), _python(python), _files(reading)]
    )


def _ns(value: float) -> str:
    return f"{value:.1f} ns" if value < 100 else f"{value:.0f} ns"


def _native(native: hits.Native) -> str:
    rows = []
    for order, pairs in native.pairs.items():
        ours = median(ours for ours, _ in pairs)
        best = min(ours for ours, _ in pairs)
        theirs = [theirs for _, theirs in pairs if theirs is not None]
        faster = not theirs or median(ours / theirs for ours, theirs in pairs if theirs is not None) <= 0.7
        rows.append(
            report.Row(
                f"a hit in C, {hits.REGISTRATIONS:,} registrations {order}",
                "12 ns, and 0.7 times UCX",
                f"{_ns(ours)} (best {_ns(best)})",
                f"{native.ucx} {_ns(median(theirs))} (best {_ns(min(theirs))})" if theirs else "no UCX here",
                ours <= 12 and faster,
            )
        )
    rows.append(report.Row("a miss in C, the registrar not counted", "", _ns(native.miss), "", None))
    return (
        "A hit is `ummunotify_cache_find` and `ummunotify_cache_release`; in UCX, `ucs_rcache_get` and "
        "`ucs_rcache_region_put`. "
        "The two take turns on the same addresses, each walks all of them once before it is timed, and what counts is "
        "CPU time in blocks that no other process interrupted (the median; the best block in brackets). All that this "
        "section measures runs at real-time priority, if that is allowed.\n\n" + report.table(rows)
    )


def _threads(native: hits.Native) -> str:
    rows = []
    for name, times in native.threads.items():
        ours = name == hits.OURS
        one, many = (min(column) for column in zip(*times, strict=True))
        scale = one * hits.THREADS / many
        rows.append(
            report.Row(
                f"{hits.THREADS} threads that hit different buffers, against one" + ("" if ours else f" ({name})"),
                "1.9 times as many hits on 2 CPUs" if ours else "",
                f"{scale:.2f} times as many",
                f"one thread: {_ns(one)} each",
                scale >= 1.9 if ours else None,
            )
        )
    return (
        "Wall-clock time, the best of many short runs, in turns. Threads that have a cache each share nothing at all, "
        "so what they lack is the machine's.\n\n" + report.table(rows)
    )


def _told(times: hits.Told) -> str:
    if not times:
        return "UCX's cache, told of changes, is not beside them: there is no UCX here.\n"
    rows = []
    for order, pairs in times.items():
        ratio = median(through / past for past, through in pairs)
        rows.append(
            report.Row(
                f"a hit in UCX's cache, {hits.REGISTRATIONS:,} registrations {order}",
                "1.25 times UCX alone",
                f"{ratio:.2f} times ({_ns(min(through for _, through in pairs))} at best)",
                f"UCX alone: {_ns(min(past for past, _ in pairs))} at best",
                ratio <= 1.25,
            )
        )
    return (
        "What `ummunotify run --ucx` adds to a look-up: `ucs_rcache_get` and `ucs_rcache_region_put` as the program "
        "calls them, and UCX's own behind that. In one process, in turns, CPU time, the median of the ratios:\n\n"
        + report.table(rows)
    )


def _libfabric(figures: libfabric.Figures) -> str:
    if not figures:
        return "libfabric's cache is not beside them: there is no libfabric.a of version 1.17 here.\n"
    rows = []
    for (count, order), pairs in figures.items():
        ratio = median(ours / theirs for theirs, ours in pairs)
        rows.append(
            report.Row(
                f"a search and a delete in libfabric's cache, {count:,} registrations {order}",
                "1.25 times memhooks",
                f"{ratio:.2f} times ({_ns(min(ours for _, ours in pairs))} at best)",
                f"memhooks: {_ns(min(theirs for theirs, _ in pairs))} at best",
                ratio <= 1.25,
            )
        )
    return (
        "libfabric's cache with our monitor, and with its own, which patches libc. One after the other on the same "
        "addresses, CPU time, the median of the ratios (Debian's static libfabric 1.17; `ummunotify run`):\n\n"
        + report.table(rows)
    )


def _python(python: dict[str, float]) -> str:
    goals = {calls.PAIR: 85, calls.ARRAY: 100}
    rows = [
        report.Row(
            f"`{name}`",
            f"{goals[name]} ns" if name in goals else "",
            _ns(value),
            f"`{calls.BASELINE}`: {_ns(python[calls.BASELINE])}",
            value <= goals[name] if name in goals else None,
        )
        for name, value in python.items()
        if name != calls.BASELINE
    ]
    return (
        "Hits in Python, by pyperf (CPU time). `pair` is `(address, length)`, `array` a NumPy array of 1 MiB. What the "
        "interpreter needs for the `with` statement itself can be seen from that of a `threading.Lock`:\n\n"
        + report.table(rows)
    )


def _files(reading: files.Reading) -> str:
    lines = ["| how | GiB/s | each block | CPU time of it |", "|---|---|---|---|"]
    for name, (wall, cpu) in reading.times.items():
        lines.append(
            f"| {name} | {files.BLOCK / wall / (1 << 30) * 1e9:.2f} | {wall / 1000:.1f} us | {cpu / 1000:.1f} us |"
        )
    return (
        f"To read {reading.size >> 20} MiB from the page cache in blocks of 1 MiB, in Python, into {files.BUFFERS} "
        "buffers in turn (the median of several passes, in turns):\n\n"
        + "\n".join(lines)
        + "\n\nFrom the page cache all three copy, and a fixed buffer is copied to page by page: plain `read` is the "
        "fastest. Where a device writes to the buffer (RDMA, a GPU, direct I/O) there is no copy, and what registering "
        "costs for each block is what the cache saves.\n"
    )
