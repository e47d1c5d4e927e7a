"""Reads what the processes of an audited program have left: a file each, see libummunotify/audit/records.h."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..symbols import Code, Frame

_COUNTS = struct.Struct("=IIQQQQQ")
_MAGIC = 0x31747561
_PYTHON_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)

Record = dict[str, Any]


@dataclass(slots=True)
class Process:
    """One, or one program of it: another after each exec."""

    pid: int
    parent: int
    command: str
    started: float
    ended: bool
    """By exit, and not by a signal, _exit or exec."""
    pins: int
    unwatched: int
    changed: int
    used: int
    lost: int
    records: list[Record] = field(default_factory=list)


def _text(value: Any) -> Any:
    """Each byte came as a character."""
    if isinstance(value, str):
        return os.fsdecode(value.encode("latin-1"))
    if isinstance(value, list):
        return [_text(each) for each in value]
    return value


def _lines(data: bytes) -> Iterator[Record]:
    """All that are complete."""
    for line in data.rstrip(b"\0").split(b"\n")[:-1]:
        try:
            yield {name: _text(value) for name, value in json.loads(line).items()}
        except ValueError:  # its writer was killed
            continue


def _read(path: Path) -> Process | None:
    with path.open("rb") as file:
        head = file.read(_COUNTS.size)
        if len(head) < _COUNTS.size:
            return None
        magic, ended, pins, unwatched, changed, used, lost = _COUNTS.unpack(head)
        if magic != _MAGIC:
            return None
        data = bytearray()
        # Almost all of the file is a hole.
        while chunk := file.read(1 << 20):
            data += chunk
            if chunk.endswith(bytes(4096)):
                break
    records = list(_lines(bytes(data)))
    if not records or records[0]["record"] != "process":
        return None
    first = records[0]
    return Process(
        first["pid"],
        first["parent"],
        first["command"],
        first["time"],
        bool(ended),
        pins,
        unwatched,
        changed,
        used,
        lost,
        records[1:],
    )


def read(directory: Path) -> list[Process]:
    """In the order in which they began."""
    found = (_read(path) for path in directory.iterdir() if re.fullmatch(r"\d+\.\d+", path.name))
    return sorted((each for each in found if each), key=lambda each: each.started)


def code(processes: Iterable[Process]) -> dict[int, list[Code]]:
    """What each had mapped that may be executed, as it last said."""
    return {
        process.pid: [Code(*each) for each in record["mappings"]]
        for process in processes
        for record in process.records
        if record["record"] == "code"
    }


def stack(record: Record, prefix: str = "") -> tuple[Frame, ...]:
    """Python's frames first: they are what a Python program's author knows."""
    python = [
        Frame("python", function, file, int(line))
        for file, line, function in _PYTHON_FRAME.findall(record.get(f"{prefix}python", ""))
    ]
    c = [Frame("c", "", "", 0, module, offset) for module, offset in record.get(f"{prefix}frames", [])]
    return (*python, *c)
