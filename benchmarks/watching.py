"""What watching costs: the process that unmaps, other processes, the calls, memory."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar

import pyperf  # type: ignore[import-untyped]

import ummunotify

from . import bare, calls, curve, report
from .mappings import (
    BETWEEN,
    BETWEEN_SCATTERED,
    HIT,
    HIT_SCATTERED,
    OUT,
    Added,
    Budget,
    added,
    one_munmap,
    other_process,
    subscribed,
)
from .report import Row
from .samples import Pairs, Spread

TITLE = "Watching"
MANY = 100_000
KINDS = {
    OUT: "outside all regions",
    BETWEEN: "between regions",
    BETWEEN_SCATTERED: "between regions, at random",
    HIT: "each hits a region",
    HIT_SCATTERED: "each hits a region, at random",
}
P = ParamSpec("P")
T = TypeVar("T")


class Figures(NamedTuple):
    added: dict[int, Added]
    """By the number of regions."""
    subscribed: Pairs
    other: Pairs
    one_munmap: tuple[Spread, Spread]
    calls: Mapping[str, pyperf.Benchmark]
    check: float
    few: int
    """Shared memory of a notifier with ten regions."""


def measure(quick: bool) -> Figures:
    numbers = (1, 2, MANY) if quick else (1, 2, 10, 100, 1000, 10_000, MANY, 1_000_000)
    short = Budget(0.003, 0, 1) if quick else Budget(0.003, 5, 10)
    long = short if quick else Budget(0.002, 10, 20)
    return Figures(
        {n: _alone(added, n, long if n in (1, 2, MANY, 1_000_000) else short) for n in numbers},
        _alone(subscribed, short),
        _alone(other_process, MANY, long),
        _alone(one_munmap, MANY, 3 if quick else 15),
        calls.measure(quick),
        min(bare.check(100 if quick else 5000).cpu for _ in range(10)),
        _few(),
    )


def _alone(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """In a process of its own, whose address space nobody else has used."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def _few() -> int:
    with ummunotify.open() as umn:
        for i in range(10):
            umn.watch((0x1000_0000_0000 + i * 0x4000, 0x1000))
        return int(umn.stats.bytes)


def rows(figures: Figures) -> list[Row]:
    """Each against its goal."""
    return [
        *(_slowdown(figures.added[MANY], name, 1.2 if name in (HIT, HIT_SCATTERED) else 1.15) for name in KINDS),
        _other(figures.other),
        *_growth(figures.added),
        *(_call(figures.calls, name) for name in (calls.CHANGED, calls.VALID)),
        _time("the check in C (`umn_region_valid`)", 2, figures.check),
        _time("`watch` + `unwatch` in Python, 100,000 watched", 1500, _median(figures.calls[calls.WATCH])),
        _one_munmap(*figures.one_munmap),
        _size("shared memory for each of 100,000 regions", 96, figures.added[MANY].bytes / MANY),
        _size("shared memory of a notifier with ten regions", 256 << 10, figures.few),
    ]


def _slowdown(of: Added, name: str, goal: float) -> Row:
    ratio, extra, without = of.pairs[name].ratio, of.pairs[name].added, of.pairs[name].without
    return Row(
        f"mmap + touch + munmap, {of.regions:,} watched, {KINDS[name]}",
        f"{goal:.2f}x",
        f"{ratio.median:.3f}x ± {ratio.doubt:.3f} (+{extra.median:.0f} ns)",
        f"not watching: {without.median:,.0f} ns",
        ratio.median <= goal,
    )


def _other(pairs: Pairs) -> Row:
    ratio = pairs.ratio
    return Row(
        f"the same while another process watches {MANY:,}",
        "1.01x",
        f"{ratio.median:.3f}x ± {ratio.doubt:.3f}",
        f"no process watching: {pairs.without.median:,.0f} ns",
        ratio.median <= 1.01,
    )


def _growth(by_number: Mapping[int, Added]) -> list[Row]:
    """Of the added time; "between" needs two regions, "at random" is compared with "between"."""
    most = by_number[max(by_number)]
    found = []
    for name, (few, begin) in {
        OUT: (1, OUT),
        BETWEEN: (2, BETWEEN),
        BETWEEN_SCATTERED: (2, BETWEEN),
        HIT: (1, HIT),
        HIT_SCATTERED: (1, HIT),
    }.items():
        before, after = (of.added.median for of in (by_number[few].pairs[begin], most.pairs[name]))
        found.append(
            Row(
                f"growth of the added time from {few} to {most.regions:,} regions, {KINDS[name]}",
                "3x",
                f"{after / before:.2f}x (+{after:.0f} ns)",
                f"{few} watched: +{before:.0f} ns",
                after <= 3 * before,
            )
        )
    return found


def _median(benchmark: pyperf.Benchmark) -> float:
    """In ns."""
    return float(benchmark.median()) * 1e9


def _call(benchmarks: Mapping[str, pyperf.Benchmark], name: str) -> Row:
    time, slot = _median(benchmarks[name]), _median(benchmarks[calls.SLOT])
    return Row(
        f"`{name}` in Python",
        "35 ns and 1.5x",
        f"{time:.1f} ns, {time / slot:.2f}x",
        f"a slot of a Python object: {slot:.1f} ns",
        time <= 35 and time <= 1.5 * slot,
    )


def _time(what: str, goal: float, measured: float) -> Row:
    return Row(what, f"{goal:,} ns", f"{measured:,.1f} ns", "", measured <= goal)


def _one_munmap(watched: Spread, not_watched: Spread) -> Row:
    return Row(
        f"one munmap that hits {MANY:,} regions",
        "10 ms",
        f"{watched.median / 1e6:.1f} ms ± {watched.doubt / 1e6:.1f}",
        f"not watched: {not_watched.median / 1e6:.2f} ms",
        watched.median <= 10e6,
    )


def _size(what: str, goal: int, measured: float) -> Row:
    return Row(what, f"{goal:,} bytes", f"{measured:,.0f} bytes", "", measured <= goal)


def section(quick: bool, folder: Path) -> str:
    return page(measure(quick), folder)


def page(figures: Figures, folder: Path) -> str:
    """The text, and the picture that goes with it."""
    most = figures.added[max(figures.added)]
    curve.draw(list(figures.added.values()), KINDS, figures.subscribed.added.median, folder / "benchmarks.svg")
    return f"""\
{report.table(rows(figures))}
![The added time against the number of regions](benchmarks.svg)

{_method(figures)}

{_limits(figures.added[MANY], most, figures.subscribed)}
"""


def _method(figures: Figures) -> str:
    noise = [of.noise for of in figures.added.values()]
    dropped = [of.dropped for of in noise]
    others = sum(of.others for of in noise) / len(noise)
    company = (
        f"On average {others:.1f} notifiers of other processes were open meanwhile, which could not be helped. The"
        " program of each runs for each munmap of a process that watches: the ratios are better without."
        if others
        else "No other notifier was open on the machine meanwhile."
    )
    many = figures.added[MANY].pairs[BETWEEN].ratio
    return f"""\
### How it is measured

A region is a page, and so is what is mapped, written to and unmapped: blocks of 100 times, in C, at neighbouring places
in turn, or at random among all regions, where the caches are of less help. A hit is the first since its region was
renewed. "Not watching" is a fork of the watching process, so its memory is laid out in the same way. The two take turns
on one CPU. The time is the thread's CPU time.

A pair of blocks during which another process had the CPU is dropped ({_percent(min(dropped))} to
{_percent(max(dropped))} of the pairs). {company} A figure is the median over all pairs; after ± stands half of its 95 %
confidence interval. How much the machine is disturbed by what else it does: of the {many.samples:,} pairs with {MANY:,}
regions (between regions), half were from {many.quarter:.2f}x to {many.three_quarters:.2f}x.

The Python figures are pyperf's, in CPU time, with {MANY:,} regions watched. The loop itself
({_median(figures.calls[calls.NOTHING]):.1f} ns) is part of them and of their baseline. What CPython 3.11 and later do
with a slot of a Python object is an instruction of its own; an attribute that is computed by C is looked up in the type
and called."""


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.0f} %"


def _limits(many: Added, most: Added, kernel: Pairs) -> str:
    share = kernel.ratio.median - 1
    return f"""\
### What limits it

An empty virtual machine, without which the kernel tells nobody, adds {kernel.added.median:.0f} ns ({_percent(share)})
to each munmap by itself: the MMU notifier calls KVM, which takes its locks. Only what comes on top is ours to save:

| {MANY:,} regions | added | of that, by the kernel's count, the BPF program |
|---|---|---|
{_programs(many)}

The kernel's count includes the counting (some 30 ns); and nothing else has the CPU between two blocks, so the caches
are warmer than in the pairs. With {most.regions:,} regions the program takes {most.program[BETWEEN]:.0f} ns between
regions, and {most.program[BETWEEN_SCATTERED]:.0f} ns at random: the table has {most.bytes / 1e6:.0f} MB then, and most
of each path through the index comes from memory, by addresses that a virtual machine translates twice. The ratios
depend on the baseline: where mapping and unmapping a page takes less than here, they are worse."""


def _programs(many: Added) -> str:
    return "\n".join(
        f"| {text} | {many.pairs[name].added.median:.0f} ns | {many.program[name]:.0f} ns |"
        for name, text in KINDS.items()
    )
