"""Two processes read and write each other's memory with RDMA, check every byte, and free their buffers all the time.

    python examples/rdma_pingpong.py                # registered through ummunotify's cache: right, and fast
    python examples/rdma_pingpong.py --no-cache     # registered for each transfer: right, and slow
    python examples/rdma_pingpong.py --naive        # registrations kept by address: fast, and wrong

It needs an RDMA device; docs/rdma.md says how to make one without hardware. Exits with 1 if a transfer was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import mmap
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Pipe
from typing import Any, NamedTuple

from rdma import Endpoint

import ummunotify
from ummunotify import RegistrationCache
from ummunotify.registrars.verbs import VerbsRegistrar

PAGE = mmap.PAGESIZE
MAP_FIXED = 0x10

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def map_memory(length: int, address: int | None = None) -> int:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (MAP_FIXED if address else 0)
    mapped = libc.mmap(address, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if mapped == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(mapped)


class Registered(NamedTuple):
    handle: Any


class NaiveCache:
    """The usual first version: keyed by the address, and never told that the memory was unmapped."""

    def __init__(self, registrar: VerbsRegistrar) -> None:
        self._registrar = registrar
        self._handles: dict[tuple[int, int], Any] = {}

    @contextlib.contextmanager
    def acquire(self, buffer: tuple[int, int]) -> Iterator[Registered]:
        if buffer not in self._handles:
            self._handles[buffer] = self._registrar.register(*buffer)
        yield Registered(self._handles[buffer])


class NoCache:
    def __init__(self, registrar: VerbsRegistrar) -> None:
        self._registrar = registrar

    @contextlib.contextmanager
    def acquire(self, buffer: tuple[int, int]) -> Iterator[Registered]:
        handle = self._registrar.register(*buffer)
        try:
            yield Registered(handle)
        finally:
            self._registrar.deregister(handle)


class Peer:
    """One of the two processes."""

    BUFFERS = 8

    def __init__(self, options: argparse.Namespace, wire: Connection, seed: int) -> None:
        self.wire = wire
        self.options = options
        self.random = random.Random(seed)
        self.wrong = 0
        with contextlib.ExitStack() as stack:
            # RDMA does not survive a fork, nor does a notifier: both are opened here, in the process that uses them.
            self.endpoint = stack.enter_context(Endpoint(options.device))
            registrar = stack.enter_context(VerbsRegistrar(self.endpoint.domain))
            self.cache: Any
            if options.naive:
                self.cache = NaiveCache(registrar)
            elif options.no_cache:
                self.cache = NoCache(registrar)
            else:
                umn = stack.enter_context(ummunotify.open())
                self.cache = stack.enter_context(RegistrationCache(registrar, notifier=umn))
            self.lengths = [PAGE * self.random.randint(1, 4) for _ in range(self.BUFFERS)]
            self.buffers = [map_memory(length) for length in self.lengths]
            wire.send(self.endpoint.name)
            self.endpoint.connect(wire.recv())
            self._close = stack.pop_all().close

    def close(self) -> None:
        self._close()
        for address, length in zip(self.buffers, self.lengths, strict=True):
            libc.munmap(address, length)

    def pick(self) -> tuple[int, int]:
        """A buffer, often a new one where an old one was."""
        i = self.random.randrange(self.BUFFERS)
        address, length = self.buffers[i], self.lengths[i]
        if self.random.random() < self.options.remap:
            libc.munmap(address, length)
            map_memory(length, address)
        return address, length

    def fill(self, address: int, length: int) -> bytes:
        content = hashlib.shake_128(self.random.randbytes(16)).digest(length)
        ctypes.memmove(address, content, length)
        return content

    def check(self, address: int, expected: bytes) -> None:
        self.wrong += ctypes.string_at(address, len(expected)) != expected

    def serve(self) -> None:
        """Offer buffers to be read and written by the other side, and check what it wrote."""
        for _ in range(self.options.rounds):
            address, length = self.pick()
            content = self.fill(address, length)
            with self.cache.acquire((address, length)) as registered:
                self.wire.send((address, registered.handle.rkey, content))
                self.check(address, self.wire.recv())
        self.wire.send(self.wrong)

    def transfer(self) -> None:
        """Read what is offered and check it, then write something else."""
        for _ in range(self.options.rounds):
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
        self.wrong += self.wire.recv()


def in_child(function: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    return pid


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", nargs="?", default="rxe0")
    parser.add_argument("--rounds", type=int, default=1000, metavar="N", help="of two transfers each (%(default)s)")
    parser.add_argument("--remap", type=float, default=0.3, metavar="P", help="how often memory is new (%(default)s)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--naive", action="store_true", help="keep registrations by address")
    how.add_argument("--no-cache", action="store_true", help="register for each transfer")
    options = parser.parse_args()
    ours, theirs = Pipe()

    def child() -> None:
        ours.close()
        peer = Peer(options, theirs, 1)
        peer.serve()
        peer.close()

    pid = in_child(child)
    theirs.close()
    peer = Peer(options, ours, 2)
    started = time.perf_counter()
    peer.transfer()
    elapsed = time.perf_counter() - started
    status = os.waitpid(pid, 0)[1]
    peer.close()
    count = 2 * options.rounds
    print(f"{count} transfers, {count / elapsed:.0f} a second, {peer.wrong} of them wrong")
    return int(status != 0 or peer.wrong != 0)


if __name__ == "__main__":
    sys.exit(main())
