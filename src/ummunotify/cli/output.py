"""Prints tables and sentences: wrapped on a terminal, and in whole lines into a file or a pipe."""

from __future__ import annotations

import os
import sys

import click
from rich.console import Console, RenderableType

_UNLIMITED = 1 << 16


def console(width: int | None = None) -> Console:
    """Takes text as it is. `width`: left out, the terminal's, or COLUMNS."""
    # COLUMNS=0, as some programs set it, means that they do not know; rich would print nothing.
    environment = {name: value for name, value in os.environ.items() if (name, value) != ("COLUMNS", "0")}
    return Console(highlight=False, markup=False, emoji=False, width=width, _environ=environment)


def show(*parts: RenderableType) -> None:
    """Print each on lines of its own. OSError: standard output cannot be written to."""
    terminal = sys.stdout is not None and sys.stdout.isatty()  # None: it was closed by the caller
    whole = not terminal and os.environ.get("COLUMNS", "0") == "0"
    printer = console(_UNLIMITED if whole else None)
    with printer.capture() as captured:
        for part in parts:
            printer.print(part)
    # rich fills the last column with blanks.
    lines = (line.rstrip() for line in captured.get().splitlines())
    click.echo("\n".join(lines), color=True)  # rich has decided about colours
