"""Many processes that watch at once, each with what it needs in the kernel."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection

import pytest
from daemons import Child, change
from support import probes, require

import ummunotify

PROCESSES = 64


@pytest.mark.parametrize("source", [*probes(), "uffd"])
def test_at_once(source: str) -> None:
    name, _, probe = source.partition(":")
    try:
        ummunotify.open(name, probe=probe or None).close()
    except ummunotify.SourceUnavailableError as error:
        require(name, str(error))

    def program(pipe: Connection) -> str:
        with ummunotify.open(name, probe=probe or None) as umn:
            pipe.send("open")
            pipe.recv()
            for _ in range(11):
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
