"""What watching costs: the process that unmaps, other processes, the calls, memory."""

from __future__ import annotations

from pathlib import Path

from . import mappings

TITLE = "Watching"


def section(quick: bool, folder: Path) -> str:
    return f"{mappings.added(100_000, mappings.Budget(1, 1, 2 if quick else 10))}"
