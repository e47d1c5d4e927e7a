"""Garbage for the daemon and the kernel, by a generator with a seed: neither takes harm, nor do other users.

UMMUNOTIFY_FUZZ_MESSAGES says how many messages, UMMUNOTIFY_FUZZ_TABLES how many tables, UMMUNOTIFY_FUZZ_SEED which.
UMMUNOTIFY_SLOW=1 stands for a million messages and a hundred thousand tables.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

from daemons import Child, Daemon, as_nobody, change, stress
from hostile import Fuzzer, change_anybody, crafted_tables
from support import SLOW, map_memory, unmap_memory

import ummunotify

MESSAGES = int(os.environ.get("UMMUNOTIFY_FUZZ_MESSAGES", 1_000_000 if SLOW else 5000))
TABLES = int(os.environ.get("UMMUNOTIFY_FUZZ_TABLES", 100_000 if SLOW else 2000))
SEED = int(os.environ.get("UMMUNOTIFY_FUZZ_SEED", "0")) or time.time_ns()
BYSTANDER = 65533


def resident(pid: int) -> int:
    """In bytes."""
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def bystander() -> Iterator[None]:
    """Meanwhile another user's process watches memory and changes it. It fails if a change is missed."""
    child = Child(stress, BYSTANDER)
    assert child.hear() == "watching"
    yield
    child.pipe.send("stop")
    assert child.result() > 0


def test_garbage(daemon: Daemon) -> None:
    print(f"UMMUNOTIFY_FUZZ_SEED={SEED}")
    fuzzer = Fuzzer(random.Random(SEED))
    daemon.settled()
    fds = daemon.fds()
    with bystander(), ummunotify.open(source="bpf"):  # its virtual machine makes the kernel tell of the secret
        while fuzzer.sent < 1000:
            fuzzer.converse()
        before = resident(daemon.pid)
        while fuzzer.sent < MESSAGES:
            fuzzer.converse()
    assert fuzzer.settled > 0
    as_nobody(lambda _: change(ummunotify.open()))
    daemon.settled()
    assert daemon.fds(fds) == fds
    assert resident(daemon.pid) - before < 4 << 20


def test_crafted_tables(daemon: Daemon) -> None:
    """Whatever is in them: each change walks through all of them, the program's own too."""
    print(f"UMMUNOTIFY_FUZZ_SEED={SEED}")

    def scramble(pipe: Connection) -> int:
        rng = random.Random(SEED)
        with crafted_tables(16) as tables:
            for _ in range(-(-TABLES // len(tables))):
                for table in tables:
                    table.scramble(rng)
                change_anybody()
                unmap_memory(map_memory(4096), 4096)
            # None of them is stuck: they work once they are in order.
            address = map_memory(4096)
            for table in tables:
                table.reset(address)
                table.arm()
            ctypes.c_ubyte.from_address(address).value = 1
            unmap_memory(address, 4096)
            return sum(table.hit for table in tables)

    daemon.settled()
    fds = daemon.fds()
    with bystander():
        assert Child(scramble).result(patience=None) == 16
    as_nobody(lambda _: change(ummunotify.open()))
    daemon.settled()
    assert daemon.fds(fds) == fds
