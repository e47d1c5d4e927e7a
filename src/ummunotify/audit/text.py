"""The report as text."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TypeVar

from rich.text import Text

from ..symbols import Frame
from .findings import MEANING, Change, Finding, Report, Severity, Stack

_T = TypeVar("_T")
_FRAMES = 12
_STYLE = {Severity.USED: "bold red", Severity.KEPT: "bold yellow", Severity.RELEASED: "bold"}
_PYTHON = ("python", "libpython")


def plain(line: str) -> str:
    """Without what would steer a terminal: names are the programs' own choice."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in line)


def size(length: int) -> str:
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if length >= 1 << shift and not length % (1 << shift):
            return f"{length >> shift} {unit}"
    return f"{length} bytes"


def shown(stack: Stack) -> list[Frame]:
    """The frames that say something: of a Python program not those of the interpreter."""
    python = [frame for frame in stack if frame.language == "python"]
    c = [frame for frame in stack if frame.language == "c"]
    if not python:
        main = next((i for i, frame in enumerate(c) if frame.function == "main"), len(c))
        return c[: main + 1]
    own = next((i for i, frame in enumerate(c) if os.path.basename(frame.module).startswith(_PYTHON)), len(c))
    return [*(frame for frame in c[:own] if "ffi" not in frame.module and "_ctypes" not in frame.module), *python]


def place(frame: Frame) -> str:
    if frame.file:
        return f"{frame.function or '?'} ({frame.file}:{frame.line})"
    if frame.module:
        return f"{frame.function or '?'} ({frame.module}+{frame.offset:#x})"
    return frame.function or "?"


def cause(change: Change) -> str:
    """What made the change, in a line."""
    words = change.cause if change.cause != "not known" else "a call that is not known"
    if change.call and change.call != change.cause:
        words += f", called by {change.call}"
    if change.other:
        return f"{words} by process {change.process} ({change.process_name})"
    if change.thread:
        words += f" by thread {change.thread}"
        if change.thread_name:
            words += f" ({change.thread_name})"
    return words


NOW = {
    "memory": "other memory than the pinned pages",
    "nothing": "nothing",
    "a part": "memory in a part of it",
}
"""What is mapped there."""


def _stack(stack: Stack) -> Iterator[str]:
    frames = shown(stack)
    for number, frame in enumerate(frames[:_FRAMES]):
        yield f"      #{number} {place(frame)}"
    if len(frames) > _FRAMES:
        yield f"      ... and {len(frames) - _FRAMES} more"


def _once(all_of_them: list[_T], what: Callable[[_T], object]) -> Iterator[tuple[_T, str]]:
    """The first of those that are the same, and how many there are."""
    groups: dict[object, list[_T]] = {}
    for each in all_of_them:
        groups.setdefault(what(each), []).append(each)
    for group in groups.values():
        yield group[0], f" (the first of {len(group)} or more)" if len(group) > 1 else ""


def _details(finding: Finding, began: float) -> Iterator[str]:
    pin = finding.pin
    yield f"    pinned at {pin.time - began:.3f} s by {pin.call} in thread {pin.thread} ({pin.thread_name})"
    yield from _stack(pin.stack)
    for change, times in _once(finding.changes, lambda each: (each.cause, each.call, each.thread, each.stack)):
        yield (
            f"    changed at {change.time - began:.3f} s by {cause(change)}: {change.start:#x}-{change.end:#x}"
            f"{'' if change.exact else ' or a part of it'}; then there was {NOW[change.now]}{times}"
        )
        yield from _stack(change.stack)
    for use, times in _once(finding.uses, lambda each: (each.call, each.thread, each.stack)):
        yield (
            f"    used at {use.time - began:.3f} s by {use.call} in thread {use.thread} ({use.thread_name}): "
            f"{use.length} bytes at {use.address:#x}, where there was {NOW[use.now]}{times}"
        )
        yield from _stack(use.stack)
    if finding.use_count > len(finding.uses):
        yield f"    used {finding.use_count} times in all"
    if finding.unpin:
        yield f"    deregistered at {finding.unpin.time - began:.3f} s by {finding.unpin.call}"
    elif finding.severity is not Severity.RELEASED:
        yield "    never deregistered"


def _alike(finding: Finding) -> tuple[object, ...]:
    """Findings with the same are shown once."""
    return (
        finding.severity,
        finding.process,
        finding.pin.stack,
        tuple((each.cause, each.stack) for each in finding.changes),
        tuple((each.call, each.stack) for each in finding.uses),
    )


def findings(report: Report, every: bool) -> Iterator[Text]:
    groups: dict[tuple[object, ...], list[Finding]] = {}
    for finding in report.findings:
        if not finding.suppressed and (every or finding.severity is not Severity.RELEASED):
            groups.setdefault(_alike(finding), []).append(finding)
    for number, alike in enumerate(groups.values(), 1):
        first = alike[0]
        title = f"{number}. {size(first.pin.length)} at {first.pin.address:#x}, pinned by {first.pin.interface}: "
        text = Text(title + MEANING[first.severity], style=_STYLE[first.severity])
        lines = [f"    process {first.process}: {first.command}", *_details(first, report.began)]
        if len(alike) > 1:
            lines.append(f"    and {len(alike) - 1:,} more like it")
        lines.append(f"    {first.advice}")
        yield text.append("\n" + "\n".join(map(plain, lines)) + "\n", style="not bold default")


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def summary(report: Report, every: bool) -> Iterator[str]:
    pins = sum(process.pins for process in report.processes)
    used, kept, released = (len(report.of(severity)) for severity in Severity)
    suppressed = sum(finding.suppressed for finding in report.findings)
    processes = _count(len({process.pid for process in report.processes}), "process", "processes")
    for pid, why in report.failures.items():
        yield f"Process {pid} could not be audited, as there is no source of events: {why}"
    if not pins and not report.failures:
        yield (
            f"Nothing was pinned by libibverbs, io_uring or CUDA in {processes}, in a way that can be seen "
            "(docs/audit.md)."
        )
    sources = sorted(set(report.sources.values()))
    if pins:
        yield (
            f"{_count(pins, 'pin', 'pins')} in {len(report.sources)} of {processes}, watched by {', '.join(sources)}: "
            f"{used} used after a change, {kept} changed and never deregistered, {released} changed and deregistered "
            f"without a use{'' if every or not released else ' (--all shows them)'}"
            f"{f', {suppressed} suppressed' if suppressed else ''}."
        )
    refused = sum(process.unwatched for process in report.processes)
    if refused:
        why = f", for example: {report.unwatched[0].why}" if report.unwatched else ""
        yield f"{_count(refused, 'pin', 'pins')} could not be watched{why}"
    if any(source.startswith("uffd") for source in sources):
        yield (
            "userfaultfd does not tell which thread or system call made a change, and cannot watch the memory of "
            "files; with the sources bpf and daemon the report says more."
        )
    lost = sum(process.lost for process in report.processes)
    if lost:
        yield f"{_count(lost, 'record', 'records')} had no room."
