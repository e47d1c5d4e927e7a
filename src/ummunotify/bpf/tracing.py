"""Loading the BPF program that takes the stacks of changes (stacks.bpf.c), and attaching it behind a feeder."""

from __future__ import annotations

import os
from collections.abc import Callable

from .._abi import Probe
from .._bpf import LINK, Descriptor
from .._stacks import Tracer, create_ring
from ..errors import UnavailableError
from . import libbpf
from .program import TRACEPOINT, Program, read_object, why

_PROGRAMS: dict[Probe, tuple[str, Callable[[int], int]]] = {
    Probe.KVM: ("stacks_kvm", lambda program: libbpf.raw_tracepoint_open(TRACEPOINT, program)),
    Probe.MMU_NOTIFIER: ("stacks_mmu", libbpf.trace_open),
}
_SHARED = ("segments", "tables", "control")


def attach(feeder: Program, ring: int) -> Descriptor:
    """Have stacks written into this ring buffer (see create_ring) until the link is closed. Raises UnavailableError."""
    if feeder.probe not in _PROGRAMS:
        raise UnavailableError(
            f"there are no stacks with the probe {feeder.probe.label}", "use bpf:mmu_notifier or bpf:kvm"
        )
    wanted, open_link = _PROGRAMS[feeder.probe]
    try:
        with libbpf.BpfObject(read_object("stacks.bpf.o"), "ummunotify") as loaded:
            for name in _SHARED:
                loaded.reuse_map(name, feeder.maps[name].number())
            loaded.reuse_map("stacks", ring)
            loaded.set_max_entries("seen", feeder.tables.capacity)
            for name, _ in _PROGRAMS.values():
                loaded.set_autoload(name, name == wanted)
            loaded.load()
            program = loaded.program_fd(wanted)
        try:
            return Descriptor("the link that takes stacks", LINK, open_link(program))
        finally:
            os.close(program)
    except OSError as error:
        raise why(error) from error


def trace(feeder: Program) -> Tracer:
    """Take stacks as long as the returned object is there. Raises UnavailableError."""
    try:
        ring = create_ring()
        try:
            return Tracer(ring, attach(feeder, ring))
        finally:
            os.close(ring)
    except OSError as error:
        raise why(error) from error
