"""What users open: notifiers, and what works here."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NamedTuple

from ._abi import Probe
from ._core import Notifier as _Notifier
from ._core import open_notifier, source_names, why_not
from .bpf import feeder
from .errors import ClosedError, SourceUnavailableError, StacksUnavailableError, UnavailableError
from .types import Invalidation


class Notifier(_Notifier):
    __doc__ = _Notifier.__doc__

    async def __aiter__(self) -> AsyncIterator[Invalidation]:
        """Invalidations as they come, until the notifier is closed."""
        import asyncio  # here, as it takes longer than all else that is imported, and a program that iterates has it

        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        # A descriptor of this iteration's own: an event loop knows each once, and several tasks may be iterating.
        with self._copy() as copy, self._waiter(lambda: loop.call_soon_threadsafe(readable.set)):
            while True:
                try:
                    # One by one: where the iteration ends, the others are left to the next reader.
                    events = self._take_one()
                except ClosedError:
                    return
                for event in events:
                    yield event
                if not events:
                    # In between the loop does not look at it, or it would spin while nothing reads.
                    loop.add_reader(copy, readable.set)
                    try:
                        await readable.wait()
                    finally:
                        loop.remove_reader(copy)
                    readable.clear()


def open(
    source: str | None = None, *, probe: str | None = None, max_regions: int | None = None, stacks: bool = False
) -> Notifier:
    """Open a notifier for this process's memory, fed by the best source that works here.

    `source` insists on one: `bpf`, `daemon` or `uffd`, the first two also with a probe, as `bpf:kvm` (or with
    `probe="kvm"`). What `Notifier.source` shows can be given back. Left out, the environment variable UMMUNOTIFY_SOURCE
    may name one in the same way. `max_regions` limits how many regions can be watched at a time, and so the memory that
    is used; without it memory is the limit.

    With `stacks` each Invalidation has the stack of its change, if it was not lost. Each change that hits a region then
    takes some microseconds more. Only the source `bpf` can do this, with the probes `kvm` and `mmu_notifier`.

    Raises SourceUnavailableError, which says of each source why not (StacksUnavailableError with `stacks`), and
    UnknownSourceError.
    """
    if probe is not None:
        source = f"{source or 'bpf'}:{probe}"
    if stacks:
        return _open_with_stacks(source, max_regions)
    return open_notifier(Notifier, source, max_regions, feeder)


def _open_with_stacks(source: str | None, max_regions: int | None) -> Notifier:
    names = source_names(source)
    reasons: dict[str, str] = {}
    for name in names:
        kind, _, probe = name.partition(":")
        if kind != "bpf":
            reasons[name] = (
                "it gives no stacks of changes; use bpf, which needs root or CAP_BPF and CAP_PERFMON, or do without"
            )
            continue
        try:
            opened = open_notifier(Notifier, name, max_regions, feeder)
        except SourceUnavailableError as error:
            reasons |= error.reasons
            continue
        try:
            opened._trace(feeder.trace(Probe[probe.upper()]))
            return opened
        except UnavailableError as error:
            reasons[name] = str(error)
            opened.close()
    why = ". ".join(
        f"{', '.join(n for n in reasons if reasons[n] == each)}: {each}" for each in dict.fromkeys(reasons.values())
    )
    raise StacksUnavailableError(f"no source with stacks is available ({why})", reasons)


class Finding(NamedTuple):
    """What became of an attempt to use a source."""

    source: str
    """`bpf:kvm`"""
    available: bool
    """It was opened, and saw a change made for it to see."""
    reason: str
    """Why it is not available."""
    remedy: str
    """What can be done about that, as far as it is known."""


def survey() -> list[Finding]:
    """Try every source, best first (as in sources/candidates.c), whatever UMMUNOTIFY_SOURCE says."""
    findings = []
    for name in ("daemon", "bpf", "uffd"):
        for candidate in source_names(name):
            try:
                with open(candidate) as opened:
                    findings.append(Finding(opened.source, True, "", ""))
            except SourceUnavailableError:
                findings += [Finding(source, False, why, remedy) for source, why, remedy in why_not()]
            except Exception as error:  # a defect of ours, which must not hide the other sources
                findings.append(Finding(candidate, False, f"{type(error).__name__}: {error}", "please report this"))
    return findings
