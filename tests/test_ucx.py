"""UCX's registration caches are told of every change: UCX's own caches, and a stand-in for libibverbs (tests/c/ucx.c).

With the system's UCX, and with that of PyPI's libucx-cu12 if it is installed.
"""

from __future__ import annotations

import importlib.util
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from daemons import COMMAND
from support import SLOW, require, require_source
from test_c import HERE, build, run, source

__all__ = ["source"]  # a fixture

RUN = [*COMMAND, "run", "--ucx"]
ROUNDS = "80000" if SLOW else "500"
KINDS = ("munmap", "madvise", "mremap", "mmap", "truncate")
PARTS = ("ucp", "uct", "ucs", "ucm")


class Ucx(NamedTuple):
    include: Path
    library: Path

    def flags(self) -> list[str]:
        return [f"-isystem{self.include}", *(str(self.library / f"lib{name}.so.0") for name in PARTS)]


def installed() -> dict[str, Ucx]:
    """Each UCX whose headers are here too."""
    found = {}
    wheel = importlib.util.find_spec("libucx")
    if wheel is not None and wheel.submodule_search_locations:
        place = Path(wheel.submodule_search_locations[0])
        found["wheel"] = Ucx(place / "include", place / "lib")
    for header in Path("/usr/include/ucs/memory").glob("rcache.h"):
        library = next(Path("/usr/lib").glob("*-linux-gnu/libucp.so.0"), None)
        if library is not None:
            found["system"] = Ucx(header.parents[2], library.parent)
    return found


@pytest.fixture(scope="module", params=["wheel", "system"])
def ucx(request: pytest.FixtureRequest) -> Ucx:
    name = str(request.param)
    if name not in installed():
        needs = {"wheel": "pip install libucx-cu12", "system": "apt-get install libucx-dev"}
        # Not after Debian 13: see the Makefile.
        always = name == "wheel" or platform.freedesktop_os_release().get("VERSION_ID") in ("12", "13")
        require("ucx", f"there is no UCX of this kind: {needs[name]}", always=always)
    return installed()[name]


class Programs(NamedTuple):
    linked: list[str]
    late: list[str]
    verbs: str


@pytest.fixture(scope="module")
def programs(ucx: Ucx, tmp_path_factory: pytest.TempPathFactory) -> Programs:
    place = tmp_path_factory.mktemp("ucx")
    (place / "map").write_text(
        "IBVERBS_1.1 { ibv_reg_mr; ibv_dereg_mr; };\n"
        "IBVERBS_1.8 { ibv_reg_mr_iova2; ucx_verbs_registered; } IBVERBS_1.1;\n"
    )
    versions = f"-Wl,--version-script={place / 'map'}"
    verbs = build(HERE / "ucx_verbs.c", place / "libverbs.so", "-shared", "-fPIC", versions)
    paths = [f"-Wl,-rpath,{ucx.library}:{place}", f"-Wl,-rpath-link,{ucx.library}"]
    linked = build(HERE / "ucx.c", place / "ucx", *ucx.flags(), verbs, *paths)
    library = build(HERE / "ucx.c", place / "late.so", "-DPLUGIN", "-shared", "-fPIC", *ucx.flags(), verbs, *paths)
    return Programs([linked], [build(HERE / "ucx_late.c", place / "late", "-ldl"), library], verbs)


class Result(NamedTuple):
    wrong: dict[str, int]
    changes: dict[str, int]
    text: str

    def count(self, what: str) -> int:
        found = re.search(rf"{what} (\d+)", self.text)
        assert found, self.text
        return int(found[1])


def look(*command: str, **environment: str) -> Result:
    text = run(*command, user=None, **({"UCX_LOG_LEVEL": "error", "UMMUNOTIFY_REPORT": "1"} | environment))
    lines = re.findall(r"^(\w+): (\d+) wrong after (\d+) changes$", text, re.MULTILINE)
    return Result({kind: int(wrong) for kind, wrong, _ in lines}, {kind: int(n) for kind, _, n in lines}, text)


NONE_WRONG = dict.fromkeys(KINDS, 0)


def test_without(programs: Programs) -> None:
    """The test sees what is stale: UCX's own hooks do not see system calls."""
    result = look(*programs.linked, "1", "300")
    assert set(result.wrong) == set(KINDS)
    assert min(result.wrong.values()) > 0, result.text


@pytest.mark.parametrize("threads", ["1", "4"])
def test_no_stale_registration(programs: Programs, source: str, threads: str) -> None:
    result = look(*RUN, "--source", source, "--", *programs.linked, threads, ROUNDS)
    assert result.wrong == NONE_WRONG, result.text
    assert min(result.changes.values()) > 0
    assert "registered at the end: 0" in result.text
    assert result.count("registrations watched") > 0
    # userfaultfd cannot watch the file: it is registered each time.
    assert (result.count("not watched") > 0) == (source == "uffd"), result.text


def test_hooks_that_are_asked_for(programs: Programs) -> None:
    require_source("uffd")
    result = look(*RUN, "--source", "uffd", "--", *programs.linked, "2", "200", UCX_MEM_MMAP_HOOK_MODE="bistro")
    assert result.wrong == NONE_WRONG, result.text


def test_no_hooks(programs: Programs) -> None:
    """Then UCX makes no cache that needs them, as the test's own. ucp_init makes one that does not, or none (1.18)."""
    require_source("uffd")
    result = look(*RUN, "--source", "uffd", "--", *programs.linked, "1", "1", UCX_MEM_MMAP_HOOK_MODE="none")
    assert "no cache\n" in result.text
    assert "caches 1," in result.text or "it has no cache" in result.text


def test_loaded_late(programs: Programs, source: str) -> None:
    """UCX that only a plugin sees. Nothing is patched."""
    assert "munmap is patched" in look(*programs.late, "1", "10").text
    result = look(*RUN, "--source", source, "--", *programs.late, "2", "200")
    assert result.wrong == NONE_WRONG, result.text
    assert "munmap is as it was" in result.text


def test_found_by_dlsym(programs: Programs) -> None:
    require_source("uffd")
    result = look(*RUN, "--source", "uffd", "--", *programs.late, "1", "100", "dlsym", UMMUNOTIFY_REPORT="")
    assert "tells UCX only a part: the program has found ucp_init by dlsym" in result.text


@pytest.mark.parametrize("ucx", ["system"], indirect=True)  # the wheel's archives are for older versions of libc
def test_linked_statically(ucx: Ucx, programs: Programs, tmp_path: Path) -> None:
    """Nothing can stand before its functions. The process says so."""
    require_source("uffd")
    archives = [str(ucx.library / f"lib{name}.a") for name in PARTS]
    if missing := [each for each in archives if not Path(each).exists()]:
        require("ucx", f"there is no {missing[0]}", always=False)
    numa = [str(found) for found in ucx.library.glob("libnuma.so.1")]  # UCX 1.13 needs it
    program = build(
        HERE / "ucx.c",
        tmp_path / "static",
        f"-isystem{ucx.include}",
        "-DLIBUCS=NULL",
        "-DLIBUCP=NULL",
        "-rdynamic",  # so that ucx.c finds them by dlsym
        "-Wl,--whole-archive",
        *archives,
        "-Wl,--no-whole-archive",
        programs.verbs,
        *numa,
        f"-Wl,-rpath,{Path(programs.verbs).parent}",
        "-ldl",
        "-lm",
        "-lrt",
    )
    result = look(*RUN, "--source", "uffd", "--", program, "1", "300")
    assert min(result.wrong.values()) > 0
    assert "tells UCX nothing: the program has UCX linked statically; link it dynamically" in result.text


def test_registrations_that_fail(programs: Programs, source: str) -> None:
    result = look(*RUN, "--source", source, "--", *programs.linked, "2", "200", "fail")
    assert result.wrong == NONE_WRONG, result.text
    assert "registered at the end: 0" in result.text


def test_fork(programs: Programs, source: str) -> None:
    """The child uses what it inherited, and none of it is stale; nor is the parent's afterwards."""
    result = look(*RUN, "--source", source, "--", *programs.linked, "1", "100", "fork")
    assert result.wrong == NONE_WRONG, result.text


def test_with_libfabric(programs: Programs) -> None:
    require_source("uffd")
    result = look(*RUN, "--libfabric", "--source", "uffd", "--", *programs.linked, "1", "100")
    assert result.wrong == NONE_WRONG, result.text
    assert "has no monitor for libfabric: it has loaded UCX" in result.text
    silent = look(*RUN, "--libfabric", "--source", "uffd", "--", *programs.linked, "1", "1", UMMUNOTIFY_REPORT="")
    assert "ummunotify" not in silent.text


def test_no_cache(programs: Programs) -> None:
    require_source("uffd")
    result = look(*RUN, "--source", "uffd", "--", *programs.linked, "1", "1", UCX_MEM_EVENTS="n")
    assert "no cache" in result.text
    assert "tells UCX nothing: it has no cache" in result.text


def test_without_a_source(programs: Programs) -> None:
    environment = {"UMMUNOTIFY_SOURCE": "daemon", "UMMUNOTIFY_SOCKET": "/nonexistent"}
    result = look(*RUN, "--", *programs.linked, "1", "100", **environment)
    assert "ummunotify: UCX goes on with its own hooks: daemon: no daemon runs here" in result.text
    assert min(result.wrong.values()) > 0, result.text
    silent = look(*RUN, "--quiet", "--", *programs.linked, "1", "1", UMMUNOTIFY_REPORT="", **environment)
    assert "ummunotify" not in silent.text


def test_program_without_ucx() -> None:
    require_source("uffd")
    says = [sys.executable, "-c", "print('said', flush=True)"]
    assert re.fullmatch(
        r"said\nummunotify: \S+ \(\d+\) tells UCX nothing: the program has not loaded UCX\n",
        run(*RUN, "--source", "uffd", *says),
    )
    assert run(*RUN, "--quiet", "--source", "uffd", *says) == "said\n"


# What neither takes a buffer nor maps memory, or only with a handle for memory that was mapped before.
HARMLESS = re.compile(
    r"ucp_(am_data_release|cleanup|config_.*|conn_request_query|context_(print_info|query)|device_.*|disconnect_nb|dt_.*|ep_.*"
    r"|get_version(_string)?|init(_version)?|lib_query|listener_.*|mem_(advise|print_info|query|unmap)|memh_.*|request_.*"
    r"|rkey_.*|stream_(data_release|recv_data_nb|recv_request_test|worker_poll)|tag_(probe_nb|recv_request_test)"
    r"|worker_.*)"
)


def test_every_operation_is_known(ucx: Ucx) -> None:
    """A version of UCX with an operation that is not in preload_ucx.c fails here."""
    code = (Path(__file__).parents[1] / "src/libummunotify/bridges/preload_ucx.c").read_text()
    drains = set(re.findall(r"^DRAINS\((\w+)\)", code, re.MULTILINE))
    declared = set()
    for header in ("ucp.h", "ucp_compat.h"):
        text = (ucx.include / "ucp/api" / header).read_text()
        text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
        declared |= set(re.findall(r"\b(ucp_\w+)\s*\((?!\*)", text))
    library = subprocess.run(
        ["nm", "-D", "--defined-only", ucx.library / "libucp.so.0"], capture_output=True, text=True, check=True
    )
    functions = declared & {line.split()[-1] for line in library.stdout.splitlines()}
    assert {"ucp_tag_send_nbx", "ucp_mem_map"} <= functions
    unknown = {name for name in functions - drains if not HARMLESS.fullmatch(name)}
    assert not unknown


def test_registrations_are_seen() -> None:
    """UCX's module for RDMA calls libibverbs by these functions only, through the PLT. MPICH's wheel has one."""
    place = Path(sys.prefix) / "lib/mpich/ucx"
    modules = [*place.glob("libuct_ib*.so.0"), *Path("/usr/lib").glob("*-linux-gnu/ucx/libuct_ib*.so.0")]
    if not modules:
        require("mpi", "there is no libuct_ib: pip install mpich")
    calls: set[str] = set()
    for module in modules:
        symbols = subprocess.run(["nm", "-D", "-u", module], capture_output=True, text=True, check=True)
        calls |= set(re.findall(r"\b(\w+)@", symbols.stdout))
    registering = {name for name in calls if re.match(r"ibv_(reg|rereg|dereg)_", name)}
    assert registering <= {"ibv_reg_mr", "ibv_reg_mr_iova2", "ibv_dereg_mr", "ibv_reg_dmabuf_mr"}
    assert {"ibv_reg_mr_iova2", "ibv_dereg_mr"} <= registering
