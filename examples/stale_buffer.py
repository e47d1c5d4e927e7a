"""A program with a planted bug: some blocks that it reads are wrong, without any error. This finds it:

    ummunotify audit -- python examples/stale_buffer.py

Exits with 1 if a block was wrong, and with 2 if something is missing here.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import mmap
import os
import sys
import tempfile
from collections.abc import Iterator

from ummunotify.registrars import RegistrarUnavailableError
from ummunotify.registrars.io_uring import FixedBuffer, IoUringRegistrar

BLOCK = 64 << 10
BLOCKS = 8


@contextlib.contextmanager
def new_buffer() -> Iterator[tuple[mmap.mmap, int]]:
    """Memory for a block, and its address."""
    with mmap.mmap(-1, BLOCK, flags=mmap.MAP_PRIVATE) as buffer:
        view = ctypes.c_char.from_buffer(buffer)
        address = ctypes.addressof(view)
        del view
        yield buffer, address


class BlockReader:
    """Reads blocks of a file by io_uring, and keeps what it has registered: registering takes long."""

    def __init__(self, fd: int, registrar: IoUringRegistrar) -> None:
        self.fd = fd
        self.registrar = registrar
        self.registered: dict[int, FixedBuffer] = {}

    def read(self, block: int, address: int) -> None:
        handle = self.registered.get(address)
        if handle is None:
            handle = self.registered[address] = self.registrar.register(address, BLOCK)
        self.registrar.read_fixed(self.fd, handle, address, BLOCK, block * BLOCK)


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    wrong = 0
    try:
        registrar = IoUringRegistrar(BLOCKS)
    except RegistrarUnavailableError as error:
        print(error, file=sys.stderr)
        return 2
    with registrar, tempfile.TemporaryFile() as file:
        for block in range(BLOCKS):
            file.write(bytes([block + 1]) * BLOCK)
        file.flush()
        reader = BlockReader(file.fileno(), registrar)
        for block in range(BLOCKS):
            with new_buffer() as (buffer, address):
                reader.read(block, address)
                wrong += buffer[:] != bytes([block + 1]) * BLOCK
    print(f"process {os.getpid()}: {wrong} of {BLOCKS} blocks are wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
