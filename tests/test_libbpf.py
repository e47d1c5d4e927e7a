"""The libbpf binding, on the running kernel, with the programs of ``bpf/tiny.bpf.c``."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import importlib.util
import mmap
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ummunotify.bpf import libbpf
from ummunotify.bpf.libbpf import (
    BpfError,
    BpfLink,
    BpfObject,
    LibraryMissingError,
    MapFlag,
    MapType,
    UpdateFlag,
)

SOURCE = Path(__file__).parent / "bpf" / "tiny.bpf.c"
SRC = Path(libbpf.__file__).parents[2]

# A system call that nothing else here makes, and a function of libc that nothing else here calls.
GET_PRIORITY_MAX = {"x86_64": 146, "aarch64": 125, "riscv64": 125}.get(os.uname().machine, 0)
LIBC = ctypes.CDLL(None)

HAS_KPROBES = os.path.exists("/sys/bus/event_source/devices/kprobe")


def skip(reason: str) -> None:
    """Skip, or fail where the environment says that BPF has to be there."""
    if "bpf" in os.environ.get("UMMUNOTIFY_REQUIRE", "").split(","):
        pytest.fail(f"UMMUNOTIFY_REQUIRE has bpf, but {reason}")
    pytest.skip(reason)


def u32(number: int) -> bytes:
    return number.to_bytes(4, sys.byteorder)


def u64(number: int) -> bytes:
    return number.to_bytes(8, sys.byteorder)


def fds() -> set[str]:
    """What descriptors are open, and on what."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{fd} -> {os.readlink(f'/proc/self/fd/{fd}')}")
        except FileNotFoundError:  # the one that listdir used
            continue
    return found


@pytest.fixture(autouse=True)
def no_fds_left_over() -> Iterator[None]:
    before = fds()
    yield
    gc.collect()
    assert fds() == before


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The compiled test object; the kernel must let us load BPF programs."""
    output = tmp_path_factory.mktemp("bpf") / "tiny.bpf.o"
    if shutil.which("clang"):
        compiler = ["clang", "-target", "bpf"]
    elif importlib.util.find_spec("ziglang"):
        compiler = [sys.executable, "-m", "ziglang", "cc", "-target", "bpfel-freestanding"]
    else:
        skip("there is neither clang nor ziglang")
    options = ["-O2", "-g", "-Wall", "-Werror", "-c", str(SOURCE), "-o", str(output)]
    subprocess.run([*compiler, *options], check=True)
    try:
        os.close(libbpf.create_map(MapType.ARRAY, "probe", 4, 8, 1))
    except BpfError as error:
        skip(f"BPF cannot be used: {error}")
    return output.read_bytes()


@pytest.fixture
def opened(tiny: bytes) -> Iterator[BpfObject]:
    with BpfObject(tiny, name="tiny") as bpf:
        only(bpf)
        yield bpf


@pytest.fixture
def loaded(opened: BpfObject) -> BpfObject:
    only(opened, "count_syscall", "probe")
    opened.set_variable("counted_syscall", u64(GET_PRIORITY_MAX))
    opened.load()
    return opened


def only(bpf: BpfObject, *names: str) -> None:
    for program in bpf.programs():
        program.set_autoload(program.name in names)


def counted(bpf: BpfObject) -> int:
    return int.from_bytes(libbpf.map_lookup(bpf.map_fd("counters"), u32(0), 8), sys.byteorder)


def probe_hits(bpf: BpfObject) -> int:
    where = bpf.variable("probe_hits")
    fd = bpf.map_fd(where.map_name)
    section = libbpf.map_lookup(fd, u32(0), libbpf.map_info(fd).value_size)
    return int.from_bytes(section[where.offset : where.offset + where.size], sys.byteorder)


def make_syscall() -> None:
    os.sched_get_priority_max(os.SCHED_FIFO)


def call_probed_function() -> None:
    LIBC.l64a(ctypes.c_long(5))


def raises(number: int, match: str | None = None) -> pytest.RaisesExc[BpfError]:
    return pytest.RaisesExc(BpfError, match=match, check=lambda error: error.errno == number)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(SRC)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )


# ------------------------------------------------------------------------------ the library


def test_import_loads_nothing() -> None:
    done = run_python(
        "from ummunotify.bpf import libbpf\n"
        "assert libbpf.btf_available() in (True, False)\n"
        "assert 'libbpf.so' not in open('/proc/self/maps').read()\n"
    )
    assert done.stdout == done.stderr == ""


def test_library_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libbpf, "_library", None)
    monkeypatch.setattr(libbpf, "_SONAME", "libbpf-not-there.so.1")
    with pytest.raises(LibraryMissingError, match="libbpf1 on Debian.* libbpf on Fedora") as raised:
        libbpf.libbpf_version()
    assert raised.value.errno == errno.ELIBACC
    assert isinstance(raised.value, BpfError)
    assert "libbpf-not-there.so.1" in raised.value.detail


def test_library_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libbpf, "_library", None)
    monkeypatch.setitem(libbpf._PROTOTYPES, "bpf_no_such_function", (ctypes.c_int,))
    with pytest.raises(LibraryMissingError, match="bpf_no_such_function.*version 1.0 or later"):
        libbpf.libbpf_version()


def test_version() -> None:
    assert libbpf.libbpf_version().startswith("v1.")


def test_btf_available(monkeypatch: pytest.MonkeyPatch) -> None:
    assert libbpf.btf_available() == os.path.exists("/sys/kernel/btf/vmlinux")
    monkeypatch.setattr(libbpf, "_BTF_PATH", "/nonexistent")
    assert not libbpf.btf_available()


def test_messages_of_others_are_passed_on() -> None:
    """The log is one per process. After exit libbpf must not call Python."""
    done = run_python(
        "import atexit, ctypes\n"
        "other = ctypes.CDLL('libbpf.so.1')\n"
        "def complain(): other.bpf_object__open_mem(b'garbage', ctypes.c_size_t(7), None)\n"
        "atexit.register(complain)\n"  # runs after libbpf.py has taken its function back
        "from ummunotify.bpf import libbpf\n"
        "try: libbpf.BpfObject(b'nonsense')\n"
        "except libbpf.BpfError: pass\n"
        "complain()\n"
    )
    assert done.stderr.count("libbpf: ") == 2
    assert done.stdout == ""


# ------------------------------------------------------------------------------ errors


def test_error_text() -> None:
    error = BpfError(errno.EACCES, "load it", "first\n\nsecond\n")
    assert isinstance(error, OSError)
    assert str(error) == "load it: Permission denied [EACCES]\n  first\n  second"
    assert str(BpfError(524, "do")) == "do: Operation not supported by this kernel (ENOTSUPP) [524]"
    long = BpfError(errno.EPERM, "x", "\n".join(f"line {i}" for i in range(1000)))
    assert "line 999" in str(long)
    assert "line 5\n" not in str(long)


@pytest.mark.parametrize(
    "error", [BpfError(errno.EACCES, "load it", "log"), LibraryMissingError("no")]
)
def test_errors_can_be_pickled(error: BpfError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), copy.errno, copy.log) == (str(error), error.errno, error.log)


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x7fELF" + bytes(100), bytes(5000)])
def test_garbage(data: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BpfError, match="open BPF object 'ummunotify'"):
        BpfObject(data)
    assert capfd.readouterr() == ("", "")


def test_garbage_has_a_log() -> None:
    with pytest.raises(BpfError) as raised:
        BpfObject(b"garbage" * 100)
    assert "libbpf: " in raised.value.log
    assert "Unknown error" not in str(raised.value)


def test_not_bytes() -> None:
    with pytest.raises(TypeError, match="str"):
        BpfObject("text")  # type: ignore[arg-type]


def test_truncated(tiny: bytes) -> None:
    """A half-written file must be refused, not crash."""
    for size in range(64, len(tiny), len(tiny) // 20):
        with pytest.raises(BpfError):
            BpfObject(tiny[:size])


def test_refused_by_verifier(opened: BpfObject, capfd: pytest.CaptureFixture[str]) -> None:
    only(opened, "refused")
    with raises(errno.EACCES, "invalid mem access 'scalar'") as raised:
        opened.load()
    assert raised.value.call == "load BPF object"
    assert "prog 'refused'" in raised.value.log
    assert "processed" in raised.value.log
    assert capfd.readouterr() == ("", "")
    with raises(errno.EBADF):
        opened.map_fd("counters")


def test_unknown_names(loaded: BpfObject) -> None:
    with raises(errno.ENOENT, "find program 'nobody'"):
        loaded.program("nobody")
    with raises(errno.ENOENT, "find map 'nowhere'"):
        loaded.map_fd("nowhere")
    with raises(errno.ENOENT, "find variable 'nothing'"):
        loaded.variable("nothing")
    with raises(errno.ENOENT, "raw tracepoint 'no_such_tracepoint'"):
        loaded.program("count_syscall").attach_raw_tracepoint("no_such_tracepoint")
    with pytest.raises(ValueError, match="NUL"):
        loaded.program("count_syscall\0")
    with pytest.raises(BpfError, match="kernel function 'no_such_function'"):
        loaded.program("probe").attach_kprobe("no_such_function")


def test_before_load(opened: BpfObject) -> None:
    with raises(errno.EBADF, "map 'counters' is not created"):
        opened.map_fd("counters")
    with pytest.raises(BpfError, match="get the fd of program"):
        opened.program("count_syscall").fd  # noqa: B018
    with pytest.raises(BpfError):
        opened.program("count_syscall").info()
    with pytest.raises(BpfError, match="before loaded|was it loaded"):
        opened.program("count_syscall").attach_raw_tracepoint("sys_enter")


def test_after_load(loaded: BpfObject) -> None:
    with raises(errno.EINVAL, "load BPF object"):
        loaded.load()
    with raises(errno.EBUSY, "set max_entries of map 'counters' to 2"):
        loaded.set_max_entries("counters", 2)
    with pytest.raises(BpfError, match="autoload"):
        loaded.program("count_syscall").set_autoload(False)
    with raises(errno.EINVAL):
        loaded.set_variable("step", u64(1))
    with raises(errno.EINVAL):
        loaded.initial_value(".data")
    with raises(errno.EINVAL):
        loaded.set_initial_value(".data", u64(1))


def test_closed(tiny: bytes) -> None:
    bpf = BpfObject(tiny)
    only(bpf, "count_syscall")
    bpf.load()
    program = bpf.program("count_syscall")
    link = program.attach()
    assert not bpf.closed
    assert repr(bpf) == "<BpfObject loaded>"
    bpf.close()
    bpf.close()
    assert bpf.closed
    assert link.closed
    link.close()
    for use in [
        bpf.load,
        bpf.programs,
        bpf.attach,
        lambda: bpf.map_fd("counters"),
        lambda: bpf.program("count_syscall"),
        lambda: program.fd,
        program.info,
        program.attach,
        lambda: program.autoload,
        lambda: link.fd,
    ]:
        with raises(errno.EBADF, "closed"):
            use()


def test_dropped(tiny: bytes) -> None:
    with pytest.warns(ResourceWarning, match="unclosed <BpfObject open>"):
        BpfObject(tiny)
    with BpfObject(tiny) as bpf:
        only(bpf, "count_syscall")
        bpf.load()
        with pytest.warns(ResourceWarning, match="unclosed <BpfLink fd="):
            bpf.program("count_syscall").attach()


# ------------------------------------------------------------------------------ objects


def test_settings_before_load(opened: BpfObject) -> None:
    only(opened, "count_syscall")
    opened.set_max_entries("counters", 17)
    assert opened.initial_value(".data") == u64(1)
    opened.set_initial_value(".data", u64(1000))
    with raises(errno.EINVAL):
        opened.set_initial_value(".data", b"short")
    with raises(errno.EINVAL):
        opened.initial_value("counters")
    assert opened.variable("counted_syscall") == (".rodata", 0, 8)
    opened.set_variable("counted_syscall", u64(GET_PRIORITY_MAX))
    with pytest.raises(ValueError, match="8 bytes, not 4"):
        opened.set_variable("counted_syscall", u32(1))
    opened.load()

    info = libbpf.map_info(opened.map_fd("counters"))
    assert (info.type, info.name, info.key_size, info.value_size) == (MapType.ARRAY, "counters", 4, 8)
    assert (info.max_entries, info.flags) == (17, MapFlag.MMAPABLE)
    assert libbpf.map_info(opened.map_fd(".rodata")).name == "tiny.rodata"
    with opened.program("count_syscall").attach():
        make_syscall()
    assert counted(opened) == 1000


def test_programs(opened: BpfObject) -> None:
    programs = {program.name: program for program in opened.programs()}
    assert set(programs) == {"count_syscall", "nest", "probe", "probe_kernel", "refused"}
    program = opened.program("nest")
    assert program.section == "raw_tp/page_fault_kernel"
    assert repr(program) == "<BpfProgram nest (raw_tp/page_fault_kernel)>"
    program.set_autoload(True)
    assert program.autoload
    program.set_autoload(False)
    assert not program.autoload
    assert program.autoattach
    program.set_autoattach(False)
    assert not program.autoattach


def test_attach_all(loaded: BpfObject) -> None:
    loaded.program("probe").set_autoattach(False)
    (link,) = loaded.attach()
    make_syscall()
    assert counted(loaded) == 1
    link.close()


def test_attach_all_or_nothing(opened: BpfObject) -> None:
    only(opened, "count_syscall", "probe_kernel")  # a kprobe whose section does not say where
    opened.set_variable("counted_syscall", u64(GET_PRIORITY_MAX))
    opened.load()
    with pytest.raises(BpfError, match="'probe_kernel' to its section's target"):
        opened.attach()
    make_syscall()
    assert counted(opened) == 0


def test_raw_tracepoint(loaded: BpfObject) -> None:
    make_syscall()
    assert counted(loaded) == 0
    with loaded.program("count_syscall").attach_raw_tracepoint("sys_enter") as link:
        assert repr(link) == f"<BpfLink fd={link.fd}>"
        for _ in range(10):
            make_syscall()
        assert counted(loaded) == 10
    assert link.closed
    assert repr(link) == "<BpfLink closed>"
    link.close()
    make_syscall()
    assert counted(loaded) == 10


def test_perf_event(loaded: BpfObject) -> None:
    with loaded.program("probe").attach():
        call_probed_function()
        assert probe_hits(loaded) == 1
    call_probed_function()
    assert probe_hits(loaded) == 1


@pytest.mark.parametrize("retprobe", [False, True])
def test_kprobe(opened: BpfObject, retprobe: bool, tmp_path: Path) -> None:
    def unlink_a_file() -> None:
        path = tmp_path / "file"
        path.touch()
        path.unlink()

    only(opened, "probe_kernel")
    opened.load()
    program = opened.program("probe_kernel")
    if not HAS_KPROBES:
        with pytest.raises(BpfError, match="kernel function 'vfs_unlink'"):
            program.attach_kprobe("vfs_unlink", retprobe)
        return
    with program.attach_kprobe("vfs_unlink", retprobe) as link:
        unlink_a_file()
        assert probe_hits(opened) >= 1
        held = os.dup(link.fd)
    before = probe_hits(opened)
    unlink_a_file()
    assert probe_hits(opened) > before
    os.close(held)
    before = probe_hits(opened)
    unlink_a_file()
    assert probe_hits(opened) == before


def test_link_held_elsewhere(loaded: BpfObject) -> None:
    """Whoever was given the link's descriptor keeps the program attached."""
    counters = os.dup(loaded.map_fd("counters"))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        link = loaded.program("count_syscall").attach()
        socket.send_fds(ours, [b"x"], [link.fd])
        loaded.close()
        _, (held,), _, _ = socket.recv_fds(theirs, 1, 1)

    def count() -> int:
        return int.from_bytes(libbpf.map_lookup(counters, u32(0), 8), sys.byteorder)

    make_syscall()
    assert count() == 1
    os.close(held)
    make_syscall()
    assert count() == 1
    os.close(counters)


def test_perf_event_link_held_elsewhere(loaded: BpfObject) -> None:
    """libbpf disables the perf event when it destroys such a link; the program must run on."""
    link = loaded.program("probe").attach()
    held = os.dup(link.fd)
    link.close()
    call_probed_function()
    assert probe_hits(loaded) == 1
    os.close(held)
    call_probed_function()
    assert probe_hits(loaded) == 1


def test_all_fds_are_close_on_exec(loaded: BpfObject) -> None:
    """Those that libbpf does not show included."""
    inner = libbpf.create_map(MapType.RINGBUF, "inner", 0, 0, mmap.PAGESIZE)
    others = [
        inner,
        libbpf.create_map(MapType.HASH_OF_MAPS, "outer", 8, 4, 1, inner_map_fd=inner),
        libbpf.enable_statistics(),
    ]
    links = [loaded.program("count_syscall").attach(), loaded.program("probe").attach()]
    if HAS_KPROBES:
        links.append(loaded.program("probe").attach_kprobe("vfs_unlink"))
    kinds = {}
    for entry in fds():
        number, _, target = entry.partition(" -> ")
        if target.startswith("anon_inode:"):
            kinds[int(number)] = target
    assert {link.fd for link in links} | set(others) <= set(kinds)
    assert len([kind for kind in kinds.values() if "perf_event" in kind]) == len(links) - 1
    for fd, kind in kinds.items():
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC, kind
    for link in links:
        link.close()
    for fd in others:
        os.close(fd)


def test_info(loaded: BpfObject) -> None:
    program = loaded.program("count_syscall")
    statistics = libbpf.enable_statistics()
    with program.attach():
        before = program.info()
        for _ in range(100):
            make_syscall()
        after = program.info()
    os.close(statistics)
    assert after.id == before.id > 0
    assert after.name == "count_syscall"
    assert after.type == 17  # BPF_PROG_TYPE_RAW_TRACEPOINT
    assert after.run_cnt >= before.run_cnt + 100
    assert after.run_time_ns > before.run_time_ns
    assert after.recursion_misses == 0
    assert libbpf.program_info(program.fd).id == after.id


def test_recursion_misses(opened: BpfObject) -> None:
    only(opened, "nest")
    opened.load()
    program = opened.program("nest")
    assert program.info().recursion_misses == 0
    try:
        link = program.attach()
    except BpfError as error:
        if error.errno != errno.ENOENT:
            raise
        skip("this architecture has no tracepoint page_fault_kernel")
    with link, mmap.mmap(-1, mmap.PAGESIZE) as memory, open("/dev/zero", "rb", buffering=0) as zero:
        zero.readinto(memory)  # the kernel faults the page in
    assert program.info().recursion_misses > 0


def test_info_of_an_old_kernel(loaded: BpfObject, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that does not count must not look like one that counted nothing."""
    fd = loaded.program("count_syscall").fd
    monkeypatch.setattr(libbpf, "_info_by_fd", lambda *_: 208)
    with raises(errno.EOPNOTSUPP, "recursion misses"):
        libbpf.program_info(fd)


def test_info_of_a_bad_fd() -> None:
    for describe in [libbpf.map_info, libbpf.program_info]:
        with pytest.raises(BpfError, match="EBADF"):
            describe(-1)
        with open("/dev/null") as null, raises(errno.EINVAL):
            describe(null.fileno())


# ------------------------------------------------------------------------------ maps


@pytest.fixture
def hash_map(tiny: bytes) -> Iterator[int]:
    fd = libbpf.create_map(MapType.HASH, "test_hash", 8, 4, 2, MapFlag.NO_PREALLOC)
    yield fd
    os.close(fd)


def test_create_map(hash_map: int) -> None:
    info = libbpf.map_info(hash_map)
    assert info.id > 0
    assert (info.type, info.name) == (MapType.HASH, "test_hash")
    assert (info.key_size, info.value_size, info.max_entries) == (8, 4, 2)
    assert info.flags == MapFlag.NO_PREALLOC
    with raises(errno.EINVAL, "create map 'wrong'"):
        libbpf.create_map(MapType.ARRAY, "wrong", 3, 8, 1)


def test_map(hash_map: int) -> None:
    with raises(errno.ENOENT, "look up in map"):
        libbpf.map_lookup(hash_map, u64(1), 4)
    libbpf.map_update(hash_map, u64(1), u32(10))
    assert libbpf.map_lookup(hash_map, u64(1), 4) == u32(10)
    with raises(errno.EEXIST, "update map"):
        libbpf.map_update(hash_map, u64(1), u32(11), UpdateFlag.NOEXIST)
    with raises(errno.ENOENT, "update map"):
        libbpf.map_update(hash_map, u64(2), u32(11), UpdateFlag.EXIST)
    libbpf.map_update(hash_map, u64(2), u32(0))
    with raises(errno.E2BIG, "update map"):
        libbpf.map_update(hash_map, u64(3), u32(11))
    libbpf.map_delete(hash_map, u64(1))
    with raises(errno.ENOENT, "delete from map"):
        libbpf.map_delete(hash_map, u64(1))
    with pytest.raises(BpfError, match="EBADF"):
        libbpf.map_delete(-1, u64(1))


def test_map_sizes_are_checked(hash_map: int) -> None:
    """The kernel would read or write beyond the end of what it is given."""
    for key, value in [(b"", u32(1)), (u64(1), b"123"), (u64(1), b"12345"), (u32(1), u32(1))]:
        with pytest.raises(ValueError, match="map 'test_hash': (keys|values) have"):
            libbpf.map_update(hash_map, key, value)
        with pytest.raises(ValueError, match="map 'test_hash': (keys|values) have"):
            libbpf.map_lookup(hash_map, key, len(value))
    with pytest.raises(ValueError, match="keys have 8 bytes, not 4"):
        libbpf.map_delete(hash_map, u32(1))


def test_percpu_map(tiny: bytes) -> None:
    fd = libbpf.create_map(MapType.PERCPU_ARRAY, "percpu", 4, 4, 1)
    cpus = libbpf._call("count", "libbpf_num_possible_cpus")
    with pytest.raises(ValueError, match=f"values have {8 * cpus} bytes, not 4"):
        libbpf.map_lookup(fd, u32(0), 4)
    libbpf.map_update(fd, u32(0), u64(7) * cpus)
    assert libbpf.map_lookup(fd, u32(0), 8 * cpus) == u64(7) * cpus
    os.close(fd)


def test_map_of_maps(tiny: bytes) -> None:
    inner = libbpf.create_map(MapType.ARRAY, "inner", 4, 8, 1, MapFlag.MMAPABLE)
    outer = libbpf.create_map(MapType.HASH_OF_MAPS, "outer", 8, 4, 4, inner_map_fd=inner)
    libbpf.map_update(outer, u64(0x1234), u32(inner))
    assert libbpf.map_lookup(outer, u64(0x1234), 4) == u32(libbpf.map_info(inner).id)
    with mmap.mmap(inner, mmap.PAGESIZE) as memory:
        memory[:8] = u64(99)
        assert libbpf.map_lookup(inner, u32(0), 8) == u64(99)
    os.close(inner)
    os.close(outer)


# ------------------------------------------------------------------------------ threads, signals, fork


def test_threads_have_their_own_log(tiny: bytes) -> None:
    failures: list[BaseException] = []

    def use() -> None:
        try:
            for _ in range(5):
                with BpfObject(tiny) as bpf:
                    only(bpf, "refused")
                    with raises(errno.EACCES) as raised:
                        bpf.load()
                    assert raised.value.log.count("BEGIN PROG LOAD LOG") == 1
                with BpfObject(tiny) as bpf:
                    only(bpf, "count_syscall")
                    bpf.load()
                    with bpf.program("count_syscall").attach(), raises(errno.ENOENT) as raised:
                        bpf.program("none")
                    assert raised.value.log == ""
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_close_while_in_use(tiny: bytes) -> None:
    for _ in range(20):
        bpf = BpfObject(tiny)
        only(bpf, "count_syscall")
        bpf.load()
        program = bpf.program("count_syscall")
        started = threading.Event()
        outcome: list[BaseException] = []

        def use(
            bpf: BpfObject = bpf, started: threading.Event = started, outcome: list[BaseException] = outcome
        ) -> None:
            try:
                while True:
                    program.attach().close()
                    bpf.map_fd("counters")
                    started.set()
            except BpfError as error:
                outcome.append(error)

        thread = threading.Thread(target=use)
        thread.start()
        assert started.wait(10)
        bpf.close()
        thread.join(10)
        assert [error.errno for error in outcome if isinstance(error, BpfError)] == [errno.EBADF]


def test_interrupt(tiny: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal handler may run, and raise, in the callback that takes libbpf's messages."""

    def raise_signal(self: object, text: int, arguments: int) -> str:
        signal.raise_signal(signal.SIGINT)
        return "message"

    libbpf.libbpf_version()
    monkeypatch.setattr(libbpf._Library, "_format", raise_signal)
    with pytest.raises(KeyboardInterrupt):
        BpfObject(b"garbage")
    with pytest.raises(KeyboardInterrupt):
        BpfObject(tiny)  # says something about a section, but succeeds: it must not leak


def in_child(use: Callable[[], None]) -> None:
    """Run it in a forked child, and fail if it raises there."""
    child = os.fork()
    if child == 0:
        try:
            use()
        except BaseException as error:
            os.write(2, f"in the child: {error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_fork(loaded: BpfObject) -> None:
    links = [loaded.program("count_syscall").attach(), loaded.program("probe").attach()]
    program = loaded.program("count_syscall")

    def use() -> None:
        actions: list[Callable[[], object]] = [
            loaded.load,
            program.attach,
            program.info,
            lambda: loaded.map_fd("counters"),
        ]
        for action in actions:
            with raises(errno.EBADF, f"of process {os.getppid()}"):
                action()
        assert libbpf.program_info(program_fd).id > 0
        links[1].close()
        loaded.close()
        assert links[0].closed
        assert not [entry for entry in fds() if "bpf" in entry or "perf" in entry]

    program_fd = program.fd
    in_child(use)
    make_syscall()
    call_probed_function()
    assert counted(loaded) == 1
    assert probe_hits(loaded) == 1
    for link in links:
        link.close()


def test_fork_while_in_use(loaded: BpfObject) -> None:
    """What another thread was doing at the fork never ends in the child, which must not hang."""
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with loaded._using():
            entered.set()
            leave.wait(30)

    def use() -> None:
        signal.alarm(20)
        link.close()
        loaded.close()
        assert link.closed
        assert loaded.closed

    link: BpfLink = loaded.program("count_syscall").attach()
    thread = threading.Thread(target=hold)
    thread.start()
    assert entered.wait(10)
    in_child(use)
    leave.set()
    thread.join()
    link.close()
