"""Fire every known way to change a mapping on this machine, and look whether a notifier sees it.

The list of the ways is in changes.py; the tests run the same list.
"""

from __future__ import annotations

import array
import contextlib
import enum
import warnings
from collections.abc import Iterator
from typing import NamedTuple, Self

from .._core import Region
from ..errors import TooManyRegionsError, UnsupportedMemoryError
from ..notifier import Notifier
from .changes import CHANGES, NO_CHANGES, PAGE, Case, Memory, MissingError

_PRESENT = 1 << 63
_FRAME = (1 << 55) - 1
_FRAMES_MOST = (64 << 20) // PAGE
"""Memory of more pages is not looked at page by page."""


def _frames(memory: Memory) -> array.array[int]:
    """Which page frame is mapped at each page of the memory, 0 for none. Empty where only root may know."""
    count = memory.length // PAGE
    frames: array.array[int] = array.array("Q")
    if count <= _FRAMES_MOST:
        with contextlib.suppress(OSError), open("/proc/self/pagemap", "rb") as pagemap:
            pagemap.seek(memory.address // PAGE * 8)
            frames.frombytes(pagemap.read(count * 8))
    return array.array("Q", (entry & _FRAME if entry & _PRESENT else 0 for entry in frames))


class Watched(contextlib.ExitStack):
    """Each unit of the memory, all of it, and its neighbours on both sides."""

    def __init__(self, umn: Notifier, memory: Memory) -> None:
        """Raises UnsupportedMemoryError, with nothing watched."""
        super().__init__()
        self.umn = umn
        self.memory = memory
        self.units: dict[int, Region] = {}
        """Without neighbours that the source refuses to watch."""
        with contextlib.ExitStack() as undo:
            undo.enter_context(self)
            for unit in range(memory.count):
                self.units[unit] = self._watch(memory.at(unit), memory.unit)
            self.whole = self._watch(memory.address, memory.length)
            self.last_byte = self._watch(memory.at(memory.count) - 1, 1)
            for unit in (-1, memory.count):
                with contextlib.suppress(UnsupportedMemoryError):
                    self.units[unit] = self._watch(memory.at(unit), memory.unit)
            undo.pop_all()
        self._frames = _frames(memory)

    def __enter__(self) -> Self:
        return self

    def _watch(self, address: int, length: int) -> Region:
        region = self.umn.watch((address, length))
        self.callback(self.umn.read)
        self.callback(region.close)
        return region

    @property
    def all(self) -> list[Region]:
        return [*self.units.values(), self.whole, self.last_byte]

    @property
    def invalid(self) -> set[int]:
        return {unit for unit, region in self.units.items() if not region.valid}

    @property
    def moved(self) -> set[int]:
        """The units of which a page is no longer where it was: they must be invalid, whatever was expected."""
        now = _frames(self.memory)
        pages = self.memory.unit // PAGE
        return {page // pages for page, frame in enumerate(self._frames) if frame not in (0, now[page])}


class Outcome(enum.StrEnum):
    SEEN = "seen"
    """It changed the mapping, and every region that it hit is invalid."""
    MISSED = "MISSED"
    """The one unforgivable defect."""
    BLIND = "blind"
    """The source cannot see this kind of change, as its documentation says, and could not refuse the memory either."""
    QUIET = "quiet"
    """It changed no mapping, and nothing is invalid."""
    NEEDLESS = "needless"
    """Something else is invalid, too: that costs time, and is no error."""
    REFUSED = "refused"
    """The source refused to watch such memory, because it cannot see all of its changes."""
    IMPOSSIBLE = "not here"
    """This machine, this kernel or this user cannot do it."""
    FAILED = "FAILED"
    """It did not do what it always does, so nothing can be said."""


_COPIES = "userfaultfd does not tell of copies on write (pinned pages stay with this process, the child gets copies)"
_MOVES = "userfaultfd does not tell of pages that the kernel moves (pinned pages stay)"
_UFFD_BLIND = {
    "shmat over it": "userfaultfd does not tell of shmat(SHM_REMAP)",
    "madvise GUARD_INSTALL": "userfaultfd does not tell of guard pages",
    "madvise COLLAPSE": _MOVES,
    "mbind moves pages": _MOVES,
    "madvise PAGEOUT of private memory": _MOVES,
    "a write after a fork": _COPIES,
    "read() after a fork": _COPIES,
    "a direct read after a fork": _COPIES,
    "io_uring reads after a fork": _COPIES,
    "clone writes the child's number": _COPIES,
    "clone writes the child's pidfd": _COPIES,
    "process_vm_writev on itself": _COPIES,
    "process_vm_writev by a child": _COPIES,
    "a debugger's write": _COPIES,
    "clone writes the child's number, from the child": _COPIES,
    "the child's number is cleared at its end": _COPIES,
    "UFFDIO_MOVE": "userfaultfd does not tell of UFFDIO_MOVE by another userfaultfd",
    "UFFDIO_MOVE of a huge page": "userfaultfd does not tell of UFFDIO_MOVE by another userfaultfd",
    "madvise POPULATE_WRITE after a fork": _COPIES,
    "mlock after a fork": _COPIES,
    "mprotect of locked memory after a fork": _COPIES,
    "a signal's frame after a fork": _COPIES,
    "a signal's frame after a fork, on the way out of a refused fork": _COPIES,
    "a signal's frame after a fork, on the way out of a refused mprotect": _COPIES,
    "a signal's frame after a fork, when a debugger has refused a fork": _COPIES,
    "the first write to the zero page": _COPIES,
    "a write to a huge page after a fork": _COPIES,
    "mlock of a part of a huge page after a fork": _COPIES,
    "mlock of a part of huge pages after a fork": _COPIES,
    "mlock of a part of the huge zero page": _COPIES,
    "mprotect of a part of a locked huge page after a fork": _COPIES,
    "clone writes the child's number into hugetlb memory": _COPIES,
    "a write to hugetlb memory after a fork": _COPIES,
    "mlock of a part of hugetlb memory after a fork": _COPIES,
}
"""What a source cannot see of memory that it can watch: the kernel's userfaultfd has no events for these."""


class Result(NamedTuple):
    case: str
    changes: bool
    """Is it a change of the mapping, or something that must not count as one?"""
    outcome: Outcome
    why: str

    @property
    def bad(self) -> bool:
        return self.outcome in (Outcome.MISSED, Outcome.FAILED)


def units(case: Case) -> tuple[set[int], set[int]]:
    """Those that must be invalid afterwards, and those that may be."""
    expected = {unit for first, last in case.expected for unit in range(first, last)}
    return expected, expected | {unit for first, last in case.needless for unit in range(first, last)}


def _try(case: Case, umn: Notifier, memory: Memory) -> tuple[Outcome, str]:
    case.prepare(memory)
    with Watched(umn, memory) as watched:
        case.run(memory)
        expected, allowed = units(case)
        expected &= set(watched.units)
        moved = watched.moved  # first: what moves while this is looked at is invalid too
        invalid = watched.invalid
        inside = expected & set(range(memory.count))
        reported = {event.region for event in umn.read()}
        missed = (expected | moved) - invalid
        missed |= {unit for unit in expected if watched.units[unit] not in reported}
        if missed and umn.source == "uffd" and (limit := _UFFD_BLIND.get(case.name)):
            return Outcome.BLIND, limit
        if missed or (inside and (watched.whole.valid or watched.whole not in reported)):
            return Outcome.MISSED, f"units {sorted(missed)} of {sorted(expected | moved)}"
        changes = case not in NO_CHANGES
        if needless := invalid - (allowed if changes else expected):
            return Outcome.NEEDLESS, f"units {sorted(needless)}"
        return (Outcome.SEEN if changes else Outcome.QUIET), ""


def run_case(case: Case, umn: Notifier) -> Result:
    changes = case not in NO_CHANGES
    try:
        with Memory() as memory:
            outcome, why = _try(case, umn, memory)
    except UnsupportedMemoryError as error:
        outcome, why = Outcome.REFUSED, error.reason
    except (MissingError, OSError, TooManyRegionsError) as error:
        outcome, why = Outcome.IMPOSSIBLE, str(error)
    except AssertionError as error:
        outcome, why = Outcome.FAILED, f"it did not do what was expected ({error})"
    return Result(case.name, changes, outcome, why)


def run(umn: Notifier) -> Iterator[Result]:
    """Everything, in order. The memory is this process's own; the notifier must have no regions."""
    with warnings.catch_warnings():
        # Some cases fork. The children do hardly anything, and the threads of the sources hold no lock they need.
        warnings.simplefilter("ignore", DeprecationWarning)
        for case in (*CHANGES, *NO_CHANGES):
            yield run_case(case, umn)
