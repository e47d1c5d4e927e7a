"""The real kernel: each change of a mapping, and what must not count as one; the cases are `ummunotify selftest`'s."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import LONG, require, require_root

from ummunotify import Notifier
from ummunotify.selftest import Watched, units
from ummunotify.selftest.changes import CASES, SLOW_CHANGES, Act, Case, Memory, MissingError, in_thread

RARE = {
    "madvise PAGEOUT of private memory",  # needs swap space
    "brk, where prctl has placed the heap",  # needs CAP_SYS_RESOURCE over the host
}
"""Changes that not every machine can make, whatever is installed."""


def run(case: Case, act: Act, umn: Notifier) -> None:
    try:
        with Memory() as memory:
            case.prepare(memory)
            with Watched(umn, memory) as watched:
                assert watched.invalid == set()
                assert not umn.changed
                act(memory)
                memory.fill()
                check(case, watched)
    except MissingError as error:
        require("changes", f"{case.name}: {error}", always=case.name not in RARE)


def check(case: Case, watched: Watched) -> None:
    expected, allowed = units(case)
    umn, memory = watched.umn, watched.memory
    moved = watched.moved
    invalid = watched.invalid
    assert expected | moved <= invalid, "missed"
    assert invalid <= allowed, "invalidated without need"
    units_inside = set(range(memory.count))
    inside = expected & units_inside
    hit = inside or invalid & units_inside
    assert watched.whole.valid == (not hit)
    assert umn.changed == bool(invalid)

    events = {event.region: event for event in umn.read()}
    assert not umn.changed
    assert {unit for unit, region in watched.units.items() if region in events} == invalid
    assert (watched.whole in events) == bool(hit)
    # The last byte's page is the last unit's, if that is one page.
    if not case.needless and memory.unit == mmap.PAGESIZE:
        assert (watched.last_byte in events) == (memory.count - 1 in expected)
    for region in watched.all:
        if region in events:
            event = events[region]
            assert (event.start, event.end) != (0, 0)
            assert region.address <= event.start < event.end <= region.address + region.length
    if case.exact and inside:
        event = events[watched.whole]
        assert event.exact
        assert (event.start, event.end) == (memory.at(min(inside)), memory.at(max(inside) + 1))


# One notifier for all: the cases also show that they leave nothing behind in it.


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_by_the_same_thread(case: Case, keeper: Notifier) -> None:
    run(case, case.act, keeper)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_by_another_thread(case: Case, keeper: Notifier) -> None:
    run(case, in_thread(case.act), keeper)


@pytest.mark.skipif("UMMUNOTIFY_SLOW" not in os.environ, reason="UMMUNOTIFY_SLOW is not set")
@pytest.mark.parametrize("case", SLOW_CHANGES, ids=lambda case: case.name)
def test_slow(case: Case, keeper: Notifier) -> None:
    run(case, case.act, keeper)


# A process with little memory that forks: in the fork the kernel reclaims pages of files, for want of page tables.
RECLAIM = """
import ctypes, mmap, os, sys, tempfile, ummunotify

PAGE, FILE_PAGES, TABLES = mmap.PAGESIZE, 4096, 4000
limit = sys.argv[1]

def set_limit(bytes):
    with open(limit, "w") as file:
        file.write(str(bytes))

with tempfile.TemporaryFile(dir="/var/tmp") as file:
    file.write(b"x" * FILE_PAGES * PAGE)
    file.flush()
    os.fsync(file.fileno())
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # or the pages would be charged to whoever wrote them
    mapped = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))

# A page in each 2 MiB, so that each needs a page table.
sparse = mmap.mmap(-1, TABLES << 21, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
sparse.madvise(mmap.MADV_NOHUGEPAGE)
for i in range(TABLES):
    sparse[i << 21] = 1

def present():
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(address // PAGE * 8)
        data = pagemap.read(FILE_PAGES * 8)
    return [data[i * 8 + 7] >= 0x80 for i in range(FILE_PAGES)]

with ummunotify.open() as umn:
    for i in range(FILE_PAGES):
        mapped[i * PAGE]
    regions = [umn.watch((address + i * PAGE, PAGE)) for i in range(FILE_PAGES)]
    before = present()
    with open(sys.argv[2]) as file:
        set_limit(int(file.read()) + (1 << 20))
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    set_limit(-1 if "limit_in_bytes" in limit else "max")
    after = present()
    gone = [i for i in range(FILE_PAGES) if before[i] and not after[i]]
    print(len(gone), sum(regions[i].valid for i in gone))
"""


def test_reclaim_inside_a_fork(keeper: Notifier, request: pytest.FixtureRequest) -> None:
    controller = next(
        (path for path in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")) if (path / "cgroup.procs").exists()),
        None,
    )
    if controller is None:
        require("cgroup", "there is no cgroup file system")
    group = controller / f"ummunotify-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        require("cgroup", f"no group can be made: {error}")
    request.addfinalizer(group.rmdir)
    limit, usage = group / "memory.limit_in_bytes", group / "memory.usage_in_bytes"
    if not limit.exists():
        limit, usage = group / "memory.max", group / "memory.current"
    if not limit.exists():
        require("cgroup", "there is no memory controller")

    enter = ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs")]
    result = subprocess.run(
        [*enter, sys.executable, "-c", RECLAIM, str(limit), str(usage)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    gone, missed = map(int, result.stdout.split())
    assert gone > 0
    assert missed == 0


# The kernel takes the last huge page from an older child, to copy it for its parent, which does what the argument says.
TAKE_FROM_CHILD = """
import os, signal, sys, ummunotify
from pathlib import Path
from ummunotify.selftest.changes import (
    ANONYMOUS, CLONE_PARENT_SETTID, HUGE_PAGE, MAP_HUGETLB, PAGE, READ_WRITE, call, clone_exit, load, store,
)

pool = Path("/proc/sys/vm/nr_hugepages")
before = pool.read_text()
pool.write_text("1")
try:
    address = call("mmap", 0, HUGE_PAGE, READ_WRITE, ANONYMOUS | MAP_HUGETLB, -1, 0)
    store(address)

    def present():
        with open("/proc/self/pagemap", "rb") as pagemap:
            pagemap.seek(address // PAGE * 8)
            return pagemap.read(8)[7] >= 0x80

    watched, changed = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        with ummunotify.open() as umn:
            region = umn.watch((address, HUGE_PAGE))
            assert region.valid and present()
            os.write(watched[1], b".")
            os.read(changed[0], 1)
            print(present(), region.valid, flush=True)
        os._exit(0)
    os.close(watched[1])
    assert os.read(watched[0], 1) == b"."
    if sys.argv[1] == "clone":
        clone_exit(CLONE_PARENT_SETTID, address)
    else:
        store(address)
    os.write(changed[1], b".")
    os.waitpid(child, 0)
finally:
    pool.write_text(before)
"""


@pytest.mark.parametrize("how", ["clone", "write"])
def test_a_huge_page_taken_from_a_child(keeper: Notifier, how: str) -> None:
    require_root("only root can reserve huge pages")
    try:
        reserved = int(Path("/proc/sys/vm/nr_hugepages").read_text())
    except OSError as error:
        require("changes", f"there is no hugetlb memory: {error}")
    if reserved:
        require("changes", "huge pages are reserved on this machine, which the test would use up")
    result = subprocess.run(
        [sys.executable, "-c", TAKE_FROM_CHILD, how], capture_output=True, text=True, check=False, timeout=LONG
    )
    assert result.stdout.split() == ["False", "False"], result.stderr
