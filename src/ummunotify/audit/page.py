"""The report as one HTML file, which needs nothing else: page.css and page.js are put into it."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path

from . import text
from .findings import MEANING, Change, Finding, Report, Severity, Stack, Use

_HERE = Path(__file__).parent
_LANES = 200
"""As many findings are in the time line and below it; the counts are of all."""
_WIDTH, _LANE, _LEFT, _RIGHT, _TOP = 1000, 22, 150, 30, 24
_TICKS = 4


class _TimeLine:
    """A lane for each finding: when it was pinned, changed and used."""

    def __init__(self, report: Report, findings: list[Finding]) -> None:
        self._report = report
        self._findings = findings
        self._from = min(each.pin.time for each in findings)
        self._to = max(self._end(each) for each in findings)

    def _end(self, finding: Finding) -> float:
        return finding.unpin.time if finding.unpin else self._report.ended

    def _x(self, time: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (time - self._from) / max(self._to - self._from, 1e-6)

    def _lane(self, number: int, finding: Finding) -> Iterator[str]:
        y = _TOP + _LANE * (number - 0.5)
        begin, changed, end = (
            self._x(time) for time in (finding.pin.time, finding.changes[0].time, self._end(finding))
        )
        name = f"{number}. {text.size(finding.pin.length)}: {MEANING[finding.severity]}"
        yield f'<a href="#finding-{number}" data-finding="{number}"><title>{escape(name)}</title>'
        yield f'<rect class="row" x="0" y="{y - _LANE / 2:.1f}" width="{_WIDTH}" height="{_LANE}"/>'
        yield f'<text x="4" y="{y + 4:.1f}">{number}. {finding.pin.address:#x}</text>'
        yield f'<rect class="pinned" x="{begin:.1f}" y="{y - 4:.1f}" width="{max(changed - begin, 1):.1f}" height="8"/>'
        yield f'<rect class="stale" x="{changed:.1f}" y="{y - 4:.1f}" width="{max(end - changed, 1):.1f}" height="8"/>'
        for change in finding.changes:
            yield f'<path class="change" d="M{self._x(change.time):.1f} {y + 5:.1f}l-5 -10h10z"/>'
        for use in finding.uses:
            yield f'<circle class="use" cx="{self._x(use.time):.1f}" cy="{y:.1f}" r="4"/>'
        yield "</a>"

    def render(self) -> Iterator[str]:
        height = _TOP + _LANE * len(self._findings) + 4
        yield f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="Pins, their changes and uses over time">'
        for i in range(_TICKS + 1):
            time = self._from + (self._to - self._from) * i / _TICKS
            x = self._x(time)
            yield f'<line class="tick" x1="{x:.1f}" y1="18" x2="{x:.1f}" y2="{height}"/>'
            yield f'<text x="{x:.1f}" y="12" text-anchor="middle">{time - self._report.began:.3f} s</text>'
        for number, finding in enumerate(self._findings, 1):
            yield from self._lane(number, finding)
        yield "</svg>"


def _stack(title: str, stack: Stack, opened: bool) -> Iterator[str]:
    frames = text.shown(stack)
    if not frames:
        yield f"<p>{title}<br><small>no stack</small></p>"
        return
    yield f"<details{' open' if opened else ''}><summary>{title}</summary><ol start=0>"
    for frame in frames:
        where = f"{frame.file}:{frame.line}" if frame.file else f"{frame.module}+{frame.offset:#x}"
        yield f"<li><b>{escape(frame.function or '?')}</b> <code>{escape(where)}</code></li>"
    yield "</ol></details>"


def _change(report: Report, change: Change) -> str:
    return (
        f"<em>changed</em> at {change.time - report.began:.3f} s by {escape(text.cause(change))}: "
        f"<code>{change.start:#x}-{change.end:#x}</code>{'' if change.exact else ' or a part of it'}; "
        f"then there was {text.NOW[change.now]}"
    )


def _use(report: Report, use: Use) -> str:
    return (
        f"<em>used</em> at {use.time - report.began:.3f} s by {escape(use.call)} in thread {use.thread} "
        f"({escape(use.thread_name)}): {use.length} bytes at <code>{use.address:#x}</code>, where there was "
        f"{text.NOW[use.now]}"
    )


def _finding(report: Report, number: int, finding: Finding) -> Iterator[str]:
    pin = finding.pin
    yield f'<article id="finding-{number}" class="{finding.severity.value}">'
    yield (
        f"<h2>{number}. {text.size(pin.length)} at <code>{pin.address:#x}</code>, pinned by {pin.interface}: "
        f"{MEANING[finding.severity]}</h2>"
    )
    yield f"<p>Process {finding.process}: <code>{escape(finding.command)}</code></p>"
    yield from _stack(
        f"<em>pinned</em> at {pin.time - report.began:.3f} s by {pin.call} in thread {pin.thread} "
        f"({escape(pin.thread_name)})",
        pin.stack,
        False,
    )
    for i, change in enumerate(finding.changes):
        yield from _stack(_change(report, change), change.stack, i == 0)
    for use in finding.uses:
        yield from _stack(_use(report, use), use.stack, False)
    if finding.use_count > len(finding.uses):
        yield f"<p>used {finding.use_count} times in all</p>"
    if finding.unpin:
        title = f"deregistered at {finding.unpin.time - report.began:.3f} s by {finding.unpin.call}"
        yield from _stack(title, finding.unpin.stack, False)
    yield f'<p class="advice">{escape(finding.advice)}</p></article>'


def render(report: Report) -> str:
    findings = [each for each in report.findings if not each.suppressed]
    shown = findings[:_LANES]
    command = escape(" ".join(report.command))
    parts = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>ummunotify audit: {command}</title>",
        f"<style>{(_HERE / 'page.css').read_text()}</style></head><body>",
        f"<h1>ummunotify audit</h1><p><code>{command}</code></p>",
        *(f"<p>{escape(line)}</p>" for line in text.summary(report, True)),
    ]
    if findings:
        parts += ['<form aria-label="Filters">']
        for severity in Severity:
            count = len(report.of(severity))
            parts.append(
                f'<label><input type="checkbox" name="{severity.value}" checked> {severity.value} ({count})</label>'
            )
        parts.append('<input type="search" name="words" placeholder="a function, a file, an address ..."></form>')
        parts += ['<figure class="line">', *_TimeLine(report, shown).render(), "</figure>"]
        parts.append(
            '<p class="legend"><span><i class="pinned"></i> pinned</span> '
            '<span><i class="stale"></i> pinned, its memory changed</span> '
            '<span><i class="change"></i> change</span> <span><i class="use"></i> use of a stale pin</span></p>'
        )
    for number, finding in enumerate(shown, 1):
        parts += _finding(report, number, finding)
    if len(findings) > len(shown):
        parts.append(f"<p>{len(findings) - len(shown):,} more are not shown; --json has them.</p>")
    parts.append(f"<script>{(_HERE / 'page.js').read_text()}</script></body></html>\n")
    return "\n".join(parts)
