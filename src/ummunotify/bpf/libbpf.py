"""A thin, typed binding of the parts of libbpf that load and attach BPF programs.

This is the slow, privileged path: it runs once when a source starts, so it is plain Python over
:mod:`ctypes`. Nothing here runs when memory is unmapped. The library is loaded at the first use
of anything in this module, never at import.

**Errors.** Every failure of libbpf or of the kernel is a :class:`BpfError`, which is an
:class:`OSError`: ``errno`` says why, ``call`` says what was attempted and ``log`` holds what libbpf
and the kernel's verifier had to say. Nothing is printed.

**Threads.** All functions may be called from any thread. Distinct objects can be used at the same
time; operations on one object (its programs and links included) wait for each other, so closing
an object that another thread is using is safe. The GIL is released while libbpf works.

**Fork.** A :class:`BpfObject`, with its programs and links, belongs to the process that made it.
A child of ``fork`` inherits copies of the file descriptors. It can only ``close()`` the objects,
which gives up the child's copies and leaves the parent's attachments in place; every other
operation raises :class:`BpfError` (EBADF). File descriptors as such (what ``create_map``, ``map_fd``
and ``fd`` return) can be used by whoever holds them.

**File descriptors.** All are close-on-exec. What is attached stays attached while any process holds
a file descriptor of its link, also after ``close()`` here.

libbpf has one log function per process. This module installs its own at the first use and takes
it back at exit; messages that are not about this module's calls go to the function that was there before.
"""

from __future__ import annotations

import atexit
import ctypes
import enum
import errno
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = [
    "BpfError",
    "BpfLink",
    "BpfObject",
    "BpfProgram",
    "LibraryMissingError",
    "MapFlag",
    "MapInfo",
    "MapType",
    "ProgramInfo",
    "UpdateFlag",
    "Variable",
    "btf_available",
    "create_map",
    "enable_statistics",
    "libbpf_version",
    "map_delete",
    "map_info",
    "map_lookup",
    "map_update",
    "program_info",
]

# Version 1 of the ABI. Versions 0.x report errors differently and are not supported.
_SONAME = "libbpf.so.1"
_BTF_PATH = "/sys/kernel/btf/vmlinux"

_LOG_LIMIT = 64 * 1024  # bytes of log that an exception carries; a verifier log can be 16 MiB
_LOG_LINES = 12  # lines of it in the exception's message

# libbpf's own error codes, and an errno of the kernel's that has no name in user space.
_FIRST_LIBBPF_ERRNO = 4000
_ENOTSUPP = 524


# --------------------------------------------------------------------------------------- errors


class BpfError(OSError):
    """A call of libbpf or of the kernel's BPF interface failed.

    ``errno`` is the error number: usually the kernel's, from 4000 on one of libbpf's own.
    ``call`` says what was attempted. ``log`` is the end of what libbpf and the verifier wrote
    during the call (up to 64 KiB, may be empty); ``str()`` shows its last lines.
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


# ------------------------------------------------------------------------------ calling the library

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
    "libbpf_num_possible_cpus": (_INT,),
    "bpf_object__open_mem": (_POINTER, _STRING, _SIZE, _POINTER),
    "bpf_object__load": (_INT, _POINTER),
    "bpf_object__close": (None, _POINTER),
    "bpf_object__btf": (_POINTER, _POINTER),
    "bpf_object__find_program_by_name": (_POINTER, _POINTER, _STRING),
    "bpf_object__next_program": (_POINTER, _POINTER, _POINTER),
    "bpf_object__find_map_by_name": (_POINTER, _POINTER, _STRING),
    "bpf_program__name": (_STRING, _POINTER),
    "bpf_program__section_name": (_STRING, _POINTER),
    "bpf_program__fd": (_INT, _POINTER),
    "bpf_program__autoload": (_BOOL, _POINTER),
    "bpf_program__set_autoload": (_INT, _POINTER, _BOOL),
    "bpf_program__autoattach": (_BOOL, _POINTER),
    "bpf_program__set_autoattach": (None, _POINTER, _BOOL),
    "bpf_program__attach": (_POINTER, _POINTER),
    "bpf_program__attach_raw_tracepoint": (_POINTER, _POINTER, _STRING),
    "bpf_program__attach_kprobe": (_POINTER, _POINTER, _BOOL, _STRING),
    "bpf_link__fd": (_INT, _POINTER),
    "bpf_link__destroy": (_INT, _POINTER),
    "bpf_map__fd": (_INT, _POINTER),
    "bpf_map__set_max_entries": (_INT, _POINTER, _U32),
    "bpf_map__initial_value": (_POINTER, _POINTER, _POINTER),
    "bpf_map__set_initial_value": (_INT, _POINTER, _STRING, _SIZE),
    "bpf_map_create": (_INT, _INT, _STRING, _U32, _U32, _U32, _POINTER),
    "bpf_map_update_elem": (_INT, _INT, _STRING, _STRING, _U64),
    "bpf_map_lookup_elem_flags": (_INT, _INT, _STRING, _POINTER, _U64),
    "bpf_map_delete_elem": (_INT, _INT, _STRING),
    "bpf_map_update_batch": (_INT, _INT, _STRING, _STRING, _POINTER, _POINTER),
    "bpf_obj_get_info_by_fd": (_INT, _INT, _POINTER, _POINTER),
    "bpf_raw_tracepoint_open": (_INT, _STRING, _INT),
    "bpf_enable_stats": (_INT, _INT),
    "btf__type_cnt": (_U32, _POINTER),
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
_library_lock = threading.Lock()


def _load_library() -> _Library:
    global _library
    if _library is None:
        with _library_lock:
            if _library is None:
                _library = _Library()
    return _library


def _invoke(
    function: str, *arguments: object, undo: Callable[[int], object] | None = None
) -> tuple[Any, int, str]:
    """Call a function of libbpf; return its result, errno and what it logged.

    ``undo`` gets the result of a successful call during which a signal handler raised an
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

    libbpf reports failure as a negative errno, or as NULL with ``errno`` set.
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


def _destroy_link(pointer: int) -> None:
    _get("bpf_link__destroy", pointer)


def _close_object(pointer: int) -> None:
    _get("bpf_object__close", pointer)


def _c_string(text: str) -> bytes:
    encoded = os.fsencode(text)
    if b"\0" in encoded:
        raise ValueError(f"a name cannot contain a NUL: {text!r}")
    return encoded


# ------------------------------------------------------------------------------ maps, as plain fds


class MapType(enum.IntEnum):
    """Kinds of BPF maps (the kernel's numbers; the functions here take any other as an int)."""

    HASH = 1
    ARRAY = 2
    PERCPU_HASH = 5
    PERCPU_ARRAY = 6
    LRU_HASH = 9
    LRU_PERCPU_HASH = 10
    ARRAY_OF_MAPS = 12
    HASH_OF_MAPS = 13
    RINGBUF = 27


class MapFlag(enum.IntFlag):
    """Flags of :func:`create_map`."""

    NO_PREALLOC = 1 << 0
    RDONLY = 1 << 3
    WRONLY = 1 << 4
    RDONLY_PROG = 1 << 7
    WRONLY_PROG = 1 << 8
    MMAPABLE = 1 << 10
    INNER_MAP = 1 << 12


class UpdateFlag(enum.IntEnum):
    """What :func:`map_update` may do: create or replace, only create, only replace."""

    ANY = 0
    NOEXIST = 1
    EXIST = 2


# Kinds whose values user space sees as one array over all possible CPUs, each padded to 8 bytes.
_PERCPU_TYPES = frozenset({MapType.PERCPU_HASH, MapType.PERCPU_ARRAY, MapType.LRU_PERCPU_HASH, 21})


class _MapCreateOpts(ctypes.Structure):
    _fields_ = (
        ("sz", _SIZE),
        ("btf_fd", _U32),
        ("btf_key_type_id", _U32),
        ("btf_value_type_id", _U32),
        ("btf_vmlinux_value_type_id", _U32),
        ("inner_map_fd", _U32),
        ("map_flags", _U32),
        ("map_extra", _U64),
        ("numa_node", _U32),
        ("map_ifindex", _U32),
    )


class _MapInfo(ctypes.Structure):
    # The beginning of the kernel's struct bpf_map_info; the kernel fills in what fits.
    _fields_ = (
        ("type", _U32),
        ("id", _U32),
        ("key_size", _U32),
        ("value_size", _U32),
        ("max_entries", _U32),
        ("map_flags", _U32),
        ("name", ctypes.c_char * 16),
    )


@dataclass(frozen=True)
class MapInfo:
    """What the kernel says about a map. ``value_size`` is that of one CPU for a per-CPU map."""

    id: int
    type: int
    name: str
    key_size: int
    value_size: int
    max_entries: int
    flags: int


def create_map(
    map_type: MapType | int,
    name: str,
    key_size: int,
    value_size: int,
    max_entries: int,
    flags: MapFlag | int = 0,
    *,
    inner_map_fd: int | None = None,
) -> int:
    """Create a BPF map and return its file descriptor, which the caller closes.

    The kernel keeps 15 characters of ``name`` and admits letters, digits, ``_`` and ``.``. A map of
    maps needs ``inner_map_fd``: a map like those that it will hold, needed only during the call.
    Raises :class:`BpfError`: EPERM without CAP_BPF, EINVAL for attributes that make no sense, ENOMEM.
    Thread-safe. The file descriptor is close-on-exec and can be used by any process that gets it.
    """
    options = _MapCreateOpts(
        sz=ctypes.sizeof(_MapCreateOpts), inner_map_fd=inner_map_fd or 0, map_flags=flags
    )
    return _call(
        f"create map {name!r}",
        "bpf_map_create",
        map_type,
        _c_string(name),
        key_size,
        value_size,
        max_entries,
        ctypes.byref(options),
        undo=os.close,
    )


def _info_by_fd(doing: str, fd: int, info: ctypes.Structure) -> int:
    """Fill ``info`` in; return how much of it this kernel knows."""
    size = _U32(ctypes.sizeof(info))
    _call(doing, "bpf_obj_get_info_by_fd", fd, ctypes.byref(info), ctypes.byref(size))
    return size.value


def map_info(fd: int) -> MapInfo:
    """Describe the map behind ``fd``.

    Raises :class:`BpfError`: EBADFD (sic) for a bad descriptor, EINVAL for one
    that is not BPF's. The kernel does not say of which kind an object is: the caller must know that it is a map.
    Thread-safe; needs no privilege; works in any process that holds the descriptor.
    """
    info = _MapInfo()
    _info_by_fd(f"describe map (fd {fd})", fd, info)
    return MapInfo(
        id=info.id,
        type=info.type,
        name=info.name.decode(errors="replace"),
        key_size=info.key_size,
        value_size=info.value_size,
        max_entries=info.max_entries,
        flags=info.map_flags,
    )


def _check_sizes(fd: int, key: bytes, value_size: int | None) -> None:
    """Raise ValueError unless the sizes are the map's: the kernel reads and writes those, unasked."""
    info = map_info(fd)
    if len(key) != info.key_size:
        raise ValueError(f"map {info.name!r}: keys have {info.key_size} bytes, not {len(key)}")
    if value_size is None:
        return
    expected = info.value_size
    if info.type in _PERCPU_TYPES:
        cpus = _call("count the CPUs", "libbpf_num_possible_cpus")
        expected = (expected + 7) // 8 * 8 * cpus
    if value_size != expected:
        raise ValueError(f"map {info.name!r}: values have {expected} bytes, not {value_size}")


def map_update(fd: int, key: bytes, value: bytes, flags: UpdateFlag | int = UpdateFlag.ANY) -> None:
    """Store ``value`` under ``key``; in a map of maps the value is a map's fd as 4 native bytes.

    Raises :class:`ValueError` if a size is not the map's, and :class:`BpfError`: EEXIST or ENOENT
    as ``flags`` ask for, E2BIG if the map is full or the array shorter, EPERM if it is read-only.
    Thread-safe; works in any process that holds the descriptor.
    """
    _check_sizes(fd, key, len(value))
    _call(f"update map (fd {fd})", "bpf_map_update_elem", fd, key, value, flags)


def map_update_batch(fd: int, items: list[tuple[bytes, bytes]]) -> None:
    """Store several values in one call; in a map of maps that means one wait for running programs.

    Raises :class:`BpfError`; some may have been stored then. Thread-safe.
    """
    count = _U32(len(items))
    _call(
        "update map elements",
        "bpf_map_update_batch",
        fd,
        b"".join(key for key, _ in items),
        b"".join(value for _, value in items),
        ctypes.byref(count),
        None,
    )


def map_lookup(fd: int, key: bytes, value_size: int) -> bytes:
    """Return the value under ``key``; for a per-CPU map the values of all possible CPUs in a row.

    Raises :class:`ValueError` if a size is not the map's, and :class:`BpfError`: ENOENT if there is
    no such key. Thread-safe; works in any process that holds the descriptor.
    """
    _check_sizes(fd, key, value_size)
    value = ctypes.create_string_buffer(value_size)
    _call(f"look up in map (fd {fd})", "bpf_map_lookup_elem_flags", fd, key, value, 0)
    return value.raw


def map_delete(fd: int, key: bytes) -> None:
    """Remove ``key``.

    Raises :class:`ValueError` if its size is not the map's, and :class:`BpfError`: ENOENT if there
    is no such key, EINVAL for an array. Thread-safe; works in any process that holds the descriptor.
    """
    _check_sizes(fd, key, None)
    _call(f"delete from map (fd {fd})", "bpf_map_delete_elem", fd, key)


# ------------------------------------------------------------------------------ programs, as fds


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


@dataclass(frozen=True)
class ProgramInfo:
    """What the kernel says about a loaded program.

    ``recursion_misses`` counts the runs that the kernel's recursion guard skipped, always.
    ``run_cnt`` and ``run_time_ns`` grow only while statistics are on (:func:`enable_statistics`).
    """

    id: int
    type: int
    name: str
    run_time_ns: int
    run_cnt: int
    recursion_misses: int


def program_info(fd: int) -> ProgramInfo:
    """Describe the program behind ``fd``.

    Raises :class:`BpfError`: EBADFD (sic) for a bad descriptor, EINVAL for one that is not BPF's,
    EOPNOTSUPP if the kernel does not count recursion misses (before 5.12): no count must
    not be taken for none missed. The caller must know that the descriptor is a program's.
    Thread-safe; needs no privilege; works in any process that holds the descriptor.
    """
    doing = f"describe program (fd {fd})"
    info = _ProgramInfo()
    if _info_by_fd(doing, fd, info) < ctypes.sizeof(info):
        raise BpfError(errno.EOPNOTSUPP, f"{doing}: the kernel does not count recursion misses")
    return ProgramInfo(
        id=info.id,
        type=info.type,
        name=info.name.decode(errors="replace"),
        run_time_ns=info.run_time_ns,
        run_cnt=info.run_cnt,
        recursion_misses=info.recursion_misses,
    )


def raw_tracepoint_open(tracepoint: str, program_fd: int) -> int:
    """Attach a program to a raw tracepoint; return the link's descriptor, which the caller closes.

    The program stays attached until the last copy of the descriptor is closed, in whatever process.
    Raises :class:`BpfError`: ENOENT if the kernel has no such tracepoint, EPERM without CAP_BPF and CAP_PERFMON.
    """
    return _call(
        f"attach to raw tracepoint {tracepoint!r}",
        "bpf_raw_tracepoint_open",
        _c_string(tracepoint),
        program_fd,
        undo=os.close,
    )


def enable_statistics() -> int:
    """Make the kernel count and time the runs of all programs until the returned fd is closed.

    This costs every BPF program on the machine some time. Raises :class:`BpfError`: EPERM without
    CAP_SYS_ADMIN. Thread-safe; the descriptor is close-on-exec and valid in any process.
    """
    return _call("enable statistics", "bpf_enable_stats", 0, undo=os.close)


def btf_available() -> bool:
    """Whether the kernel's type information (BTF) can be read, which relocatable programs need.

    Does not need libbpf. Raises nothing; thread-safe and fork-safe.
    """
    return os.access(_BTF_PATH, os.R_OK)


def libbpf_version() -> str:
    """The version of the loaded library, such as ``v1.1``.

    Raises :class:`LibraryMissingError`. Thread-safe and fork-safe.
    """
    version: bytes = _get("libbpf_version_string")
    return version.decode()


# ------------------------------------------------------------------------------ objects


class Variable(NamedTuple):
    """Where a global variable of the BPF object lives: its section's map, offset and size."""

    map_name: str
    offset: int
    size: int


class _ObjectOpenOpts(ctypes.Structure):
    # The beginning of libbpf's structure, which its first field allows.
    _fields_ = (("sz", _SIZE), ("object_name", _STRING))


class _BtfType(ctypes.Structure):
    _fields_ = (("name_off", _U32), ("info", _U32), ("size", _U32))


class _BtfSectionEntry(ctypes.Structure):
    _fields_ = (("type", _U32), ("offset", _U32), ("size", _U32))


_BTF_KIND_DATASEC = 15
_DATA_SECTIONS = (".rodata", ".data", ".bss")


class BpfObject:
    """A compiled BPF object file: its maps and its programs.

    Constructing it parses the file; nothing is in the kernel before :meth:`load`. What has to be
    chosen before (sizes, which programs, initial values) can only be set in between.

    Errors are :class:`BpfError`: EBADF after :meth:`close` and in a forked child, ENOENT for the
    name of a program, map or variable that is not there. Thread-safe. After a fork the child may only
    :meth:`close` it. An object that is dropped without ``close()`` warns (ResourceWarning) and closes.
    """

    _pointer: int | None = None  # for __del__, when __init__ raised

    def __init__(self, data: bytes, name: str = "ummunotify") -> None:
        """Parse ``data``, the contents of an ELF file.

        The kernel's names of the data sections begin with the first letters of ``name``.
        Raises :class:`LibraryMissingError` and :class:`BpfError` (4001, or EINVAL in some versions
        of libbpf, for what is not a BPF object; the log says more).
        """
        if not isinstance(data, bytes):
            raise TypeError(f"a BPF object is bytes, not {type(data).__name__}")
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._links: weakref.WeakSet[BpfLink] = weakref.WeakSet()
        self._loaded = False
        self._data = data  # libbpf may look at it until the object is closed
        options = _ObjectOpenOpts(
            sz=ctypes.sizeof(_ObjectOpenOpts), object_name=_c_string(name)
        )
        self._pointer = _call(
            f"open BPF object {name!r}",
            "bpf_object__open_mem",
            data,
            len(data),
            ctypes.byref(options),
            undo=_close_object,
        )

    def __enter__(self) -> BpfObject:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._pointer is not None:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "loaded" if self._loaded else "open"
        return f"<BpfObject {state}>"

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._pointer is None

    @contextmanager
    def _using(self) -> Iterator[int]:
        """The C pointer, with the guarantee that it stays valid inside."""
        if os.getpid() != self._pid:
            raise BpfError(errno.EBADF, f"use of a BpfObject of process {self._pid}")
        with self._lock:
            if self._pointer is None:
                raise BpfError(errno.EBADF, "use of a closed BpfObject")
            yield self._pointer

    def load(self) -> None:
        """Create the maps and load the programs that are to be loaded.

        Raises :class:`BpfError`: EPERM without CAP_BPF and CAP_PERFMON; EACCES or EINVAL with the
        verifier's log if it refuses a program; EINVAL if called twice. After a failure only
        :meth:`close` makes sense.
        """
        with self._using() as pointer:
            _call("load BPF object", "bpf_object__load", pointer)
            self._loaded = True

    def close(self) -> None:
        """Close the links, maps and programs. Does nothing the second time; raises nothing.

        What others hold descriptors of lives on. In a forked child this gives up the child's copies.
        """
        with self._closing() as usable:
            for link in list(self._links):
                link.close()
            pointer, self._pointer = self._pointer, None
            if pointer is not None and usable:
                _close_object(pointer)
                self._data = b""

    @contextmanager
    def _closing(self) -> Iterator[bool]:
        """Wait for other threads; tell whether what the C pointers point to is intact.

        It may not be in a forked child, if a thread of the parent was in libbpf at the fork: that
        thread does not exist here and will never finish. Then it is better to leak.
        """
        usable = self._lock.acquire(blocking=os.getpid() == self._pid)
        try:
            yield usable
        finally:
            if usable:
                self._lock.release()

    # -- maps and variables

    def _map(self, pointer: int, name: str) -> int:
        doing = f"find map {name!r}"
        return _call(doing, "bpf_object__find_map_by_name", pointer, _c_string(name))

    def map_fd(self, name: str) -> int:
        """The descriptor of a map. It is this object's: duplicate it to keep it longer.

        Raises :class:`BpfError`: EBADF before :meth:`load`, ENOENT.
        """
        with self._using() as pointer:
            c_map = self._map(pointer, name)
            fd = int(_get("bpf_map__fd", c_map)) if self._loaded else -1
            if fd < 0:
                raise BpfError(errno.EBADF, f"map {name!r} is not created")
            return fd

    def set_max_entries(self, name: str, max_entries: int) -> None:
        """Set the size of a map, before :meth:`load`.

        Raises :class:`BpfError`: EBUSY after load, ENOENT.
        """
        with self._using() as pointer:
            _call(
                f"set max_entries of map {name!r} to {max_entries}",
                "bpf_map__set_max_entries",
                self._map(pointer, name),
                max_entries,
            )

    def initial_value(self, name: str) -> bytes:
        """What a data section (a map such as ``.rodata``, ``.data``, ``.bss``) will start with.

        Raises :class:`BpfError`: EINVAL for a map that is not a data section or after load, ENOENT.
        """
        with self._using() as pointer:
            return self._initial_value(pointer, name)

    def _initial_value(self, pointer: int, name: str) -> bytes:
        doing = f"get the initial value of map {name!r}"
        c_map = self._map(pointer, name)
        if self._loaded:
            # libbpf would show its own copy, which the program no longer shares.
            raise BpfError(errno.EINVAL, f"{doing}: the object is loaded")
        size = _SIZE(0)
        address = _get("bpf_map__initial_value", c_map, ctypes.byref(size))
        if address is None:
            raise BpfError(errno.EINVAL, f"{doing}: it is not a data section")
        return ctypes.string_at(address, size.value)

    def set_initial_value(self, name: str, value: bytes) -> None:
        """Set what a whole data section starts with, before :meth:`load`.

        Raises :class:`BpfError`: EINVAL for a wrong size, another kind of map, or after load; ENOENT.
        """
        with self._using() as pointer:
            _call(
                f"set the initial value of map {name!r}",
                "bpf_map__set_initial_value",
                self._map(pointer, name),
                value,
                len(value),
            )

    def variable(self, name: str) -> Variable:
        """Find a global variable by its name in the source, from the object's type information.

        Raises :class:`BpfError`: ENOENT if there is none in a data section.
        """
        with self._using() as pointer:
            return self._variable(pointer, name)

    def _variable(self, pointer: int, name: str) -> Variable:
        wanted = name.encode()
        btf = _get("bpf_object__btf", pointer)
        count = _get("btf__type_cnt", btf) if btf else 0
        for number in range(1, count):
            address = _get("btf__type_by_id", btf, number)
            section = _BtfType.from_address(address)
            if (section.info >> 24) & 0x1F != _BTF_KIND_DATASEC:
                continue
            map_name = _get("btf__name_by_offset", btf, section.name_off).decode()
            if not map_name.startswith(_DATA_SECTIONS):
                continue
            entries = (_BtfSectionEntry * (section.info & 0xFFFF)).from_address(
                address + ctypes.sizeof(_BtfType)
            )
            for entry in entries:
                variable = _BtfType.from_address(_get("btf__type_by_id", btf, entry.type))
                if _get("btf__name_by_offset", btf, variable.name_off) == wanted:
                    return Variable(map_name, entry.offset, entry.size)
        raise BpfError(errno.ENOENT, f"find variable {name!r}")

    def set_variable(self, name: str, value: bytes) -> None:
        """Set the initial value of one global variable, before :meth:`load`.

        Raises :class:`ValueError` for a wrong size, :class:`BpfError`: EINVAL after load, ENOENT.
        """
        with self._using() as pointer:
            where = self._variable(pointer, name)
            if len(value) != where.size:
                raise ValueError(f"variable {name!r} has {where.size} bytes, not {len(value)}")
            section = bytearray(self._initial_value(pointer, where.map_name))
            section[where.offset : where.offset + where.size] = value
            self.set_initial_value(where.map_name, bytes(section))

    # -- programs

    def program(self, name: str) -> BpfProgram:
        """The program with this (function) name. Raises :class:`BpfError`: ENOENT."""
        with self._using() as pointer:
            found = _call(
                f"find program {name!r}",
                "bpf_object__find_program_by_name",
                pointer,
                _c_string(name),
            )
            return BpfProgram(self, found)

    def programs(self) -> list[BpfProgram]:
        """All programs of the object, in its order."""
        found: list[BpfProgram] = []
        with self._using() as pointer:
            current = _get("bpf_object__next_program", pointer, None)
            while current is not None:
                found.append(BpfProgram(self, current))
                current = _get("bpf_object__next_program", pointer, current)
        return found

    def attach(self) -> list[BpfLink]:
        """Attach each loaded program that has autoattach set to what its section names.

        If one fails, those attached before it are detached. Raises what :meth:`BpfProgram.attach` does.
        """
        links: list[BpfLink] = []
        with self._using():
            try:
                for program in self.programs():
                    if program.autoload and program.autoattach:
                        links.append(program.attach())
            except BaseException:
                for link in links:
                    link.close()
                raise
        return links


class BpfProgram:
    """A program of a :class:`BpfObject`, which it keeps alive and whose rules it shares.

    Errors are :class:`BpfError`: EBADF if the object is closed or belongs to a parent process.
    Made by :meth:`BpfObject.program`. Thread-safe.
    """

    def __init__(self, owner: BpfObject, pointer: int) -> None:
        self._owner = owner
        self._pointer = pointer  # valid as long as the owner is open
        self.name: str = _get("bpf_program__name", pointer).decode()
        self.section: str = _get("bpf_program__section_name", pointer).decode()

    def __repr__(self) -> str:
        return f"<BpfProgram {self.name} ({self.section})>"

    @property
    def fd(self) -> int:
        """The program's descriptor, which is the object's. Raises ENOENT if it is not loaded."""
        with self._owner._using():
            return _call(f"get the fd of program {self.name!r}", "bpf_program__fd", self._pointer)

    @property
    def autoload(self) -> bool:
        """Whether :meth:`BpfObject.load` loads it."""
        with self._owner._using():
            return bool(_get("bpf_program__autoload", self._pointer))

    def set_autoload(self, autoload: bool) -> None:
        """Choose whether :meth:`BpfObject.load` loads it. Raises EINVAL after load."""
        with self._owner._using():
            _call(
                f"set autoload of program {self.name!r}",
                "bpf_program__set_autoload",
                self._pointer,
                autoload,
            )

    @property
    def autoattach(self) -> bool:
        """Whether :meth:`BpfObject.attach` attaches it."""
        with self._owner._using():
            return bool(_get("bpf_program__autoattach", self._pointer))

    def set_autoattach(self, autoattach: bool) -> None:
        """Choose whether :meth:`BpfObject.attach` attaches it."""
        with self._owner._using():
            _get("bpf_program__set_autoattach", self._pointer, autoattach)

    def info(self) -> ProgramInfo:
        """What the kernel says about it, statistics included; see :func:`program_info`."""
        with self._owner._using():
            return program_info(self.fd)

    def attach(self) -> BpfLink:
        """Attach it to what its section name says.

        Raises EINVAL if it is not loaded, EOPNOTSUPP or ESRCH if libbpf cannot attach such a section
        by itself, otherwise what the kernel says.
        """
        return self._attach("its section's target", "bpf_program__attach")

    def attach_raw_tracepoint(self, tracepoint: str) -> BpfLink:
        """Attach it to a raw tracepoint. Raises ENOENT if the kernel has no such tracepoint."""
        return self._attach(
            f"raw tracepoint {tracepoint!r}",
            "bpf_program__attach_raw_tracepoint",
            _c_string(tracepoint),
        )

    def attach_kprobe(self, function: str, retprobe: bool = False) -> BpfLink:
        """Attach it to the entry of a kernel function, or to its return.

        Raises ENOENT if there is no such function or the kernel has no kprobes (the log tells them
        apart), EADDRNOTAVAIL or EINVAL if the function cannot be probed.
        """
        return self._attach(
            f"kernel function {function!r}",
            "bpf_program__attach_kprobe",
            retprobe,
            _c_string(function),
        )

    def _attach(self, target: str, c_function: str, *arguments: object) -> BpfLink:
        with self._owner._using():
            pointer = _call(
                f"attach program {self.name!r} to {target}",
                c_function,
                self._pointer,
                *arguments,
                undo=_destroy_link,
            )
            link = BpfLink(self._owner, pointer)
            self._owner._links.add(link)
            return link


class BpfLink:
    """An attachment of a program. Made by the ``attach`` methods of :class:`BpfProgram`.

    The program stays attached until the last descriptor of the link is closed, in whatever process.
    Closing the object closes its links; the link keeps the object alive. Thread-safe. After
    a fork the child may only :meth:`close` it.
    """

    def __init__(self, owner: BpfObject, pointer: int) -> None:
        self._owner = owner
        self._pointer: int | None = pointer
        self._fd = int(_get("bpf_link__fd", pointer))

    def __enter__(self) -> BpfLink:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._pointer is not None:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        return "<BpfLink closed>" if self.closed else f"<BpfLink fd={self._fd}>"

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called, on the link or on its object."""
        return self._pointer is None

    @property
    def fd(self) -> int:
        """The link's descriptor, which is the link's. Raises :class:`BpfError` (EBADF) once closed."""
        if self._pointer is None:
            raise BpfError(errno.EBADF, "use of a closed BpfLink")
        return self._fd

    def close(self) -> None:
        """Detach, unless somebody else holds the link too. Does nothing the second time.

        Raises nothing. In a forked child this gives up the child's copy.
        """
        with self._owner._closing() as usable:
            pointer, self._pointer = self._pointer, None
            if pointer is not None and usable:
                _destroy_link(pointer)
