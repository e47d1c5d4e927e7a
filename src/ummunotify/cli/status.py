"""`ummunotify status`: what the daemon does."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import click
from rich.console import RenderableType
from rich.table import Table

from .._abi import RECORD_SIZE, STATUS_SUMMARY, SUMMARY_SIZE, Op, Record, Request, Summary
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


def _mib(count: int) -> str:
    return f"{count / (1 << 20):,.1f} MiB"


@click.command("status")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def status(as_json: bool) -> None:
    """Show the daemon's clients: their regions, invalidations and memory.

    root sees all clients, another user those of its own. Exits with 1 if no daemon answers.
    """
    try:
        with socket.socket(fileno=connect_to_daemon()) as connection:
            summary = Summary.unpack(_ask(connection, STATUS_SUMMARY, SUMMARY_SIZE))
            records = list(_records(connection))
    except SourceUnavailableError as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise click.ClickException(f"the daemon does not answer ({error}); look at its log") from None
    if as_json:
        clients = [record._asdict() | {"command": record.command.decode(errors="replace")} for record in records]
        click.echo(json.dumps({"daemon": summary._asdict(), "clients": clients}, indent=2))
        return
    parts: list[RenderableType] = [
        f"daemon {summary.pid}: {summary.clients} of {summary.tables} clients, {summary.ready} tables ready, "
        f"{_mib(summary.memory)} of kernel memory, up for {summary.seconds} s"
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
            _mib(r.memory),
            ascii(r.command.decode(errors="replace"))[1:-1],
        )
    show(*parts, *([table] if records else []))
