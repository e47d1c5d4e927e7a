"""Closing, garbage, and the end of the interpreter."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
from support import LONG, hit, watch

import ummunotify
from ummunotify import (
    ClosedError,
    Notifier,
    Region,
)
from ummunotify.selftest.changes import PAGE, Memory


def test_everything_says_closed(memory: Memory) -> None:
    umn = ummunotify.open()
    region = watch(umn, memory, 0)
    hit(memory, 0)
    umn.close()
    umn.close()
    assert umn.closed
    assert not region.valid
    calls: list[Callable[[], object]] = [
        lambda: umn.watch((memory.address, 1)),
        lambda: umn.unwatch(region),
        umn.read,
        lambda: umn.read(None),
        lambda: umn.read(1),
        umn.fileno,
        region.renew,
        lambda: umn.generation,
        lambda: umn.changed,
        lambda: umn.regions,
        lambda: umn.stats,
    ]
    for do in calls:
        with pytest.raises(ClosedError, match="closed"):
            do()
    region.close()
    region.close()
    assert not region.valid
    assert (region.address, region.length) == (memory.address, PAGE)
    assert repr(umn) == "<Notifier closed>"
    with umn:
        pass


def test_closing_wakes_readers() -> None:
    for timeout in (None, LONG):
        umn = ummunotify.open()
        errors: list[BaseException] = []

        def read(umn: Notifier = umn, timeout: float | None = timeout, errors: list[BaseException] = errors) -> None:
            try:
                umn.read(timeout)
            except ClosedError as error:
                errors.append(error)

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.02)
        umn.close()
        for thread in threads:
            thread.join(LONG)
        assert len(errors) == 4


def test_closing_while_others_use_it(memory: Memory) -> None:
    """Each call works or says that it is closed."""
    for _ in range(10):
        umn = ummunotify.open()
        errors: list[BaseException] = []

        def use(umn: Notifier = umn, errors: list[BaseException] = errors) -> None:
            try:
                while True:
                    region = watch(umn, memory, 0)
                    hit(memory, 0)
                    region.renew()
                    umn.read(0.0001)
                    assert umn.changed in (True, False)
                    umn.unwatch(region)
            except ClosedError:
                pass
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=use) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.01)
        umn.close()
        for thread in threads:
            thread.join(LONG)
        assert errors == []


def test_closing_in_several_threads() -> None:
    for _ in range(10):
        umn = ummunotify.open()
        umn.fileno()
        threads = [threading.Thread(target=umn.close) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG)
        assert umn.closed


# ---- Garbage, and the end ----


class Holder:
    """Holds things in a reference cycle."""

    def __init__(self, *things: object) -> None:
        self.things = things
        self.itself = self


def test_a_forgotten_notifier_is_closed(memory: Memory) -> None:
    """Whatever refers to what, and in whatever order it goes; the fixture counts what is left over."""
    makers: list[Callable[[], object]] = [
        ummunotify.open,
        lambda: watch(ummunotify.open(), memory, 0),
        lambda: Holder(ummunotify.open()),
        lambda: Holder(watch(ummunotify.open(), memory, 0)),
    ]

    def both(backwards: bool) -> object:
        umn = ummunotify.open()
        region = watch(umn, memory, 0)
        umn.fileno()
        hit(memory, 0)
        return Holder(region, umn) if backwards else Holder(umn, region)

    makers += [lambda: both(False), lambda: both(True)]
    for make in makers:
        made = make()
        gone = weakref.ref(made) if not isinstance(made, Region) else None
        del made
        gc.collect()
        assert gone is None or gone() is None


def test_a_region_outlives_its_notifier(memory: Memory) -> None:
    umn = ummunotify.open()
    region = watch(umn, memory, 0)
    umn.close()
    del umn
    gc.collect()
    assert not region.valid
    with pytest.raises(ClosedError):
        region.renew()
    region.close()


def test_events_outlive_their_regions(umn: Notifier, memory: Memory) -> None:
    region = watch(umn, memory, 0)
    hit(memory, 0)
    (event,) = umn.read()
    region.close()
    umn.close()
    del region
    gc.collect()
    assert event.region.address == event.start == memory.address


def test_garbage_collected_while_another_opens(keeper: Notifier) -> None:
    """The collector may run, and close a notifier, at any moment of opening and closing another one."""
    gc.collect()
    before = gc.get_threshold()
    result: list[Notifier] = []

    def open_one() -> None:
        # In a thread, so that a deadlock fails the test.
        thread = threading.Thread(target=lambda: result.append(ummunotify.open()), daemon=True)
        thread.start()
        thread.join(LONG)
        assert result

    try:
        for _ in range(5):
            for _ in range(3):
                Holder(ummunotify.open())
            gc.set_threshold(1)
            open_one()
            Holder(result.pop())
            open_one()
            result.pop().close()
            gc.set_threshold(*before)
    finally:
        gc.set_threshold(*before)


ENDINGS = {
    "open": "umn = ummunotify.open(); region = umn.watch(buf)",
    "many": "all = [ummunotify.open() for _ in range(5)]; regions = [umn.watch(buf) for umn in all]",
    "invalid": "umn = ummunotify.open(); region = umn.watch(buf); umn.fileno(); buf.close()",
    "only the region": "region = ummunotify.open().watch(buf)",
    "in a cycle": "umn = ummunotify.open(); umn.itself = umn; umn.region = umn.watch(buf)",
    "in a module": "sys.ummunotify = ummunotify.open(); sys.region = sys.ummunotify.watch(buf)",
    "a thread waits": (
        "umn = ummunotify.open(); region = umn.watch(buf)\n"
        "threading.Thread(target=umn.read, args=(None,), daemon=True).start(); time.sleep(0.05)"
    ),
    "atexit": "umn = ummunotify.open(); atexit.register(lambda: (umn.watch(buf), umn.close()))",
    "sys.exit in a handler": (
        "umn = ummunotify.open(); signal.signal(signal.SIGALRM, lambda *_: sys.exit(0))\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.05); umn.read(None)"
    ),
    "an object closes it": (
        "class Late:\n"
        "    def __init__(self): self.umn = ummunotify.open(); self.region = self.umn.watch(buf)\n"
        "    def __del__(self): self.region.close(); self.umn.close()\n"
        "late = Late(); late.itself = late"
    ),
}


def test_interpreter_exit() -> None:
    processes = {
        name: subprocess.Popen(
            [
                sys.executable,
                "-X",
                "dev",
                "-W",
                "error",
                "-c",
                "import atexit, mmap, signal, sys, threading, time, ummunotify\nbuf = mmap.mmap(-1, 1 << 20)\n" + code,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, code in ENDINGS.items()
    }
    results = {}
    for name, process in processes.items():
        with process:
            results[name] = (process.communicate(timeout=LONG)[0], process.returncode)
    assert results == dict.fromkeys(ENDINGS, ("", 0))


# ---- The kernel refuses more memory ----

REFUSE = {
    # A mapping of a page, until there are as many as there may be.
    "vm.max_map_count": """
        protection = 1
        while libc.mmap(None, 4096, protection, 0x22, -1, 0) != ctypes.c_void_p(-1).value:
            protection = 4 - protection
    """,
    "RLIMIT_MEMLOCK": """
        assert libc.mlockall(2) == 0  # MCL_FUTURE
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (4096, 4096))
        os.setresuid(65534, 65534, 65534)
    """,
}


@pytest.mark.parametrize("refuse", REFUSE)
def test_closed_although_nothing_can_be_mapped(refuse: str) -> None:
    """What closing maps over the table cannot be mapped, and nothing is valid all the same."""
    program = f"""if True:
        import ctypes, os, resource, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import ummunotify
        from support import map_memory
        from ummunotify.selftest.changes import store

        class Registrar:
            def register(self, address, length): return object()
            def deregister(self, handle): pass

        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        umn = ummunotify.open()
        cache = ummunotify.RegistrationCache(Registrar(), notifier=umn)
        pages = [map_memory(4096) for _ in range(2)]
        for page in pages:
            store(page)
        region = umn.watch((pages[0], 4096))
        cache.acquire((pages[1], 4096)).release()
        assert region.valid
        {textwrap.indent(textwrap.dedent(REFUSE[refuse]), " " * 8).strip()}
        umn.close()
        assert not region.valid
        try:
            cache.acquire((pages[1], 4096))
        except ummunotify.ClosedError:
            os._exit(0)  # without what an interpreter's end may map
        raise AssertionError("a registration was found")
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=LONG, check=False)
    assert (done.stderr, done.returncode) == ("", 0)
