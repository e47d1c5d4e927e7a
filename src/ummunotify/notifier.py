"""What users open: notifiers, and what works here."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NamedTuple

from ._core import Notifier as _Notifier
from ._core import open_notifier, source_names, why_not
from .bpf import feeder
from .errors import ClosedError, SourceUnavailableError
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


def open(source: str | None = None, *, probe: str | None = None, max_regions: int | None = None) -> Notifier:
    """Open a notifier for this process's memory, fed by the best source that works here.

    `source` insists on one: `bpf`, `daemon` or `uffd`, the first two also with a probe, as `bpf:kvm` (or with
    `probe="kvm"`). What `Notifier.source` shows can be given back. Left out, the environment variable UMMUNOTIFY_SOURCE
    may name one in the same way. `max_regions` limits how many regions can be watched at a time, and so the memory that
    is used; without it memory is the limit.

    Raises SourceUnavailableError, which says of each source why not, and UnknownSourceError.
    """
    if probe is not None:
        source = f"{source or 'bpf'}:{probe}"
    return open_notifier(Notifier, source, max_regions, feeder)


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
