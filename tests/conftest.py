"""Fixtures for all test modules."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import pytest
from other_users import let_in
from support import is_ours, probes, require

import ummunotify
from ummunotify import Notifier, _core
from ummunotify.selftest.changes import Memory, private

pytest_plugins = ("daemons", "random_changes")


PAGE = mmap.PAGESIZE

let_in()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The feeder's tests come first: they take all of its tables and descriptors. Later the keeper has some."""
    items.sort(key=lambda item: item.path.name != "test_feeder.py")


def resources() -> tuple[dict[str, str], list[str], set[str]]:
    """Descriptors and what they are open on, the mappings that are the library's, and threads."""
    fds = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            fds[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # the one that listdir used
            continue
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if is_ours(line)]
    threads = set()
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            name = Path(f"/proc/self/task/{thread}/comm").read_text()
            if not name.startswith("iou-"):  # the kernel's own; they stay for some seconds
                threads.add(thread)
    return fds, maps, threads


@pytest.fixture(autouse=True, scope="session")
def ctrl_c() -> None:
    """Works, here and in the processes that tests start, also where a shell began this one in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def tracker() -> None:
    """What multiprocessing starts when it is first needed, and keeps, is there from the beginning."""
    resource_tracker.ensure_running()


@pytest.fixture(autouse=True, scope="session")
def machine() -> None:
    """What the library makes when it is first needed, and keeps, is there from the beginning."""
    with contextlib.suppress(ummunotify.SourceUnavailableError):
        ummunotify.open("bpf").close()


@pytest.fixture(autouse=True, scope="session")
def garbage() -> None:
    """What imports have left is closed at the beginning: files too, as of matplotlib where it lists the fonts anew."""
    gc.collect()


@pytest.fixture(autouse=True)
def nothing_left_over() -> Iterator[None]:
    """Each test gives back what it took."""
    before = resources()
    yield
    after = resources()
    # A thread that was joined may still be on its way out.
    for _ in range(100):
        if after[:2] == before[:2] and after[2] <= before[2]:
            break
        gc.collect()
        time.sleep(0.02)
        after = resources()
    assert after[:2] == before[:2]
    assert after[2] <= before[2]


@pytest.fixture(scope="session", params=probes())
def keeper(request: pytest.FixtureRequest) -> Iterator[Notifier]:
    """A notifier that stays open, with which opening more takes milliseconds."""
    source = request.param
    try:
        opened = ummunotify.open(source)
    except ummunotify.SourceUnavailableError as error:
        require("bpf", str(error))
    with opened:
        # A table of several segments leaves something for the next ones to be forgotten sooner.
        with ummunotify.open(source) as large:
            for i in range(5000):
                large.watch((PAGE + i, 1))
        yield opened


@pytest.fixture(autouse=True)
def the_keepers_source(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test opens that has a keeper has the keeper's source and probe."""
    if "keeper" in request.fixturenames:
        monkeypatch.setenv(_core.SOURCE_ENVIRONMENT, request.getfixturevalue("keeper").source)


@pytest.fixture
def umn(keeper: Notifier) -> Iterator[Notifier]:
    """A notifier of the test's own."""
    with ummunotify.open() as umn:
        yield umn


@pytest.fixture
def memory() -> Iterator[Memory]:
    """A few pages of private anonymous memory, in use."""
    with Memory() as memory:
        private(memory)
        yield memory


@pytest.fixture
def alarm() -> Iterator[Callable[[Callable[[], None], float], None]]:
    """Runs something in a signal handler, again and again."""
    before = signal.getsignal(signal.SIGALRM)

    def start(act: Callable[[], None], seconds: float) -> None:
        signal.signal(signal.SIGALRM, lambda *_: act())
        signal.setitimer(signal.ITIMER_REAL, seconds, seconds)

    yield start
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
