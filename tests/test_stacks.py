"""`open(stacks=True)`: each Invalidation has the stack of its change, and no event depends on that."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import (
    LONG,
    hit,
    in_child,
    map_memory,
    meanwhile,
    open_fds,
    probes,
    require_source,
    unmap_memory,
    watch,
)
from test_c import HERE, build
from test_docs import block

import ummunotify
from ummunotify import Notifier, SourceUnavailableError, StacksUnavailableError
from ummunotify._stacks import Stack
from ummunotify.bpf import libbpf
from ummunotify.selftest.changes import PAGE, Memory

with_stacks = [each for each in probes() if each != "bpf:zap"]


def open_traced(source: str) -> Notifier:
    require_source(source)
    return ummunotify.open(source, stacks=True)


@pytest.fixture(params=with_stacks)
def umn(request: pytest.FixtureRequest) -> Iterator[Notifier]:
    with open_traced(request.param) as opened:
        yield opened


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    target = tmp_path_factory.mktemp("stacks") / "stacks.so"
    build(HERE / "stacks.c", target, "-shared", "-fPIC", "-fno-omit-frame-pointer")
    return ctypes.CDLL(str(target))


def call(function: Callable[..., object], address: int, pages: int = 1) -> None:
    function(ctypes.c_void_p(address), ctypes.c_size_t(pages * PAGE))


def written(pages: int = 1) -> int:
    """Memory that has pages."""
    address = map_memory(pages * PAGE)
    ctypes.memset(address, 1, pages * PAGE)
    return address


def stack_of(umn: Notifier) -> Stack:
    [event] = umn.read()
    assert event.stack is not None
    assert event.stack.thread == event.thread
    return event.stack


def functions(stack: Stack) -> list[str]:
    return [frame.function for frame in stack.frames]


def test_function_of_the_c_library(umn: Notifier, library: ctypes.CDLL) -> None:
    """It makes no frame, and yet its caller is found."""
    address = written(2)
    umn.watch((address, PAGE))
    before = time.monotonic()
    call(library.outer, address, 2)
    after = time.monotonic()
    stack = stack_of(umn)
    assert functions(stack)[1:3] == ["unmap_buffer", "outer"]
    frame = stack.frames[1]
    assert Path(frame.file).name == "stacks.c"
    assert "munmap(address" in (HERE / "stacks.c").read_text().splitlines()[frame.line - 1]
    assert before <= stack.time <= after
    assert (stack.start, stack.end) == (address, address + 2 * PAGE)
    assert (stack.process, stack.thread) == (os.getpid(), threading.get_native_id())
    assert stack.process_name == Path("/proc/self/comm").read_text().strip()
    assert stack.thread_name == Path("/proc/thread-self/comm").read_text().strip()
    assert any("munmap" in name for name in stack.kernel)
    assert not any("bpf" in name for name in stack.kernel)


def test_bare_system_call(umn: Notifier, library: ctypes.CDLL) -> None:
    address = written()
    umn.watch((address, PAGE))
    call(library.outer_bare, address)
    assert functions(stack_of(umn))[:2] == ["unmap_bare", "outer_bare"]


def test_python(umn: Notifier) -> None:
    """Python's own function is called by it; which is shown where that has symbols."""
    memory = mmap.mmap(-1, PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[0] = 1
    umn.watch(memory)
    memory.close()
    frames = stack_of(umn).frames
    assert "munmap" in frames[0].function
    assert "python" in frames[1].module or "mmap" in frames[1].module


def test_another_thread(umn: Notifier, library: ctypes.CDLL) -> None:
    address = written()
    umn.watch((address, PAGE))

    def work() -> None:
        Path("/proc/thread-self/comm").write_text("cleaner")
        call(library.drop_pages, address)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    stack = stack_of(umn)
    assert (stack.thread, stack.process) == (thread.native_id, os.getpid())
    assert stack.thread_name == "cleaner"
    assert functions(stack)[1] == "drop_pages"
    unmap_memory(address, PAGE)


def test_another_process(umn: Notifier, tmp_path: Path) -> None:
    path = tmp_path / "shared"
    path.write_bytes(bytes(PAGE))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), PAGE) as memory:
        memory[0] = 1
        umn.watch(memory)
        script = "import os, sys; os.truncate(sys.argv[1], 0); print('done', flush=True); sys.stdin.read()"
        with subprocess.Popen(
            [sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == b"done\n"
            name = Path(f"/proc/{other.pid}/comm").read_text().strip()
            stack = stack_of(umn)
            assert "truncate" in functions(stack)[0]
            other.communicate()
        assert (stack.process, stack.process_name) == (other.pid, name)
        assert any("truncate" in each for each in stack.kernel)


def test_first_of_several(umn: Notifier, library: ctypes.CDLL) -> None:
    """Changes that are reported together have the first one's stack, and the next report that of the next."""
    address = written(2)
    umn.watch((address, 2 * PAGE))
    call(library.drop_pages, address)
    ctypes.memset(address, 1, PAGE)
    call(library.unmap_buffer, address)
    map_memory(PAGE, address)  # or else what looks up functions may map and unmap something there
    assert functions(stack_of(umn))[1] == "drop_pages"
    call(library.unmap_bare, address + PAGE)
    assert functions(stack_of(umn))[0] == "unmap_bare"
    unmap_memory(address, PAGE)


def test_watched_after_a_change(umn: Notifier, library: ctypes.CDLL) -> None:
    """What was before is not taken for it."""
    address = written()
    umn.watch((address, PAGE))
    call(library.unmap_buffer, address)
    assert map_memory(PAGE, address) == address
    ctypes.memset(address, 1, PAGE)
    region = umn.watch((address, PAGE))
    call(library.unmap_bare, address)
    second = next(event.stack for event in umn.read() if event.region is region)
    assert second is not None
    assert functions(second)[0] == "unmap_bare"


def test_dispatch(umn: Notifier, library: ctypes.CDLL) -> None:
    address = written()
    umn.watch((address, PAGE))
    call(library.unmap_buffer, address)
    stacks: list[Stack | None] = []
    umn.dispatch(lambda event: stacks.append(event.stack))
    [stack] = stacks
    assert stack is not None
    assert functions(stack)[1] == "unmap_buffer"


def test_not_asked_for(memory: Memory, library: ctypes.CDLL) -> None:
    require_source("bpf")
    with ummunotify.open("bpf") as umn:
        watch(umn, memory, 0)
        hit(memory, 0)
        [event] = umn.read()
        assert event.stack is None


def test_no_room(umn: Notifier) -> None:
    """What finds no room in the ring buffer has no stack; every event is there, and the next ones have stacks again."""
    pages = 2500
    address = written(2 * pages)
    for i in range(pages):
        umn.watch((address + 2 * i * PAGE, PAGE), cookie=i)
    for i in range(pages):
        unmap_memory(address + 2 * i * PAGE, PAGE)
    events = {event.cookie: event for event in umn.read()}
    assert len(events) == pages
    found = {cookie: event.stack for cookie, event in events.items() if event.stack is not None}
    assert 1000 < len(found) < pages
    assert all(stack.start == address + 2 * cookie * PAGE for cookie, stack in found.items())
    umn.watch((address + PAGE, PAGE))
    unmap_memory(address + PAGE, PAGE)
    assert stack_of(umn).start == address + PAGE
    unmap_memory(address, 2 * pages * PAGE)


def test_threads(umn: Notifier) -> None:
    """Many change, and many read: each event has its own thread's stack."""
    found: list[tuple[int, Stack]] = []

    def change() -> None:
        address = written()
        with umn.watch((address, PAGE)):
            unmap_memory(address, PAGE)

    def read() -> None:
        found.extend((event.thread, event.stack) for event in umn.read() if event.stack is not None)

    with meanwhile(change, change, change, read, read):
        end = time.monotonic() + LONG
        while len(found) < 100 and time.monotonic() < end:
            time.sleep(0.01)
    assert len(found) >= 100
    assert all(stack.thread == thread for thread, stack in found)


def taking() -> set[int]:
    """This process's programs that take stacks. Others on this host may have some, too."""
    own = set()
    for fd in open_fds():
        with contextlib.suppress(FileNotFoundError):
            own |= set(re.findall(r"^prog_id:\s+(\d+)$", Path(f"/proc/self/fdinfo/{fd}").read_text(), re.MULTILINE))
    return loaded({int(each) for each in own})


def loaded(numbers: set[int]) -> set[int]:
    """Those of these programs that are loaded and take stacks."""
    return {
        each.number for each in libbpf.loaded_programs() if each.name.startswith("stacks_") and each.number in numbers
    }


def becomes(what: Callable[[], object], expected: object) -> bool:
    """The kernel frees programs some time after they were detached."""
    end = time.monotonic() + LONG
    while what() != expected and time.monotonic() < end:
        gc.collect()
        time.sleep(0.01)
    return what() == expected


@pytest.mark.parametrize("source", with_stacks)
def test_close_leaves_nothing(source: str) -> None:
    require_source(source)
    with ummunotify.open(source):  # the feeder stays for a while
        before = open_fds(), taking()
        umn = ummunotify.open(source, stacks=True)
        [number] = taking() - before[1]
        umn.close()
        assert becomes(lambda: (open_fds(), loaded({number})), (before[0], set()))
        ummunotify.open(source, stacks=True)  # and with the last reference
        assert becomes(lambda: (open_fds(), taking()), before)


def test_fork(umn: Notifier) -> None:
    """A child has none, and does not keep the program attached."""
    address = written()
    umn.watch((address, PAGE))
    numbers = taking()
    assert numbers

    def child() -> None:
        with pytest.raises(ummunotify.ForkedError):
            umn.read()

    in_child(child)
    unmap_memory(address, PAGE)
    assert stack_of(umn).process == os.getpid()
    pid = os.fork()
    if not pid:
        signal.pause()
    umn.close()
    try:
        assert becomes(lambda: loaded(numbers), set())
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("source", with_stacks)
def test_descriptors_that_the_program_closes(source: str) -> None:
    """It loses the stacks at most."""
    require_source(source)

    def child() -> None:
        umn = ummunotify.open(source, stacks=True)
        os.closerange(3, 1000)
        address = written()
        umn.watch((address, PAGE))
        unmap_memory(address, PAGE)
        [event] = umn.read()
        assert event.stack is None or event.stack.thread == event.thread
        umn.close()

    in_child(child)


@pytest.mark.parametrize("source", with_stacks)
def test_signals(source: str) -> None:
    """A handler raises in the middle of opening: nothing is left behind."""
    require_source(source)
    with ummunotify.open(source):
        before = open_fds(), taking()

        def interrupt(*_: object) -> None:
            raise InterruptedError

        old = signal.signal(signal.SIGALRM, interrupt)
        raised = 0
        try:
            for i in range(40):
                umn = None
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.0002 * (i + 1))
                    umn = ummunotify.open(source, stacks=True)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except InterruptedError:
                    raised += 1
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    if umn is not None:
                        umn.close()
        finally:
            signal.signal(signal.SIGALRM, old)
        assert raised
        umn = None
        assert becomes(lambda: (open_fds(), taking()), before)  # a thread may still be loading


@pytest.mark.parametrize(
    ("source", "says"),
    [("uffd", "uffd: it gives no stacks"), ("daemon", "daemon:.*it gives no stacks"), ("bpf:zap", "bpf:zap")],
)
def test_what_cannot(source: str, says: str) -> None:
    """The error says what, why and what to do, and the other sources work without stacks."""
    with pytest.raises(StacksUnavailableError, match=says) as caught:
        ummunotify.open(source, stacks=True)
    assert isinstance(caught.value, SourceUnavailableError)
    assert all(caught.value.reasons.values())


def test_example(capsys: pytest.CaptureFixture[str]) -> None:
    """What docs/audit.md shows."""
    open_traced(with_stacks[0]).close()
    exec(compile(block("docs/audit.md", "import mmap, ummunotify"), "example", "exec"), {})
    said = capsys.readouterr().out
    assert said.startswith(f"munmap by thread {threading.get_native_id()} ")
    assert "sys_munmap" in said
