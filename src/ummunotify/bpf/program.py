"""Loading the BPF program with one of its probes, and attaching it."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from pathlib import Path

from .._abi import OBJECT_VERSION, SEGMENTS, Probe, u64
from .._bpf import LINK, MAP, PROGRAM, Bounds, Descriptor, Tables
from ..errors import UnavailableError
from . import features, libbpf, zap

_NO_USER_READS = "kvm_no_reads"
"""The program for the probe kvm where the kernel is locked down."""
_GAPS = "probe_gap"
"""The program that notices where the kernel may skip the others."""
_ENDED, _WAKE = "ended", ("wake_all_due", "wake_all_due_no_reads")
"""Programs that are attached to nothing: for tables whose address space has ended, and for wake-ups that are due."""
_OBJECTS = Path(libbpf.__file__).parent
TRACEPOINT = "kvm_unmap_hva_range"
_FUNCTION = "__mmu_notifier_invalidate_range_start"
_TABLE_MAPS = ("segments", "rings", "tables", "owners", "handshakes", "control")

_PROGRAM_TYPES = (2, 17)
"""BPF_PROG_TYPE_KPROBE, BPF_PROG_TYPE_RAW_TRACEPOINT."""

CAP_SYS_ADMIN, CAP_PERFMON, CAP_BPF = 21, 38, 39
_SYS = Path("/sys/kernel")
_LOCKDOWN = Path("/sys/kernel/security/lockdown")
_KPROBES = Path("/sys/kernel/debug/kprobes/enabled")
_PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")


def capabilities() -> int | None:
    """The effective ones of this process, as bits. None: /proc is not mounted."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    except OSError:
        return None


def _may_load() -> bool:
    """False if the kernel would refuse in any case: known without loading libbpf, which takes milliseconds."""
    effective = capabilities()
    return effective is None or bool(  # None: the kernel will say
        effective >> CAP_SYS_ADMIN & 1 or (effective >> CAP_BPF & 1 and effective >> CAP_PERFMON & 1)
    )


def check_permitted() -> None:
    """Raises UnavailableError where this process may not load programs in any case."""
    if not _may_load():
        raise _not_permitted()


def _not_permitted() -> UnavailableError:
    return UnavailableError(
        "loading BPF programs is not permitted",
        "run as root or with CAP_BPF and CAP_PERFMON, or have an administrator run the daemon",
    )


def _locked_down() -> bool:
    """Is the kernel's memory closed to all programs, root's too?"""
    try:
        return "[confidentiality]" in _LOCKDOWN.read_text()
    except OSError:  # it is not mounted, or there is no lockdown
        return False


def _switched_off() -> bool:
    """Are all kprobes switched off? Then they can be made, and are never hit."""
    try:
        return _KPROBES.read_text().strip() == "0"
    except OSError:  # it is not mounted, or for root only; the self-test will tell
        return False


def _may_not_read(error: libbpf.BpfError) -> bool:
    """Was a program refused because it reads memory, as lockdown refuses it?"""
    return bool(re.search(r"(unknown func|cannot use helper) bpf_probe_read", error.log))


def read_object(name: str) -> bytes:
    """A BPF object. Raises UnavailableError if it is not of the library that this process has."""
    path = _OBJECTS / name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnavailableError(str(error), "install ummunotify again, and start the process again") from error
    if OBJECT_VERSION + b"\0" not in data:
        raise UnavailableError(
            f"{path} is of another version of ummunotify than this process", "start the process again"
        )
    return data


def why(error: OSError) -> UnavailableError:
    """What an error of loading means."""
    if isinstance(error, libbpf.LibraryMissingError):
        return UnavailableError("libbpf is not installed", "install libbpf1 (Debian) or libbpf (Fedora)")
    # With a log it was the verifier that refused, whatever errno it chose.
    if isinstance(error, libbpf.BpfError) and error.log and (missing := features.missing()):
        return UnavailableError(
            f"this kernel is too old for the BPF program: it lacks {', '.join(missing)}",
            "use a kernel that has all of these (Linux 5.17 or later, or one that has them added)",
        )
    if error.errno in (errno.EPERM, errno.EACCES):
        return _not_permitted()
    if error.errno == errno.EMFILE:
        return UnavailableError("this process may not open more descriptors", "raise `ulimit -n`")
    if isinstance(error, libbpf.BpfError) and _may_not_read(error):
        return UnavailableError(
            "the kernel does not let BPF read its memory", "use bpf:kvm, or boot with lockdown=integrity"
        )
    return UnavailableError(str(error).splitlines()[0], "")


def _paranoid() -> int:
    try:
        return int(_PARANOID.read_text())
    except (OSError, ValueError):  # no /proc
        return 0


def _why_not_attached(probe: Probe, error: OSError) -> UnavailableError:
    if probe == Probe.KVM and error.errno == errno.ENOENT:
        return UnavailableError(f"the kernel has no tracepoint {TRACEPOINT}", "load the kvm module (modprobe kvm)")
    if probe != Probe.KVM and error.errno == errno.EACCES and (paranoid := _paranoid()) > 2:
        # Debian and Ubuntu have this level.
        return UnavailableError(
            f"kprobes are not permitted without CAP_SYS_ADMIN (kernel.perf_event_paranoid is {paranoid})",
            "set that to 2 (sysctl), or use bpf:kvm",
        )
    if probe != Probe.KVM and error.errno == errno.ENOENT:
        return UnavailableError(str(error), "use another probe")
    return why(error)


def _possible_cpus() -> list[int]:
    """Those that there are or can be. OSError."""
    found: list[int] = []
    for part in Path("/sys/devices/system/cpu/possible").read_text().split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


class Program:
    """A loaded program with its maps; after `attach` it feeds its tables.

    It is unloaded when this object is gone, and everybody else has closed the links.
    """

    def __init__(self, probe: Probe, tables: int, bounds: Bounds | None = None) -> None:
        """Load. `bounds`: see Tables. Raises UnavailableError."""
        self.probe = probe
        self.links: list[Descriptor] = []
        self.probe_gaps: Descriptor | None = None
        self._gaps_code: Descriptor | None = None
        # For tables of other processes only; and `ended` reads memory.
        self._ended_code: Descriptor | None = None
        self._wake_code: Descriptor | None = None
        _check_kernel(probe)
        data = read_object("watch.bpf.o")
        try:
            try:
                maps = self._load(data, tables, probe.label, bounds is not None)
            except libbpf.BpfError as error:
                if probe != Probe.KVM or not _may_not_read(error):
                    raise
                maps = self._load(data, tables, _NO_USER_READS, bounds is not None)
            # Each function to attach to, with the cookie that the program gets from there. After loading: a kernel that
            # is too old for the program should not be refused for how its functions are called.
            self._functions = zap.attachments() if probe == Probe.ZAP else {_FUNCTION: 0}
        except OSError as error:
            raise why(error) from error
        self.maps = maps
        self.tables = Tables(maps, tables, bounds)

    def _load(self, data: bytes, tables: int, program: str, others: bool) -> dict[str, Descriptor]:
        """The maps. `others`: with what serves tables of other processes. OSError."""
        kprobe = self.probe != Probe.KVM
        with libbpf.BpfObject(data, "ummunotify") as loaded:
            loaded.set_max_entries("segments", tables * SEGMENTS)
            for name in ("rings", "tables", "owners", "handshakes", "due"):
                loaded.set_max_entries(name, tables)
            for name in ("tables", "control"):
                loaded.make_mappable(name)
            reads = program != _NO_USER_READS
            wake = _WAKE[not reads]
            wanted = {program, *((_GAPS,) if kprobe else ())}
            if others:
                wanted |= {wake, *((_ENDED,) if reads else ())}
            for name in (*(probe.label for probe in Probe), _NO_USER_READS, _GAPS, _ENDED, *_WAKE):
                loaded.set_autoload(name, name in wanted)
            loaded.load()
            maps = {name: Descriptor(f"the map {name}", MAP, loaded.map_fd(name)) for name in _TABLE_MAPS}
            self.code = Descriptor("the program", PROGRAM, loaded.program_fd(program))
            self.relay = Descriptor("the map relay", MAP, loaded.map_fd("relay"))
            if others:
                self._wake_code = Descriptor(f"the program {wake}", PROGRAM, loaded.program_fd(wake))
            if others and reads:
                self._ended_code = Descriptor(f"the program {_ENDED}", PROGRAM, loaded.program_fd(_ENDED))
            if kprobe:
                self._gaps_code = Descriptor(f"the program {_GAPS}", PROGRAM, loaded.program_fd(_GAPS))
                self.probe_gaps = Descriptor("the map probe_gaps", MAP, loaded.map_fd("probe_gaps"))
                libbpf.map_freeze(self.probe_gaps.number())
        return maps

    def attach(self) -> None:
        """Attach the probe. Raises UnavailableError."""
        try:
            if self.probe == Probe.KVM:
                self._link(TRACEPOINT, libbpf.raw_tracepoint_open(TRACEPOINT, self.code.number()))
            else:
                self._notice_gaps()
                for function, cookie in self._functions.items():
                    self._link(function, libbpf.kprobe_open(function, self.code.number(), cookie))
        except OSError as error:
            raise _why_not_attached(self.probe, error) from error

    def _link(self, name: str, fd: int) -> None:
        self.links.append(Descriptor(f"the link to {name}", LINK, fd))

    def _notice_gaps(self) -> None:
        """Notice what the kernel skips at kprobes: see `probe_gap` in watch.bpf.c. Raises UnavailableError, OSError."""
        assert self._gaps_code is not None
        self._link("sched_switch", libbpf.raw_tracepoint_open("sched_switch", self._gaps_code.number()))
        # Each CPU once: what it runs now may have been there before.
        for cpu in _possible_cpus():
            try:
                able = libbpf.program_run(self._gaps_code.number(), cpu=cpu)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                continue
            if not able:
                raise UnavailableError(
                    "the kernel's types (BTF) lack bpf_prog_active, so skipped runs cannot be noticed",
                    "use another probe: UMMUNOTIFY_SOURCE=bpf:kvm",
                )

    def descriptors(self) -> list[Descriptor]:
        """All of them."""
        optional = (self.probe_gaps, self._gaps_code, self._ended_code, self._wake_code)
        others = [each for each in optional if each is not None]
        return [*self.maps.values(), self.relay, self.code, *others, *self.links]

    def check(self) -> None:
        """Raises DescriptorLostError if the process has closed descriptors that cannot be opened again."""
        for descriptor in self.descriptors():
            descriptor.number()

    def close(self) -> None:
        """Close all descriptors, and give back the memory. May be called more than once."""
        for descriptor in self.descriptors():
            descriptor.close()
        self.tables.close()

    def ended(self) -> Iterator[int]:
        """The tables whose address space has ended, whatever keeps their connections open. OSError.

        None where the kernel is locked down: there such a table stays until its connection ends, and is fed nothing.
        """
        first = 0
        while self._ended_code is not None:
            first = libbpf.program_run(self._ended_code.number(), u64(first))
            if not first:
                break
            yield first - 1

    def wake_due(self, first: int) -> int:
        """Wake up owners that changes have left for later, from this table on.

        Returns with which to go on, or 0: that was all. OSError.
        """
        assert self._wake_code is not None
        return libbpf.program_run(self._wake_code.number(), u64(first))

    def invalidate_all(self) -> None:
        """Everything of every table may be invalid: to the program `kvm`, a change of all addresses. OSError."""
        everything = bytes(8) + b"\xff" * 8
        libbpf.program_run(self.code.number(), everything)


def count_on_host() -> int | None:
    """How many feeders there are on this host, of all processes. None: only root can know."""
    names = {*(probe.label for probe in Probe), _NO_USER_READS}
    try:
        return sum(each.type in _PROGRAM_TYPES and each.name in names for each in libbpf.loaded_programs())
    except OSError:
        return None


def _check_kernel(probe: Probe) -> None:
    """Raises UnavailableError for what is known without trying."""
    check_permitted()
    if not _SYS.is_dir():  # what is looked for below is there
        raise UnavailableError("/sys is not mounted", "mount -t sysfs sysfs /sys")
    if probe != Probe.KVM:
        if not libbpf.kprobes_available():
            raise UnavailableError("the kernel has no kprobes", "use one that is built with CONFIG_KPROBE_EVENTS")
        if _locked_down():
            raise UnavailableError(
                "the kernel is locked down (confidentiality): no program may read its memory",
                "use bpf:kvm, or boot with lockdown=integrity",
            )
        if _switched_off():
            raise UnavailableError(f"kprobes are switched off ({_KPROBES})", "write 1 to that file, or use bpf:kvm")
    if not libbpf.btf_available():
        raise UnavailableError(
            f"the kernel's types (BTF) are not available: there is no {libbpf.BTF_PATH}",
            "use a kernel that is built with CONFIG_DEBUG_INFO_BTF",
        )
    if probe == Probe.KVM and libbpf.tracepoints_preemptible():
        raise UnavailableError(
            "this kernel preempts programs at tracepoints, and then skips those of other tasks (since Linux 7)",
            "use a probe at kprobes: bpf:mmu_notifier, bpf:zap",
        )


def attached(probe: Probe, tables: int, bounds: Bounds | None = None) -> Program:
    """Load and attach. Raises UnavailableError."""
    program = Program(probe, tables, bounds)
    program.attach()
    return program
