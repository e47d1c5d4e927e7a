"""Where the probe `zap` is attached: the kernel's functions that take pages away from an address space.

That these are all of them is argued in docs/architecture.md. How each is called comes from the running kernel's types,
by the names of its parameters. Whatever is not as it is written here makes the probe unavailable, and the reason says
what.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from .._abi import CALL_ARGUMENTS, CallType, Extent, call_cookie
from ..errors import UnavailableError
from . import libbpf

_TYPES: dict[str, tuple[CallType, tuple[str, ...]]] = {
    "struct mm_struct *": (CallType.MM, ()),
    "struct vm_area_struct *": (CallType.HOLDER, ("vm_mm",)),
    "struct mmu_gather *": (CallType.HOLDER, ("mm",)),
    "struct mm_walk *": (CallType.HOLDER, ("mm",)),
    "struct userfaultfd_ctx *": (CallType.HOLDER, ("mm",)),
    "struct pagetable_move_control *": (CallType.SPAN, ("old", "old_addr", "old_end")),
    "struct unmap_desc *": (CallType.SPAN, ("first", "vma_start", "vma_end")),
}
"""What says whose address space it is, and the members that the program reads."""

_ADDRESS = "long unsigned int"
_LAST = {Extent.END: _ADDRESS, Extent.LENGTH: _ADDRESS, Extent.FOLIO: "struct folio *"}


_MembersOf = Callable[[str], dict[str, int] | None]
"""KernelTypes.members"""


class _Call(NamedTuple):
    """A way to call a function: the names of the parameters that matter."""

    whose: str
    start: str = ""
    extent: Extent = Extent.PAGE
    last: str = ""

    def cookie(self, members_of: _MembersOf, parameters: list[libbpf.Parameter]) -> int | None:
        """What the program is told. None if this is not how the function is called."""
        at = {parameter.name: (number, parameter.type) for number, parameter in enumerate(parameters)}
        nothing = 0, ""
        whose, what = at.get(self.whose, nothing)
        start, start_type = at.get(self.start, nothing)
        last, last_type = at.get(self.last, nothing)
        if what not in _TYPES or (self.start and start_type != _ADDRESS) or last_type != _LAST.get(self.extent, ""):
            return None
        needed = parameters[: max(whose, start, last) + 1]
        if len(needed) > CALL_ARGUMENTS or not all(each.type == _ADDRESS or each.type[-1] == "*" for each in needed):
            return None  # then it is not in the place that its number says
        kind, members = _TYPES[what]
        offsets = members_of(what.split()[1]) or {}
        if not set(members) <= set(offsets):
            return None
        places = [offsets[member] // 8 for member in members]
        if any(offsets[member] % 8 or offsets[member] // 8 > 0xFF for member in members):
            return None
        return call_cookie(whose, kind, start, last, self.extent, places)


class _Function(NamedTuple):
    name: str
    calls: tuple[_Call, ...]
    optional: bool = False
    """A kernel without it needs none."""


class _Need(NamedTuple):
    what: str
    either: tuple[tuple[_Function, ...], ...]
    """The first of these that the kernel has."""
    only_with: str = ""
    """A structure or a function: without it the kernel cannot do this at all."""


_VMA_PAGE = _Call("vma", "address", Extent.PAGE)
_VMA_PMD = _Call("vma", "address", Extent.PMD)
_FOLIO = _Call("vma", "address", Extent.FOLIO, "folio")

_NEEDS = (
    _Need(
        "munmap, mmap over it, brk, shmdt",
        (
            (
                _Function(
                    "unmap_vmas",
                    # Since Linux 7, and before.
                    (_Call("unmap", extent=Extent.SPAN), _Call("tlb", "start_addr", Extent.END, "end_addr")),
                ),
            ),
        ),
    ),
    _Need(
        "madvise DONTNEED, truncation",
        (
            (_Function("zap_vma_range_batched", (_Call("vma", "address", Extent.LENGTH, "size"),)),),
            # Before Linux 7. Since Linux 6.16 the next one calls it, too.
            (_Function("zap_page_range_single_batched", (_Call("vma", "address", Extent.LENGTH, "size"),)),),
            (
                _Function("zap_page_range_single", (_Call("vma", "address", Extent.LENGTH, "size"),)),
                # Until Linux 6.2, for drivers.
                _Function("zap_page_range", (_Call("vma", "start", Extent.LENGTH, "size"),), optional=True),
            ),
        ),
    ),
    _Need(
        "truncation of hugetlb files",
        ((_Function("unmap_hugepage_range", (_Call("vma", "start", Extent.END, "end"),)),),),
        only_with="hugetlbfs_sb_info",
    ),
    _Need("madvise FREE", ((_Function("madvise_free_pte_range", (_Call("walk", "addr", Extent.END, "end"),)),),)),
    _Need(
        "mremap",
        (
            (
                _Function(
                    "move_page_tables",
                    (_Call("pmc", extent=Extent.SPAN), _Call("vma", "old_addr", Extent.LENGTH, "len")),
                ),
            ),
        ),
    ),
    _Need(
        "copying on write, merging of equal pages, uprobes",
        (
            (
                _Function("ptep_clear_flush", (_VMA_PAGE,)),
                # arm64's, where a page of hugetlb memory has several entries; elsewhere it calls the one before.
                _Function("huge_ptep_clear_flush", (_Call("vma", "addr", Extent.PAGE),), optional=True),
            ),
        ),
    ),
    _Need(
        "huge pages",
        (
            (
                _Function("pmdp_huge_clear_flush", (_VMA_PMD,)),
                _Function("pmdp_collapse_flush", (_VMA_PMD,)),
                # Only what is split half-way and given up; the others call the one before.
                _Function("collapse_pte_mapped_thp", (_Call("mm", "addr", Extent.PMD),), optional=True),
                # Since Linux 7 that one calls this one.
                _Function("try_collapse_pte_mapped_thp", (_Call("mm", "addr", Extent.PMD),), optional=True),
                # Not on all processors.
                _Function("pudp_huge_clear_flush", (_Call("vma", "address", Extent.PUD),), optional=True),
            ),
        ),
        only_with="khugepaged_scan",
    ),
    _Need(
        "reclaim, hardware errors",
        (
            (
                _Function("try_to_unmap_one", (_FOLIO,)),
                # Since Linux 7; before that it is a part of the other.
                _Function("try_to_unmap_poisoned_hugetlb_one", (_FOLIO,), optional=True),
            ),
        ),
    ),
    _Need("migration", ((_Function("try_to_migrate_one", (_FOLIO,)),),)),
    _Need(
        "migration to devices",
        ((_Function("migrate_vma_collect_pmd", (_Call("walk", "start", Extent.END, "end"),)),),),
        only_with="migrate_vma_setup",
    ),
    _Need(
        "userfaultfd's UFFDIO_MOVE",
        (
            # Since Linux 6.18, which moves several pages at once. Others are huge pages: see there.
            (_Function("move_pages_ptes", (_Call("mm", "src_addr", Extent.LENGTH, "len"),)),),
            (_Function("move_pages", (_Call("ctx", "src_start", Extent.LENGTH, "len"),)),),
        ),
        only_with="uffdio_move",
    ),
)


_SYMBOLS = Path("/proc/kallsyms")


class _Missing(Exception):
    pass


@functools.cache
def _symbols() -> dict[str, list[str]]:
    """Of each function that matters here, the code that the kernel has for it. Raises UnavailableError."""
    names = "|".join(function.name for need in _NEEDS for functions in need.either for function in functions)
    try:
        if not (symbols := _SYMBOLS.read_text()):
            raise OSError(f"{_SYMBOLS} is empty")  # to root, where a unit hides it
    except OSError as error:
        raise UnavailableError(
            f"which functions the kernel has cannot be read ({error})",
            f"let {_SYMBOLS} be read (in a systemd unit: ProtectKernelTunables=no), or use another probe",
        ) from error
    found: dict[str, list[str]] = {}
    for name, suffix in re.findall(rf" [tT] ({names})(\.\S+)?$", symbols, re.MULTILINE):
        if not suffix.startswith(".cold"):  # what is seldom needed of a function, not a way into it
            found.setdefault(name, []).append(name + suffix)
    return found


def _cookie(types: libbpf.KernelTypes, function: _Function) -> int:
    """Raises _Missing."""
    symbols = _symbols().get(function.name, [])
    if not symbols:
        raise _Missing(f"there is no {function.name}")
    if symbols != [function.name]:
        # The compiler made several of it, or changed how it is called, or there is another function of this name.
        raise _Missing(f"there is not one {function.name}, but {', '.join(symbols)}")
    parameters = types.parameters(function.name)
    if parameters is None:
        raise _Missing(f"nothing says how {function.name} is called")
    for call in function.calls:
        if (cookie := call.cookie(types.members, parameters)) is not None:
            return cookie
    called = ", ".join(f"{each.type} {each.name}".replace("* ", "*") for each in parameters)
    raise _Missing(f"{function.name} is called in an unknown way: ({called})")


def _meet(types: libbpf.KernelTypes, need: _Need) -> dict[str, int]:
    """Raises _Missing."""
    if need.only_with and types.members(need.only_with) is None and types.parameters(need.only_with) is None:
        return {}
    # Not the next because this one has changed: then not everything passes the next.
    functions = next((each for each in need.either if each[0].name in _symbols()), need.either[0])
    wanted = [each for each in functions if not each.optional or each.name in _symbols()]
    return {function.name: _cookie(types, function) for function in wanted}


def attachments() -> dict[str, int]:
    """What to attach the program to, and with which cookie. Raises UnavailableError, OSError."""
    chosen: dict[str, int] = {}
    missing: list[str] = []
    with libbpf.KernelTypes() as types:
        for need in _NEEDS:
            try:
                chosen |= _meet(types, need)
            except _Missing as error:
                missing.append(f"{error} (for {need.what})")
    if missing:
        raise UnavailableError(
            f"this kernel's functions are not those that the probe knows: {'; '.join(missing)}",
            "use another probe (mmu_notifier, kvm), and please report this with the kernel's version",
        )
    return chosen
