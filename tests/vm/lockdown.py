"""What is left in a kernel that is locked down. There is no way back, so suite.sh runs it last."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
from test_circumstances import best, doctor

LOCKDOWN = Path("/sys/kernel/security/lockdown")


def test_lockdown() -> None:
    if not LOCKDOWN.exists():
        subprocess.run(["mount", "-t", "securityfs", "securityfs", "/sys/kernel/security"], check=True)
    LOCKDOWN.write_text("integrity")
    assert set(doctor("true").values()) == {""}
    LOCKDOWN.write_text("confidentiality")
    assert set(doctor("true").values()) == {
        "the kernel is locked down (confidentiality): nobody may read its memory by kprobes or BPF"
    }
    assert best("true") == "uffd"
    # Where nothing says so.
    assert set(doctor("umount /sys/kernel/security").values()) == {"the kernel does not let BPF read its memory"}
