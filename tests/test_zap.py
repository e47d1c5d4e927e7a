"""Which functions the probe `zap` is attached to: the running kernel's types, and what it says when they are others.

That it sees all changes is shown where it is for all probes: test_changes.py, test_stress.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support import require

from ummunotify._abi import CallType, Extent, call_cookie
from ummunotify._core import source_names
from ummunotify.bpf import libbpf, zap
from ummunotify.bpf.libbpf import KernelTypes, Parameter
from ummunotify.bpf.zap import _Call, _Function, _Need
from ummunotify.errors import UnavailableError

FLUSH = _Function("ptep_clear_flush", (_Call("vma", "address", Extent.PAGE),))


@pytest.fixture(autouse=True)
def types() -> None:
    if not libbpf.btf_available():
        require("btf", "the kernel's types are not there")


@pytest.fixture(autouse=True)
def symbols() -> None:
    zap._symbols.cache_clear()


def refused(monkeypatch: pytest.MonkeyPatch, *needs: _Need) -> str:
    monkeypatch.setattr(zap, "_NEEDS", needs)
    with pytest.raises(UnavailableError) as info:
        zap.attachments()
    zap._symbols.cache_clear()
    assert "another probe" in info.value.remedy
    return info.value.reason


@pytest.mark.parametrize("hidden", ["empty", "absent"])
def test_symbols_that_cannot_be_read(hidden: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a systemd unit with ProtectKernelTunables=yes: root finds nothing there, and others are refused."""
    symbols = tmp_path / "kallsyms"
    if hidden == "empty":
        symbols.touch()
    monkeypatch.setattr(zap, "_SYMBOLS", symbols)
    with pytest.raises(UnavailableError, match=r"cannot be read .*kallsyms") as info:
        zap.attachments()
    assert "ProtectKernelTunables=no" in info.value.remedy


def test_types_of_the_kernel() -> None:
    with KernelTypes() as types:
        parameters = types.parameters("ptep_clear_flush")
        assert parameters is not None
        assert [each.name for each in parameters] == ["vma", "address", "ptep"]
        assert [each.type for each in parameters[:2]] == ["struct vm_area_struct *", "long unsigned int"]
        assert types.parameters("no_such_function") is None
        members = types.members("vm_area_struct")
        assert members is not None
        assert 0 < members["vm_mm"] < members["vm_file"]
        assert types.members("no_such_structure") is None


def test_this_kernel() -> None:
    """Every kernel that is tested has what the probe needs, also where it admits no kprobes."""
    found = zap.attachments()
    assert {"unmap_vmas", "move_page_tables", "ptep_clear_flush", "try_to_unmap_one"} <= set(found)
    assert len({"zap_vma_range_batched", "zap_page_range_single_batched", "zap_page_range_single"} & set(found)) == 1
    with KernelTypes() as types:
        members = types.members("vm_area_struct")
    assert members is not None
    place = members["vm_mm"] // 8
    assert found["ptep_clear_flush"].to_bytes(8, sys.byteorder) == bytes((0, 1, 1, 0, Extent.PAGE, place, 0, 0))


def test_the_range_is_in_a_structure() -> None:
    """As for munmap since Linux 7, and for mremap since Linux 6.16."""
    call = _Call("unmap", extent=Extent.SPAN)
    parameters = [Parameter("tlb", "struct mmu_gather *"), Parameter("unmap", "struct unmap_desc *")]
    members = {"mas": 0, "first": 8, "pg_start": 16, "vma_start": 32, "vma_end": 40}
    cookie = call.cookie({"unmap_desc": members}.get, parameters)
    assert cookie == call_cookie(1, CallType.SPAN, 0, 0, Extent.SPAN, [1, 4, 5])
    for name in ("first", "vma_start", "vma_end"):
        others = {each: place for each, place in members.items() if each != name}
        assert call.cookie({"unmap_desc": others}.get, parameters) is None


def test_arguments_on_the_stack() -> None:
    """As for UFFDIO_MOVE since Linux 6.18."""
    no_members = dict[str, dict[str, int]]().get
    call = _Call("mm", "src_addr", Extent.LENGTH, "len")
    before = [Parameter("mm", "struct mm_struct *"), *(Parameter(f"pointer{i}", "struct  *") for i in range(5))]
    after = [Parameter("src_addr", "long unsigned int"), Parameter("len", "long unsigned int")]
    assert call.cookie(no_members, before + after) == call_cookie(0, CallType.MM, 6, 7, Extent.LENGTH)
    farther = [*before, Parameter("pointer5", "void *"), *after]
    assert call.cookie(no_members, farther) is None
    for kind in ("struct large", "double", "int"):  # it may take no place, or several
        assert call.cookie(no_members, [*before[:-1], Parameter("value", kind), *after]) is None


def test_a_function_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = _Function("no_such_function", FLUSH.calls)
    assert "there is no no_such_function (for magic)" in refused(monkeypatch, _Need("magic", ((missing,),)))
    # Unless the kernel cannot do what it is for, or does it in another function.
    for need in (
        _Need("magic", ((missing,),), only_with="no_such_structure"),
        _Need("magic", ((missing,), (FLUSH,))),
        _Need("magic", ((FLUSH, missing._replace(optional=True)),)),
    ):
        zap._symbols.cache_clear()
        monkeypatch.setattr(zap, "_NEEDS", (_Need("copies", ((FLUSH,),)), need))
        assert list(zap.attachments()) == ["ptep_clear_flush"]
    needed = _Need("magic", ((missing,),), only_with="vm_area_struct")
    assert "no_such_function" in refused(monkeypatch, needed)


def test_a_function_is_called_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    for call in (
        _Call("vma", "start", Extent.PAGE),
        _Call("mm", "address", Extent.PAGE),
        _Call("address", "address", Extent.PAGE),
        _Call("vma", "vma", Extent.PAGE),
        _Call("vma", "address", Extent.LENGTH, "size"),
        _Call("vma", "address", Extent.LENGTH, "ptep"),
    ):
        changed = FLUSH._replace(calls=(call,))
        reason = refused(monkeypatch, _Need("magic", ((changed,),)))
        assert "ptep_clear_flush is called in an unknown way: (struct vm_area_struct *vma, long unsigned int" in reason
        # Then it may have another purpose, too: the next best is no way out.
        assert "ptep_clear_flush" in refused(monkeypatch, _Need("magic", ((changed,), (FLUSH,))))
    monkeypatch.setattr(
        zap, "_TYPES", {**zap._TYPES, "struct vm_area_struct *": (CallType.HOLDER, ("vm_mm", "no_such_member"))}
    )
    assert "unknown way" in refused(monkeypatch, _Need("magic", ((FLUSH,),)))


def test_everything_that_is_wrong_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = [_Need(f"magic {i}", ((_Function(f"no_such_function_{i}", FLUSH.calls),),)) for i in range(3)]
    reason = refused(monkeypatch, *needs)
    assert all(f"no_such_function_{i} (for magic {i})" in reason for i in range(3))


def test_a_function_that_the_compiler_took_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel has many such; of those that matter none, on the kernels that are tested."""
    for line in Path("/proc/kallsyms").read_text().splitlines():
        symbol = line.split()[2]
        name, dot, suffix = symbol.partition(".")
        if dot and suffix.startswith(("part", "constprop", "isra")) and "[" not in line:
            break
    else:
        pytest.skip("the compiler took no function of this kernel apart")
    reason = refused(monkeypatch, _Need("magic", ((_Function(name, FLUSH.calls),),)))
    assert f"there is not one {name}, but " in reason
    assert symbol in reason


def test_it_is_the_last_of_the_probes() -> None:
    assert source_names("bpf")[-1] == "bpf:zap"
    assert source_names("bpf:zap") == ["bpf:zap"]
