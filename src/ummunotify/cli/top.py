"""`ummunotify top`: what the daemon's clients do, live."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import click
from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .._abi import Record, Summary
from ..errors import SourceUnavailableError
from .output import console, show
from .status import as_dict, ask_daemon, command_of, mib, no_daemon


class _Row(NamedTuple):
    """Of a client, and how many changes a second hit its regions."""

    record: Record
    rate: float


class _Column(NamedTuple):
    title: str
    key: str
    """That sorts by it."""
    text: Callable[[_Row], str]
    order: Callable[[_Row], float | str]


_COLUMNS = (
    _Column("pid", "p", lambda row: str(row.record.pid), lambda row: row.record.pid),
    _Column("uid", "u", lambda row: str(row.record.uid), lambda row: row.record.uid),
    _Column("regions", "r", lambda row: f"{row.record.regions:,}", lambda row: -row.record.regions),
    _Column("changes/s", "c", lambda row: f"{row.rate:,.0f}", lambda row: -row.rate),
    _Column("changes", "a", lambda row: f"{row.record.generation:,}", lambda row: -row.record.generation),
    _Column("overflows", "o", lambda row: f"{row.record.overflows:,}", lambda row: -row.record.overflows),
    _Column("memory", "m", lambda row: mib(row.record.memory), lambda row: -row.record.memory),
    _Column("command", "n", lambda row: command_of(row.record), lambda row: command_of(row.record)),
)
_KEYS = {column.key: column for column in _COLUMNS}


class _Snapshot(NamedTuple):
    at: float
    summary: Summary
    records: list[Record]


def _look(pid: int | None) -> _Snapshot:
    summary, records = ask_daemon()
    return _Snapshot(time.monotonic(), summary, [record for record in records if pid in (None, record.pid)])


def _rows(before: _Snapshot | None, now: _Snapshot) -> list[_Row]:
    """A table's number is given anew, so the process is compared too; and its owner can write the count."""
    earlier = {(record.table, record.pid): record.generation for record in before.records} if before else {}
    seconds = now.at - before.at if before else 0.0
    rows = []
    for record in now.records:
        count = record.generation - earlier.get((record.table, record.pid), record.generation)
        rows.append(_Row(record, max(count, 0) / seconds if seconds > 0 else 0.0))
    return rows


def _feeder(before: _Snapshot | None, now: _Snapshot) -> str:
    """The BPF program's part of a CPU."""
    skipped = f"{now.summary.skipped} runs skipped"
    if not now.summary.runs:
        return f"{skipped}; the kernel does not time them (`ummunotify daemon --bpf-statistics`)"
    if before is None or now.at <= before.at or now.summary.runs < before.summary.runs:
        return skipped
    seconds = now.at - before.at
    runs = (now.summary.runs - before.summary.runs) / seconds
    busy = (now.summary.run_time_ns - before.summary.run_time_ns) / 1e9 / seconds
    return f"{runs:,.0f} runs a second, {busy:.2%} of a CPU, {skipped}"


def _render(before: _Snapshot | None, now: _Snapshot, by: _Column, most: int | None) -> list[RenderableType]:
    s = now.summary
    rows = sorted(_rows(before, now), key=by.order)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in _COLUMNS:
        last = column is _COLUMNS[-1]
        title = Text(column.title, "reverse" if column is by else "bold")
        # Numbers are never shortened: what a narrow terminal has no room for is cut off on the right.
        room = None if last else max(len(text) for text in (column.title, *map(column.text, rows[:most])))
        justify: JustifyMethod = "left" if last else "right"
        table.add_column(title, justify=justify, no_wrap=True, overflow="ellipsis", min_width=room)
    for row in rows[:most]:
        table.add_row(*(column.text(row) for column in _COLUMNS))
    head = (
        f"daemon {s.pid}: {s.clients} of {s.tables} clients, {mib(s.memory)} of kernel memory, up for {s.seconds} s\n"
        f"BPF program: {_feeder(before, now)}"
    )
    more = [f"and {len(rows) - most} more"] if most is not None and len(rows) > most else []
    return [head, table if rows else "no clients that this user may see", *more]


# ---- A terminal ----


def _can_draw() -> bool:
    """Standard input or output may be closed, and a dumb terminal shows nothing of a full screen."""
    terminal = all(file is not None and file.isatty() for file in (sys.stdin, sys.stdout))
    return terminal and not Console().is_dumb_terminal


@contextlib.contextmanager
def _ended_by_exit(*numbers: signal.Signals) -> Iterator[None]:
    """These signals end the program as sys.exit does, which leaves the terminal as it was."""
    before = {number: signal.signal(number, lambda which, _: sys.exit(128 + which)) for number in numbers}
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """A function that waits for a key for so many seconds: "" if none was pressed."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)

        def wait(seconds: float) -> str:
            ready, _, _ = select.select([fd], [], [], seconds)
            return os.read(fd, 1).decode(errors="replace") if ready else ""

        yield wait
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _live(by: _Column, interval: float, pid: int | None, first: _Snapshot) -> None:
    printer = console()
    pairs = [("sort by:", ""), *((column.key, column.title) for column in _COLUMNS), ("q", "quit")]
    hint = Text("  ").join(Text.assemble((key, "bold"), " " + what) for key, what in pairs)
    before: _Snapshot | None = None
    now = first
    said = ""
    with (
        _ended_by_exit(signal.SIGTERM, signal.SIGHUP),
        _keys() as key,
        Live(console=printer, screen=True, auto_refresh=False) as live,
    ):
        due = time.monotonic() + interval
        while True:
            room = max(printer.size.height - 7, 1)
            live.update(Group(*_render(before, now, by, room), "", said or hint), refresh=True)
            pressed = key(max(due - time.monotonic(), 0))
            if pressed in ("q", "Q", "\x04"):
                return
            by = _KEYS.get(pressed, by)
            if time.monotonic() < due:
                continue
            due = time.monotonic() + interval
            try:
                before, now, said = now, _look(pid), ""
            except (SourceUnavailableError, OSError) as error:
                said = no_daemon(error)


# ---- Without a daemon ----


def _without_a_daemon(pid: int) -> str:
    """What can be seen of a process from outside. click.ClickException: nothing."""
    try:
        name = Path(f"/proc/{pid}/comm").read_text().strip()
        files = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
        mapped = Path(f"/proc/{pid}/maps").read_text()
    except FileNotFoundError:
        raise click.ClickException(f"there is no process {pid}") from None
    except PermissionError as error:
        why = "is another user's: run this as root" if os.geteuid() else f"cannot be looked at: {error.strerror}"
        raise click.ClickException(f"process {pid} {why}") from None
    tables = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) .*anon_inode:bpf-map$", mapped, re.M)
    size = sum(int(end, 16) - int(start, 16) for start, end in tables)
    found = []
    if "anon_inode:bpf_link" in files and tables:
        found.append(f"BPF: {mib(size)} of tables")
    if "anon_inode:[userfaultfd]" in files:
        found.append("userfaultfd")
    process = f"process {pid} ({ascii(name)[1:-1]})"
    if not found:
        return f"{process} has no notifier that can be seen from outside: it uses neither BPF nor userfaultfd"
    return (
        f"{process} uses {' and '.join(found)}. How many regions it watches and what hit them is in "
        "memory of its own: ask it there (Notifier.stats, RegistrationCache.explain, ummunotify.metrics)"
    )


@click.command("top")
@click.option(
    "--interval", type=click.FloatRange(0.1, 3600), default=1.0, show_default=True, help="Seconds between looks."
)
@click.option(
    "--sort",
    type=click.Choice([column.title for column in _COLUMNS]),
    default="changes/s",
    show_default=True,
    help="The column to sort by.",
)
@click.option("--pid", type=click.IntRange(1), help="Show one process; also where there is no daemon.")
@click.option(
    "--batch", is_flag=True, help="Print each look below the last one; so it is where the output is no terminal."
)
@click.option("--count", type=click.IntRange(1), help="End after so many looks.  [default: 1 with --batch, or none]")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print what `status --json` does, with `changes_per_second` of one interval.",
)
def top(interval: float, sort: str, pid: int | None, batch: bool, count: int | None, as_json: bool) -> None:
    """Watch the daemon's clients: regions, changes that hit, memory, and what the BPF program takes.

    root sees all clients, another user those of its own. By which kind of call memory was changed only the process
    itself knows. Exits with 1 if no daemon answers.
    """
    by = next(column for column in _COLUMNS if column.title == sort)
    try:
        before, now = None, _look(pid)
        if pid is not None and not now.records:
            raise click.ClickException(f"process {pid} is no client of the daemon's that this user may see")
        if as_json:
            time.sleep(interval)
            before, now = now, _look(pid)
            found = as_dict(now.summary, now.records)
            for client, row in zip(found["clients"], _rows(before, now), strict=True):
                client["changes_per_second"] = row.rate
            click.echo(json.dumps(found, indent=2))
        elif batch or not _can_draw():
            for left in range((count or 1) - 1, -1, -1):
                time.sleep(interval)
                before, now = now, _look(pid)
                show(*_render(before, now, by, None), *([""] if left else []))
        else:
            _live(by, interval, pid, now)
    except (SourceUnavailableError, OSError) as error:
        if pid is None:
            raise click.ClickException(no_daemon(error)) from None
        show(_without_a_daemon(pid))
    except KeyboardInterrupt:
        pass
