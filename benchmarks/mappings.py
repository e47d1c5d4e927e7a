"""What watching adds to mmap + touch + munmap.

"Not watching" is a fork of the watching process: its memory is laid out in the same way, but it has no notifier. The
two take turns, a block of a millisecond or two each, on one CPU. What counts is the thread's CPU time, in pairs of
blocks during which neither had to wait for another process and no other program on the machine was attached to the
same tracepoint.
"""

from __future__ import annotations

import os
import random
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, cast

import ummunotify
from ummunotify.bpf import libbpf
from ummunotify.sources.bpf import BpfFeed

from . import bare
from .samples import Pairs, Spread, spread

PAGE = 4096
STRIDE = 4 * PAGE
"""From one region's start to the next. A region is a page."""
GAP = 2 * PAGE
"""From a region's start to where a page that is not watched is mapped and unmapped."""
AREA = 0x1000_0000_0000
"""Where the regions are: far below anything that the kernel places itself."""
OUTSIDE = 0x0800_0000_0000
BLOCK = 100
"""How many times to map, touch and unmap between two looks at the clock."""
SCATTERED = 1000
OUT, BETWEEN, HIT = "outside", "between", "hit"
"""Where the changes are: in a hundred places, over and over. Each hit is the first since its region was renewed."""
BETWEEN_SCATTERED, HIT_SCATTERED = "between, scattered", "hit, scattered"
"""The same in a thousand places at random, so that what is needed for each is no longer in the nearest caches."""
WARM_UP = 30
_BLOCK_RESULT = struct.Struct("=dd?")


class Budget(NamedTuple):
    """How long to measure: until the median is known this well, but neither shorter nor longer than this."""

    doubt: float
    at_least: float
    at_most: float


def until(budget: Budget, doubt: Callable[[], float]) -> Iterator[int]:
    """Numbers rounds for as long as the budget says."""
    begin = time.monotonic()
    number = 0
    while True:
        yield number
        number += 1
        passed = time.monotonic() - begin
        if passed >= budget.at_most or (passed >= budget.at_least and number % 16 == 0 and doubt() <= budget.doubt):
            return


def pin() -> None:
    """Stay on one CPU, and so do the children."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


class Case(NamedTuple):
    """A block's worth of addresses after the other, and whether they are in watched regions."""

    blocks: list[bare.Addresses]
    hit: bool

    def block(self, number: int) -> bare.Addresses:
        return self.blocks[number % len(self.blocks)]


def _case(addresses: list[int], hit: bool) -> Case:
    for address in addresses:
        bare.unmap(address, PAGE)
    repeated = addresses if len(addresses) >= BLOCK else (addresses * BLOCK)[:BLOCK]
    return Case([bare.addresses(repeated[i : i + BLOCK]) for i in range(0, len(repeated), BLOCK)], hit)


def _cases(regions: int) -> dict[str, Case]:
    """Where to map and unmap. What lies around each of the places stays mapped, so that page tables stay too."""
    bare.reserve(OUTSIDE, BLOCK * STRIDE)
    bare.reserve(AREA, regions * STRIDE)
    pick = random.Random(2010)
    cases = {OUT: _case([OUTSIDE + i * STRIDE + GAP for i in pick.sample(range(BLOCK), BLOCK)], False)}
    if regions > 1:
        gaps = [AREA + i * STRIDE + GAP for i in pick.sample(range(regions - 1), min(BLOCK + SCATTERED, regions - 1))]
        cases[BETWEEN] = _case(gaps[:BLOCK], False)
        if len(gaps) == BLOCK + SCATTERED:
            cases[BETWEEN_SCATTERED] = _case(gaps[BLOCK:], False)
    if regions >= BLOCK:
        hits = [AREA + i * STRIDE for i in pick.sample(range(regions), min(BLOCK + SCATTERED, regions))]
        cases[HIT] = _case(hits[:BLOCK], True)
        if len(hits) == BLOCK + SCATTERED:
            cases[HIT_SCATTERED] = _case(hits[BLOCK:], True)
    return cases


def _watch(umn: ummunotify.Notifier, regions: int) -> None:
    order = list(range(regions))
    random.Random(1).shuffle(order)
    for i in order:
        umn.watch((AREA + i * STRIDE, PAGE))


@contextmanager
def _not_watching(cases: dict[str, Case]) -> Iterator[Callable[[str, int], bare.Timing]]:
    """A fork of this process that times blocks on demand."""
    names = list(cases)
    ask_read, ask = os.pipe()
    answer, answer_write = os.pipe()
    child = os.fork()
    if not child:
        os.close(ask)
        try:
            while request := os.read(ask_read, 2):
                os.write(answer_write, _BLOCK_RESULT.pack(*_timed(cases[names[request[0]]], request[1])))
        finally:
            os._exit(0)

    def timed(name: str, number: int) -> bare.Timing:
        os.write(ask, bytes((names.index(name), number % 256)))
        return bare.Timing(*_BLOCK_RESULT.unpack(os.read(answer, _BLOCK_RESULT.size)))

    os.close(ask_read)
    os.close(answer_write)
    try:
        yield timed
    finally:
        os.close(ask)
        os.close(answer)
        os.waitpid(child, 0)


_warm_up: list[bare.Addresses] = []


def _timed(case: Case, number: int) -> bare.Timing:
    if not _warm_up:
        bare.reserve(OUTSIDE - 2 * PAGE, PAGE)
        _warm_up.append(bare.addresses([OUTSIDE - 4 * PAGE] * WARM_UP))
    bare.churn(_warm_up[0])
    return bare.churn(case.block(number))


class Added(NamedTuple):
    """What was found with a number of regions, by where the changes are: outside, between, hit."""

    regions: int
    pairs: dict[str, Pairs]
    program: dict[str, float]
    """How long the BPF program ran for each munmap, by the kernel's own count; that includes the counting."""
    bytes: int
    """Shared memory of the table."""
    disturbed: float
    """The fraction of the pairs that were dropped."""


def added(regions: int, budget: Budget) -> Added:
    """To be called in a process of its own."""
    pin()
    cases = _cases(regions)
    pairs = {name: Pairs() for name in cases}
    tried = 0
    with ummunotify.open() as umn:
        _watch(umn, regions)

        def watching(name: str, number: int) -> bare.Timing:
            timing = _timed(cases[name], number)
            if cases[name].hit:
                _settle(umn, len(cases[name].block(number)))
            return timing

        with _not_watching(cases) as not_watching:
            for number in until(budget, lambda: max(_doubt(of) for of in pairs.values())):
                for name, of in pairs.items():
                    tried += 1
                    before = bare.probes()
                    if number % 2:
                        first, second = watching(name, number), not_watching(name, number)
                    else:
                        second, first = not_watching(name, number), watching(name, number)
                    if before == bare.probes() >= 1 and not first.disturbed and not second.disturbed:
                        of.add(first.cpu, second.cpu)
            program = {name: _program_time(umn, partial(watching, name, 0)) for name in cases}
        kept = sum(len(of.times) for of in pairs.values())
        return Added(regions, pairs, program, int(umn.stats["bytes"]), 1 - kept / tried)


def _doubt(pairs: Pairs) -> float:
    return pairs.ratio.doubt if len(pairs.times) > 20 else 1.0


def _settle(umn: ummunotify.Notifier, expected: int) -> None:
    """The regions that were hit are as they were before."""
    events = umn.read()
    if len(events) != expected:
        raise RuntimeError(f"{expected} regions were hit, {len(events)} reported")
    for event in events:
        event.region.renew()


def _program_time(umn: ummunotify.Notifier, run: Callable[[], object]) -> float:
    program = cast(BpfFeed, umn._feed)._maps.fds["program"]
    statistics = libbpf.enable_statistics()
    times = []
    try:
        for _ in range(20):
            before = libbpf.program_info(program)
            run()
            after = libbpf.program_info(program)
            times.append((after.run_time_ns - before.run_time_ns) / (after.run_cnt - before.run_cnt))
    finally:
        os.close(statistics)
    return spread(times).median


def other_process(regions: int, budget: Budget) -> Pairs:
    """In this process, with and without another one that watches. To be called in a process of its own."""
    case = _cases(1)[OUT]
    ask_read, ask = os.pipe()
    answer, answer_write = os.pipe()
    child = os.fork()
    if not child:
        os.close(ask)
        try:
            while os.read(ask_read, 1):
                with ummunotify.open() as umn:
                    _watch(umn, regions)
                    os.write(answer_write, b"o")
                    os.read(ask_read, 1)
                os.write(answer_write, b"c")
        finally:
            os._exit(0)
    os.close(ask_read)
    os.close(answer_write)
    pin()
    pairs = Pairs()

    def toggle() -> None:
        os.write(ask, b"t")
        os.read(answer, 1)

    def measure(probes: int) -> float | None:
        times = []
        for number in range(16):
            if bare.probes() == probes:
                timing = _timed(case, number)
                if not timing.disturbed and bare.probes() == probes:
                    times.append(timing.cpu)
        return spread(times).median if len(times) >= 4 else None

    for number in until(budget, lambda: _doubt(pairs)):
        first = measure(number % 2)
        toggle()
        second = measure(1 - number % 2)
        if first is not None and second is not None:
            pairs.add(*((second, first) if number % 2 == 0 else (first, second)))
    os.close(ask)
    os.waitpid(child, 0)
    return pairs


def one_munmap(regions: int, rounds: int) -> tuple[Spread, Spread]:
    """One munmap of an area in which so many regions are watched, in ns, and not watched. In a process of its own."""
    pin()
    hit, bare_times = [], []
    with ummunotify.open() as umn:
        _watch(umn, regions)
        for _ in range(rounds):
            bare.reserve(AREA, regions * STRIDE)
            hit.append(bare.unmap(AREA, regions * STRIDE).cpu)
            _settle(umn, regions)
            bare.reserve(OUTSIDE, regions * STRIDE)
            bare_times.append(bare.unmap(OUTSIDE, regions * STRIDE).cpu)
    return spread(hit), spread(bare_times)
