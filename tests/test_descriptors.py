"""A program that closes all descriptors, or uses their numbers for files of its own.

Afterwards changes are seen, or nothing is valid and each call says why; and of the program's files none is closed.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support import LONG, SLOW, probes, require_source

SOURCES = (*probes(), "uffd")

PROGRAM = """
import ctypes, mmap, os, select, sys, threading, time
sys.path.insert(0, sys.argv[1])
import ummunotify
from support import LONG, SYS, bpf_map, map_memory, unmap_memory
from ummunotify.selftest.changes import load, store

source, how, when = sys.argv[2:]
PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
before = {int(fd) for fd in os.listdir("/proc/self/fd")}
umn = ummunotify.open(source)
end = 200

def mapped():
    address = map_memory(PAGE)
    store(address)
    return address

def close_all():
    if how == "closerange":
        os.closerange(3, end)
        return []
    if how == "close_range":
        assert libc.syscall(436, 3, end - 1, 0) == 0
        return []
    made = {
        "file": lambda: os.open("/dev/null", os.O_RDWR),
        "pipe's ends": lambda: os.pipe()[end_of_pipe],
        "epoll": lambda: select.epoll().detach() if hasattr(select.epoll, "detach") else libc.epoll_create1(0),
        "eventfd": lambda: os.eventfd(1),
        "BPF map": bpf_map,
        "userfaultfd": lambda: libc.syscall(SYS["userfaultfd"], 1),
    }[how]
    files = []
    # Of each number that the process has in use now: another file, and one file for all of them.
    numbers = [int(fd) for fd in os.listdir("/proc/self/fd") if int(fd) > 2]
    for i, number in enumerate(numbers):
        global end_of_pipe
        end_of_pipe = i % 2
        fd = made()
        assert fd >= 0
        if number != fd:
            os.dup2(fd, number)
            if how == "pipe's ends":
                os.close(fd)
            else:
                files.append(fd)
        files.append(number)
    return files

def identity(fd):
    status = os.fstat(fd)
    return os.readlink(f"/proc/self/fd/{fd}"), status.st_dev, status.st_ino

a, b = mapped(), mapped()
if when != "before watch":
    region, other = umn.watch((a, PAGE)), umn.watch((b, PAGE))
    assert region.valid and other.valid
if when in ("armed", "a thread waits"):
    umn.fileno()
outcome, reported = [], []
if when == "a thread waits":
    def wait():
        try:
            outcome.append(umn.read(None))
        except ummunotify.UmmunotifyError as error:
            outcome.append(error)
    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)

files = close_all()
identities = {fd: identity(fd) for fd in files}
said = []

def attempt(act):
    "What it returns, or None if it says why not."
    try:
        return act()
    except ummunotify.UmmunotifyError as error:
        assert len(str(error)) > 20, error
        said.append(str(error))

def was_reported(watched, found):
    reported.extend(event.region for event in found)
    if watched not in reported and when == "a thread waits":
        # Then that thread has taken it.
        thread.join(LONG)
        reported.extend(event.region for event in outcome[0])
    return watched in reported

def check_region(watched, address):
    unmap_memory(address, PAGE)
    assert not watched.valid, "missed"
    assert umn.changed or when == "a thread waits"  # which may have taken it
    found = attempt(umn.read)
    assert found is None or was_reported(watched, found), "not reported"
    assert not watched.valid
    # It is renewed, and sees the next change, or that is refused, or it stays invalid.
    again = map_memory(PAGE, address)
    store(again)
    attempt(watched.renew)
    unmap_memory(address, PAGE)
    assert not watched.valid, "missed after renew"
    attempt(umn.read)

if when == "a thread waits":
    unmap_memory(a, PAGE)
    assert not region.valid, "missed"
elif when != "before watch":
    check_region(region, a)

# New regions, so many that the table grows.
for _ in range(3):
    c = mapped()
    new = attempt(lambda: umn.watch((c, PAGE)))
    if new is not None:
        check_region(new, c)
d = mapped()
many = []
while len(many) < 1500 and (new := attempt(lambda: umn.watch((d, PAGE)))) is not None:
    many.append(new)
unmap_memory(d, PAGE)
assert not any(each.valid for each in many), "missed after growing"
attempt(umn.read)
for each in many[::2]:
    each.close()

fd = attempt(umn.fileno)
waited = attempt(lambda: umn.read(0.01))
with_another = attempt(lambda: ummunotify.open(source))
if with_another is not None:
    e = mapped()
    theirs = with_another.watch((e, PAGE))
    unmap_memory(e, PAGE)
    assert not theirs.valid, "missed by a new notifier"
    assert [event.region for event in with_another.read()] == [theirs]
    with_another.close()
if when != "before watch":
    unmap_memory(b, PAGE)
    assert not other.valid, "missed"
umn.close()
if when == "a thread waits":
    thread.join(LONG)
    assert not thread.is_alive(), "a thread waits for ever"
    assert outcome
    assert isinstance(outcome[0], Exception) or outcome[0] == [] or was_reported(region, outcome[0])
for fd, was in identities.items():
    assert identity(fd) == was, f"the program's descriptor {fd} was closed or replaced"
del umn
for fd, was in identities.items():
    assert identity(fd) == was
if "file" == how:
    assert os.write(files[0], b"x") == 1
print("done", len(said), with_another is not None)
"""

HOWS = ("closerange", "close_range", "file", "pipe's ends", "epoll", "eventfd", "BPF map", "userfaultfd")
WHENS = ("before watch", "watched", "armed", "a thread waits")
# Each of the one with one of the other, and with UMMUNOTIFY_SLOW all with all.
PAIRS = [
    (how, when)
    for i, how in enumerate(HOWS)
    for j, when in enumerate(WHENS)
    if SLOW or (i + j) % len(WHENS) == 0 or how == "closerange"
]


def run(program: str, source: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, whose descriptors are its own too; with what it says as an error in its output."""
    require_source(source)
    return subprocess.run(
        [sys.executable, "-c", program, str(Path(__file__).parent), source, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LONG,
        check=False,
    )


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("how", "when"), PAIRS)
def test_descriptors_that_the_program_closes_or_replaces(how: str, when: str, source: str) -> None:
    result = run(PROGRAM, source, how, when)
    assert result.returncode == 0, result.stdout
    assert result.stdout.startswith("done"), result.stdout


ENDS = """
import ctypes, mmap, os, sys, threading
sys.path.insert(0, sys.argv[1])
import ummunotify
from support import map_memory, unmap_memory
from ummunotify.selftest.changes import store

source, call, by = sys.argv[2:]
PAGE, COUNT = mmap.PAGESIZE, 300
libc = ctypes.CDLL(None, use_errno=True)
umn = ummunotify.open(source)
address = map_memory(COUNT * PAGE)
for i in range(COUNT):
    store(address + i * PAGE)
regions = [umn.watch((address + i * PAGE, PAGE)) for i in range(COUNT)]

def drain():
    # Python's read takes what there is piece by piece; C's callers do.
    if by == "the process":
        os.closerange(3, 200)
    else:
        assert libc.syscall(436, 3, 0xFFFFFFFF, 2) == 0  # CLOSE_RANGE_UNSHARE
    unmap_memory(address, PAGE)
    found = set()
    for i in range(2):
        try:
            if call == "dispatch":
                umn.dispatch(lambda event: found.add(event.region))
            else:
                found.update(event.region for event in umn.read())
        except ummunotify.DescriptorClosedError:
            assert i == 1
    assert regions[0] in found
    assert not regions[0].valid

thread = threading.Thread(target=drain)
thread.start()
thread.join()
assert not regions[0].valid
unmap_memory(address + PAGE, PAGE)
assert not regions[1].valid
umn.close()
print("done")
"""


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("call", ["read", "dispatch"])
@pytest.mark.parametrize("by", ["the process", "a thread, of its own table"])
def test_reading_ends(by: str, call: str, source: str) -> None:
    """Also where the source can no longer say what has changed."""
    result = run(ENDS, source, call, by)
    assert (result.stdout, result.returncode) == ("done\n", 0)
