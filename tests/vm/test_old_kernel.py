"""What is said on a kernel that is too old: by hand, in Debian 11's guest, as it takes long to boot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))
from support import require

from ummunotify.bpf import features


@pytest.fixture(autouse=True, scope="session")
def machine() -> None:
    """Replaces conftest's, which opens a notifier."""


def test_each_source_names_what_it_lacks() -> None:
    if not features.missing():
        require("old kernel", "this one has all that the BPF program needs", always=False)
    result = subprocess.run(["ummunotify", "doctor", "--json"], capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stdout + result.stderr
    reasons = {each["source"]: each["reason"] for each in json.loads(result.stdout)["sources"]}
    for probe in ("mmu_notifier", "kvm", "zap"):
        assert reasons[f"bpf:{probe}"].startswith("this kernel is too old for the BPF program: it lacks ")
        assert reasons[f"bpf:{probe}"].endswith("bpf_loop (Linux 5.17)")
    assert reasons["uffd"].startswith("this kernel's userfaultfd lacks UFFD_")
