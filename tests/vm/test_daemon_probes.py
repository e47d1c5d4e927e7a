"""The daemon with the probes at kprobes, which only the guests' kernels have."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import socket
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))
from daemons import Child, Daemon, as_nobody, change, connect, stress

import ummunotify
from ummunotify._abi import Gives, Op, Reply, Request

PAGE = mmap.PAGESIZE
CHANGES = 20_000 if "UMMUNOTIFY_SLOW" in os.environ else 300
_BPF = 321
_MAP_UPDATE, _LINK_UPDATE, _LINK_DETACH = 2, 29, 34


@pytest.fixture(params=["mmu_notifier", "zap"])
def options(request: pytest.FixtureRequest) -> list[str]:
    return ["--probe", request.param]


def test_a_user_is_told(daemon: Daemon, options: list[str]) -> None:
    def program(_: Connection) -> str:
        with ummunotify.open() as umn:
            change(umn)
            return umn.source

    assert as_nobody(program) == f"daemon:{options[1]}"


def test_what_a_client_holds_gives_it_no_power(daemon: Daemon) -> None:
    """It could keep others in the dark if it could write the map of probe gaps."""

    def program(_: Connection) -> list[int]:
        with connect() as connection:
            connection.send(Request(Op.HELLO).pack())
            data, fds, *_flags = socket.recv_fds(connection, 100, 64)
        held = fds[2:]
        if Reply.unpack(data).gives & Gives.KVM:
            os.close(held.pop(0))
        assert Reply.unpack(data).gives & Gives.PROBE_GAPS
        libc = ctypes.CDLL(None, use_errno=True)
        errors = []
        gaps, *links = held
        with pytest.raises(PermissionError) as caught:
            mmap.mmap(gaps, PAGE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        errors.append(caught.value.errno or 0)
        key = ctypes.c_uint32(0)
        value = (ctypes.c_uint32 * 2)(1, 1)
        attribute = (ctypes.c_uint64 * 16)(gaps, ctypes.addressof(key), ctypes.addressof(value))
        assert libc.syscall(_BPF, _MAP_UPDATE, attribute, ctypes.sizeof(attribute)) == -1
        errors.append(ctypes.get_errno())
        for link in links:
            for command in (_LINK_UPDATE, _LINK_DETACH):
                words = (ctypes.c_uint32 * 32)(link, link)
                assert libc.syscall(_BPF, command, words, ctypes.sizeof(words)) == -1
        for fd in (*fds[:2], *held):
            os.close(fd)
        return errors

    assert as_nobody(program) == [errno.EPERM, errno.EPERM]


class _Many:
    """As a pipe, to `stress`: it says stop after so many changes."""

    def __init__(self) -> None:
        self.left = CHANGES

    def send(self, what: object) -> None:
        pass

    def poll(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_the_daemon_is_killed(daemon: Daemon) -> None:
    """Its clients hold what keeps the programs attached, and the look-out for skipped runs."""

    def program(pipe: Connection) -> int:
        with ummunotify.open(source="daemon") as umn:
            pipe.send("open")
            pipe.recv()
            change(umn)
        return 0

    child = Child(program)
    assert child.hear() == "open"
    assert daemon.end(signal.SIGKILL) == -signal.SIGKILL
    child.pipe.send(None)
    assert child.result() == 0


def test_random_changes(daemon: Daemon) -> None:
    assert as_nobody(lambda _: stress(_Many())) == CHANGES  # type: ignore[arg-type]
