"""`ummunotify audit` finds the stale registration of an RDMA device, and nothing in a program that has none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_rdma import DEVICE, EXAMPLES, device

__all__ = ["device"]  # a fixture


def audit(path: Path, *command: str, status: int = 0) -> dict[str, Any]:
    words = [sys.executable, "-m", "ummunotify", "audit", "--json", str(path), "--", sys.executable, *command]
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
