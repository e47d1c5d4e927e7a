"""Where invalidations come from: the sources that there are, best first."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from ..errors import UnknownSourceError
from .base import Feed

ENVIRONMENT = "UMMUNOTIFY_SOURCE"


class Candidate(NamedTuple):
    """A source with one of its probes."""

    name: str
    """`bpf:kvm`"""
    open: Callable[[], Feed]
    """Raises UnavailableError."""


def _open_bpf(probe: str) -> Feed:
    from .bpf import BpfFeed, ZapFeed

    return ZapFeed() if probe == "zap" else BpfFeed(probe)


def _open_daemon() -> Feed:
    from .daemon import open_feed

    return open_feed()


def _open_uffd() -> Feed:
    from .uffd import UffdFeed

    return UffdFeed()


_ALL = [
    Candidate("bpf:mmu_notifier", lambda: _open_bpf("mmu_notifier")),
    Candidate("bpf:kvm", lambda: _open_bpf("kvm")),
    Candidate("bpf:zap", lambda: _open_bpf("zap")),
    Candidate("daemon", _open_daemon),
    Candidate("uffd", _open_uffd),
]


def every() -> list[Candidate]:
    """All there are, best first, whatever the environment says."""
    return list(_ALL)


def candidates(source: str | None = None, probe: str | None = None) -> list[Candidate]:
    """The sources to try, best first; all of them, or what the arguments or the environment insist on.

    Raises UnknownSourceError.
    """
    origin = ""
    if source is None and probe is None and (named := os.environ.get(ENVIRONMENT)):
        source, _, rest = named.partition(":")
        probe = rest or None
        origin = f" (from {ENVIRONMENT})"
    chosen = [
        candidate
        for candidate in _ALL
        if source in (None, candidate.name.partition(":")[0]) and probe in (None, candidate.name.partition(":")[2])
    ]
    if not chosen:
        wanted = ":".join(part for part in (source or "*", probe) if part)
        known = ", ".join(candidate.name for candidate in _ALL)
        raise UnknownSourceError(f"there is no source {wanted!r}{origin}; there are {known}")
    return chosen
