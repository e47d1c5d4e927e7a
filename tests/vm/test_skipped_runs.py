"""Runs of the program that the kernel skips, in the guests: none is skipped unnoticed.

It skips programs at kprobes on a CPU where a task has raised bpf_prog_active and was preempted. System calls on maps
raise it. Here they copy much, and threads of real-time priority preempt them and change memory.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1]))
from daemons import Child
from support import require

import ummunotify

_BPF, _MAP_CREATE, _MAP_LOOKUP, _MAP_TYPE_ARRAY = {"x86_64": 321, "aarch64": 280}[os.uname().machine], 0, 1, 2
_SIZE = 1 << 20
_CHANGES = 2000  # enough for more overflows than these
_OVERFLOWS = 20
_libc = ctypes.CDLL(None, use_errno=True)


def look_up(pipe: Any) -> None:
    """Values of a map, for ever."""

    def bpf(command: int, attributes: bytes) -> int:
        result: int = _libc.syscall(_BPF, command, attributes, len(attributes))
        assert result >= 0, os.strerror(ctypes.get_errno())
        return result

    key, value = ctypes.c_uint32(0), ctypes.create_string_buffer(_SIZE)
    fd = bpf(_MAP_CREATE, struct.pack("=IIIII", _MAP_TYPE_ARRAY, 4, _SIZE, 1, 0))
    pipe.send("looking up")
    while True:
        bpf(_MAP_LOOKUP, struct.pack("=IxxxxQQQ", fd, ctypes.addressof(key), ctypes.addressof(value), 0))


@pytest.fixture
def others() -> Iterator[list[Child]]:
    children = [Child(look_up, 0) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        assert {each.hear() for each in children} == {"looking up"}
        yield children
    finally:
        for each in children:
            each.kill()


@pytest.fixture
def first() -> Iterator[None]:
    """This process preempts all others that want the CPU."""
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
    yield
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


@pytest.mark.parametrize("source", ["bpf:mmu_notifier", "bpf:zap"])
def test_what_is_skipped_is_noticed(source: str, native: Any, others: list[Child], first: None) -> None:
    if "UMMUNOTIFY_VM" not in os.environ:
        require("vm", "the host would stand still", always=False)

    def end_others() -> None:
        """At the end all has to be told, and while they go on, runs may always have been skipped just now."""
        while umn.stats.overflows < _OVERFLOWS and not ended.wait(0.01):
            pass
        for each in others:
            os.kill(each.pid, signal.SIGKILL)

    ended = threading.Event()
    with ummunotify.open(source) as umn:
        thread = threading.Thread(target=end_others)
        thread.start()
        try:
            wrong, totals = native.run(umn, threads=4, files=True, changes=_CHANGES, seconds=600.0, seed=os.getpid())
        finally:
            ended.set()
            thread.join()
        overflows = umn.stats.overflows
    report = f"{source}: {totals}, {overflows} overflows"
    print(report)
    assert wrong is None, report
    # There was something to notice: after each time that runs may have been skipped, every region is given up.
    assert overflows > 0, report
