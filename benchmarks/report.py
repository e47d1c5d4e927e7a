"""docs/benchmarks.md: a section for each of the modules that measure something, which can be replaced alone."""

from __future__ import annotations

import os
import platform
import re
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_INTRODUCTION = """\
# What it costs

`make bench` measured all of this and wrote this page. `make bench SECTIONS=NAME` renews a section alone; its name is in
the page's source. Each ratio is against a baseline that was measured in the same run, in turns.
"""
_MARK = re.compile(r"^<!-- section (\w+) -->\n", re.MULTILINE)


class Row(NamedTuple):
    """A figure, and whether it is what was to be reached (None: nothing was)."""

    what: str
    goal: str
    measured: str
    baseline: str
    reached: bool | None


_VERDICT = {True: "reached", False: "**missed**", None: ""}


def table(rows: Iterable[Row]) -> str:
    lines = ["| what | goal | measured | baseline | |", "|---|---|---|---|---|"]
    for row in rows:
        lines.append("| {} | {} | {} | {} | {} |".format(*row[:4], _VERDICT[row.reached]))
    return "\n".join(lines) + "\n"


def wrapped(text: str) -> str:
    """The text, each of its paragraphs filled anew. Headings, tables and pictures stay as they are."""
    return "\n\n".join(
        part if part[0] in "|!#" else textwrap.fill(" ".join(part.split()), 120, break_on_hyphens=False)
        for part in re.split(r"\n\n+", text.strip())
    )


def machine() -> str:
    """When and on what something is measured, as a sentence."""
    cpu = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    flags = re.search(r"^flags\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    virtual = " (a virtual machine)" if flags and "hypervisor" in flags[1].split() else ""
    return (
        f"Measured on {time.strftime('%Y-%m-%d')}: {os.cpu_count()} CPUs, {cpu[1] if cpu else platform.machine()}"
        f"{virtual}, Linux {platform.release()}, Python {platform.python_version()}."
    )


def sections(page: str) -> dict[str, str]:
    """The sections of a page by name."""
    parts = _MARK.split(page)
    return {name: text.strip("\n") for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def assemble(order: Sequence[str], texts: Mapping[str, str]) -> str:
    """The page with those of the sections, in this order, of which there is a text."""
    known = [f"<!-- section {name} -->\n{texts[name]}\n" for name in order if name in texts]
    return "\n".join([_INTRODUCTION, *known])
