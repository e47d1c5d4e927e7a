"""The source `bpf`: a BPF program sees the kernel's MMU notifications and writes the tables.

One set of maps and programs for the process, however many notifiers it opens. It consists of nothing but
file descriptors, so that the child of a fork can let go of it by closing them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import struct
from pathlib import Path

from ..bpf import libbpf
from . import zap
from .base import UnavailableError

PAGE = 4096
CELLS_PER_PAGE = 128
SEGMENT_PAGES = 64
SEGMENTS = 2048
"""As core/layout.h has them."""

TABLES = 16
"""Notifiers in one process."""

TABLES_PER_PROCESS = 256
"""As many as a change looks at: TABLES_PER_MM_MAX in watch.bpf.c."""

_STEPS_MAX = 1 << 23
_STEPS_LEAST = 32
"""Enough to invalidate some regions among a million: 3 for each of the 5 levels, 1 for each hit."""
_U64_MAX = (1 << 64) - 1

_KVM_CREATE_VM = 0xAE01
_TABLE = struct.Struct("=QII")  # struct table in watch.bpf.c
_U32 = struct.Struct("=I")
_U64 = struct.Struct("=Q")
_CONTROL = struct.Struct("=IIQII")  # struct control

PROBES = ("mmu_notifier", "kvm", "zap")
"""Best first: the first knows whose change it is, and of what kind; the last costs other processes time, too."""

_BLIND = "kvm_blind"
"""The program for the probe kvm where the kernel is locked down."""
_TRACEPOINT = "kvm_unmap_hva_range"
_FUNCTION = "__mmu_notifier_invalidate_range_start"


_CAP_SYS_ADMIN, _CAP_PERFMON, _CAP_BPF = 21, 38, 39


def _may_load() -> bool:
    """False if the kernel would refuse in any case: known without loading libbpf, which takes milliseconds."""
    with open("/proc/self/status") as status:
        capabilities = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    return bool(
        capabilities >> _CAP_SYS_ADMIN & 1 or (capabilities >> _CAP_BPF & 1 and capabilities >> _CAP_PERFMON & 1)
    )


def _not_permitted() -> UnavailableError:
    return UnavailableError(
        "loading BPF programs is not permitted",
        "run as root or with CAP_BPF and CAP_PERFMON, or have an administrator run the daemon",
    )


_LOCKDOWN = Path("/sys/kernel/security/lockdown")


def _locked_down() -> bool:
    """May nobody, not even root, read the kernel's memory?"""
    try:
        return "[confidentiality]" in _LOCKDOWN.read_text()
    except OSError:  # it is not mounted, or there is no lockdown
        return False


_KPROBES = Path("/sys/kernel/debug/kprobes/enabled")


def _switched_off() -> bool:
    """Has somebody switched all kprobes off? Then they can be made, and are never hit."""
    try:
        return _KPROBES.read_text().strip() == "0"
    except OSError:  # it is not mounted, or for root only; the self-test will tell
        return False


def _may_not_read(error: libbpf.BpfError) -> bool:
    """Was a program refused because it reads memory, as lockdown refuses it?"""
    return bool(re.search(r"(unknown func|cannot use helper) bpf_probe_read", error.log))


def _why(error: OSError) -> UnavailableError:
    if isinstance(error, libbpf.LibraryMissingError):
        return UnavailableError("libbpf is not installed", "install libbpf1 (Debian) or libbpf (Fedora)")
    if error.errno in (errno.EPERM, errno.EACCES):
        return _not_permitted()
    if isinstance(error, libbpf.BpfError) and _may_not_read(error):
        return UnavailableError(
            "the kernel does not let BPF read its memory", "use bpf:kvm, or boot with lockdown=integrity"
        )
    return UnavailableError(str(error).splitlines()[0], "")


_PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")


def _why_not_attached(probe: str, error: OSError) -> UnavailableError:
    if probe == "kvm" and error.errno == errno.ENOENT:
        return UnavailableError(f"the kernel has no tracepoint {_TRACEPOINT}", "load the kvm module (modprobe kvm)")
    if probe != "kvm" and error.errno == errno.EACCES and (paranoid := int(_PARANOID.read_text())) > 2:
        # Debian and Ubuntu have this level.
        return UnavailableError(
            f"kprobes are not permitted without CAP_SYS_ADMIN (kernel.perf_event_paranoid is {paranoid})",
            "set that to 2 (sysctl), or use bpf:kvm",
        )
    if probe != "kvm" and error.errno == errno.ENOENT:
        return UnavailableError(str(error), "use another probe")
    return _why(error)


def _possible_cpus() -> list[int]:
    """Those that there are or can be. OSError."""
    found: list[int] = []
    for part in Path("/sys/devices/system/cpu/possible").read_text().split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def create_segment() -> int:
    """Memory for a table. A map's descriptor; OSError."""
    return libbpf.create_map(libbpf.MapType.ARRAY, "umn_segment", 4, PAGE, SEGMENT_PAGES, libbpf.MapFlag.MMAPABLE)


def create_ring() -> int:
    """A wake-up. A map's descriptor; OSError."""
    return libbpf.create_map(libbpf.MapType.RINGBUF, "umn_wake", 0, 0, PAGE)


class Maps:
    """The kernel side: the maps, the loaded programs and what they are attached to."""

    def __init__(
        self,
        tables: int = TABLES,
        steps_foreign: int | None = None,
        steps_own: int = _STEPS_MAX,
        probe: str = "kvm",
    ) -> None:
        """Load. `steps_foreign` bounds the work in all tables on behalf of a change that may be another process's.

        None: all tables are this process's own, and each may take what it needs. `steps_own` bounds the work in one
        table on behalf of any change.

        Raises UnavailableError.
        """
        self.probe = probe
        self.fds: dict[str, int] = {}
        if not _may_load():
            raise _not_permitted()
        if probe != "kvm" and not libbpf.kprobes_available():
            raise UnavailableError("the kernel has no kprobes", "use one that is built with CONFIG_KPROBE_EVENTS")
        if probe != "kvm" and _locked_down():
            raise UnavailableError(
                "the kernel is locked down (confidentiality): nobody may read its memory",
                "use bpf:kvm, or boot with lockdown=integrity",
            )
        if probe != "kvm" and _switched_off():
            raise UnavailableError(f"kprobes are switched off ({_KPROBES})", "write 1 to that file, or use bpf:kvm")
        if not libbpf.btf_available():
            raise UnavailableError(
                "the kernel's types (BTF) are not available", "use a kernel that is built with CONFIG_DEBUG_INFO_BTF"
            )
        data = Path(libbpf.__file__).with_name("watch.bpf.o").read_bytes()
        try:
            # Each function to attach to, with the cookie that the program gets from there.
            self.functions = zap.attachments() if probe == "zap" else {_FUNCTION: 0}
            try:
                self._load(data, tables, probe)
            except libbpf.BpfError as error:
                if probe != "kvm" or not _may_not_read(error):
                    raise
                self._load(data, tables, _BLIND)
        except OSError as error:
            raise _why(error) from error
        self.free = list(range(tables - 1, -1, -1))
        self.fed: dict[int, int] = {}  # table: its address space
        self.used = 0
        self.handshakes = 0
        self.steps_foreign = steps_foreign
        self.steps_own = steps_own

    def _load(self, data: bytes, tables: int, program: str) -> None:
        """OSError, with nothing left open."""
        programs = [program] if self.probe == "kvm" else [program, "doubt"]
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            with libbpf.BpfObject(data, "ummunotify") as loaded:
                loaded.set_max_entries("segments", tables * SEGMENTS)
                for name in ("rings", "tables", "owners", "handshakes"):
                    loaded.set_max_entries(name, tables)
                for name in (*PROBES, _BLIND, "doubt"):
                    loaded.set_autoload(name, name in programs)
                loaded.load()
                for name in ("segments", "rings", "tables", "owners", "handshakes", "control", "doubts"):
                    self.fds[name] = loaded.map_fd(name)
                self.fds["program"] = loaded.program_fd(program)
                if "doubt" in programs:
                    self.fds["doubt"] = loaded.program_fd("doubt")
                    libbpf.map_freeze(self.fds["doubts"])
            undo.pop_all()

    def attach(self) -> None:
        """Attach the probe. Raises UnavailableError."""
        try:
            if self.probe == "kvm":
                self.fds["link"] = libbpf.raw_tracepoint_open(_TRACEPOINT, self.fds["program"])
            else:
                self._look_out()
                for function, cookie in self.functions.items():
                    self.fds[f"link {function}"] = libbpf.kprobe_open(function, self.fds["program"], cookie)
        except OSError as error:
            raise _why_not_attached(self.probe, error) from error

    def _look_out(self) -> None:
        """For what the kernel skips at kprobes: see `doubt` in watch.bpf.c. Raises UnavailableError, OSError."""
        self.fds["link doubt"] = libbpf.raw_tracepoint_open("sched_switch", self.fds["doubt"])
        # Each CPU once: what it runs now may have been there before.
        for cpu in _possible_cpus():
            try:
                able = libbpf.program_run(self.fds["doubt"], cpu=cpu)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                continue
            if not able:
                raise UnavailableError(
                    "the kernel's types (BTF) lack bpf_prog_active, so skipped runs cannot be noticed",
                    "use another probe: UMMUNOTIFY_SOURCE=bpf:kvm",
                )

    def links(self) -> list[int]:
        """The descriptors that keep the programs attached, in whatever process they are open."""
        return [fd for name, fd in self.fds.items() if name.startswith("link")]

    def close(self) -> None:
        """Close every descriptor; what it was attached to is detached with the last copy of the link."""
        while self.fds:
            os.close(self.fds.popitem()[1])

    # ---- one table; the caller holds a lock ----

    def take(self) -> int:
        """A number for a new table. Raises UnavailableError."""
        if not self.free:
            raise UnavailableError(f"all {self.used} tables are in use", "close notifiers that are no longer needed")
        table = self.free.pop()
        self._put_table(table, 0, 0, 0)
        if table >= self.used:
            self.used = table + 1
            self._put_control()
        return table

    def add_segments(self, table: int, first: int, count: int) -> list[int]:
        """Make the table's segments from number `first` on. The maps' descriptors, which the caller closes. OSError."""
        fds: list[int] = []
        try:
            for _ in range(count):
                fds.append(create_segment())
            self.allow(table, count)
            self.put_segments([(table, first + i, fd) for i, fd in enumerate(fds)])
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return fds

    def allow(self, table: int, count: int) -> None:
        """Let a walk of the table take the steps that `count` more segments need; before they are put in."""
        mm, following, cells = self._get_table(table)
        cells = min(cells + count * SEGMENT_PAGES * CELLS_PER_PAGE, self.steps_own)
        self._put_table(table, mm, following, cells)

    def put_segments(self, items: list[tuple[int, int, int]]) -> None:
        """Of several tables: (table, number, the map's descriptor), all at the price of one. OSError.

        The kernel returns only when no program can be using what was there before.
        """
        libbpf.map_update_batch(
            self.fds["segments"],
            [(_U32.pack(table * SEGMENTS + number), _U32.pack(fd)) for table, number, fd in items],
        )

    def put_rings(self, items: list[tuple[int, int]]) -> None:
        """The same for (table, the map's descriptor)."""
        libbpf.map_update_batch(self.fds["rings"], [(_U32.pack(table), _U32.pack(fd)) for table, fd in items])

    def add_ring(self, table: int) -> int:
        """Make the table's wake-up. The map's descriptor, which the caller closes. OSError."""
        fd = create_ring()
        try:
            self.put_rings([(table, fd)])
        except BaseException:
            os.close(fd)
            raise
        return fd

    def expect(self, table: int) -> int:
        """Open a handshake: the address space that shows the secret returned here becomes the table's."""
        secret = secrets.randbits(64)
        libbpf.map_update(self.fds["handshakes"], _U64.pack(secret), _U32.pack(table))
        self.handshakes += 1
        self._put_control()
        return secret

    def cancel(self, secret: int) -> None:
        """Close the handshake, whatever came of it."""
        libbpf.map_delete(self.fds["handshakes"], _U64.pack(secret))
        self.handshakes -= 1
        self._put_control()

    def settle(self, table: int, secret: int) -> bool:
        """Close the handshake. True if it has happened; then the table is fed from now on."""
        self.cancel(secret)
        mm, _, cells = self._get_table(table)
        if not mm:
            return False
        if list(self.fed.values()).count(mm) >= TABLES_PER_PROCESS:
            raise UnavailableError(f"this process has {TABLES_PER_PROCESS} notifiers", "close some of them")
        first = self._first(mm)
        self._put_table(table, mm, first, cells)
        libbpf.map_update(self.fds["owners"], _U64.pack(mm), _U32.pack(table + 1))
        self.fed[table] = mm
        self._put_control()
        return True

    def drop(self, table: int, segments: int, ring: bool) -> None:
        """Stop feeding the table and forget its memory.

        The kernel returns from a change of a map of maps only when no program can be using what was there before
        (maybe_wait_bpf_programs in kernel/bpf/syscall.c), so the number can be given to another table.
        """
        self.unlink(table)
        self._forget_segments(table, segments)
        if ring:
            libbpf.map_delete(self.fds["rings"], _U32.pack(table))
        self.free.append(table)

    def _forget_segments(self, table: int, count: int) -> None:
        # One wait for all: they are replaced together, as they cannot be deleted together.
        if count > 1:
            with contextlib.suppress(OSError):  # no descriptor is left to this process
                if "blank" not in self.fds:
                    self.fds["blank"] = create_segment()
                self.put_segments([(table, number, self.fds["blank"]) for number in range(count)])
                return
        for number in range(count):
            libbpf.map_delete(self.fds["segments"], _U32.pack(table * SEGMENTS + number))

    def unlink(self, table: int) -> None:
        """Stop feeding the table. Programs may be on their way through it until its segments are replaced."""
        mm, following, _ = self._get_table(table)
        if mm:
            first = self._first(mm)
            if first == table + 1:
                if following:
                    libbpf.map_update(self.fds["owners"], _U64.pack(mm), _U32.pack(following))
                else:
                    libbpf.map_delete(self.fds["owners"], _U64.pack(mm))
            else:
                while first:
                    previous = first - 1
                    _, first, cells = self._get_table(previous)
                    if first == table + 1:
                        self._put_table(previous, mm, following, cells)
                        break
        self.fed.pop(table, None)
        self._put_control()
        # Not `next`: a program may be on its way through it to another table of this address space.
        self._put_table(table, 0, following, 0)

    def doubt(self) -> None:
        """Everything of every table may be invalid: to the program `kvm`, one more change, of all addresses."""
        libbpf.program_run(self.fds["program"], struct.pack("=QQ", 0, _U64_MAX))

    def _first(self, mm: int) -> int:
        try:
            return int(_U32.unpack(libbpf.map_lookup(self.fds["owners"], _U64.pack(mm), _U32.size))[0])
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            return 0

    def _get_table(self, table: int) -> tuple[int, int, int]:
        mm, following, cells = _TABLE.unpack(libbpf.map_lookup(self.fds["tables"], _U32.pack(table), _TABLE.size))
        return mm, following, cells

    def _put_table(self, table: int, mm: int, following: int, cells: int) -> None:
        libbpf.map_update(self.fds["tables"], _U32.pack(table), _TABLE.pack(mm, following, cells))

    def _put_control(self) -> None:
        only, mm = 0, 0
        if len(self.fed) == 1:
            only, mm = next((table + 1, mm) for table, mm in self.fed.items())
        steps = _STEPS_MAX
        if self.steps_foreign is not None:
            # Each table has its share, so that none can use up the others'. One that takes more gives up by itself.
            steps = max(_STEPS_LEAST, self.steps_foreign // max(1, len(self.fed)))
        value = _CONTROL.pack(self.used, self.handshakes, mm, only, steps)
        libbpf.map_update(self.fds["control"], _U32.pack(0), value)


def open_kvm() -> int:
    """A descriptor of /dev/kvm. Raises UnavailableError."""
    try:
        return os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise UnavailableError(
            "there is no /dev/kvm",
            "load the module (modprobe kvm-intel or kvm-amd), enable virtualisation in the firmware, or "
            "pass the device into the container",
        ) from error
    except OSError as error:
        raise UnavailableError(
            f"/dev/kvm cannot be opened ({error.strerror})", "become a member of its group (kvm)"
        ) from error


def create_vm(kvm: int) -> int:
    """An empty virtual machine, which subscribes this address space to MMU notifications.

    Its descriptor. KVM is told until it is closed everywhere; the kernel goes on calling the function that tells all
    who have subscribed, for as long as the address space exists (mmu_notifier_unregister leaves
    mm->notifier_subscriptions). Raises UnavailableError.
    """
    try:
        return fcntl.ioctl(kvm, _KVM_CREATE_VM, 0)
    except OSError as error:
        raise UnavailableError(f"KVM cannot create a virtual machine ({error.strerror})", "") from error
