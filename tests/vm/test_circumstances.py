"""What is left, and what is said, when something is missing: only in the guests, where it can be taken away."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1]))
from support import require, require_module

Context = require_module("pyverbs.device").Context
# A process of its own, whose mounts are its own.
PRIVATE = ("unshare", "--mount", "--propagation", "private", "sh", "-ec")
DEVICES = "mount -t tmpfs tmpfs /dev; mknod -m 666 /dev/null c 1 3; mknod -m 666 /dev/urandom c 1 9"
WHO_MAY_LOAD = (
    "setpriv --reuid=nobody --regid=nogroup --clear-groups --inh-caps=-all,+bpf,+perfmon "
    "--ambient-caps=-all,+bpf,+perfmon --bounding-set=-all,+bpf,+perfmon "
)
KPROBES = Path("/sys/kernel/debug/kprobes/enabled")
_ODP_SUPPORT = 1  # IBV_ODP_SUPPORT
OPEN = "python -c 'import ummunotify as u; print(u.open().source, u._core.subscribed_by(), sep=\", \")'"


@pytest.fixture(autouse=True, scope="session")
def machine() -> None:
    """Replaces conftest's, which opens a notifier: this process must have no virtual machine, which uses the module."""


@pytest.fixture(autouse=True)
def guest() -> None:
    if "UMMUNOTIFY_VM" not in os.environ:
        require("vm", "this takes away what the machine needs", always=False)


def doctor(prepare: str, become: str = "") -> dict[str, str]:
    """Of each BPF source why it does not work, or nothing."""
    command = [*PRIVATE, f"{prepare}; exec {become}ummunotify doctor --json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    sources: list[dict[str, Any]] = json.loads(result.stdout)["sources"]
    return {each["source"]: each["reason"] for each in sources if each["source"].startswith("bpf:")}


def best(prepare: str) -> str:
    return subprocess.run([*PRIVATE, f"{prepare}; {OPEN}"], capture_output=True, text=True, check=True).stdout.strip()


def subscribed(prepare: str, source: str, kvm: int) -> None:
    command = [*PRIVATE, f"{prepare}; python {Path(__file__).with_name('subscribed.py')} {source} {kvm}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def not_subscribed(why: str) -> str:
    return f"the kernel does not notify of this process's changes, as nothing has subscribed it: {why}"


def test_no_device() -> None:
    absent = "there is no /dev/kvm"
    assert doctor(DEVICES) == {
        "bpf:mmu_notifier": not_subscribed(f"{absent}, and there is no RDMA device"),
        "bpf:kvm": absent,
        "bpf:zap": "",
    }
    assert best(DEVICES) == "bpf:zap, None"


@pytest.mark.parametrize("source", ["bpf:mmu_notifier", "daemon:mmu_notifier"])
def test_no_device_but_something_else_subscribes(source: str) -> None:
    daemon = (
        "export UMMUNOTIFY_SOCKET=/dev/daemon/socket; "
        "ummunotify daemon --probe mmu_notifier --socket $UMMUNOTIFY_SOCKET & "
        "trap 'kill $!; wait $!' EXIT; while [ ! -S $UMMUNOTIFY_SOCKET ]; do kill -0 $!; sleep 0.2; done"
    )
    start = daemon if source.startswith("daemon") else "true"
    subscribed(f"exec 9<>/dev/kvm; {DEVICES}; mkdir -m 755 /dev/daemon; {start}", source, 9)


def test_no_device_but_rdma_memory_that_is_paged_on_demand() -> None:
    keep_rdma = f"mkdir -p /run/rdma; mount --bind /dev/infiniband /run/rdma; {DEVICES}; mkdir /dev/infiniband; "
    keep_rdma += "mount --bind /run/rdma /dev/infiniband"
    on_demand = Context(name="rxe0").query_device_ex().odp_caps.general_caps & _ODP_SUPPORT
    if on_demand:
        assert best(keep_rdma) == "bpf:mmu_notifier, RDMA memory that is paged on demand"
        subscribed(keep_rdma, "bpf:mmu_notifier", -1)
    else:
        refused = "there is no /dev/kvm, and there is no RDMA device here that pages on demand"
        assert doctor(keep_rdma)["bpf:mmu_notifier"] == not_subscribed(refused)


@pytest.fixture
def paranoid() -> Iterator[Callable[[int], None]]:
    """How little users may see of the kernel."""
    path = Path("/proc/sys/kernel/perf_event_paranoid")
    before = path.read_text()
    yield lambda level: void(path.write_text(str(level)))
    path.write_text(before)


def void(_: object) -> None:
    """For a lambda: no result."""


def test_two_capabilities_and_no_access_to_the_device(paranoid: Callable[[int], None]) -> None:
    no_access = DEVICES + "; mknod -m 600 /dev/kvm c 10 232"
    refused = "/dev/kvm cannot be opened (Permission denied)"
    paranoid(2)
    assert doctor(no_access, WHO_MAY_LOAD) == {
        "bpf:mmu_notifier": not_subscribed(f"{refused}, and there is no RDMA device"),
        "bpf:kvm": refused,
        "bpf:zap": "",
    }
    paranoid(3)
    no_kprobes = "kprobes are not permitted without CAP_SYS_ADMIN (kernel.perf_event_paranoid is 3)"
    assert doctor(no_access, WHO_MAY_LOAD) == {
        "bpf:mmu_notifier": no_kprobes,
        "bpf:kvm": refused,
        "bpf:zap": no_kprobes,
    }


def test_a_capability_is_missing() -> None:
    for capability in ("bpf", "perfmon"):
        become = WHO_MAY_LOAD.replace(f",+{capability}", "")
        assert set(doctor("true", become).values()) == {"loading BPF programs is not permitted"}


@pytest.fixture
def no_module() -> Iterator[None]:
    # The kernel lets go of the virtual machine of a process some time after the process has ended.
    for _ in range(120):
        if not subprocess.run(["modprobe", "-r", "kvm_amd", "kvm"], check=False).returncode:
            break
        time.sleep(1)
    assert not Path("/sys/module/kvm").exists()
    yield
    subprocess.run(["modprobe", "kvm-amd"], check=True)
    Path("/dev/kvm").chmod(0o666)


def test_no_module(no_module: None) -> None:
    assert doctor("mount -t tmpfs tmpfs /dev/infiniband") == {
        "bpf:mmu_notifier": not_subscribed(
            "there is no /dev/kvm, and there is no RDMA device here that pages on demand"
        ),
        "bpf:kvm": "the kernel has no tracepoint kvm_unmap_hva_range",
        "bpf:zap": "",
    }


def test_no_types() -> None:
    found = doctor("mount -t tmpfs tmpfs /sys/kernel/btf")
    assert set(found.values()) == {"the kernel's types (BTF) are not available: there is no /sys/kernel/btf/vmlinux"}


def test_no_kprobes() -> None:
    found = doctor("mount -t tmpfs tmpfs /sys/bus/event_source/devices")
    absent = "the kernel has no kprobes"
    assert found == {"bpf:mmu_notifier": absent, "bpf:kvm": "", "bpf:zap": absent}


@pytest.fixture
def switch() -> Iterator[Callable[[bool], None]]:
    """Of all kprobes."""
    subprocess.run(["mount", "-t", "debugfs", "debugfs", "/sys/kernel/debug"], check=False, capture_output=True)

    def set_to(on: bool) -> None:
        KPROBES.write_text("1" if on else "0")

    yield set_to
    set_to(True)


def test_kprobes_are_switched_off(switch: Callable[[bool], None]) -> None:
    switch(False)
    found = doctor("true")
    assert found["bpf:kvm"] == ""
    for probe in ("mmu_notifier", "zap"):
        assert found[f"bpf:{probe}"] == "kprobes are switched off (/sys/kernel/debug/kprobes/enabled)"
    switch(True)
    # Nothing lacks any more.
    assert doctor("true") == {"bpf:mmu_notifier": "", "bpf:kvm": "", "bpf:zap": ""}
    assert best("true") == "bpf:mmu_notifier, an empty virtual machine"
