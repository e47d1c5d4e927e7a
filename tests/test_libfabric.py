"""libfabric's memory monitor: the main program is in tests/c.

tests/vm/test_libfabric_rdma.py tests it with libfabric's caches, and RDMA.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import COMMAND
from support import require, require_source
from test_c import HERE, build, flags, run, source

__all__ = ["source"]  # a fixture

LIBFABRIC = "-lfabric"
RUN = [*COMMAND, "run", "--libfabric"]


@pytest.fixture(scope="module", autouse=True)
def libfabric() -> Iterator[None]:
    if not Path("/usr/include/rdma/fi_ext.h").exists() or not shutil.which("fi_info"):
        require("libfabric", "libfabric-dev and libfabric-bin are not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UMMUNOTIFY_REPORT", "1")
        # Else a library that libfabric loads writes files about programs that fail.
        patch.setenv("IPATH_NO_BACKTRACE", "1")
        yield


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    lib = f"-I{Path(__file__).parents[1] / 'src/libummunotify'}"
    return build(HERE / "libfabric.c", tmp_path_factory.mktemp("libfabric") / "libfabric", lib, LIBFABRIC, *flags())


def test_monitor(program: str, source: str) -> None:
    assert run(program, UMMUNOTIFY_SOURCE=source).endswith("caches\n")


def test_without_a_source(program: str) -> None:
    with pytest.raises(AssertionError, match="no daemon runs here"):
        run(program, "the_case", UMMUNOTIFY_SOURCE="daemon", UMMUNOTIFY_SOCKET="/nonexistent")


def report(output: str) -> str:
    found = re.search(r"libfabric's monitor, source ([a-z:]+): (\d+) subscribed", output)
    assert found, output
    return found[1]


def test_preloaded(source: str) -> None:
    says = run(*RUN, "--source", source, "--", "fi_info", "-l")
    assert report(says).startswith(source)
    assert "tcp:" in says


def test_preloaded_without_a_source() -> None:
    says = run(*RUN, "fi_info", "-l", UMMUNOTIFY_SOURCE="daemon", UMMUNOTIFY_SOCKET="/nonexistent")
    assert "ummunotify: libfabric goes on with its own monitor: daemon: no daemon runs here" in says
    assert "tcp:" in says
    assert "ummunotify" not in run(
        *RUN, "--quiet", "fi_info", "-l", UMMUNOTIFY_SOURCE="daemon", UMMUNOTIFY_SOCKET="/nonexistent"
    )


def test_cache_that_was_disabled(source: str) -> None:
    assert "ummunotify" not in run(*RUN, "--source", source, "fi_info", "-l", FI_MR_CACHE_MONITOR="disabled")


def test_programs_without_libfabric() -> None:
    require_source("uffd")
    says = [sys.executable, "-c", "print('said', flush=True)"]
    no_use = r"said\nummunotify: \S+ \(\d+\) has no monitor for libfabric: it has not loaded libfabric\n"
    assert re.fullmatch(no_use, run(*RUN, "--source", "uffd", *says))
    # Without a daemon, one of the program's own is started, or tried.
    assert re.fullmatch(no_use, run(*RUN, *says, UMMUNOTIFY_SOCKET="/nonexistent"))
    assert run(*RUN, "--quiet", "--source", "uffd", *says) == "said\n"
    # A program that starts others is not meant, and neither are they.
    assert run(*RUN, "--source", "uffd", "sh", "-c", f"{sys.executable} -c 0; echo said") == "said\n"


@pytest.mark.parametrize("linked", ["dynamically", "statically", "by dlsym"])
def test_programs_that_call_another_fi_getinfo(tmp_path: Path, linked: str) -> None:
    """Or none. They end as they did, and say why there is no monitor."""
    require_source("uffd")
    main = tmp_path / "main.c"
    main.write_text("""
        #define _GNU_SOURCE
        #include <dlfcn.h>
        #include <rdma/fabric.h>
        #ifdef STATICALLY
        const char *volatile name = "mr_cache_monitor"; /* as in libfabric itself */
        #endif
        int main(void)
        {
        #ifdef BY_DLSYM
            return !dlsym(dlopen("libfabric.so.1", RTLD_NOW), "fi_getinfo");
        #elif defined(LINKED)
            return !fi_version();
        #else
            return 0;
        #endif
        }
    """)
    options = {
        "dynamically": ["-DLINKED", LIBFABRIC],
        "statically": ["-DSTATICALLY"],
        "by dlsym": ["-DBY_DLSYM", "-ldl"],
    }
    program = build(main, tmp_path / "main", *options[linked])
    says = run(*RUN, "--source", "uffd", program)
    why = "linked statically" if linked == "statically" else "not called fi_getinfo"
    assert re.fullmatch(rf"ummunotify: main \(\d+\) has no monitor for libfabric: [^\n]*{why}[^\n]*\n", says)


def test_plugin_with_its_own_libfabric(tmp_path: Path, source: str) -> None:
    """As MPI libraries do: neither libfabric nor what is linked with it can be seen by others."""
    plugin, main = tmp_path / "plugin.c", tmp_path / "main.c"
    plugin.write_text("""
        #include <rdma/fabric.h>
        int ask(void)
        {
            struct fi_info *info;
            int error = fi_getinfo(FI_VERSION(1, 13), NULL, NULL, 0, NULL, &info);

            if (!error)
                fi_freeinfo(info);
            return error;
        }
    """)
    main.write_text("""
        #include <dlfcn.h>
        int main(int argc, char **argv)
        {
            void *plugin = dlopen(argv[argc - 1], RTLD_NOW | RTLD_LOCAL);
            int (*ask)(void) = plugin ? (int (*)(void))dlsym(plugin, "ask") : 0;
            int error = ask ? ask() : 1;

            return error || dlclose(plugin);
        }
    """)
    library = build(plugin, tmp_path / "plugin.so", "-shared", "-fPIC", LIBFABRIC)
    program = build(main, tmp_path / "main", "-ldl")
    says = run(*RUN, "--source", source, program, library)
    assert report(says).startswith(source)


def test_old_program(tmp_path: Path) -> None:
    """Linked with the first version of fi_getinfo, whose structures are shorter, it still gets that."""
    require_source("uffd")
    program = tmp_path / "old.c"
    program.write_text("""
        #include <rdma/fabric.h>
        __asm__(".symver fi_getinfo, fi_getinfo@FABRIC_1.0");
        __asm__(".symver fi_freeinfo, fi_freeinfo@FABRIC_1.0");
        int main(void)
        {
            struct fi_info *info;
            int error = fi_getinfo(FI_VERSION(1, 0), NULL, NULL, 0, NULL, &info);

            if (!error)
                fi_freeinfo(info);
            return error;
        }
    """)
    old = build(program, tmp_path / "old", LIBFABRIC)
    says = run(*RUN, "--source", "uffd", old, LD_DEBUG="bindings")
    bound = set(re.findall(r"to \S*/(\S+) \[0\]: normal symbol `fi_getinfo' \[(FABRIC_\S+)\]", says))
    assert {("libummunotify-libfabric.so", "FABRIC_1.0"), ("libfabric.so.1", "FABRIC_1.0")} <= bound
    assert report(says) == "uffd"
