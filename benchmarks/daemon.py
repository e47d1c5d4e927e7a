"""The daemon: what opening a notifier through it costs, and 256 processes with 1,000 regions each.

The clients are processes of an unprivileged user.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NamedTuple

import ummunotify
from ummunotify import SourceUnavailableError, _abi, _core

from . import report

TITLE = "The daemon"

PAGE = mmap.PAGESIZE
NOBODY = 65534
AT_ONCE = 100
RANKS, REGIONS = 256, 1000
OPEN_MOST = 5e-3
RESIDENT_MOST = 100 << 20


class Process:
    """A child of another user, that runs `function` with its end of `pipe`."""

    def __init__(self, function: Callable[[Connection], None]) -> None:
        self.pipe, theirs = Pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                self.pipe.close()
                os.setgroups([])
                os.setresgid(NOBODY, NOBODY, NOBODY)
                os.setresuid(NOBODY, NOBODY, NOBODY)
                function(theirs)
            finally:
                os._exit(0)
        theirs.close()

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.pipe.close()


@contextlib.contextmanager
def processes(function: Callable[[Connection], None], count: int) -> Iterator[list[Process]]:
    """That have all sent their first message."""
    started: list[Process] = []
    try:
        for _ in range(count):
            started.append(Process(function))
        for process in started:
            process.pipe.recv()
        yield started
    finally:
        for process in started:
            process.end()


def ask(started: list[Process]) -> list[Any]:
    """Let all go on at once, and hear what they say."""
    for process in started:
        process.pipe.send(None)
    return [process.pipe.recv() for process in started]


@contextlib.contextmanager
def serving() -> Iterator[int]:
    """A daemon; its number."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = os.environ[_abi.SOCKET_ENVIRONMENT] = f"{folder}/socket"
        daemon = subprocess.Popen(
            [sys.executable, "-m", "ummunotify", "daemon", "--socket", path, "--user", "nobody"],
            stderr=subprocess.DEVNULL,
        )
        try:
            idle()
            yield daemon.pid
        finally:
            daemon.terminate()
            daemon.wait()
            del os.environ[_abi.SOCKET_ENVIRONMENT]


def idle() -> _abi.Summary:
    """When the daemon is there, and has everything ready."""
    while True:
        with contextlib.suppress(SourceUnavailableError), socket.socket(fileno=_core.connect_to_daemon()) as connection:
            connection.send(_abi.Request(_abi.Op.STATUS, argument=_abi.STATUS_SUMMARY).pack())
            summary = _abi.Summary.unpack(connection.recv(_abi.SUMMARY_SIZE))
            if summary.ready == 16:
                return summary
        time.sleep(0.05)


def resident(pid: int) -> int:
    """In bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE


def cpu(pid: int) -> float:
    """In seconds, of all threads."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


# ---- opening ----


class Opened(NamedTuple):
    wall: float
    cpu: float


def opener(pipe: Connection) -> None:
    ummunotify.open(source="daemon").close()  # what is done once in a process
    pipe.send(None)
    while True:
        pipe.recv()
        used, began = time.process_time(), time.perf_counter()
        umn = ummunotify.open(source="daemon")
        pipe.send(Opened(time.perf_counter() - began, time.process_time() - used))
        pipe.recv()
        umn.close()
        pipe.send(None)


class Opening(NamedTuple):
    latency: float
    """From asking for it to having it: the median of all that were opened."""
    share: float
    """The time in which all were opened, divided by their number."""
    clients_cpu: float
    daemon_cpu: float


def opening(pid: int, count: int, rounds: int) -> Opening:
    """The best round."""
    best: Opening | None = None
    with processes(opener, count) as started:
        for _ in range(rounds):
            idle()
            before, began = cpu(pid), time.perf_counter()
            opened: list[Opened] = ask(started)
            took, used = time.perf_counter() - began, cpu(pid) - before
            ask(started)
            result = Opening(
                statistics.median(one.wall for one in opened),
                took / count,
                statistics.mean(one.cpu for one in opened),
                used / count,
            )
            best = result if best is None else min(best, result, key=lambda one: one.share)
    assert best is not None
    return best


# ---- many with many ----


class Many(NamedTuple):
    resident: int
    kernel: int
    idle_cpu: float
    """A second's."""
    truncate: float
    told: int
    """Processes that found all of their regions invalid."""


def many(pid: int, ranks: int, seconds: float) -> Many:
    with tempfile.TemporaryFile() as file:
        os.truncate(file.fileno(), REGIONS * PAGE)

        def rank(pipe: Connection) -> None:
            with ummunotify.open(source="daemon") as umn, mmap.mmap(file.fileno(), REGIONS * PAGE) as mapped:
                address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
                bytes(mapped)
                regions = [umn.watch((address + i * PAGE, PAGE)) for i in range(REGIONS)]
                assert all(region.valid for region in regions)
                pipe.send(None)
                pipe.recv()
                pipe.send(not any(region.valid for region in regions) and len(umn.read()) == REGIONS)
                pipe.recv()

        with processes(rank, ranks) as started:
            summary = idle()
            time.sleep(0.5)
            before = cpu(pid)
            time.sleep(seconds)
            used = cpu(pid) - before
            began = time.perf_counter()
            os.truncate(file.fileno(), 0)
            took = time.perf_counter() - began
            return Many(resident(pid), summary.memory, used / seconds, took, sum(ask(started)))


# ---- afterwards ----


def unmapping(source_name: str, count: int) -> float:
    """Seconds that munmap of a watched page takes, the least of some rounds."""
    libc = ctypes.CDLL(None)
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    best = 1.0
    with ummunotify.open(source=source_name) as umn:
        for _ in range(10):
            areas = [mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE) for _ in range(count)]
            for area in areas:
                area[0] = 1
            regions = [umn.watch(area) for area in areas]
            began = time.thread_time()
            for area in areas:
                area.close()
            best = min(best, (time.thread_time() - began) / count)
            assert len(umn.read()) == count
            for region in regions:
                region.close()
    return best


def section(quick: bool, folder: Path) -> str:
    ummunotify.open(source="bpf").close()  # imported before the processes are made
    count = 32 if quick else RANKS
    with serving() as pid:
        one = opening(pid, 1, 5 if quick else 50)
        hundred = opening(pid, AT_ONCE, 2 if quick else 10)
        munmap = {name: unmapping(name, 200) for name in ("bpf", "daemon")}
        ranks = many(pid, count, 2 if quick else 20)
    rows = [
        report.Row("open(), one alone", "5 ms", f"{one.latency * 1e3:.1f} ms", "-", one.latency < OPEN_MOST),
        report.Row(
            f"open(), {AT_ONCE} at once, each", "5 ms", f"{hundred.share * 1e3:.1f} ms", "-", hundred.share < OPEN_MOST
        ),
        report.Row(
            "the daemon's memory", "100 MB", f"{ranks.resident / 1e6:.0f} MB", "-", ranks.resident < RESIDENT_MOST
        ),
        report.Row(
            "the daemon's CPU time while nothing is opened", "0", f"{ranks.idle_cpu:.3%}", "-", ranks.idle_cpu < 1e-3
        ),
        report.Row(
            "told of a remote truncate", f"{count} of {count}", f"{ranks.told} of {count}", "-", ranks.told == count
        ),
    ]
    return f"""
{report.table(rows)}
The last three with {count} processes of {REGIONS:,} regions each, all of one file. Their tables take
{ranks.kernel / 1e6:.0f} MB of kernel memory. Truncating the file took {ranks.truncate * 1e3:.0f} ms: the kernel
tells of each process's mapping, and each time all that watch these addresses are told, as the probe does
not say whose they are.

"Each" of {AT_ONCE} at once is the time in which all of them were opened, divided by {AT_ONCE}: there are
{os.cpu_count()} CPUs. In the median a process waited {hundred.latency * 1e3:.0f} ms. Of CPU time one `open()` takes
{hundred.clients_cpu * 1e3:.1f} ms in the client, most of it for the virtual machine and the self-test, and
{hundred.daemon_cpu * 1e3:.1f} ms in the daemon.

Afterwards the daemon is on no path: a munmap of a watched page takes {munmap["daemon"] * 1e6:.2f} us through the
daemon's program and {munmap["bpf"] * 1e6:.2f} us through one of the process's own.
"""
