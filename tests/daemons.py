"""A daemon, its clients, and fixtures for the tests of both."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import pickle
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import pytest
from other_users import require_another_user
from support import LONG, SYS, map_memory, require, unmap_memory

import ummunotify
from ummunotify import _abi, _core
from ummunotify._abi import SEGMENTS, Op, Probe, Request, Summary
from ummunotify._bpf import read_map
from ummunotify.bpf import feeder
from ummunotify.daemon.limits import TABLE
from ummunotify.errors import UnavailableError

PAGE = mmap.PAGESIZE
NOBODY = 65534
COMMAND = [sys.executable, "-m", "ummunotify"]


def connect() -> socket.socket:
    """A client's socket. SourceUnavailableError."""
    return socket.socket(fileno=_core.connect_to_daemon())


class Daemon:
    """One that runs, or can be started."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.path = str(directory / "socket")
        self.options = options
        self.log = directory / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready, open(self.log, "ab") as log:
            address = f"{self.path}.notify"
            with contextlib.suppress(FileNotFoundError):
                os.unlink(address)
            ready.bind(address)
            os.chmod(address, 0o777)
            ready.settimeout(LONG)
            self.process = subprocess.Popen(
                [*COMMAND, "daemon", "--socket", self.path, "--user", "nobody", *self.options],
                env=os.environ | {"NOTIFY_SOCKET": address},
                stderr=log,
            )
            try:
                assert ready.recv(100) == b"READY=1"
            except BaseException:
                self.end(signal.SIGKILL)
                raise

    def end(self, number: int = signal.SIGTERM) -> int:
        assert self.process
        self.process.send_signal(number)
        return self.process.wait(LONG)

    @property
    def pid(self) -> int:
        assert self.process
        return self.process.pid

    def fds(self, expected: int | None = None) -> int:
        """How many descriptors it has, when that many are left or it does not change any more."""
        counts = [-1]
        while counts[-1] != expected and len(counts) < 100:
            counts.append(len(os.listdir(f"/proc/{self.pid}/fd")))
            if expected is None and len(counts) > 5 and len(set(counts[-5:])) == 1:
                break
            time.sleep(0.02)
        return counts[-1]

    def objects(self) -> set[tuple[str, int]]:
        """The kernel's BPF objects that are its own, or its clients'."""
        found: set[tuple[str, int]] = set()
        for info in Path(f"/proc/{self.pid}/fdinfo").iterdir():
            with contextlib.suppress(FileNotFoundError):
                text = info.read_text()
                found.update((kind, int(number)) for kind, number in re.findall(r"(prog|map|link)_id:\s*(\d+)", text))
                # The maps in a map of maps: those of the first tables.
                if re.search(r"map_type:\s*12\b", text):
                    found.update(("map", number) for number in inner_maps(int(re.findall(r"map_id:\s*(\d+)", text)[0])))
        return found

    def summary(self) -> Summary:
        with connect() as connection:
            connection.send(Request(Op.STATUS, argument=_abi.STATUS_SUMMARY).pack())
            return Summary.unpack(connection.recv(_abi.SUMMARY_SIZE))

    def settled(self, clients: int = 0) -> Summary:
        """When it has so many clients, and nothing to do."""
        deadline = time.monotonic() + LONG
        while True:
            summary = self.summary()
            if summary.clients == clients and summary.ready == 16 and summary.memory == (16 + clients) * TABLE:
                return summary
            assert time.monotonic() < deadline, summary
            time.sleep(0.02)


_FD_BY_ID = {"prog": 13, "map": 14, "link": 30}
"""BPF_PROG_GET_FD_BY_ID, and so on."""


def object_fd(kind: str, number: int) -> int:
    """A descriptor of one of the kernel's BPF objects. FileNotFoundError."""
    libc = ctypes.CDLL(None, use_errno=True)
    attribute = (ctypes.c_uint32 * 32)(number)
    fd: int = libc.syscall(SYS["bpf"], _FD_BY_ID[kind], attribute, ctypes.sizeof(attribute))
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return fd


def inner_maps(number: int, tables: int = 64) -> Iterator[int]:
    """Of the map of maps with this number: the maps of the first tables."""
    fd = object_fd("map", number)
    try:
        for table in range(tables):
            with contextlib.suppress(OSError):
                segments = read_map(fd, struct.pack("=I", table * SEGMENTS), 4)
                yield int(struct.unpack("=I", segments)[0])
            with contextlib.suppress(OSError):
                rings = read_map(fd, struct.pack("=I", table), 4)
                yield int(struct.unpack("=I", rings)[0])
    finally:
        os.close(fd)


def left_of(objects: set[tuple[str, int]]) -> set[tuple[str, int]]:
    """Those that there still are, when none is left or it has been given time enough."""
    deadline = time.monotonic() + LONG
    left = set(objects)
    while left and time.monotonic() < deadline:
        for kind, number in sorted(left):
            try:
                os.close(object_fd(kind, number))
            except FileNotFoundError:
                left.discard((kind, number))
        time.sleep(0.02)
    return left


@pytest.fixture(scope="session")
def privileged() -> None:
    require_another_user()
    try:
        feeder.connect(Probe.KVM).disconnect()
    except UnavailableError as error:
        require("bpf", str(error))


@pytest.fixture
def directory(privileged: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """That other users can get into."""
    directory = Path(tempfile.mkdtemp(prefix="umn"))
    directory.chmod(0o755)
    monkeypatch.setenv(_abi.SOCKET_ENVIRONMENT, str(directory / "socket"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def options() -> list[str]:
    return []


@pytest.fixture
def daemon(directory: Path, options: list[str]) -> Iterator[Daemon]:
    daemon = Daemon(directory, *options)
    daemon.start()
    yield daemon
    assert daemon.process
    if daemon.process.poll() is None:
        assert daemon.end() == 0, daemon.log.read_text()
    assert "Traceback" not in daemon.log.read_text()


class Child:
    """A process of another user's that runs a function, and talks with it through `pipe`."""

    def __init__(self, function: Callable[[Connection], Any], uid: int = NOBODY) -> None:
        self.pipe, theirs = Pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                self.pipe.close()
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
                theirs.send((True, function(theirs)))
            except BaseException as error:
                try:
                    theirs.send((False, pickle.loads(pickle.dumps(error))))
                except BaseException:
                    theirs.send((False, RuntimeError(repr(error))))
            finally:
                os._exit(0)
        theirs.close()

    def hear(self, patience: float | None = LONG) -> Any:
        assert self.pipe.poll(patience)
        return self.pipe.recv()

    def result(self, patience: float | None = LONG) -> Any:
        try:
            good, value = self.hear(patience)
        finally:
            self.kill()
        if not good:
            raise value
        return value

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.pipe.close()


def as_nobody(function: Callable[[Connection], Any]) -> Any:
    return Child(function).result()


def change(umn: ummunotify.Notifier) -> None:
    """Unmap something that is watched: it is told at once, and once."""
    address = map_memory(PAGE)
    ctypes.c_ubyte.from_address(address).value = 1
    region = umn.watch((address, PAGE))
    assert region.valid
    unmap_memory(address, PAGE)
    assert not region.valid
    assert umn.changed
    assert region in [event.region for event in umn.read()]
    region.close()


def held() -> list[str]:
    """This process's descriptors and mappings that are the library's."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that listdir used
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
    lines = links + Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if re.search("anon_inode:(bpf|kvm)|/dev/kvm", line)]


def stress(pipe: Connection) -> int:
    """Change one thing after the other until told to stop, and miss nothing."""
    rng = random.Random(os.getpid())
    changes = 0
    with ummunotify.open(source="daemon") as umn:
        base = map_memory(64 * PAGE)
        regions = [umn.watch((base + i * PAGE, PAGE)) for i in range(64)]
        pipe.send("watching")
        while not pipe.poll():
            first = rng.randrange(64)
            count = rng.randrange(1, 65 - first)
            for i in range(first, first + count):
                ctypes.c_ubyte.from_address(base + i * PAGE).value = 1
            unmap_memory(base + first * PAGE, count * PAGE)
            valid = [region.valid for region in regions]
            assert not any(valid[first : first + count])
            assert set(regions[first : first + count]) <= {event.region for event in umn.read()}
            for region in regions[first : first + count]:
                region.renew()
            assert map_memory(count * PAGE, base + first * PAGE) == base + first * PAGE
            changes += 1
    return changes
