"""The core's tests, which are programs in C: built and run as tests/core/Makefile says."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support import require

CORE = Path(__file__).parent / "core"
CHECKS = (
    "interleave",
    "exact",
    "exact-asan",
    "hostile-asan",
    "stress",
    "stress-tsan",
    "stress-asan",
    "stress-clang",
    "uffd-race",
    "uffd-race-tsan",
    "uffd-fill",
    "uffd-fill-tsan",
    "uffd-heap",
    "uffd-heap-tsan",
    "uffd-changes-tsan",
    "uffd-closed",
    "uffd-closed-tsan",
    "uffd-clone",
    "uffd-mappings",
    "uffd-limits",
)


@pytest.mark.parametrize("check", CHECKS)
def test_core(check: str, tmp_path: Path) -> None:
    for tool in ("make", "clang" if check.endswith("-clang") else "gcc"):
        if not shutil.which(tool):
            require(tool, "it is not installed")
    command = ["make", "--no-print-directory", "-C", str(CORE), f"BUILD={tmp_path}", f"check-{check}"]
    if "UMMUNOTIFY_SLOW" in os.environ:
        command.append("LONG=1")
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if run.returncode and "userfaultfd does not work here" in run.stdout:
        require("uffd", run.stdout.splitlines()[-1])
    assert run.returncode == 0, run.stdout
