"""Frames, and what is known about an address, of a process or of the kernel.

C frames get their functions and lines by elfutils' eu-addr2line if it is there, which finds separate debug information
too (build ids, debuginfod), else by that of binutils: both take the same options, and know exported functions without
debug information. Without them a frame is a library and an offset.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import os
import re
import shutil
import struct
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_PATIENCE = 60.0
_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class Frame:
    """Of a stack, innermost first. A C frame is a place in a file until it is looked up."""

    language: str
    """`c` or `python`."""
    function: str
    file: str
    """Of the source; empty where that is not known."""
    line: int
    module: str = ""
    """The program or library, and where in it."""
    offset: int = 0


Known = dict[tuple[str, int], tuple[Frame, ...]]


# ---- C code. ----


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


# ---- Addresses of a process. ----


class Code(NamedTuple):
    """A mapping that may be executed."""

    start: int
    end: int
    offset: int
    path: str


def code_of(pid: int) -> list[Code]:
    """Empty if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        addresses, permissions, offset, _, _, *path = line.split(maxsplit=5)
        if "x" in permissions:
            start, end = (int(each, 16) for each in addresses.split("-"))
            found.append(Code(start, end, int(offset, 16), path[0] if path else ""))
    return found


_PT_LOAD = 1
_HEAD, _PROGRAM_HEADER = struct.Struct("=32xQ14xHH6x"), struct.Struct("=IIQQQQQ")


@functools.lru_cache(maxsize=256)
def _segments(path: str) -> list[tuple[int, int, int]]:
    """Of a 64-bit ELF file: where each segment is in the file, how long it is there, and at which address."""
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD.size)
            if len(head) < _HEAD.size or head[:5] != b"\x7fELF\x02":
                return []
            at, size, count = _HEAD.unpack(head)
            file.seek(at)
            table = file.read(size * count)
    except OSError:
        return []
    headers = [_PROGRAM_HEADER.unpack_from(table, at) for at in range(0, len(table) - _PROGRAM_HEADER.size, size or 1)]
    return [(offset, length, address) for kind, _, offset, address, _, length, _ in headers if kind == _PT_LOAD]


def _in_module(code: Code, address: int) -> int:
    """The address as the module itself has it, for addr2line."""
    in_file = address - code.start + code.offset
    for offset, length, at in _segments(code.path):
        if offset <= in_file < offset + length:
            return in_file - offset + at
    return in_file


def _makes_no_frames(code: Code) -> bool:
    """The C library's functions that make a system call do nothing else."""
    return os.path.basename(code.path).startswith(("libc.so", "libc-", "libc.musl", "ld-musl"))


def places(code: Sequence[Code], addresses: Sequence[int], caller: int) -> list[Frame]:
    """The frames at these addresses, up to the first that is none, to be looked up.

    `caller`: where the innermost function returns to if it has made no frame. A walk along the frame pointers has left
    that out.
    """

    def code_at(address: int) -> Code | None:
        return next((each for each in code if each.start <= address < each.end), None)

    first = code_at(addresses[0]) if addresses else None
    if first is not None and _makes_no_frames(first) and code_at(caller - 1):
        addresses = (addresses[0], caller, *addresses[1:])
    frames = []
    for address in addresses:
        # The call itself: a frame has the address to return to, and the first one that after the system call.
        at = code_at(address - 1)
        if at is None:
            break
        frames.append(Frame("c", "", "", 0, at.path, _in_module(at, address - 1)))
    return frames


# ---- Addresses of the kernel. ----

_KERNEL = Path("/proc/kallsyms")
_OF_TRACING = ("bpf_", "__bpf_", "__traceiter_", "arch_rethook", "ftrace_")
_kernel_names: dict[int, str] = {}


def _look_up_kernel(addresses: Iterable[int]) -> dict[int, str]:
    """Where addresses are hidden from this user, they have no names."""
    try:
        lines = _KERNEL.read_text().splitlines()
    except OSError:
        lines = []
    symbols = sorted((int(start, 16), name) for start, _, name, *_ in (line.split() for line in lines))
    found = {}
    for address in addresses:
        at = bisect.bisect(symbols, (address, "")) - 1
        found[address] = symbols[at][1] if at >= 0 and symbols[at][0] else f"{address:#x}"
    return found


def kernel_functions(addresses: Sequence[int]) -> tuple[str, ...]:
    """The names of the functions, without those that take the stack."""
    missing = {address for address in addresses if address not in _kernel_names}
    if missing:
        _kernel_names.update(_look_up_kernel(missing))
    names = [_kernel_names[address] for address in addresses]
    first = next((i for i, name in enumerate(names) if not name.startswith(_OF_TRACING)), 0)
    return tuple(names[first:])
