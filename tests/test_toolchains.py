"""Whatever compiler and kernel headers the package is built with, the kernel is handed nothing that is not cleared."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support import require

from ummunotify import Notifier
from ummunotify.bpf import libbpf

SOURCES = Path(__file__).parent.parent / "src/ummunotify"
COMPILERS = ("gcc", "clang", *(f"gcc-{version}" for version in range(12, 20)), *(f"clang-{v}" for v in range(14, 26)))


@pytest.mark.parametrize("compiler", [each for each in COMPILERS if shutil.which(each)])
@pytest.mark.parametrize("optimise", ["-O0", "-O2"])
def test_a_query_is_cleared(keeper: Notifier, tmp_path: Path, compiler: str, optimise: str) -> None:
    """The compiler fills with a pattern what the code leaves as it is. The kernel refuses what it does not know."""
    library = tmp_path / "platform.so"
    flags = (
        "-std=gnu11",
        optimise,
        "-shared",
        "-fPIC",
        "-ftrivial-auto-var-init=pattern",
        "-Wall",
        "-Wextra",
        "-Werror",
    )
    subprocess.run([compiler, *flags, str(SOURCES / "core/platform.c"), "-o", str(library)], check=True)
    skipped_runs = ctypes.CDLL(str(library)).umn_skipped_runs
    skipped_runs.restype = ctypes.c_int64
    feed = keeper._feed
    if not hasattr(feed, "_maps"):
        require("bpf", f"{keeper.source} has no program of this process")
    program = feed._maps.fds["program"]
    assert skipped_runs(program) == libbpf.program_info(program).recursion_misses
    assert skipped_runs(-1) < 0


def test_the_headers_do_not_say_what_the_kernel_is_handed() -> None:
    """Structures that grow are declared with the fields that are used: the headers' vary in size and padding."""
    extensible = re.compile(r"\b(union bpf_attr|struct (bpf_\w+_info|perf_event_attr|clone_args|procmap_query))\b")
    found = [
        f"{path.name}: {match[0]}"
        for path in SOURCES.rglob("*.[ch]")
        for match in extensible.finditer(re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL))
    ]
    assert found == []
