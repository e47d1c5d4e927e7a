"""libfabric's own caches of registrations with our monitor, over RDMA.

Its provider verbs runs on the device that Linux makes of a network interface.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import soft_roce
from soft_roce import ADDRESS, DEVICE, INTERFACE, PATIENCE

sys.path.append(str(Path(__file__).parents[1]))
from support import require
from test_c import build, flags

PROGRAM = Path(__file__).parents[1] / "c/libfabric_rdma.c"
EXAMPLE = Path(__file__).parents[2] / "examples/mpi_libfabric.py"
MPIEXEC = Path(sys.executable).with_name("mpiexec")
CHANGES = ("nothing", "munmap", "syscall", "madvise", "mremap", "truncate")
RIGHT = {"nothing": "from the cache, new"} | dict.fromkeys(CHANGES[1:], "registered anew, new")
WRONG = "from the cache, old"


@pytest.fixture(scope="module", autouse=True)
def device() -> Iterator[None]:
    if not Path("/usr/include/rdma/fabric.h").exists():
        require("libfabric", "libfabric-dev is not installed")
    with soft_roce.made():
        for _ in range(PATIENCE):
            if subprocess.run(["fi_info", "-p", "verbs", "-d", DEVICE], capture_output=True).returncode == 0:
                break
            time.sleep(1)
        yield


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build(PROGRAM, tmp_path_factory.mktemp("libfabric") / "rdma", "-lfabric", *flags())


def run(*command: str, **environment: str) -> tuple[dict[str, str], str]:
    """What came of each change, and everything else that was said."""
    settings = os.environ | {"UMMUNOTIFY_REPORT": "1", "IPATH_NO_BACKTRACE": "1"} | environment
    result = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return dict(line.split(": ", 1) for line in result.stdout.splitlines()), result.stderr


def counts(said: str) -> dict[str, int]:
    return {
        name: int(count)
        for count, name in re.findall(r"(\d+) (subscribed|refused|checked|of them stale|notified)", said)
    }


def preload(source: str) -> list[str]:
    return [sys.executable, "-m", "ummunotify", "run", "--libfabric", "--source", source, "--"]


def test_without(program: str) -> None:
    """The cache is at work, and libfabric's own monitor misses changes."""
    results, _ = run(program, ADDRESS, *CHANGES)
    assert results["nothing"] == RIGHT["nothing"]
    assert results["truncate"] == results["syscall"] == WRONG


@pytest.mark.parametrize("source", ["bpf", "uffd"])
def test_preloaded(program: str, source: str) -> None:
    results, said = run(*preload(source), program, ADDRESS, *CHANGES)
    assert results == RIGHT
    count = counts(said)
    assert count["checked"] >= 1
    # Before and after each change. uffd cannot watch the file; but if it is where memory was that has just gone, it
    # joins a range that is stale already, and so do others.
    assert count["refused"] <= (2 if source == "uffd" else 0), said
    assert count["subscribed"] == 2 * len(CHANGES) - count["refused"], said
    assert count["notified"] >= 1, said
    # The cache may ask before it is told.
    assert count["notified"] + count["of them stale"] >= len(CHANGES) - 1 - count["refused"] / 2, said


def test_imported(program: str) -> None:
    results, _ = run(program, "import", ADDRESS, *CHANGES, UMMUNOTIFY_SOURCE="uffd")
    assert results == RIGHT


def test_pingpong() -> None:
    """A program of libfabric's own."""
    command = [*preload("bpf"), "fi_pingpong", "-p", "verbs", "-e", "msg", "-d", DEVICE, "-I", "10", "-S", "65536"]
    settings = os.environ | {"UMMUNOTIFY_REPORT": "1"}
    server = subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for _ in range(PATIENCE):
            client = subprocess.run([*command, ADDRESS], env=settings, capture_output=True, text=True, check=False)
            if client.returncode == 0 or server.poll() is not None:
                break
            time.sleep(1)
        said, _ = server.communicate(timeout=PATIENCE)
    finally:
        server.kill()
        server.wait()
    assert client.returncode == 0, client.stdout + client.stderr
    assert server.returncode == 0, said
    assert counts(said)["subscribed"] > 0
    assert counts(client.stderr)["subscribed"] > 0


@pytest.mark.parametrize("watched", [False, True])
def test_mpi(watched: bool) -> None:
    """Of mpich as it is: its libfabric is newer than Debian's, and loads the provider as a plugin."""
    if importlib.util.find_spec("mpi4py") is None or not MPIEXEC.exists():
        require("mpi", "mpi4py and mpich are not installed: pip install mpi4py mpich")
    settings = {
        "HYDRA_LAUNCHER": "fork",
        "MPIR_CVAR_CH4_NETMOD": "ofi",
        "MPIR_CVAR_NOLOCAL": "1",  # no shared memory between the ranks
        "FI_PROVIDER": "verbs;ofi_rxm",
        "FI_VERBS_IFACE": INTERFACE,
        "FI_UNIVERSE_SIZE": "2",  # else it wants longer queues than the device has
        "UMMUNOTIFY_REPORT": "1",
    }
    command = [*(preload("bpf") if watched else []), str(MPIEXEC), "-n", "2", sys.executable, str(EXAMPLE)]
    result = subprocess.run(
        command, env=os.environ | settings, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    wrong = [int(count) for count in re.findall(r": (\d+) of \d+ messages wrong", result.stdout)]
    assert len(wrong) == 2, result.stdout + result.stderr
    if watched:
        assert wrong == [0, 0]
        assert max(counts(line)["subscribed"] for line in result.stderr.splitlines() if "subscribed" in line) >= 20
    else:
        assert 0 not in wrong
    assert result.returncode == (0 if watched else 1)
