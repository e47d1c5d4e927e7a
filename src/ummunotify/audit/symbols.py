"""C frames get their functions and lines from debug information.

By elfutils' eu-addr2line if it is there, which finds separate debug information too (build ids, debuginfod), else by
that of binutils: both take the same options, and know exported functions without debug information. Without them a
frame is a library and an offset.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from .records import Frame

_PATIENCE = 60.0
_AT_ONCE = 1000

Known = dict[tuple[str, int], tuple[Frame, ...]]


def _tool() -> str | None:
    return shutil.which("eu-addr2line") or shutil.which("addr2line")


def _ask(tool: str, module: str, offsets: list[int]) -> Iterator[tuple[int, tuple[Frame, ...]]]:
    """The frames at each offset: several where functions were inlined."""
    command = [tool, "-a", "-C", "-f", "-i", "-e", module, *(f"{offset:#x}" for offset in offsets)]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_PATIENCE, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return
    for part in re.split(r"^(?=0x[0-9a-f]+$)", result.stdout, flags=re.MULTILINE)[1:]:
        address, *lines = part.splitlines()
        frames = []
        for function, place in zip(lines[::2], lines[1::2], strict=False):
            # "file:12", "file:12:5", "file:12 (discriminator 3)"; "??:0" where it is not known
            found = re.match(r"(.*?):(\d+)(?::\d+)?(?: \(.*\))?$", place)
            known = found is not None and not found[1].startswith("?")
            frames.append(
                Frame(
                    "c",
                    re.sub(r" inlined at .*", "", function),
                    found[1] if found and known else "",
                    int(found[2]) if found and known else 0,
                    module,
                    int(address, 16),
                )
            )
        yield int(address, 16), tuple(frames)


def look_up(frames: Iterable[Frame]) -> Known:
    """What is known about the C frames among these."""
    places = defaultdict(set)
    for frame in frames:
        if frame.language == "c" and frame.module:
            places[frame.module].add(frame.offset)
    tool = _tool()
    known: Known = {}
    if tool is None:
        return known
    for module, all_offsets in places.items():
        offsets = sorted(all_offsets)
        if not Path(module).is_file():
            continue
        for i in range(0, len(offsets), _AT_ONCE):
            known |= {(module, offset): found for offset, found in _ask(tool, module, offsets[i : i + _AT_ONCE])}
    return known


def resolve(stack: Iterable[Frame], known: Known) -> tuple[Frame, ...]:
    """The same with all that is known."""
    result: list[Frame] = []
    for frame in stack:
        found = known.get((frame.module, frame.offset), ())
        if found and found[0].function and not found[0].function.startswith("?"):
            result += found
        elif found and found[0].file:
            result.append(dataclasses.replace(frame, file=found[0].file, line=found[0].line))
        else:
            result.append(frame)
    return tuple(result)
