"""Prints tables and sentences: wrapped on a terminal, and in whole lines into a file or a pipe."""

from __future__ import annotations

import os
import sys

import click
from rich.console import Console, RenderableType

_UNLIMITED = 1 << 16


def show(*parts: RenderableType) -> None:
    """Print each on lines of its own. OSError: standard output cannot be written to."""
    terminal = sys.stdout is not None and sys.stdout.isatty()  # None: it was closed by the caller
    whole = not terminal and "COLUMNS" not in os.environ
    console = Console(highlight=False, markup=False, emoji=False, width=_UNLIMITED if whole else None)
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    # rich fills the last column with blanks.
    lines = (line.rstrip() for line in captured.get().splitlines())
    click.echo("\n".join(lines), color=True)  # rich has decided about colours
