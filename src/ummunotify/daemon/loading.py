"""Which probe the daemon attaches: shared by the one for all users and the one for a single program."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from .._abi import Probe
from .._core import open_kvm
from ..bpf import libbpf
from ..bpf.program import Program, attached, check_permitted
from ..errors import SourceUnavailableError, UnavailableError
from ..notifier import open as open_notifier
from .server import BOUNDS

_PREFERENCE = (Probe.KVM, Probe.MMU_NOTIFIER, Probe.ZAP)
"""Another order than a process's own (`ummunotify_sources`): the kernel may skip the programs of the last two while a
client is preempted inside bpf system calls, so with `kvm` no client can slow down the others."""


def load_who() -> int:
    """The program that tells to whom a connection counts: peers.bpf.c. OSError, if the kernel refuses it."""
    data = Path(libbpf.__file__).with_name("peers.bpf.o").read_bytes()
    with libbpf.BpfObject(data, "ummunotify") as loaded:
        loaded.load()
        return loaded.program_fd("user")


class Loaded(NamedTuple):
    """What the daemon works with."""

    program: Program
    kvm: int
    """/dev/kvm, for clients; -1: they get none."""
    missing: list[tuple[str, str]]
    """Probes that would have been better, and why there are none."""


def load(probe: str | None, give_kvm: bool, tables: int) -> Loaded:
    """Attach this probe, or else the first that works here.

    Raises UnavailableError, OSError, with nothing left open.
    """
    check_permitted()  # first: without that, access to /dev/kvm is of no use
    tried = [each.label for each in _PREFERENCE] if probe is None else [probe]
    missing: list[tuple[str, UnavailableError]] = []
    kvm = -1
    if give_kvm and tried != ["zap"]:
        try:
            kvm = open_kvm()
        except UnavailableError as error:
            if probe == "kvm":
                raise
            # zap is the only one for which no client needs it. With mmu_notifier, clients that nothing else has
            # subscribed are refused, so it has to be asked for.
            if probe is None:
                tried.remove("zap")
                missing.append((", ".join(tried), error))
                tried = ["zap"]
    try:
        for each in tried:
            try:
                return Loaded(_attach(each, tables), kvm, [(names, str(error)) for names, error in missing])
            except UnavailableError as error:
                missing.append((each, error))
        if len({str(error) for _, error in missing}) == 1:  # it is not the probe's fault
            raise missing[0][1]
        raise UnavailableError(". ".join(f"{names}: {error}" for names, error in missing), "")
    except BaseException:
        if kvm >= 0:
            os.close(kvm)
        raise


def _attach(probe: str, tables: int) -> Program:
    if probe == "zap":
        # It is at many functions, so many kinds of change are tried. The others clients try by themselves.
        try:
            open_notifier("bpf:zap").close()
        except SourceUnavailableError as error:
            raise UnavailableError(error.reasons.get("bpf:zap", str(error)), "") from None
    return attached(Probe[probe.upper()], tables, BOUNDS)
