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
    refused = "the kernel is locked down (confidentiality): no program may read its memory"
    assert doctor("true") == {"bpf:mmu_notifier": refused, "bpf:kvm": "", "bpf:zap": refused}
    assert best("true") == "bpf:kvm, an empty virtual machine"
    # Where nothing says so.
    refused = "the kernel does not let BPF read its memory"
    found = doctor("umount /sys/kernel/security")
    assert found == {"bpf:mmu_notifier": refused, "bpf:kvm": "", "bpf:zap": refused}
    selftest = ("ummunotify", "selftest", "--source", "bpf:kvm")
    result = subprocess.run(selftest, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert result.stdout.rstrip().splitlines()[-1].startswith("bpf:kvm: no miss")
