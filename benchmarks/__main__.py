"""Measure what ummunotify costs, and write docs/benchmarks.md.

Each section of that page comes from a module of this package that has

    TITLE: str
    def section(quick: bool, folder: Path) -> str: ...

which measures, for a minute or two or (quick) some seconds, and returns the text under the title. It may leave pictures
in the folder, where the page will be.
"""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path

import click

from . import report

SECTIONS = ("watching", "probes", "cache", "daemon", "uffd", "device")
"""The modules, in the page's order."""


def _measure(name: str, quick: bool, folder: Path) -> str:
    click.echo(f"{name} ...", err=True)
    module = importlib.import_module(f".{name}", __package__)
    return f"## {module.TITLE}\n\n{report.machine()}\n\n{report.wrapped(module.section(quick, folder))}"


@click.command(help=__doc__)
@click.argument("names", nargs=-1, type=click.Choice(SECTIONS), metavar="[SECTION]...")
@click.option("--quick", is_flag=True, help="Measure for seconds only; print the sections, write no page.")
@click.option("--folder", default=Path("docs"), type=click.Path(path_type=Path, file_okay=False), show_default=True)
def main(names: tuple[str, ...], quick: bool, folder: Path) -> None:
    if quick:
        with tempfile.TemporaryDirectory() as scratch:
            for name in names or SECTIONS:
                click.echo(_measure(name, quick, Path(scratch)) + "\n")
        return
    page = folder / "benchmarks.md"
    for name in names or SECTIONS:
        text = _measure(name, quick, folder)
        # Read it only now: a colleague may have renewed another section meanwhile.
        texts = report.sections(page.read_text()) if page.exists() else {}
        page.write_text(report.assemble(SECTIONS, {**texts, name: text}))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
