"""A file server that reads into io_uring's fixed buffers, and a client that checks every byte it gets.

    python examples/file_server.py                # registered through ummunotify's cache: right, and fast
    python examples/file_server.py --no-cache     # registered for each request: right, and slow
    python examples/file_server.py --naive        # registrations kept by address: fast, and wrong

Like many servers it maps a buffer for each connection and unmaps it with the connection; the kernel gives the next one
the same address. What --naive has registered then leads to the pages of an earlier connection: the file is read into
these, and the client gets what happens to be in the new ones.

Exits with 1 if a byte was wrong, and with 2 if something is missing here.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import mmap
import os
import random
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import ummunotify
from ummunotify.registrars.io_uring import FixedBuffer, IoUringRegistrar

REQUEST = struct.Struct("=QQ")  # offset and length; a length of 0 ends the connection
TALLY = struct.Struct("=QQQ")
BUFFER_SIZE = 4 << 20
LARGEST = 64 << 10
FILE_SIZE = 16 << 20
REQUESTS = 20
"""In each connection."""


class Registered(Protocol):
    @property
    def handle(self) -> FixedBuffer: ...
    @property
    def address(self) -> int: ...


class Cache(Protocol):
    def acquire(self, buffer: mmap.mmap, /) -> AbstractContextManager[Registered]: ...


class Held(NamedTuple):
    handle: FixedBuffer
    address: int


class NoCache:
    def __init__(self, registrar: IoUringRegistrar) -> None:
        self._registrar = registrar

    @contextlib.contextmanager
    def acquire(self, buffer: mmap.mmap, /) -> Iterator[Held]:
        address = address_of(buffer)
        handle = self._registrar.register(address, len(buffer))
        try:
            yield Held(handle, address)
        finally:
            self._registrar.deregister(handle)


class NaiveCache:
    """The usual first version: keyed by the address, and never told that the memory was unmapped."""

    def __init__(self, registrar: IoUringRegistrar) -> None:
        self._registrar = registrar
        self._handles: dict[tuple[int, int], FixedBuffer] = {}

    @contextlib.contextmanager
    def acquire(self, buffer: mmap.mmap, /) -> Iterator[Held]:
        key = address_of(buffer), len(buffer)
        if key not in self._handles:
            self._handles[key] = self._registrar.register(*key)
        yield Held(self._handles[key], key[0])


def address_of(buffer: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def serve(connection: socket.socket, file: int, registrar: IoUringRegistrar, cache: Cache) -> None:
    """All the requests of a connection, with a buffer of its own."""
    with mmap.mmap(-1, BUFFER_SIZE, flags=mmap.MAP_PRIVATE) as buffer:
        while True:
            offset, length = REQUEST.unpack(receive(connection, REQUEST.size))
            if not length:
                return
            with cache.acquire(buffer) as registered:
                registrar.read_fixed(file, registered.handle, registered.address, length, offset)
            with memoryview(buffer) as view:
                connection.sendall(view[:length])


def ask(connection: socket.socket, file: int, connections: int) -> tuple[int, int, int]:
    """The client: requests, wrong answers, and bytes."""
    pick = random.Random(1)
    requests = wrong = received = 0
    for _ in range(connections):
        for _ in range(REQUESTS):
            length = pick.randint(1, LARGEST)
            offset = pick.randrange(FILE_SIZE - length)
            connection.sendall(REQUEST.pack(offset, length))
            wrong += receive(connection, length) != os.pread(file, length, offset)
            requests += 1
            received += length
        connection.sendall(REQUEST.pack(0, 0))
    return requests, wrong, received


def receive(connection: socket.socket, length: int) -> bytearray:
    data = bytearray(length)
    with memoryview(data) as view:
        done = 0
        while done < length:
            count = connection.recv_into(view[done:])
            if not count:
                raise EOFError("the other side has gone")
            done += count
    return data


def run(connections: int, registrar: IoUringRegistrar, cache: Cache) -> tuple[int, int, int]:
    ours, theirs = socket.socketpair()
    answer, answer_write = os.pipe()
    with tempfile.TemporaryFile() as file, ours:
        file.write(random.Random(2).randbytes(FILE_SIZE))
        file.flush()
        child = os.fork()
        if not child:
            try:
                ours.close()
                os.write(answer_write, TALLY.pack(*ask(theirs, file.fileno(), connections)))
            finally:
                os._exit(0)
        theirs.close()
        os.close(answer_write)
        # One after the other on the same socket: it is the buffer that is new each time.
        for _ in range(connections):
            serve(ours, file.fileno(), registrar, cache)
        tally = os.read(answer, TALLY.size)
        os.close(answer)
        os.waitpid(child, 0)
    requests, wrong, received = TALLY.unpack(tally)
    return requests, wrong, received


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--no-cache", action="store_true", help="register for each request")
    mode.add_argument("--naive", action="store_true", help="keep registrations by address")
    parser.add_argument("--connections", type=int, default=200, metavar="N", help="default: %(default)s")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        registrar = stack.enter_context(IoUringRegistrar())
        cache: Cache
        if options.no_cache:
            name, cache = "no cache", NoCache(registrar)
        elif options.naive:
            name, cache = "naive cache", NaiveCache(registrar)
        else:
            name, cache = "cache", stack.enter_context(ummunotify.RegistrationCache(registrar))
        begun = time.monotonic()
        requests, wrong, received = run(options.connections, registrar, cache)
        seconds = time.monotonic() - begun
    print(
        f"{name}: {requests} requests, {received / 1e6:.0f} MB in {seconds:.2f} s "
        f"({requests / seconds:.0f} requests/s), {wrong} wrong answers"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ummunotify.UmmunotifyError as missing:
        print(missing, file=sys.stderr)
        sys.exit(2)
