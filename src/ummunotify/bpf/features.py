"""What of BPF this kernel lacks, found out by trying: distributions add features to old kernels.

Asked only when the kernel has refused the program, to say why.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from . import libbpf

_RAW_TRACEPOINT = 17  # BPF_PROG_TYPE_RAW_TRACEPOINT


def _instruction(code: int, to: int, of: int = 0, offset: int = 0, value: int = 0) -> bytes:
    return struct.pack("=BBhi", code, of << 4 | to, offset, value)


_FETCH_AND_ADD = b"".join(
    (
        _instruction(0x7A, 10, offset=-8),  # *(u64 *)(r10 - 8) = 0
        _instruction(0xB7, 0),  # r0 = 0
        _instruction(0xDB, 10, 0, -8, 1),  # r0 = atomic_fetch_add((u64 *)(r10 - 8), r0)
        _instruction(0x95, 0),  # exit
    )
)


def _helper(number: int) -> Callable[[], bool]:
    return lambda: libbpf.has_helper(_RAW_TRACEPOINT, number)


_NEEDED: tuple[tuple[str, str, Callable[[], bool]], ...] = (
    ("bpf_get_current_task_btf", "5.11", _helper(158)),
    ("atomic operations that fetch", "5.12", lambda: libbpf.accepts(_RAW_TRACEPOINT, _FETCH_AND_ADD)),
    ("bpf_task_pt_regs", "5.15", _helper(175)),
    ("bpf_loop", "5.17", _helper(181)),
)
"""With which Linux it came, and whether this one has it."""


def missing() -> list[str]:
    """What the program needs and the kernel lacks. Raises nothing."""
    try:
        return [f"{name} (Linux {since})" for name, since, found in _NEEDED if not found()]
    except libbpf.BpfError:  # no libbpf: the error at hand says so
        return []
