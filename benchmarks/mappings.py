"""What watching adds to mmap + touch + munmap.

"Not watching" is a fork of the watching process: its memory is laid out in the same way, but it has no notifier. The
two take turns, a block of a millisecond or two each, on one CPU. What counts is the thread's CPU time, in pairs of
blocks during which neither had to wait for another process, and if possible no other program on the machine was
attached to the same tracepoint.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import ummunotify
from ummunotify._abi import Probe
from ummunotify.bpf import feeder, libbpf

from . import bare
from .samples import Pairs, Spread, spread

PAGE = mmap.PAGESIZE
STRIDE = 4 * PAGE
"""From one region's start to the next. A region is a page."""
GAP = 2 * PAGE
"""From a region's start to where a page that is not watched is mapped and unmapped."""
AREA = 0x1000_0000_0000
"""Where the regions are: far below anything that the kernel places itself."""
OUTSIDE = 0x0800_0000_0000
BLOCK = 100
"""How many times to map, touch and unmap between two looks at the clock."""
ENOUGH = 100
"""So many pairs are enough to do without those during which other programs were attached to the tracepoint."""
SCATTERED = 1000
ENOUGH = 100
"""So many pairs are enough to do without those during which other programs were attached to the tracepoint."""
SCATTERED = 1000
PATIENCE = 120.0
"""Seconds after which nothing undisturbed can be expected any more."""
OUT, BETWEEN, HIT = "outside", "between", "hit"
"""Where the changes are, a hundred places: before all regions; in the gaps between neighbours; in the neighbours
themselves, each hit being the first since its region was renewed."""
BETWEEN_SCATTERED, HIT_SCATTERED = "between, scattered", "hit, scattered"
"""The same in a thousand places at random, so that little of what is needed for one is in the caches from another."""
_KVM_CREATE_VM = 0xAE01
_REQUEST = struct.Struct("=32sI")
_RESULT = struct.Struct("=dd?")


class Budget(NamedTuple):
    """How long to measure: until the median is known this well, but neither shorter nor longer than this."""

    doubt: float
    at_least: float
    at_most: float


def until(budget: Budget, doubt: Callable[[], float], measured: Callable[[], bool] = lambda: True) -> Iterator[int]:
    """Numbers rounds for as long as the budget says, and on a busy machine until anything is measured."""
    begin = time.monotonic()
    number = 0
    while True:
        yield number
        number += 1
        passed = time.monotonic() - begin
        if not measured() and passed < PATIENCE:
            continue
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


def _blocks(addresses: list[int]) -> list[bare.Addresses]:
    return [bare.addresses(addresses[i : i + BLOCK]) for i in range(0, len(addresses), BLOCK)]


def places(regions: int) -> dict[str, Case]:
    """Where to map and unmap. What lies around each of the places stays mapped, so that page tables stay too."""
    bare.reserve(OUTSIDE, BLOCK * STRIDE)
    bare.reserve(AREA, regions * STRIDE)
    scattered = random.Random(2010).sample(range(regions), SCATTERED) if regions > SCATTERED else []
    middle = max(0, (regions - BLOCK) // 2)
    hit = list(range(middle, min(middle + BLOCK, regions)))
    between = [i for i in hit if i < regions - 1]
    where = {
        OUT: [OUTSIDE + i * STRIDE + GAP for i in range(BLOCK)],
        BETWEEN: [AREA + i * STRIDE + GAP for i in between * (BLOCK // max(1, len(between)))],
        BETWEEN_SCATTERED: [AREA + i * STRIDE + GAP for i in scattered],
        HIT: [AREA + i * STRIDE for i in hit],
        HIT_SCATTERED: [AREA + i * STRIDE for i in scattered],
    }
    for addresses in where.values():
        for address in set(addresses):
            bare.unmap(address, PAGE)
    hits = (HIT, HIT_SCATTERED)
    return {name: Case(_blocks(addresses), name in hits) for name, addresses in where.items() if addresses}


def _watch(umn: ummunotify.Notifier, regions: int) -> None:
    order = list(range(regions))
    random.Random(1).shuffle(order)
    for i in order:
        umn.watch((AREA + i * STRIDE, PAGE))


@contextmanager
def _answering(make: Callable[[], Callable[[bytes], bytes]]) -> Iterator[Callable[[bytes], bytes]]:
    """A fork of this process that calls what `make` makes there with what it is sent, and sends back the result."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if not child:
        try:
            ours.close()
            answer = make()
            while request := theirs.recv(100):
                theirs.send(answer(request))
        finally:
            os._exit(0)
    theirs.close()

    def ask(request: bytes) -> bytes:
        ours.send(request)
        return ours.recv(100)

    try:
        yield ask
    finally:
        ours.close()
        os.waitpid(child, 0)


def timed(case: Case, number: int) -> bare.Timing:
    """Times a block, when the process has run for a while since another had the CPU."""
    if not _warm_up:
        bare.reserve(OUTSIDE - 2 * PAGE, PAGE)
        _warm_up.append(bare.addresses([OUTSIDE - 4 * PAGE] * BLOCK))
    bare.churn(_warm_up[0] if case.hit else case.block(number - 1))
    return bare.churn(case.block(number))


_warm_up: list[bare.Addresses] = []


class Noise(NamedTuple):
    dropped: float
    """The fraction of the pairs during which another process had the CPU."""
    others: float
    """How many other programs were attached to the tracepoint during those that count, on average. Each has to find
    out, for each munmap of a process that is subscribed, that it is not about its own tables."""


class Added(NamedTuple):
    """What was found with a number of regions, by where the changes are."""

    regions: int
    pairs: dict[str, Pairs]
    program: dict[str, float]
    """How long the BPF program ran for each munmap, by the kernel's own count; that includes the counting."""
    bytes: int
    """Shared memory of the table."""
    noise: Noise


def added(regions: int, budget: Budget) -> Added:
    """Against not watching. To be called in a process of its own."""
    pin()
    cases = places(regions)
    with ummunotify.open() as umn:
        _watch(umn, regions)

        def watching(name: str, number: int) -> bare.Timing:
            timing = timed(cases[name], number)
            if cases[name].hit:
                _settle(umn, len(cases[name].block(number)))
            return timing

        pairs, noise = in_turns(cases, watching, int(umn.source == "bpf:kvm"), budget)
        program = {name: _program_time(umn, case) for name, case in cases.items()}
        return Added(regions, pairs, program, int(umn.stats.bytes), noise)


def subscribed(budget: Budget) -> Pairs:
    """With nothing but an empty virtual machine, against without. To be called in a process of its own."""
    pin()
    cases = {OUT: places(1)[OUT]}
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    machine = fcntl.ioctl(kvm, _KVM_CREATE_VM, 0)
    try:
        return in_turns(cases, lambda name, number: timed(cases[name], number), 0, budget)[0][OUT]
    finally:
        os.close(machine)
        os.close(kvm)


def in_turns(
    cases: dict[str, Case], watching: Callable[[str, int], bare.Timing], own: int, budget: Budget
) -> tuple[dict[str, Pairs], Noise]:
    """Times with `watching`, for which so many programs are attached, and in a process that does not watch."""
    alone = {name: Pairs() for name in cases}
    in_company = {name: Pairs() for name in cases}
    tried = company = 0

    def answer(request: bytes) -> bytes:
        name, number = _REQUEST.unpack(request)
        return _RESULT.pack(*timed(cases[name.rstrip(b"\0").decode()], number))

    with _answering(lambda: answer) as ask:

        def not_watching(name: str, number: int) -> bare.Timing:
            return bare.Timing(*_RESULT.unpack(ask(_REQUEST.pack(name.encode(), number))))

        def measured() -> bool:
            return all(in_company[name].times or alone[name].times for name in cases)

        for number in until(budget, lambda: max(doubtful(of) for of in alone.values()), measured):
            for name in cases:
                tried += 1
                others = bare.probes() - own
                if number % 2:
                    first, second = watching(name, number), not_watching(name, number)
                else:
                    second, first = not_watching(name, number), watching(name, number)
                if others == bare.probes() - own and not first.disturbed and not second.disturbed:
                    company += others
                    (in_company if others else alone)[name].add(first.cpu, second.cpu)
    kept, kept_alone = (sum(len(of.times) for of in pairs.values()) for pairs in (in_company, alone))
    dropped = 1 - (kept + kept_alone) / tried
    if all(len(of.times) >= ENOUGH for of in alone.values()):
        return alone, Noise(dropped, 0)
    if not measured():
        raise RuntimeError("the machine is too busy to measure anything")
    return {name: in_company[name] + alone[name] for name in cases}, Noise(dropped, company / (kept + kept_alone))


def doubtful(pairs: Pairs) -> float:
    return pairs.ratio.doubt if len(pairs.times) > 20 else 1.0


def _settle(umn: ummunotify.Notifier, expected: int) -> None:
    """The regions that were hit are as they were before."""
    events = umn.read()
    if len(events) < expected:  # more: false alarms, which a busy machine may cause
        raise RuntimeError(f"{expected} regions were hit, {len(events)} reported")
    for event in events:
        event.region.renew()


def _program_time(umn: ummunotify.Notifier, case: Case) -> float:
    program = feeder._program(Probe[umn.source.partition(":")[2].upper()]).code.number()
    statistics = libbpf.enable_statistics()
    times = []
    try:
        for number in range(20):
            block = case.block(number)
            before = libbpf.program_info(program)
            bare.churn(block)
            after = libbpf.program_info(program)
            times.append((after.run_time_ns - before.run_time_ns) / (after.run_cnt - before.run_cnt))
            if case.hit:
                _settle(umn, len(block))
    finally:
        os.close(statistics)
    return spread(times).median


def other_process(regions: int, budget: Budget) -> Pairs:
    """In this process, with and without another one that watches. To be called in a process of its own."""
    case = places(1)[OUT]
    pairs = Pairs()
    with _answering(partial(_watch_now_and_then, regions)) as toggle:
        pin()
        for number in until(budget, lambda: doubtful(pairs)):
            watched = number % 2
            first = _median_time(case)
            toggle(b"t")
            second = _median_time(case)
            if first and second:
                pairs.add(*((first, second) if watched else (second, first)))
    return pairs


def _watch_now_and_then(regions: int) -> Callable[[bytes], bytes]:
    """Opens a notifier and closes it, in turns."""
    opened: list[ummunotify.Notifier] = []

    def toggle(_: bytes) -> bytes:
        if opened:
            opened.pop().close()
        else:
            opened.append(ummunotify.open())
            _watch(opened[0], regions)
        return b"."

    return toggle


def _median_time(case: Case) -> float | None:
    times = [timing.cpu for timing in (timed(case, number) for number in range(40)) if not timing.disturbed]
    return spread(times).median if len(times) >= 4 else None


def one_munmap(regions: int, rounds: int) -> tuple[Spread, Spread]:
    """One munmap of an area in which so many regions are watched, in ns, and not watched. In a process of its own."""
    pin()
    watched: list[float] = []
    not_watched: list[float] = []
    with ummunotify.open() as umn:
        _watch(umn, regions)
        for _ in range(rounds):
            for times, area in ((watched, AREA), (not_watched, OUTSIDE)):
                bare.reserve(area, regions * STRIDE)
                times.append(bare.unmap(area, regions * STRIDE).cpu)
            _settle(umn, regions)
    return spread(watched), spread(not_watched)
