"""`ummunotify selftest`: is every kind of change seen on this machine?"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable

import click
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from .._core import source_names
from ..errors import SourceUnavailableError, UnknownSourceError
from ..notifier import open as open_notifier
from ..selftest import Outcome, Result, run
from .output import show

_STYLES = {
    Outcome.SEEN: "green",
    Outcome.QUIET: "green",
    Outcome.MISSED: "bold red",
    Outcome.FAILED: "bold red",
    Outcome.NEEDLESS: "yellow",
    Outcome.BLIND: "yellow",
}


def _table(title: str, names: list[str], found: dict[str, list[Result]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(title)
    for source in found:
        table.add_column(source.replace(":", ":\n").replace("_", "_\n"), no_wrap=True)
    for name in names:
        outcomes = [result.outcome for results in found.values() for result in results if result.case == name]
        table.add_row(name, *(Text(outcome, style=_STYLES.get(outcome, "dim")) for outcome in outcomes))
    return table


def _notes(found: dict[str, list[Result]]) -> Iterable[tuple[str, str]]:
    """What there is to say about outcomes, each once: ("not here", "why: the cases")."""
    notes: dict[tuple[str, Outcome, str], list[str]] = {}
    for source, results in found.items():
        for result in results:
            if result.why:
                # What cannot be done here cannot be done for any source.
                where = "" if result.outcome is Outcome.IMPOSSIBLE else f"{source}: "
                cases = notes.setdefault((where, result.outcome, result.why), [])
                if result.case not in cases:
                    cases.append(result.case)
    for (where, outcome, why), cases in notes.items():
        # Of the others there are many, and the table shows which.
        which = "" if outcome in (Outcome.REFUSED, Outcome.BLIND) else f": {', '.join(cases)}"
        yield f"{where}{outcome}", f"{why}{which}"


def _show(found: dict[str, list[Result]], unavailable: dict[str, str]) -> None:
    results = next(iter(found.values()), [])
    parts: list[RenderableType] = []
    if found:
        parts += [_table("what changes the mapping", [each.case for each in results if each.changes], found), ""]
        parts += [_table("what must not count", [each.case for each in results if not each.changes], found), ""]
    notes = Table.grid(padding=(0, 2))
    notes.add_column(no_wrap=True)
    for source, reason in unavailable.items():
        notes.add_row(f"{source}: unavailable", reason)
    for what, why in _notes(found):
        notes.add_row(what, why)
    if notes.rows:
        parts += [notes, ""]
    for source, results in found.items():
        bad = sum(each.bad for each in results)
        seen = sum(each.outcome is Outcome.SEEN for each in results)
        verdict = f"{bad} missed" if bad else "no miss"
        parts.append(Text(f"{source}: {verdict}, {seen} seen", style="bold red" if bad else "bold green"))
    if not found:
        parts.append(Text("no source works here: see `ummunotify doctor`", style="bold red"))
    show(*parts)


@click.command("selftest")
@click.option("--source", help="Only this source, or this of its probes: bpf, bpf:kvm, uffd, ...")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def selftest(source: str | None, as_json: bool) -> None:
    """Make every known kind of change of a mapping, and check that it is seen.

    Each source and probe that works here watches memory of this process while it is unmapped, moved, replaced,
    discarded, truncated, copied on write; and while things happen that must not count as a change.

    \b
    seen      the change was seen           quiet     nothing was reported, as it should be
    MISSED    it was not: a defect          needless  reported without need: it costs time
    refused   such memory cannot be watched with this source, and it says so
    blind     the source cannot see this, as its documentation says
    not here  this kernel or this user cannot do it
    FAILED    the change itself failed, so the source was not tested

    Exits with 1 if anything was missed, or if no source works.
    """
    try:
        names = [*source_names("bpf"), "daemon", "uffd"] if source is None else source_names(source)
    except UnknownSourceError as error:
        raise click.BadParameter(str(error), param_hint="--source") from None
    found: dict[str, list[Result]] = {}
    unavailable: dict[str, str] = {}
    for name in names:
        try:
            with open_notifier(name) as umn:
                found[umn.source] = list(run(umn))
        except SourceUnavailableError as error:
            unavailable |= error.reasons
    if as_json:
        report = {
            "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
            "uid": os.geteuid(),
            "sources": {
                name: [result._asdict() | {"bad": result.bad} for result in results] for name, results in found.items()
            },
            "unavailable": unavailable,
        }
        click.echo(json.dumps(report, indent=2))
    else:
        _show(found, unavailable)
    raise SystemExit(not found or any(result.bad for results in found.values() for result in results))
