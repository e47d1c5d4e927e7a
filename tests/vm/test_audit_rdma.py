"""`ummunotify audit` finds the stale registration of an RDMA device, and nothing in a program that has none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import soft_roce
from test_mpi_rdma import LAYERS, LENGTH
from test_rdma import DEVICE, EXAMPLES, device

sys.path.append(str(Path(__file__).parents[1]))
from mpi import LIBRARIES, PROGRAM

__all__ = ["device"]  # a fixture

COMMAND = [sys.executable, "-m", "ummunotify"]


def audit(path: Path, *command: str, status: int = 0) -> dict[str, Any]:
    words = [*COMMAND, "audit", "--json", str(path), "--", sys.executable, *command]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == status, result.stdout + result.stderr
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def functions(stack: list[dict[str, Any]]) -> list[str]:
    return [frame["function"] for frame in stack if frame["language"] == "python"]


def test_stale_registration(tmp_path: Path) -> None:
    report = audit(tmp_path / "report", str(EXAMPLES / "rdma_stale_mr.py"), DEVICE)
    [finding] = [each for each in report["findings"] if each["severity"] == "used"]
    assert finding["pin"]["interface"] == "verbs"
    assert "without" in functions(finding["pin"]["stack"])
    [change] = finding["changes"]
    assert (change["cause"], change["call"]) == ("munmap", "munmap")
    assert "free" in functions(change["stack"])
    [use] = finding["uses"]
    assert use["call"] == "ibv_post_send (RDMA read)"
    assert use["now"] == "memory"
    assert "_transfer" in functions(use["stack"])


@pytest.mark.parametrize(("how", "wrong"), [("--remap=0.5", False), ("--naive", True)])
def test_two_processes(tmp_path: Path, how: str, wrong: bool) -> None:
    """The cache deregisters what has changed before it uses the address again; without it stale keys are used."""
    example = str(EXAMPLES / "rdma_pingpong.py")
    report = audit(tmp_path / "report", example, DEVICE, how, "--rounds", "50", status=int(wrong))
    assert len({process["pid"] for process in report["processes"] if process["pins"]}) == 2
    assert (report["counts"]["used"] > 0) == wrong
    assert wrong or report["counts"]["kept"] == 0


@pytest.mark.parametrize("watched", [False, True])
def test_mpi(tmp_path: Path, watched: bool) -> None:
    """Open MPI over UCX: what its cache is not told of is found, and nothing where ummunotify tells it."""
    library, program, path = LIBRARIES["openmpi"], tmp_path / "mpi", tmp_path / "report"
    library.require()
    subprocess.run([library.compiler, "-O1", "-g", "-o", program, PROGRAM], check=True)
    run = [*COMMAND, "run", "--ucx", "--source", "bpf", "--"] if watched else []
    ranks: list[str | Path] = [library.launcher, "-n", "2", program, "send", LENGTH, "300"]  # some 100 at a time
    with soft_roce.made():
        result = subprocess.run(
            [*COMMAND, "audit", "--source", "bpf", "--json", path, "--", *run, *ranks],
            env=os.environ | library.environment | LAYERS["ucx"] | {"IPATH_NO_BACKTRACE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    print(result.stdout, result.stderr)
    report = json.loads(path.read_text())
    pinning = [process for process in report["processes"] if process["pins"]]
    assert len({process["pid"] for process in pinning}) == 2
    used = [finding for finding in report["findings"] if finding["severity"] == "used"]
    assert result.returncode == (0 if watched else 1)
    assert bool(used) != watched
    for finding in used:
        assert finding["uses"][0]["call"].startswith("ibv_post_")
    # A call of this program, by which it changes memory that UCX has pinned. Others change some, too: allocators.
    assert watched or any(
        frame["function"] == "change" for finding in used for each in finding["changes"] for frame in each["stack"]
    )
    assert not watched or report["counts"]["kept"] == 0
