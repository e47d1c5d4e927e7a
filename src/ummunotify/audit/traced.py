"""Stacks of changes from the kernel, for those that the audited program could not take itself."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from .._stacks import Stack, Tracer
from ..symbols import Code, Frame, code_of
from .records import Process, Record

_OWN = "libummunotify-audit.so"
"""It stands between the program and the C library."""
_PAUSE = 0.02
_MOST = 20_000


@dataclass(frozen=True, slots=True)
class Traced:
    time: float
    """Since 1970, as in the records."""
    start: int
    end: int
    thread: int
    thread_name: str
    process: int
    process_name: str
    stack: Stack
    code: list[Code]
    """What its process had mapped; empty if that had ended already."""

    def places(self, code: list[Code]) -> tuple[Frame, ...]:
        """Its frames, to be looked up. `code`: what is known of its process otherwise."""
        found = self.stack.places(self.code or code)
        return tuple(each for each in found if os.path.basename(each.module) != _OWN)


class Listener:
    """Reads the stacks while the program runs; where their processes still are, so are their mappings."""

    def __init__(self, ring: int) -> None:
        """Of a descriptor that the caller closes. OSError."""
        self._tracer = Tracer(ring)
        self._found: list[Traced] = []
        self._to_real = time.time() - time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are for the main thread
        while not self._stop.wait(_PAUSE):
            self._read()

    def _read(self) -> None:
        code: dict[int, list[Code]] = {}
        for stack in self._tracer.take():
            if len(self._found) < _MOST:
                if stack.process not in code:
                    code[stack.process] = code_of(stack.process)
                self._found.append(self._traced(stack, code[stack.process]))

    def _traced(self, stack: Stack, code: list[Code]) -> Traced:
        return Traced(
            stack.time + self._to_real,
            stack.start,
            stack.end,
            stack.thread,
            stack.thread_name,
            stack.process,
            stack.process_name,
            stack,
            code,
        )

    def end(self) -> list[Traced]:
        """All of them, in order."""
        self._stop.set()
        self._thread.join()
        self._read()
        return sorted(self._found, key=lambda each: each.time)


class Assigned(NamedTuple):
    traced: Traced
    places: tuple[Frame, ...]


def assign(processes: Iterable[Process], traced: list[Traced], code: Mapping[int, list[Code]]) -> dict[int, Assigned]:
    """Which belongs to which change, by the record's id().

    The first one by that thread since the pin's last change that hit the pin, and no later than it was noticed.
    """
    found: dict[int, Assigned] = {}
    by_thread: dict[int, list[Traced]] = {}
    for each in traced:
        by_thread.setdefault(each.thread, []).append(each)
    last: dict[tuple[int, int], float] = {}
    for process in processes:
        for record in process.records:
            if record["record"] == "change":
                pin = process.pid, record["pin"]
                since = last.get(pin, float(record["pinned_time"]))
                first = _first(record, by_thread.get(record.get("thread", 0), []), since)
                if first:
                    found[id(record)] = Assigned(first, first.places(code.get(first.process, [])))
                last[pin] = record["time"]
    return found


def _first(record: Record, traced: list[Traced], since: float) -> Traced | None:
    return next(
        (
            each
            for each in traced
            if since < each.time <= record["time"] and each.start < record["end"] and each.end > record["start"]
        ),
        None,
    )
