"""The binding of libbpf, on the real kernel with the real object."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
from support import require

from ummunotify._abi import FED_TABLE_SIZE, Probe, u32
from ummunotify._bpf import create_segment, read_map
from ummunotify.bpf import features, libbpf
from ummunotify.bpf.libbpf import BpfError, BpfObject, LibraryMissingError
from ummunotify.bpf.program import Program, why
from ummunotify.errors import UnavailableError

OBJECT = resources.files("ummunotify.bpf").joinpath("watch.bpf.o").read_bytes()


@pytest.fixture(autouse=True)
def privileged() -> None:
    try:
        os.close(create_segment())
    except BpfError as error:
        if error.errno == errno.EPERM:
            require("bpf", f"BPF maps cannot be made: {error}")
        raise


def descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def test_tracepoints_that_are_preempted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the next task's run is skipped: nobody may watch through them."""
    if not libbpf.btf_available():
        require("btf", "the kernel's types are not there")
    assert libbpf.tracepoints_preemptible() == (int(os.uname().release.partition(".")[0]) >= 7)
    types = tmp_path / "vmlinux"
    monkeypatch.setattr(libbpf, "BTF_PATH", str(types))
    types.write_bytes(b"\0pid_t\0class_srcu_fast_notrace_t\0int\0")  # in an older kernel, too
    libbpf.tracepoints_preemptible.cache_clear()
    try:
        assert libbpf.tracepoints_preemptible()
        with pytest.raises(UnavailableError, match="Linux 7") as info:
            Program(Probe.KVM, 1)
    finally:
        libbpf.tracepoints_preemptible.cache_clear()
    assert "mmu_notifier" in info.value.remedy


def test_load_and_attach() -> None:
    before = descriptors()
    with BpfObject(OBJECT, "test") as loaded:
        with pytest.raises(BpfError, match="EBADF"):
            loaded.map_fd("tables")
        loaded.set_max_entries("tables", 7)
        for needs_kprobes in ("mmu_notifier", "probe_gap", "zap", "kvm_no_reads", "wake_all_due_no_reads"):
            loaded.set_autoload(needs_kprobes, False)
        loaded.load()
        with pytest.raises(BpfError, match="EBUSY"):
            loaded.set_max_entries("tables", 8)
        tables, program = loaded.map_fd("tables"), loaded.program_fd("kvm")
        with pytest.raises(BpfError, match="ENOENT"):
            loaded.map_fd("no such map")
    # The descriptors outlive the object, and nothing else does.
    assert descriptors() - before == {str(tables), str(program)}
    assert read_map(tables, u32(6), FED_TABLE_SIZE) == bytes(FED_TABLE_SIZE)
    with pytest.raises(BpfError) as info:
        read_map(tables, u32(7), FED_TABLE_SIZE)
    assert info.value.errno == errno.ENOENT
    assert "look up in a map" in str(info.value)
    copy = pickle.loads(pickle.dumps(info.value))
    assert (copy.errno, str(copy)) == (info.value.errno, str(info.value))
    assert libbpf.program_info(program).recursion_misses == 0
    with pytest.raises(BpfError) as info:
        libbpf.raw_tracepoint_open("no_such_tracepoint", program)
    assert info.value.errno == errno.ENOENT
    with pytest.raises(BpfError, match="closed"):
        loaded.load()
    loaded.close()
    os.close(tables)
    os.close(program)
    assert descriptors() == before


def test_what_is_not_an_object_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    before = descriptors()
    for data in (b"", b"garbage", OBJECT[: len(OBJECT) // 2]):
        with pytest.raises(BpfError):
            BpfObject(data, "test").load()
    assert descriptors() == before
    assert capfd.readouterr() == ("", "")


def test_the_verifier_is_quoted() -> None:
    # The license decides which helpers a program may call.
    with BpfObject(OBJECT.replace(b"Dual BSD/GPL", b"Proprietary!"), "test") as refused:
        with pytest.raises(BpfError) as info:
            refused.load()
        assert "GPL" in info.value.log
        assert "GPL" in str(info.value)


def test_a_missing_library_is_named() -> None:
    code = """if True:
        import ctypes
        from ummunotify.bpf import libbpf
        libbpf._SONAME = "libbpf.so.none"
        try:
            libbpf.libbpf_version()
        except libbpf.LibraryMissingError as error:
            print(error)
    """
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "libbpf1" in said
    assert issubclass(LibraryMissingError, OSError)


def test_what_a_kernel_lacks_is_found_by_trying() -> None:
    assert features.missing() == []
    assert not libbpf.has_helper(features._RAW_TRACEPOINT, 100_000)
    assert libbpf.accepts(features._RAW_TRACEPOINT, features._FETCH_AND_ADD)
    unknown = features._FETCH_AND_ADD.replace(bytes([0xDB]), bytes([0xFF]))
    assert not libbpf.accepts(features._RAW_TRACEPOINT, unknown)


def test_an_old_kernel_is_told_from_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """An old kernel's verifier may say EACCES, which without a log is a lack of privileges."""
    monkeypatch.setattr(libbpf, "has_helper", lambda _, number: number != 181)
    refused = BpfError(errno.EACCES, "load BPF object", "invalid func unknown#181")
    assert why(refused).reason == "this kernel is too old for the BPF program: it lacks bpf_loop (Linux 5.17)"
    assert why(BpfError(errno.EACCES, "load BPF object")).reason == "loading BPF programs is not permitted"
