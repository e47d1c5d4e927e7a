"""RDMA on the device that Linux makes of a network interface: only in the guests, and where somebody made one."""

from __future__ import annotations

import mmap
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(("how", "right"), [("--remap=0.5", True), ("--no-cache", True), ("--naive", False)])
def test_two_processes_that_free_their_buffers(how: str, right: bool) -> None:
    command = [sys.executable, str(EXAMPLES / "rdma_pingpong.py"), DEVICE, how, "--rounds", str(ROUNDS)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not result.stderr
    assert result.returncode == (0 if right else 1)
    assert result.stdout.startswith(f"{2 * ROUNDS} transfers")
    assert result.stdout.endswith(" 0 of them wrong\n") == right
