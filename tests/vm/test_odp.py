"""On-demand paging, which soft-RoCE has since Linux 6.15: the hardware's answer to the same question (docs/rdma.md)."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import soft_roce

sys.path.append(str(Path(__file__).parents[1]))
from support import require

PROGRAM = Path(__file__).parents[1] / "c/odp.c"


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with soft_roce.made():
        yield


def test_registrations_of_changed_memory(tmp_path: Path) -> None:
    program = tmp_path / "odp"
    subprocess.run(["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", PROGRAM, "-o", program, "-libverbs"], check=True)
    done = subprocess.run([program, soft_roce.DEVICE, "1", "4096", "100"], capture_output=True, text=True, check=False)
    if done.returncode == 3:
        require("odp", done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = {
        (way, kind): int(count)
        for way, kind, count in re.findall(r"^([\w ]+), (\w+): (\d+) of 100 wrong", done.stdout, re.MULTILINE)
    }
    kinds = ("munmap", "madvise", "mremap", "mmap")
    assert all(wrong["kept", kind] == 100 for kind in kinds), done.stdout
    assert not any(wrong[way, kind] for way in ("on demand", "anew") for kind in (*kinds, "nothing")), done.stdout
