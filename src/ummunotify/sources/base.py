"""What a source of invalidations is, and what it says when it cannot be one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol, runtime_checkable

from ..errors import UnavailableError as UnavailableError


class Feed(Protocol):
    """A source's connection to one table.

    The notifier makes it and calls it from one thread at a time, for all feeds of the process together, and there is no
    fork meanwhile; but for `acknowledge`, `doubtful` and `wake_fd` once that has been made.
    """

    name: str
    """As `Notifier.source` shows it: `bpf:kvm`."""

    def add_segment(self, pages: int) -> int:
        """Make memory for the table's next segment, which feeders see from then on.

        Returns the address of the mapping. OSError, with nothing left behind.
        """

    def bind(self) -> None:
        """Begin to feed: the changes of this process from now on. Called once there is a segment.

        Raises UnavailableError.
        """

    def wake_fd(self) -> int:
        """The descriptor that polls readable after a wake-up; made when first asked for. OSError."""

    def acknowledge(self) -> None:
        """Make the descriptor unreadable until the next wake-up."""

    def doubtful(self) -> bool:
        """May something have been missed since this was last asked?"""

    def close(self) -> None:
        """Stop feeding and release everything but the segments' mappings. May be called twice."""

    def abandon(self) -> None:
        """The same in the child of a fork, without disturbing the parent."""


class Exercise(NamedTuple):
    """A change of a page of our own."""

    name: str
    page: int
    act: Callable[[], object]


@runtime_checkable
class ExercisedFeed(Feed, Protocol):
    """One that has to be tried with more than one kind of change."""

    def exercises(self) -> Iterable[Exercise]:
        """One at a time: what it needs is gone when the next is asked for. OSError."""


@runtime_checkable
class ToldFeed(Feed, Protocol):
    """One that has to be told what is watched, and whose news may come late: see umn_source in core/table.h."""

    source_address: int
    """Of its struct umn_source."""

    def refusal(self, number: int, start: int, end: int) -> Exception:
        """What to raise when it refuses to watch [start, end) with this errno."""
