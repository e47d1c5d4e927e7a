"""`ummunotify status`: what the daemon does."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import click
from rich.console import RenderableType
from rich.table import Table

from .._abi import (
    RECORD_SIZE,
    SOCKET_ENVIRONMENT,
    STATUS_SUMMARY,
    SUMMARY_SIZE,
    Op,
    Record,
    Request,
    Summary,
    socket_path,
)
from .._core import connect_to_daemon
from ..errors import SourceUnavailableError
from .output import show


def _ask(connection: socket.socket, argument: int, size: int) -> bytes:
    connection.send(Request(Op.STATUS, argument=argument).pack())
    data = connection.recv(size)
    if not data:
        raise ConnectionError("the daemon ended the connection")
    return data


def _records(connection: socket.socket) -> Iterator[Record]:
    table = 0
    while True:
        data = _ask(connection, table, RECORD_SIZE)
        if len(data) < RECORD_SIZE:
            return
        record = Record.unpack(data)
        yield record
        table = record.table + 1


def ask_daemon() -> tuple[Summary, list[Record]]:
    """What it says of itself, and of the clients that this user may see. SourceUnavailableError, OSError."""
    with socket.socket(fileno=connect_to_daemon()) as connection:
        try:
            summary = Summary.unpack(_ask(connection, STATUS_SUMMARY, SUMMARY_SIZE))
        except ValueError:
            why = (
                f"what answers at {socket_path()} is no daemon of this version of ummunotify; install the same version "
                f"on both sides, or set {SOCKET_ENVIRONMENT} to the daemon's socket"
            )
            raise SourceUnavailableError(why, {"daemon": why}) from None
        return summary, list(_records(connection))


def no_daemon(error: SourceUnavailableError | OSError) -> str:
    """Why `ask_daemon` failed."""
    if isinstance(error, SourceUnavailableError):
        return str(error)
    return f"the daemon does not answer ({error}); look at its log"


def as_dict(summary: Summary, records: list[Record]) -> dict[str, Any]:
    clients = [record._asdict() | {"command": record.command.decode(errors="replace")} for record in records]
    return {"daemon": summary._asdict(), "clients": clients}


def command_of(record: Record) -> str:
    """The name is the client's own choice."""
    return ascii(record.command.decode(errors="replace"))[1:-1]


def mib(count: int) -> str:
    return f"{count / (1 << 20):,.1f} MiB"


@click.command("status")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def status(as_json: bool) -> None:
    """Show the daemon's clients: their regions, invalidations and memory.

    root sees all clients, another user those of its own. Exits with 1 if no daemon answers.
    """
    try:
        summary, records = ask_daemon()
    except (SourceUnavailableError, OSError) as error:
        raise click.ClickException(no_daemon(error)) from None
    if as_json:
        click.echo(json.dumps(as_dict(summary, records), indent=2))
        return
    parts: list[RenderableType] = [
        f"daemon {summary.pid}: {summary.clients} of {summary.tables} clients, {summary.ready} tables ready, "
        f"{mib(summary.memory)} of kernel memory, up for {summary.seconds} s"
    ]
    if summary.runs:
        parts.append(
            f"BPF program: {summary.runs:,} runs, {summary.run_time_ns / summary.runs:.0f} ns each, "
            f"{summary.skipped} skipped"
        )
    else:
        parts.append(f"BPF program: {summary.skipped} runs skipped; the kernel does not time them (--bpf-statistics)")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("pid", "uid", "regions", "invalidations", "memory"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("command")
    for r in records:
        table.add_row(
            str(r.pid),
            str(r.uid),
            f"{r.regions:,}",
            f"{r.generation:,}",
            mib(r.memory),
            command_of(r),
        )
    show(*parts, *([table] if records else []))
