"""From records to findings: pins whose memory changed, what happened then, and what to do."""

from __future__ import annotations

import enum
import fnmatch
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .. import symbols
from ..symbols import Frame
from ..types import call_name
from .records import Process, Record, code, stack
from .traced import Assigned, Traced, assign

Stack = tuple[Frame, ...]


class Severity(enum.Enum):
    """The worst first."""

    USED = "used"
    """Used after the change: wrong data."""
    KEPT = "kept"
    """Still pinned at the end: the next use would be wrong."""
    RELEASED = "released"
    """Given up without a use."""


MEANING = {
    Severity.USED: "used after its memory had changed",
    Severity.KEPT: "changed while it was pinned, and never deregistered",
    Severity.RELEASED: "changed while it was pinned, then deregistered without a use",
}

_ADVICE = {
    Severity.USED: (
        "Deregister before the memory is freed, or check before each use whether it has changed: ummunotify's "
        "registration cache does (docs/cache.md; docs/ucx.md and docs/libfabric.md for MPI)."
    ),
    Severity.KEPT: "Deregister before the memory is freed: a later use of this pin would go to pages that are gone.",
    Severity.RELEASED: "Harmless so far. Deregister first, then free the memory.",
}


@dataclass(frozen=True, slots=True)
class Pin:
    interface: str
    """`verbs`, `io_uring`, `cuda` or `mlock`."""
    call: str
    address: int
    length: int
    time: float
    thread: int
    thread_name: str
    stack: Stack


@dataclass(frozen=True, slots=True)
class Change:
    time: float
    """When it was made, or noticed where the kernel has not told more."""
    start: int
    end: int
    exact: bool
    cause: str
    """The system call; `not known` with userfaultfd."""
    thread: int
    """0: not known."""
    thread_name: str
    process: int
    process_name: str
    other: bool
    """Another process made it."""
    now: str
    """What is mapped there now: `memory`, `nothing` or `a part`."""
    call: str
    """The function that the program called; empty: by a system call, or by another process."""
    stack: Stack


@dataclass(frozen=True, slots=True)
class Use:
    time: float
    call: str
    address: int
    length: int
    thread: int
    thread_name: str
    now: str
    stack: Stack


@dataclass(frozen=True, slots=True)
class Unpin:
    time: float
    call: str
    thread: int
    stack: Stack


@dataclass(slots=True)
class Finding:
    severity: Severity
    process: int
    command: str
    pin: Pin
    changes: list[Change]
    uses: list[Use]
    use_count: int
    unpin: Unpin | None
    suppressed: bool = False

    @property
    def advice(self) -> str:
        return _ADVICE[self.severity]


@dataclass(frozen=True, slots=True)
class Unwatched:
    """A pin that the source cannot watch."""

    process: int
    pin: Pin
    why: str


@dataclass(slots=True)
class Report:
    command: list[str]
    status: int
    """The program's exit status; negative: the signal that ended it."""
    began: float
    ended: float
    processes: list[Process]
    findings: list[Finding]
    unwatched: list[Unwatched]
    sources: dict[int, str] = field(default_factory=dict)
    """Of each process that has pinned something."""
    failures: dict[int, str] = field(default_factory=dict)
    """Why a process had no source."""

    def of(self, severity: Severity) -> list[Finding]:
        return [each for each in self.findings if each.severity is severity and not each.suppressed]

    @property
    def wrong(self) -> bool:
        return bool(self.of(Severity.USED) or self.of(Severity.KEPT))


class SuppressionError(Exception):
    """The file cannot be read, or a line is not understood."""


class Suppressions:
    """Lines `pin:`, `change:`, `use:` or `any:` and a pattern, which a frame of that stack has to match: its function,
    its file or its library, with `*` and `?`. `#` begins a comment.
    """

    _KINDS = ("pin", "change", "use", "any")

    def __init__(self, text: str = "", name: str = "") -> None:
        self._patterns: list[tuple[str, str]] = []
        for number, line in enumerate(text.splitlines(), 1):
            words = line.partition("#")[0].strip()
            if not words:
                continue
            kind, colon, pattern = words.partition(":")
            if kind not in self._KINDS or not colon or not pattern.strip():
                raise SuppressionError(
                    f"{name}:{number}: a line is pin:, change:, use: or any: and a pattern, not {words!r}"
                )
            self._patterns.append((kind, pattern.strip()))

    def match(self, finding: Finding) -> bool:
        stacks = {
            "pin": [finding.pin.stack],
            "change": [each.stack for each in finding.changes],
            "use": [each.stack for each in finding.uses],
        }
        stacks["any"] = [each for of_kind in stacks.values() for each in of_kind]
        return any(
            fnmatch.fnmatchcase(name, pattern)
            for kind, pattern in self._patterns
            for each in stacks[kind]
            for frame in each
            for name in _names(frame)
        )


def _names(frame: Frame) -> set[str]:
    files = {frame.file, os.path.basename(frame.file), frame.module, os.path.basename(frame.module)}
    return {frame.function, *files} - {""}


def _pin(record: Record, known: symbols.Known) -> Pin:
    return Pin(
        record["interface"],
        record["pinned_call"],
        record["address"],
        record["length"],
        record["pinned_time"],
        record["pinned_thread"],
        record["pinned_thread_name"],
        symbols.resolve(stack(record, "pinned_"), known),
    )


def _change(
    record: Record, process: Process, by: Record | None, assigned: Assigned | None, source: str, known: symbols.Known
) -> Change:
    traced = assigned.traced if assigned else None
    thread = record.get("thread", 0)
    owner = record.get("process", 0) or (traced.process if traced else 0)
    unknown = source.startswith("uffd")
    places = stack(by) if by else assigned.places if assigned else ()
    return Change(
        traced.time if traced else record["time"],
        record["start"],
        record["end"],
        bool(record["exact"]),
        "not known" if unknown else call_name(record.get("syscall", -1)),
        thread,
        record.get("thread_name", "") or (traced.thread_name if traced else ""),
        owner,
        record.get("process_name", "") or (traced.process_name if traced else ""),
        bool(owner) and owner != process.pid,
        record["now"],
        by["call"] if by else "",
        symbols.resolve(places, known),
    )


def _use(record: Record, known: symbols.Known) -> Use:
    return Use(
        record["time"],
        record["call"],
        record["address"],
        record["length"],
        record["thread"],
        record["thread_name"],
        record["now"],
        symbols.resolve(stack(record), known),
    )


def _once(changes: list[Record], calls: Mapping[int, Record]) -> Iterator[Record]:
    """Each change, though it may have been reported more than once: the kernel tells each virtual machine of a process.

    The changes of a batch that has a stack were made in one call (libummunotify/audit/pins.c). An event that is not
    exact may be two changes, and the other one may be another thread's.
    """
    found: dict[tuple[int, int | None], list[Record]] = defaultdict(list)
    for change in changes:
        of_call = found[change["batch"], change.get("syscall")]
        if not (
            change["exact"]
            and change["batch"] in calls
            and any(each["start"] <= change["start"] and change["end"] <= each["end"] for each in of_call)
        ):
            of_call.append(change)
            yield change


def _of_process(
    process: Process, source: str, traced: Mapping[int, Assigned], known: symbols.Known
) -> Iterable[Finding]:
    batches = {record["batch"]: record for record in process.records if record["record"] == "stack"}
    of_pin: dict[int, list[Record]] = defaultdict(list)
    for record in process.records:
        if "pin" in record:
            of_pin[record["pin"]].append(record)
    for records in of_pin.values():
        changes = list(_once([record for record in records if record["record"] == "change"], batches))
        if not changes:
            continue
        uses = [record for record in records if record["record"] == "use"]
        ends = [record for record in records if record["record"] == "unpin"]
        yield Finding(
            Severity.USED if uses else Severity.RELEASED if ends else Severity.KEPT,
            process.pid,
            process.command,
            _pin(changes[0], known),
            [
                _change(each, process, batches.get(each["batch"]), traced.get(id(each)), source, known)
                for each in changes
            ],
            [_use(each, known) for each in uses],
            ends[0]["uses"] if ends else len(uses),
            Unpin(ends[0]["time"], ends[0]["call"], ends[0]["thread"], symbols.resolve(stack(ends[0]), known))
            if ends
            else None,
        )


def judge(
    command: list[str],
    status: int,
    began: float,
    ended: float,
    processes: list[Process],
    suppressions: Suppressions,
    traced: list[Traced],
) -> Report:
    """The worst findings first, in the order of the first change."""
    of_changes = assign(processes, traced, code(processes))
    report = Report(command, status, began, ended, processes, [], [])
    all_records = [record for process in processes for record in process.records]
    known = symbols.look_up(
        [
            *(frame for record in all_records for prefix in ("", "pinned_") for frame in stack(record, prefix)),
            *(frame for each in of_changes.values() for frame in each.places),
        ]
    )
    for process in processes:
        for record in process.records:
            if record["record"] == "source" and "source" in record:
                report.sources[process.pid] = record["source"]
            elif record["record"] == "source":
                report.failures[process.pid] = record["error"]
            elif record["record"] == "unwatched":
                report.unwatched.append(Unwatched(process.pid, _pin(record, known), record["error"]))
        report.findings += _of_process(process, report.sources.get(process.pid, ""), of_changes, known)
    for finding in report.findings:
        finding.suppressed = suppressions.match(finding)
    order = list(Severity)
    report.findings.sort(key=lambda each: (order.index(each.severity), each.changes[0].time))
    return report


def read_suppressions(path: Path) -> Suppressions:
    """SuppressionError."""
    try:
        return Suppressions(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError:
        raise SuppressionError(f"{path} is not text in UTF-8") from None
    except OSError as error:
        raise SuppressionError(f"{path} cannot be read: {error.strerror}") from None
