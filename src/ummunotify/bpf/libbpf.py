"""A thin, typed binding of the parts of libbpf that load and attach BPF programs.

This is the slow, privileged path: it runs once when a source starts, so it is plain Python over ctypes. The library
is loaded at the first use of anything here, never at import.

Every failure of libbpf or of the kernel is a `BpfError`. Nothing is printed: libbpf has one log function per process,
and this module installs its own at the first use and takes it back at exit; messages that are not about this module's
calls go to the function that was there before.

All functions may be called from any thread, and release the GIL while libbpf works. File descriptors are plain
numbers, close-on-exec, and can be used by any process that gets them.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import fcntl
import functools
import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, Self

# Version 1 of the ABI. Versions 0.x report errors differently and are not supported.
_SONAME = "libbpf.so.1"
BTF_PATH = "/sys/kernel/btf/vmlinux"

_LOG_LIMIT = 64 * 1024  # bytes of log that an exception carries; a verifier log can be 16 MiB
_LOG_LINES = 12  # lines of it in the exception's message

# libbpf's own error codes, and an errno of the kernel's that has no name in user space.
_FIRST_LIBBPF_ERRNO = 4000
_ENOTSUPP = 524


class BpfError(OSError):
    """A call of libbpf or of the kernel's BPF interface failed.

    `errno` is the error number: usually the kernel's, from 4000 on one of libbpf's own.
    `call` says what was attempted. `log` is the end of what libbpf and the verifier wrote
    during the call (up to 64 KiB, may be empty); `str()` shows its last lines.
    """

    def __init__(self, number: int, call: str, log: str = "") -> None:
        super().__init__(number, _describe_errno(number))
        self.call = call
        self.log = log

    def __str__(self) -> str:
        name = errno.errorcode.get(self.errno or 0, str(self.errno))
        text = f"{self.call}: {self.strerror} [{name}]"
        lines = [line for line in self.log.splitlines() if line.strip()]
        return "\n  ".join([text, *lines[-_LOG_LINES:]])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.errno, self.call, self.log)


class LibraryMissingError(BpfError):
    """libbpf cannot be loaded on this machine, or it lacks a function that is needed (ELIBACC)."""

    def __init__(self, detail: str) -> None:
        super().__init__(
            errno.ELIBACC,
            f"cannot use {_SONAME} ({detail}); "
            "install version 1.0 or later: package libbpf1 on Debian and Ubuntu, libbpf on Fedora",
        )
        self.detail = detail

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.detail,)


def _describe_errno(number: int) -> str:
    if number == _ENOTSUPP:
        return "Operation not supported by this kernel (ENOTSUPP)"
    if number >= _FIRST_LIBBPF_ERRNO and _library is not None:
        buffer = ctypes.create_string_buffer(128)
        _library["libbpf_strerror"](number, buffer, len(buffer))
        return buffer.value.decode(errors="replace")
    return os.strerror(number)


_POINTER = ctypes.c_void_p
_STRING = ctypes.c_char_p
_INT = ctypes.c_int
_U32 = ctypes.c_uint32
_U64 = ctypes.c_uint64
_SIZE = ctypes.c_size_t
_BOOL = ctypes.c_bool

# Function: result type, argument types. All of them are in libbpf 1.0.
_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "libbpf_version_string": (_STRING,),
    "libbpf_strerror": (_INT, _INT, _STRING, _SIZE),
    "bpf_object__open_mem": (_POINTER, _STRING, _SIZE, _POINTER),
    "bpf_object__load": (_INT, _POINTER),
    "bpf_object__close": (None, _POINTER),
    "bpf_object__find_program_by_name": (_POINTER, _POINTER, _STRING),
    "bpf_object__find_map_by_name": (_POINTER, _POINTER, _STRING),
    "bpf_program__fd": (_INT, _POINTER),
    "bpf_program__set_autoload": (_INT, _POINTER, _BOOL),
    "bpf_map__fd": (_INT, _POINTER),
    "bpf_map__set_map_flags": (_INT, _POINTER, _U32),
    "bpf_map__set_max_entries": (_INT, _POINTER, _U32),
    "bpf_map__reuse_fd": (_INT, _POINTER, _INT),
    "bpf_map_freeze": (_INT, _INT),
    "bpf_obj_get_info_by_fd": (_INT, _INT, _POINTER, _POINTER),
    "bpf_prog_get_next_id": (_INT, _U32, _POINTER),
    "bpf_prog_get_fd_by_id": (_INT, _U32),
    "bpf_prog_test_run_opts": (_INT, _INT, _POINTER),
    "bpf_prog_load": (_INT, _U32, _STRING, _STRING, _POINTER, _SIZE, _POINTER),
    "bpf_raw_tracepoint_open": (_INT, _STRING, _INT),
    "bpf_enable_stats": (_INT, _INT),
    "bpf_link_create": (_INT, _INT, _INT, _INT, _POINTER),
    "libbpf_probe_bpf_helper": (_INT, _U32, _U32, _POINTER),
    "btf__load_vmlinux_btf": (_POINTER,),
    "btf__free": (None, _POINTER),
    "btf__find_by_name_kind": (_INT, _POINTER, _STRING, _U32),
    "btf__type_by_id": (_POINTER, _POINTER, _U32),
    "btf__name_by_offset": (_STRING, _POINTER, _U32),
}

# int (*)(enum libbpf_print_level, const char *format, va_list). A va_list is passed as one pointer
# (to the list, or being the list) by every 64-bit Linux ABI. use_errno saves errno around the
# callback, because libbpf reads it after it has logged.
_PRINT_FUNCTION = ctypes.CFUNCTYPE(_INT, _INT, _POINTER, _POINTER, use_errno=True)
_LEVEL_DEBUG = 2


class _Capture:
    """What libbpf logs on this thread between entry and exit."""

    def __init__(self) -> None:
        self.log = ""
        self.interrupt: BaseException | None = None

    def __enter__(self) -> _Capture:
        _thread.captures.append(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        _thread.captures.pop()


class _Thread(threading.local):
    def __init__(self) -> None:
        self.captures: list[_Capture] = []


class _Library:
    """libbpf with its prototypes set and its log function installed."""

    def __init__(self) -> None:
        try:
            library = ctypes.CDLL(_SONAME, use_errno=True)
            self._functions = {name: getattr(library, name) for name in _PROTOTYPES}
            self._set_print = library.libbpf_set_print
        except (OSError, AttributeError) as error:
            raise LibraryMissingError(str(error)) from None
        for name, (result, *arguments) in _PROTOTYPES.items():
            self._functions[name].restype = result
            self._functions[name].argtypes = arguments

        libc = ctypes.CDLL(None)
        self._vasprintf, self._free = libc.vasprintf, libc.free
        self._vasprintf.argtypes = [_POINTER, _POINTER, _POINTER]
        self._free.argtypes = [_POINTER]

        # This object is kept by the module, so the callback outlives all calls; and because C
        # code may still call libbpf when Python is gone, the callback is taken back at exit.
        self._callback = _PRINT_FUNCTION(self._print)
        self._set_print.argtypes = [_POINTER]
        self._set_print.restype = _POINTER
        self._address = ctypes.cast(self._callback, _POINTER).value
        previous = self._set_print(self._address)
        self._previous_address = previous
        self._previous = _PRINT_FUNCTION(previous) if previous else None
        atexit.register(self._restore_print)

    def __getitem__(self, name: str) -> Callable[..., Any]:
        function: Callable[..., Any] = self._functions[name]
        return function

    def _print(self, level: int, text: int, arguments: int) -> int:
        captures = _thread.captures
        if not captures:
            # Another user of libbpf in this process: what it logs is not ours to keep.
            return int(self._previous(level, text, arguments)) if self._previous else 0
        if level >= _LEVEL_DEBUG:
            return 0
        try:
            captures[-1].log = (captures[-1].log + self._format(text, arguments))[-_LOG_LIMIT:]
        except BaseException as error:
            # Signal handlers run here too. ctypes would print a KeyboardInterrupt and drop it.
            captures[-1].interrupt = error
        return 0

    def _format(self, text: int, arguments: int) -> str:
        # A va_list can be walked only once, so the size cannot be asked for first.
        message = _POINTER()
        length = self._vasprintf(ctypes.byref(message), text, arguments)
        if length < 0 or message.value is None:
            return ""
        kept = min(length, _LOG_LIMIT)
        try:
            tail = ctypes.string_at(message.value + length - kept, kept)
        finally:
            self._free(message)
        return tail.decode(errors="replace")

    def _restore_print(self) -> None:
        current = self._set_print(self._previous_address)
        if current != self._address:
            # Somebody installed theirs after us.
            self._set_print(current)


_thread = _Thread()
_library: _Library | None = None


def _load_library() -> _Library:
    # No lock, which a child of a fork could find locked for good: two threads at once do this twice, and the second log
    # function passes on to the first.
    global _library
    if _library is None:
        _library = _Library()
    return _library


def _invoke(function: str, *arguments: object, undo: Callable[[int], object] | None = None) -> tuple[Any, int, str]:
    """Call a function of libbpf; return its result, errno and what it logged.

    `undo` gets the result of a successful call during which a signal handler raised an
    exception (KeyboardInterrupt): the exception goes on, and the result would be lost.
    """
    c_function = _load_library()[function]
    with _Capture() as capture:
        ctypes.set_errno(0)
        result = c_function(*arguments)
        number = ctypes.get_errno()
    if capture.interrupt is not None:
        if undo is not None and result is not None and result >= 0:
            undo(result)
        raise capture.interrupt
    return result, number, capture.log


def _call(
    doing: str,
    function: str,
    *arguments: object,
    undo: Callable[[int], object] | None = None,
) -> int:
    """Call a function that can fail; the one place where a failed call becomes an exception.

    libbpf reports failure as a negative errno, or as NULL with `errno` set.
    """
    result, number, log = _invoke(function, *arguments, undo=undo)
    if result is None:
        raise BpfError(number or errno.EINVAL, doing, log)
    if result < 0:
        raise BpfError(-result, doing, log)
    return int(result)


def _get(function: str, *arguments: object) -> Any:
    """Call a function that cannot fail, or whose result the caller judges."""
    return _invoke(function, *arguments)[0]


def _close_object(pointer: int) -> None:
    _get("bpf_object__close", pointer)


def _c_string(text: str) -> bytes:
    encoded = os.fsencode(text)
    if b"\0" in encoded:
        raise ValueError(f"a name cannot contain a NUL: {text!r}")
    return encoded


def map_freeze(fd: int) -> None:
    """From now on only programs can write it, for good; processes can map it to read it. Raises BpfError."""
    _call("freeze a map", "bpf_map_freeze", fd)


class _ProgramInfo(ctypes.Structure):
    # The beginning of the kernel's struct bpf_prog_info. A kernel that knows less than this fills
    # in less and says so; one that knows more fills in this much.
    _fields_ = (
        ("type", _U32),
        ("id", _U32),
        ("tag", ctypes.c_uint8 * 8),
        ("jited_prog_len", _U32),
        ("xlated_prog_len", _U32),
        ("jited_prog_insns", _U64),
        ("xlated_prog_insns", _U64),
        ("load_time", _U64),
        ("created_by_uid", _U32),
        ("nr_map_ids", _U32),
        ("map_ids", _U64),
        ("name", ctypes.c_char * 16),
        ("ifindex", _U32),
        ("gpl_compatible", _U32),
        ("netns_dev", _U64),
        ("netns_ino", _U64),
        ("nr_jited_ksyms", _U32),
        ("nr_jited_func_lens", _U32),
        ("jited_ksyms", _U64),
        ("jited_func_lens", _U64),
        ("btf_id", _U32),
        ("func_info_rec_size", _U32),
        ("func_info", _U64),
        ("nr_func_info", _U32),
        ("nr_line_info", _U32),
        ("line_info", _U64),
        ("jited_line_info", _U64),
        ("nr_jited_line_info", _U32),
        ("line_info_rec_size", _U32),
        ("jited_line_info_rec_size", _U32),
        ("nr_prog_tags", _U32),
        ("prog_tags", _U64),
        ("run_time_ns", _U64),
        ("run_cnt", _U64),
        ("recursion_misses", _U64),
    )


class ProgramInfo(NamedTuple):
    """What the kernel says about a loaded program."""

    run_time_ns: int
    """This and the next grow only while statistics are on."""
    run_cnt: int
    recursion_misses: int
    """Runs that the kernel's recursion guard skipped."""


def program_info(fd: int) -> ProgramInfo:
    """Describe the program behind `fd`. Needs no privilege.

    Raises BpfError; EOPNOTSUPP if the kernel does not count what it skips (before 5.12): no count must not be taken
    for none skipped.
    """
    info, size = _ProgramInfo(), _U32(ctypes.sizeof(_ProgramInfo))
    _call("describe a program", "bpf_obj_get_info_by_fd", fd, ctypes.byref(info), ctypes.byref(size))
    if size.value < ctypes.sizeof(info):
        raise BpfError(errno.EOPNOTSUPP, "describe a program: the kernel does not count recursion misses")
    return ProgramInfo(info.run_time_ns, info.run_cnt, info.recursion_misses)


class LoadedProgram(NamedTuple):
    number: int
    """The kernel's, which no other program gets."""
    type: int
    name: str


def loaded_programs() -> list[LoadedProgram]:
    """All on this host. Raises BpfError: EPERM without CAP_SYS_ADMIN."""
    found: list[LoadedProgram] = []
    number = _U32(0)
    while True:
        try:
            _call("find programs", "bpf_prog_get_next_id", number, ctypes.byref(number))
        except BpfError as error:
            if error.errno == errno.ENOENT:
                return found
            raise
        info, size = _ProgramInfo(), _U32(ctypes.sizeof(_ProgramInfo))
        try:
            fd = _call("open a program", "bpf_prog_get_fd_by_id", number, undo=os.close)
        except BpfError as error:
            if error.errno == errno.ENOENT:  # it is gone
                continue
            raise
        try:
            _call("describe a program", "bpf_obj_get_info_by_fd", fd, ctypes.byref(info), ctypes.byref(size))
        finally:
            os.close(fd)
        found.append(LoadedProgram(number.value, info.type, info.name.decode()))


class _TestRunOpts(ctypes.Structure):
    _fields_ = (
        ("sz", _SIZE),
        ("data_in", _POINTER),
        ("data_out", _POINTER),
        ("data_size_in", _U32),
        ("data_size_out", _U32),
        ("ctx_in", _STRING),
        ("ctx_out", _POINTER),
        ("ctx_size_in", _U32),
        ("ctx_size_out", _U32),
        ("retval", _U32),
        ("repeat", _INT),
        ("duration", _U32),
        ("flags", _U32),
        ("cpu", _U32),
        ("batch_size", _U32),
    )


_TEST_RUN_ON_CPU = 1
_INSTRUCTION = 8  # bytes


def program_run(fd: int, arguments: bytes = b"", cpu: int | None = None) -> int:
    """Run a raw tracepoint's program once as if the tracepoint was hit with these arguments; return what it returns.

    On this CPU or that one, between any two instructions of whatever runs there. Raises BpfError: ENXIO if that CPU is
    not online.
    """
    options = _TestRunOpts(
        sz=ctypes.sizeof(_TestRunOpts), ctx_in=arguments or None, ctx_size_in=len(arguments), cpu=cpu or 0
    )
    if cpu is not None:
        options.flags = _TEST_RUN_ON_CPU
    _call("run a program", "bpf_prog_test_run_opts", fd, ctypes.byref(options))
    return int(options.retval)


def has_helper(program_type: int, helper: int) -> bool:
    """Can programs of this type call this function of the kernel's? True also if nobody may load them.

    Raises BpfError.
    """
    return _call("look for a helper", "libbpf_probe_bpf_helper", program_type, helper, None) > 0


def accepts(program_type: int, instructions: bytes) -> bool:
    """Does the kernel know these instructions? True also if it cannot be asked. Raises LibraryMissingError."""
    arguments = program_type, b"try", b"GPL", instructions, len(instructions) // _INSTRUCTION, None
    try:
        os.close(_call("try instructions", "bpf_prog_load", *arguments, undo=os.close))
    except LibraryMissingError:
        raise
    except BpfError as error:
        return error.errno != errno.EINVAL
    return True


def raw_tracepoint_open(tracepoint: str, program_fd: int) -> int:
    """Attach a program to a raw tracepoint; return the link's descriptor, which the caller closes.

    The program stays attached until the last copy of the descriptor is closed, in whatever process.
    Raises `BpfError`: ENOENT if the kernel has no such tracepoint, EPERM without CAP_BPF and CAP_PERFMON.
    """
    return _call(
        f"attach to raw tracepoint {tracepoint!r}",
        "bpf_raw_tracepoint_open",
        _c_string(tracepoint),
        program_fd,
        undo=os.close,
    )


def trace_open(program_fd: int) -> int:
    """Attach a program to the kernel function that it names itself (fentry, fexit); else as raw_tracepoint_open."""
    return _call("attach to a kernel function", "bpf_raw_tracepoint_open", None, program_fd, undo=os.close)


_PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}
_PERF_FLAG_FD_CLOEXEC = 8
_KPROBE_TYPE = "/sys/bus/event_source/devices/kprobe/type"
_BPF_PERF_EVENT = 41  # enum bpf_attach_type


class _PerfEventAttr(ctypes.Structure):
    # The second version of the kernel's structure, which all kernels take.
    _fields_ = (
        ("type", _U32),
        ("size", _U32),
        ("config", _U64),
        ("sample_period", _U64),
        ("sample_type", _U64),
        ("read_format", _U64),
        ("flags", _U64),
        ("wakeup_events", _U32),
        ("bp_type", _U32),
        ("kprobe_func", _STRING),
        ("probe_offset", _U64),
    )
    # Fields are aligned as in C; the string is a pointer in 64 bits.


def kprobes_available() -> bool:
    """Whether the kernel has kprobes for perf events. Needs neither libbpf nor privileges; raises nothing."""
    return os.path.exists(_KPROBE_TYPE)


class _LinkCreateOpts(ctypes.Structure):
    _fields_ = (
        ("sz", _SIZE),
        ("flags", _U32),
        ("iter_info", _POINTER),
        ("iter_info_len", _U32),
        ("target_btf_id", _U32),
        ("bpf_cookie", _U64),
    )


def kprobe_open(function: str, program_fd: int, cookie: int = 0) -> int:
    """Attach a program to the entry of a kernel function; return the link's descriptor, which the caller closes.

    The program gets the cookie from bpf_get_attach_cookie. It stays attached until the last copy of the descriptor is
    closed, in whatever process. Raises `BpfError`: EOPNOTSUPP if the kernel has no kprobes, ENOENT if it has no such
    function, EINVAL before Linux 5.15.
    """
    doing = f"attach to the kernel's function {function!r}"
    number = _PERF_EVENT_OPEN.get(os.uname().machine)
    if number is None or not kprobes_available():
        raise BpfError(errno.EOPNOTSUPP, doing)
    with open(_KPROBE_TYPE) as file:
        kind = int(file.read())
    attributes = _PerfEventAttr(type=kind, size=ctypes.sizeof(_PerfEventAttr), kprobe_func=_c_string(function))
    libc = ctypes.CDLL(None, use_errno=True)
    # On whatever CPU the function runs: the event's CPU only says where samples would go.
    arguments = (number, ctypes.byref(attributes), -1, 0, -1, ctypes.c_ulong(_PERF_FLAG_FD_CLOEXEC))
    event = libc.syscall(*arguments)
    if event < 0:
        raise BpfError(ctypes.get_errno(), doing)
    try:
        # The link keeps the event.
        options = _LinkCreateOpts(sz=ctypes.sizeof(_LinkCreateOpts), bpf_cookie=cookie)
        return _call(doing, "bpf_link_create", program_fd, event, _BPF_PERF_EVENT, ctypes.byref(options), undo=os.close)
    finally:
        os.close(event)


def enable_statistics() -> int:
    """Make the kernel count and time the runs of all programs until the returned fd is closed.

    This costs every BPF program on the machine some time. Raises `BpfError`: EPERM without
    CAP_SYS_ADMIN. Thread-safe; the descriptor is close-on-exec and valid in any process.
    """
    return _call("enable statistics", "bpf_enable_stats", 0, undo=os.close)


def btf_available() -> bool:
    """Whether the kernel's type information (BTF) can be read, which relocatable programs need.

    Does not need libbpf. Raises nothing; thread-safe and fork-safe.
    """
    return os.access(BTF_PATH, os.R_OK)


@functools.cache  # megabytes are searched, which takes milliseconds
def tracepoints_preemptible() -> bool:
    """May a program at a raw tracepoint be preempted? Since Linux 7 SRCU protects these, which leaves preemption on.

    Does not need libbpf. OSError.
    """
    if int(os.uname().release.partition(".")[0]) >= 7:
        return True
    with open(BTF_PATH, "rb") as types:
        return b"\0class_srcu_fast_notrace_t\0" in types.read()  # the tracepoints of Linux 7 use it


class Parameter(NamedTuple):
    """A parameter of a kernel function."""

    name: str
    type: str
    """As the compiler names it, without qualifiers and typedefs: `struct page *`, `long unsigned int`."""


_BTF_PTR, _BTF_STRUCT, _BTF_FUNC = 2, 4, 12
_BTF_WORDS = {4: "struct ", 5: "union ", 6: "enum ", 7: "struct "}
_BTF_ALIASES = (8, 9, 10, 11, 18)  # typedef, volatile, const, restrict, type_tag


def _free_types(pointer: int) -> None:
    _get("btf__free", pointer)


class KernelTypes:
    """The running kernel's type information (BTF). To be used by one thread, as a context manager."""

    def __init__(self) -> None:
        """Raises LibraryMissingError, BpfError."""
        self._pointer = _call("read the kernel's types", "btf__load_vmlinux_btf", undo=_free_types)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        _free_types(self._pointer)

    def parameters(self, function: str) -> list[Parameter] | None:
        """How a function is called. None: there is none, or the compiler has changed how it is called."""
        number = self._find(function, _BTF_FUNC)
        if number is None:
            return None
        (_, _, prototype), _ = self._entry(number, 0)
        return [Parameter(self._name(name), self._type(kind)) for name, kind in self._entry(prototype, 2)[1]]

    def members(self, structure: str) -> dict[str, int] | None:
        """Where in a structure its members are, in bytes, but for bit fields. None: there is no such structure."""
        number = self._find(structure, _BTF_STRUCT)
        if number is None:
            return None
        # The number of bits before it; where a structure has bit fields, their sizes are in the upper byte.
        found = {self._name(name): bits for name, _, bits in self._entry(number, 3)[1]}
        return {name: bits // 8 for name, bits in found.items() if bits < 1 << 24 and bits % 8 == 0}

    def _find(self, name: str, kind: int) -> int | None:
        number = int(_get("btf__find_by_name_kind", self._pointer, _c_string(name), kind))
        return number if number >= 0 else None

    def _entry(self, number: int, words: int) -> tuple[tuple[int, int, int], list[tuple[int, ...]]]:
        """A struct btf_type, and what follows it if that is things of so many 32-bit words."""
        address = _call("look up a type", "btf__type_by_id", self._pointer, number)
        name, info, kind = (_U32 * 3).from_address(address)
        rest = ((_U32 * words) * (info & 0xFFFF)).from_address(address + 12)
        return (name, info >> 24 & 0x1F, kind), [tuple(each) for each in rest]

    def _name(self, offset: int) -> str:
        name: bytes = _get("btf__name_by_offset", self._pointer, offset)
        return name.decode()

    def _type(self, number: int) -> str:
        stars = ""
        while number:
            (name, kind, target), _ = self._entry(number, 0)
            if kind == _BTF_PTR:
                stars = "*" + stars
            elif kind not in _BTF_ALIASES:
                return _BTF_WORDS.get(kind, "") + self._name(name) + (f" {stars}" if stars else "")
            number = target
        return f"void {stars}".rstrip()


def libbpf_version() -> str:
    """The version of the loaded library, such as `v1.1`.

    Raises `LibraryMissingError`. Thread-safe and fork-safe.
    """
    version: bytes = _get("libbpf_version_string")
    return version.decode()


_MAPPABLE = 0x400  # BPF_F_MMAPABLE


class _ObjectOpenOpts(ctypes.Structure):
    # The beginning of libbpf's structure, which its first field allows.
    _fields_ = (("sz", _SIZE), ("object_name", _STRING))


class BpfObject:
    """A compiled BPF object file, for as long as it takes to load it.

    Nothing is in the kernel before `load`; which programs and how large maps has to be said before. What is to stay
    is then duplicated as file descriptors, and the object is closed. To be used by one thread.
    """

    def __init__(self, data: bytes, name: str) -> None:
        """Parse `data`, the contents of an ELF file. Raises LibraryMissingError, BpfError for what is not one."""
        self._data = data  # libbpf may look at it until the object is closed
        options = _ObjectOpenOpts(sz=ctypes.sizeof(_ObjectOpenOpts), object_name=_c_string(name))
        self._pointer: int | None = _call(
            f"open BPF object {name!r}",
            "bpf_object__open_mem",
            data,
            len(data),
            ctypes.byref(options),
            undo=_close_object,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it with its descriptors. May be called more than once."""
        pointer, self._pointer = self._pointer, None
        if pointer is not None:
            _close_object(pointer)

    def set_max_entries(self, name: str, max_entries: int) -> None:
        """Set the size of a map. Raises BpfError: ENOENT, EBUSY after load."""
        _call(f"set the size of map {name!r}", "bpf_map__set_max_entries", self._map(name), max_entries)

    def make_mappable(self, name: str) -> None:
        """Let processes that have the map share its values' memory. Raises BpfError: ENOENT, EBUSY after load."""
        _call(f"make map {name!r} mappable", "bpf_map__set_map_flags", self._map(name), _MAPPABLE)

    def reuse_map(self, name: str, fd: int) -> None:
        """Take the map behind this descriptor, which the caller closes, for the one of this name. Raises BpfError."""
        _call(f"reuse map {name!r}", "bpf_map__reuse_fd", self._map(name), fd)

    def set_autoload(self, name: str, autoload: bool) -> None:
        """Choose whether `load` loads a program. Raises BpfError: ENOENT, EINVAL after load."""
        _call(f"choose program {name!r}", "bpf_program__set_autoload", self._program(name), autoload)

    def load(self) -> None:
        """Create the maps and load the programs that are to be loaded.

        Raises BpfError: EPERM without CAP_BPF and CAP_PERFMON; EACCES or EINVAL with the verifier's log if it refuses
        a program. After a failure only `close` makes sense.
        """
        _call("load BPF object", "bpf_object__load", self._open())

    def map_fd(self, name: str) -> int:
        """A new descriptor of a map, which the caller closes. Raises BpfError: ENOENT, EBADF before load."""
        fd = _get("bpf_map__fd", self._map(name))
        if fd < 0:
            raise BpfError(errno.EBADF, f"get map {name!r}: it is not created")
        return _duplicate(fd)

    def program_fd(self, name: str) -> int:
        """A new descriptor of a program, which the caller closes. Raises BpfError: ENOENT, also if it is not loaded."""
        return _duplicate(_call(f"get program {name!r}", "bpf_program__fd", self._program(name)))

    def _open(self) -> int:
        if self._pointer is None:
            raise BpfError(errno.EBADF, "use a closed BpfObject")
        return self._pointer

    def _map(self, name: str) -> int:
        return _call(f"find map {name!r}", "bpf_object__find_map_by_name", self._open(), _c_string(name))

    def _program(self, name: str) -> int:
        return _call(f"find program {name!r}", "bpf_object__find_program_by_name", self._open(), _c_string(name))


def _duplicate(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
