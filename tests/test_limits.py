"""Processes with little: it works, or an error names the cause."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from other_users import require_another_user
from support import LONG, probes, require_source

SOURCES = (*probes(), "uffd")

# Prints "works", or the error of the library's.
PROGRAM = """
import ctypes, mmap, os, resource, sys
sys.path.insert(0, sys.argv[2])
import ummunotify
from support import map_memory, unmap_memory
from ummunotify.selftest.changes import store
libc = ctypes.CDLL(None, use_errno=True)
source = sys.argv[1]
{before}
try:
    umn = ummunotify.open(source)
except ummunotify.UmmunotifyError as error:
    print("refused:", error)
    sys.exit(0)
{after}
address = map_memory(4096)
store(address)
try:
    region = umn.watch((address, 4096))
except ummunotify.UmmunotifyError as error:  # with uffd, watching begins with the first region
    print("refused:", error)
    sys.exit(0)
assert region.valid
umn.fileno()
unmap_memory(address, 4096)
assert not region.valid
assert umn.changed
assert [event.region for event in umn.read(10)] == [region]
{late}
umn.close()
print("works")
"""

LIMIT = "resource.setrlimit(resource.{name}, ({value}, resource.getrlimit(resource.{name})[1]))"
GROW = """
try:
    more = [umn.watch((address + i, 1)) for i in range(1)] if source != "uffd" else []
    if source != "uffd":
        more += [umn.watch((address, 1)) for i in range(3000)]
except ummunotify.UmmunotifyError as error:
    print("refused:", error)
"""

CASES: dict[str, tuple[str, str, str]] = {
    "mlockall before": ("assert libc.mlockall(3) == 0", "", GROW),
    "mlockall after": ("", "assert libc.mlockall(3) == 0", GROW),
    "RLIMIT_MEMLOCK": (LIMIT.format(name="RLIMIT_MEMLOCK", value=0), "", GROW),
    "RLIMIT_NPROC": (LIMIT.format(name="RLIMIT_NPROC", value=1), "", GROW),
    "RLIMIT_NPROC, unprivileged after": (
        "",
        LIMIT.format(name="RLIMIT_NPROC", value=1) + "\nos.setresuid(65534, 65534, 65534)",
        GROW,
    ),
    "setuid after": ("", "os.setresuid(65534, 65534, 65534)", GROW),
    "no descriptors": (LIMIT.format(name="RLIMIT_NOFILE", value=0), "", ""),
    "few descriptors": (LIMIT.format(name="RLIMIT_NOFILE", value=12), "", ""),
    "no descriptors after": ("", LIMIT.format(name="RLIMIT_NOFILE", value=0), GROW),
    "no memory after": ("", "", LIMIT.format(name="RLIMIT_AS", value=1 << 20) + GROW),
    "little memory": (LIMIT.format(name="RLIMIT_AS", value=400 << 20), "", GROW),
    "no /proc": (
        "assert libc.unshare(0x20000) == 0 and libc.mount(None, b'/', None, 0x44000, None) == 0\n"
        "assert libc.umount2(b'/proc', 2) == 0",
        "",
        GROW,
    ),
}


def run(program: str, source: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which it may leave without what it needs."""
    return subprocess.run(
        [sys.executable, "-c", program, source, str(Path(__file__).parent)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("case", CASES)
def test_works_or_says_why_not(case: str, source: str) -> None:
    require_source(source)
    before, after, late = CASES[case]
    if "setresuid" in after:
        require_another_user()
    result = run(PROGRAM.format(before=before, after=after, late=late), source)
    assert (result.stderr, result.returncode) == ("", 0)
    assert "works" in result.stdout or len(result.stdout) > len("refused: ") + 20, result.stdout


# ---- Seccomp ----

SECCOMP = """
import struct
def refuse(*numbers, errno=1):
    code = struct.pack("=HBBI", 0x20, 0, 0, 0)
    for i, number in enumerate(numbers):
        code += struct.pack("=HBBI", 0x15, len(numbers) - i, 0, number)
    code += struct.pack("=HBBI", 6, 0, 0, 0x7FFF0000) + struct.pack("=HBBI", 6, 0, 0, 0x50000 | errno)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("=HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer))
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, program, 0, 0) == 0
"""
IO_URING, USERFAULTFD, BPF, CLOSE_RANGE, CLONE3 = 425, 323, 321, 436, 435
FILTERS: dict[str, tuple[str, dict[str, str]]] = {
    "clone3": (f"refuse({CLONE3}, errno=38)", {"bpf": "works", "uffd": "works"}),
    "io_uring": (f"refuse({IO_URING}, 426, 427)", {"bpf": "works", "uffd": "works"}),
    "bpf": (f"refuse({BPF})", {"bpf": "refused", "uffd": "works"}),
    "userfaultfd": (f"refuse({USERFAULTFD})", {"bpf": "works"}),
    "io_uring and close_range": (f"refuse({IO_URING}, {CLOSE_RANGE})", {"bpf": "io_uring", "uffd": ""}),
}


LATE = """
import ctypes, mmap, os, sys
sys.path.insert(0, sys.argv[2])
import ummunotify
from support import map_memory, unmap_memory
from ummunotify.selftest.changes import store
libc = ctypes.CDLL(None, use_errno=True)
PAGE, COUNT = mmap.PAGESIZE, 300
umn = ummunotify.open(sys.argv[1])
address = map_memory(COUNT * PAGE)
for i in range(COUNT):
    store(address + i * PAGE)
regions = [umn.watch((address + i * PAGE, PAGE)) for i in range(COUNT)]
{code}
unmap_memory(address, PAGE)
assert not regions[0].valid
seen = set()
try:
    for _ in range(3):
        seen.update(event.region for event in umn.read())
except ummunotify.UmmunotifyError as error:
    print(error)
assert regions[0] in seen
unmap_memory(address + PAGE, PAGE)
assert not regions[1].valid
umn.close()
"""


@pytest.mark.parametrize("source", SOURCES)
def test_bpf_is_refused_after_opening(source: str) -> None:
    """Reading ends, and says that it does not know any more whether the kernel has skipped runs."""
    require_source(source)
    program = LATE.replace("{code}", SECCOMP + f"refuse({BPF})")
    result = run(program, source)
    assert (result.stderr, result.returncode) == ("", 0)
    assert bool(result.stdout) == source.startswith("bpf")


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("refused", FILTERS)
def test_seccomp(refused: str, source: str) -> None:
    require_source(source)
    code, expected = FILTERS[refused]
    program = PROGRAM.format(before=SECCOMP + code, after="", late=GROW)
    result = run(program, source)
    assert (result.stderr, result.returncode) == ("", 0)
    assert expected.get(source.partition(":")[0], "") in result.stdout
