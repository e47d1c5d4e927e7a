"""Whatever compiler and kernel headers the library is built with, the kernel is handed nothing that is not cleared."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import require_source

from ummunotify import Notifier

SOURCES = Path(__file__).parent.parent / "src/libummunotify"
COMPILERS = ("gcc", "clang", *(f"gcc-{version}" for version in range(12, 20)), *(f"clang-{v}" for v in range(14, 26)))
SOURCE_FOLDERS = ("process", "table", "sources", "notifier", "cache", "bridges")

SEES = """
import mmap, sys, ummunotify

with ummunotify.open(sys.argv[1]) as umn:
    memory = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[0] = 1
    region = umn.watch(memory)
    assert region.valid
    memory.close()
    assert not region.valid
    assert len(umn.read(1)) == 1
    maps = open("/proc/self/maps").read()
    assert sys.argv[2] in maps, maps
"""


@pytest.mark.parametrize("compiler", [each for each in COMPILERS if shutil.which(each)])
@pytest.mark.parametrize("optimise", ["-O0", "-O2"])
def test_what_the_kernel_is_handed_is_cleared(keeper: Notifier, tmp_path: Path, compiler: str, optimise: str) -> None:
    """The compiler fills with a pattern what the code leaves as it is. The kernel refuses what it does not know."""
    library = tmp_path / "libummunotify.so"
    flags = [
        "-std=gnu11",
        optimise,
        "-shared",
        "-fPIC",
        "-ftrivial-auto-var-init=pattern",
        "-Wall",
        "-Wextra",
        "-Werror",
    ]
    sources = sorted(str(path) for folder in SOURCE_FOLDERS for path in (SOURCES / folder).glob("*.c"))
    sources = [path for path in sources if "preload_" not in path]  # for a process of their own each
    includes = [f"-I{SOURCES}", f"-I{SOURCES / 'include'}"]
    links = ["-pthread", "-ldl", "-Wl,-soname,libummunotify.so", "-Wl,-z,nodelete"]
    command = [compiler, *flags, '-DUMN_VERSION="pattern"', *includes, *sources, *links, "-o", str(library)]
    subprocess.run(command, check=True)
    require_source("uffd")
    for source in (keeper.source, "uffd"):
        environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
        subprocess.run([sys.executable, "-c", SEES, source, str(library)], env=environment, check=True)


def test_the_headers_do_not_say_what_the_kernel_is_handed() -> None:
    """Structures that grow are declared with the fields that are used: the headers' vary in size and padding."""
    extensible = re.compile(r"\b(union bpf_attr|struct (bpf_\w+_info|perf_event_attr|clone_args|procmap_query))\b")
    found = [
        f"{path.name}: {match[0]}"
        for path in SOURCES.rglob("*.[ch]")
        # These two clear all of each, whatever its size; programs for BPF take no declaration from the headers.
        if path.name not in ("objects.c", "peers.c") and not path.name.endswith(".bpf.c")
        for match in extensible.finditer(re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL))
    ]
    assert found == []
