"""`ummunotify doctor`: what works on this machine."""

from __future__ import annotations

import json
import os
import platform

import click
from rich.table import Table
from rich.text import Text

from .._core import SOURCE_ENVIRONMENT, source_names, subscribed_by
from ..bpf import libbpf
from ..bpf.program import CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN, capabilities, count_on_host
from ..errors import UnknownSourceError
from ..notifier import Finding, survey
from .output import show


def _capabilities() -> str:
    """Those of this process that matter here."""
    effective = capabilities()
    if effective is None:
        return "capabilities not known: /proc is not mounted"
    names = {CAP_BPF: "CAP_BPF", CAP_PERFMON: "CAP_PERFMON", CAP_SYS_ADMIN: "CAP_SYS_ADMIN"}
    held = [name for number, name in names.items() if effective >> number & 1]
    return ", ".join(held) or "no capability that matters here"


def _libbpf() -> str:
    try:
        return libbpf.libbpf_version()
    except OSError:
        return "not installed"


def _programs(count: int | None) -> str:
    """Before any source is opened here."""
    if count is None:
        return "not known: counting them takes CAP_SYS_ADMIN and libbpf"
    return f"{count} attached, of all processes"


def _advice(findings: list[Finding], programs: int | None) -> str:
    """What to do where processes have programs of their own."""
    if not programs or any(finding.available for finding in findings if finding.source.startswith("daemon")):
        return ""
    return (
        f"There is no daemon, so each process that loads BPF has a program of its own: {programs} now. Each adds to "
        "what a munmap takes in all processes that watch. With a daemon there is one program for all: see "
        "`ummunotify daemon install`."
    )


def _machine(programs: int | None) -> dict[str, str]:
    return {
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "user": f"uid {os.geteuid()}, {_capabilities()}",
        "libbpf": _libbpf(),
        "kernel types (BTF)": "available" if libbpf.btf_available() else f"not available: no {libbpf.BTF_PATH}",
        "/dev/kvm": ("usable" if os.access("/dev/kvm", os.R_OK | os.W_OK) else "not permitted")
        if os.path.exists("/dev/kvm")
        else "not there",
        "BPF programs": _programs(programs),
    }


def _verdict(findings: list[Finding]) -> tuple[str | None, str]:
    """Which source `open()` would take, and how to say that."""
    working = [finding.source for finding in findings if finding.available]
    try:
        wanted = source_names()
    except UnknownSourceError as error:
        return None, f"ummunotify does not work here: {error}"
    best = next((each for name in wanted for each in working if each == name or each.startswith(f"{name}:")), None)
    if best is not None:
        return best, f"ummunotify works here: it will use {best}."
    if working:
        insisted = os.environ.get(SOURCE_ENVIRONMENT)
        return (
            None,
            f"ummunotify does not work here with {SOURCE_ENVIRONMENT}={insisted}; without it, {working[0]} works.",
        )
    return None, "ummunotify does not work here."


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(as_json: bool) -> None:
    """Report what works on this machine, what does not, and what to do about it.

    Opens each source of invalidations, unmaps a page and checks that the source has seen it. Exits with 0 if
    at least one source works, and with 1 if none does, or not the one that UMMUNOTIFY_SOURCE insists on.
    """
    programs = count_on_host()
    machine, findings = _machine(programs), survey()
    machine["subscribed by"] = subscribed_by() or "nothing"
    if insisted := os.environ.get(SOURCE_ENVIRONMENT):
        machine[SOURCE_ENVIRONMENT] = insisted
    best, verdict = _verdict(findings)
    advice = _advice(findings, programs)
    if as_json:
        sources = [finding._asdict() for finding in findings]
        click.echo(json.dumps({"machine": machine, "sources": sources, "advice": advice}, indent=2))
        raise SystemExit(best is None)

    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    for name, value in machine.items():
        facts.add_row(Text(name, style="bold"), value)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("source", no_wrap=True)
    table.add_column("self-test", overflow="fold")
    for finding in findings:
        if finding.available:
            outcome = Text.assemble(("passed", "green"), ": a page was unmapped, and it was seen")
        else:
            remedy = f"\n-> {finding.remedy}" if finding.remedy else ""
            outcome = Text.assemble(("not available", "red"), f": {finding.reason}{remedy}")
        table.add_row(finding.source, outcome)
    style = "bold red" if best is None else "bold green"
    show(facts, "", table, "", *([advice, ""] if advice else []), Text(verdict, style=style))
    raise SystemExit(best is None)
