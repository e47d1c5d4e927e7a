"""Many processes that watch at once, each with what it needs in the kernel."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from multiprocessing.connection import Connection

import pytest
from daemons import Child
from support import map_memory, probes, require_source, unmap_memory

import ummunotify

PAGE = mmap.PAGESIZE
PROCESSES = 64


def change(umn: ummunotify.Notifier) -> None:
    """Unmap what is watched and known to be as it was: where the kernel skips a probe, that takes a while."""
    address = map_memory(PAGE)
    ctypes.c_ubyte.from_address(address).value = 1
    region = umn.watch((address, PAGE))
    while not region.valid:
        time.sleep(0.001)
        region.renew()
    umn.read()
    unmap_memory(address, PAGE)
    assert not region.valid
    assert umn.changed
    while region not in [event.region for event in umn.read(timeout=None)]:
        pass
    assert not region.valid
    region.close()


@pytest.mark.parametrize("source", [*probes(), "uffd"])
def test_at_once(source: str) -> None:
    require_source(source)

    def program(pipe: Connection) -> str:
        with ummunotify.open(source) as umn:
            pipe.send("open")
            pipe.recv()
            for _ in range(10):
                change(umn)
            return umn.source

    children: list[Child] = []
    try:
        for _ in range(PROCESSES):
            children.append(Child(program, uid=os.geteuid()))
        assert [child.pipe.recv() for child in children] == ["open"] * PROCESSES
        for child in children:
            child.pipe.send("go")
        assert [child.pipe.recv() for child in children] == [(True, source)] * PROCESSES
    finally:
        for child in children:
            child.kill()
