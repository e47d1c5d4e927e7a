"""RDMA on the device that Linux makes of a network interface: only in the guests, and where somebody made one."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import mmap
import os
import random
import resource
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import pytest

import ummunotify
from ummunotify import RegistrationCache
from ummunotify.registrars import (
    RegistrarError,
    RegistrarUnavailableError,
    RegistrationError,
    RegistrationLimitError,
)
from ummunotify.registrars.verbs import VerbsRegistrar

sys.path.append(str(Path(__file__).parents[1]))
from support import in_child, map_memory, require, unmap_memory

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.append(str(EXAMPLES))
DEVICE = "rxe0"
PAGE = mmap.PAGESIZE
ROUNDS = 20_000 if "UMMUNOTIFY_SLOW" in os.environ else 200


@pytest.fixture(autouse=True)
def device() -> None:
    try:
        VerbsRegistrar(DEVICE).close()
    except RegistrarUnavailableError as error:
        require("rdma", str(error))


@pytest.fixture
def registrar() -> Iterator[VerbsRegistrar]:
    with VerbsRegistrar(DEVICE) as registrar:
        yield registrar


def test_example() -> None:
    command = [sys.executable, str(EXAMPLES / "rdma_stale_mr.py"), DEVICE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    without, _, watched = result.stdout.partition("With ummunotify")
    assert "RDMA read of b        b'old data'" in without
    assert "RDMA read of b        b'new data'" in watched


def test_unknown_device() -> None:
    with pytest.raises(RegistrarUnavailableError, match=r"nosuch0.*rdma link add"):
        VerbsRegistrar("nosuch0")


def test_memory_that_is_not_mapped(registrar: VerbsRegistrar) -> None:
    address = map_memory(PAGE)
    unmap_memory(address, PAGE)
    with pytest.raises(RegistrationError, match=f"{address:#x}"):
        registrar.register(address, PAGE)


def test_limit() -> None:
    def child() -> None:
        registrar = VerbsRegistrar(DEVICE)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (PAGE, PAGE))
        os.setresuid(65534, 65534, 65534)  # root is above the limit
        with pytest.raises(RegistrationLimitError, match="RLIMIT_MEMLOCK"):
            registrar.register(map_memory(64 * PAGE), 64 * PAGE)

    in_child(child)


def test_deregistering_twice(registrar: VerbsRegistrar) -> None:
    handle = registrar.register(map_memory(PAGE), PAGE)
    registrar.deregister(handle)
    with pytest.raises(RegistrarError, match="not registered here"):
        registrar.deregister(handle)


def test_fork(registrar: VerbsRegistrar) -> None:
    handle = registrar.register(map_memory(PAGE), PAGE)

    def child() -> None:
        with pytest.raises(RegistrarError, match="parent"):
            registrar.deregister(handle)
        registrar.close()

    in_child(child)
    registrar.deregister(handle)


class NaiveCache:
    """What everybody writes first: keyed by the address, and never told that the memory has gone."""

    def __init__(self, registrar: VerbsRegistrar) -> None:
        self._registrar = registrar
        self._handles: dict[tuple[int, int], Any] = {}

    @contextlib.contextmanager
    def acquire(self, buffer: tuple[int, int]) -> Iterator[Any]:
        if buffer not in self._handles:
            self._handles[buffer] = self._registrar.register(*buffer)
        yield Entry(self._handles[buffer])

    def close(self) -> None:
        pass


class Entry:
    def __init__(self, handle: Any) -> None:
        self.handle = handle


class Peer:
    """One of two processes, each with buffers that it frees and maps again at random, at the same addresses."""

    BUFFERS = 8

    def __init__(self, wire: Connection, seed: int, naive: bool) -> None:
        from rdma import Endpoint  # in the child: RDMA does not survive a fork

        self.wire = wire
        self.random = random.Random(seed)
        self.endpoint = Endpoint(DEVICE)
        self.registrar = VerbsRegistrar(self.endpoint.domain)
        self.umn = ummunotify.open()
        self.cache: Any = NaiveCache(self.registrar) if naive else RegistrationCache(self.registrar, notifier=self.umn)
        self.lengths = [PAGE * self.random.randint(1, 4) for _ in range(self.BUFFERS)]
        self.buffers = [map_memory(length) for length in self.lengths]
        wire.send(self.endpoint.name)
        self.endpoint.connect(wire.recv())
        self.wrong = 0

    def pick(self) -> tuple[int, int]:
        """A buffer, often a new one where an old one was."""
        i = self.random.randrange(self.BUFFERS)
        address, length = self.buffers[i], self.lengths[i]
        if self.random.random() < 0.5:
            unmap_memory(address, length)
            map_memory(length, address)
        return address, length

    def fill(self, address: int, length: int) -> bytes:
        content = hashlib.shake_128(self.random.randbytes(16)).digest(length)
        ctypes.memmove(address, content, length)
        return content

    def check(self, address: int, expected: bytes) -> None:
        self.wrong += ctypes.string_at(address, len(expected)) != expected

    def serve(self) -> None:
        """Offers buffers to be read and written by the other side."""
        for _ in range(ROUNDS):
            address, length = self.pick()
            content = self.fill(address, length)
            with self.cache.acquire((address, length)) as registered:
                self.wire.send((address, registered.handle.rkey, content))
                self.check(address, self.wire.recv())

    def transfer(self) -> None:
        for _ in range(ROUNDS):
            remote, rkey, expected = self.wire.recv()
            address, length = self.pick()
            length = min(length, len(expected))
            with self.cache.acquire((address, length)) as registered:
                self.endpoint.read(address, registered.handle, length, remote, rkey)
                self.check(address, expected[:length])
            address, limit = self.pick()
            length = min(limit, length)
            content = self.fill(address, length)
            with self.cache.acquire((address, length)) as registered:
                self.endpoint.write(address, registered.handle, length, remote, rkey)
            self.wire.send(content)


def transfers(naive: bool) -> int:
    """How many of the transfers between two processes were wrong."""
    ours, theirs = Pipe()

    def child() -> None:
        peer = Peer(theirs, 1, naive)
        peer.serve()
        theirs.send(peer.wrong)
        assert theirs.recv() == "done"

    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            child()
            status = 0
        finally:
            os._exit(status)
    theirs.close()
    peer = Peer(ours, 2, naive)
    try:
        peer.transfer()
        wrong = peer.wrong + ours.recv()
        ours.send("done")
    finally:
        assert os.waitpid(pid, 0)[1] == 0
        peer.cache.close()
        peer.umn.close()
        peer.registrar.close()
        peer.endpoint.close()
        for address, length in zip(peer.buffers, peer.lengths, strict=True):
            unmap_memory(address, length)
    assert isinstance(wrong, int)
    return wrong


def test_no_wrong_byte() -> None:
    assert transfers(naive=False) == 0


def test_naive_cache_corrupts() -> None:
    assert transfers(naive=True) > 0
