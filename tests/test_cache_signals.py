"""Signal handlers that raise out of the cache's methods, or use the cache that they interrupt."""

from __future__ import annotations

import mmap
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from cache_check import wrong
from registrar import Recorder
from support import map_memory, unmap_memory

from ummunotify import DeregistrationError, RegistrationCache, RegistrationError

PAGE = mmap.PAGESIZE
PAGES = 64
SECONDS = 60.0 if "UMMUNOTIFY_SLOW" in os.environ else 1.5

pytestmark = pytest.mark.usefixtures("keeper")


class Interrupt(BaseException):
    """What the handler raises: nothing may take it for an error of its own."""


@pytest.fixture
def memory() -> Iterator[int]:
    address = map_memory(PAGES * PAGE)
    yield address
    unmap_memory(address, PAGES * PAGE)


@contextmanager
def timer(handler: Callable[[], None], seconds: float, interval: float = 0.0) -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, lambda _number, _frame: handler())
    signal.setitimer(signal.ITIMER_REAL, seconds, interval)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def raise_interrupt() -> None:
    raise Interrupt


class Careful:
    """A registrar without locks, that no exception tears apart: what one leaves behind is the cache's doing."""

    def __init__(self, overlap: bool = True) -> None:
        self.live: set[object] = set()
        self.overlap = overlap

    def register(self, address: int, length: int) -> object:
        handle = object()
        self.live.add(handle)
        return handle

    def deregister(self, handle: object) -> None:
        self.live.discard(handle)


def acquire(cache: RegistrationCache[object], memory: int, pick: random.Random) -> None:
    with cache.acquire((memory + pick.randrange(PAGES) * PAGE, PAGE)):
        pass


def churn(cache: RegistrationCache[object], memory: int, pick: random.Random) -> None:
    acquire(cache, memory, pick)
    cache.invalidate((memory + pick.randrange(PAGES) * PAGE, PAGE))


def flush(cache: RegistrationCache[object], memory: int, pick: random.Random) -> None:
    acquire(cache, memory, pick)
    cache.flush()


def look(cache: RegistrationCache[object], memory: int, pick: random.Random) -> None:
    with cache.acquire((memory, PAGE)) as registration:
        assert registration.handle is not None
        _ = registration.valid, cache.stats, repr(cache)


@pytest.mark.filterwarnings("ignore:a registration was dropped:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("operation", [acquire, churn, flush, look])
def test_an_exception_at_any_moment(memory: int, operation: Callable[..., None]) -> None:
    pick = random.Random(operation.__name__)
    registrar = Careful()
    interrupted = calls = 0
    armed = False

    def handler() -> None:
        if armed:
            raise Interrupt

    with RegistrationCache(registrar, max_registrations=16) as cache:
        end = time.monotonic() + SECONDS
        with timer(handler, 0):
            while time.monotonic() < end:
                try:
                    try:
                        signal.setitimer(signal.ITIMER_REAL, pick.random() * 1e-4 + 1e-6)
                        armed = True
                        for _ in range(100):
                            operation(cache, memory, pick)
                            calls += 1
                    finally:
                        armed = False
                except Interrupt:
                    interrupted += 1
        assert min(interrupted, calls) > 100
        # Nothing is in use, nothing is left, nothing waits for ever.
        assert wrong(cache) is None
        assert cache.stats.in_use == 0
        for page in range(PAGES):
            cache.acquire((memory + page * PAGE, PAGE)).release()
        cache.flush()
        stats = cache.stats
        assert (stats.registrations, stats.registered_bytes, stats.not_deregistered) == (0, 0, 0)


def test_an_exception_at_every_step_of_the_registrar(memory: int) -> None:
    """Whatever line of the registrar's methods raises."""
    for method in ("register", "deregister"):
        for error in (Interrupt(), OSError(5, "Input/output error"), ValueError("a bug")):
            registrar = Recorder()
            with RegistrationCache(registrar) as cache:
                cache.acquire((memory, PAGE)).release()
                cache.invalidate((memory, PAGE))
                setattr(registrar, f"{method}_errors", iter([error]))
                with pytest.raises((Interrupt, RegistrationError, ValueError, DeregistrationError)):  # noqa: PT012
                    cache.acquire((memory, PAGE)).release()
                    cache.invalidate((memory, PAGE))
                assert wrong(cache) is None
                cache.acquire((memory, PAGE)).release()
                cache.flush()
                assert registrar.live == {}
                assert cache.stats.registrations == 0


@pytest.mark.parametrize("overlap", [True, False])
def test_a_handler_that_acquires_the_same_memory(memory: int, overlap: bool) -> None:
    """The registrar has a lock, which the handler may find taken by the code that it has interrupted."""
    registrar = Recorder(overlap=overlap)
    nested = refused = calls = 0
    busy = False

    def handler() -> None:
        nonlocal nested, refused, busy
        if busy:
            return
        busy = True
        try:
            with cache.acquire((memory, 8 * PAGE)):
                nested += 1
        except RegistrationError:
            refused += 1
        busy = False

    with RegistrationCache(registrar) as cache:
        end = time.monotonic() + SECONDS
        with timer(handler, 2e-4, 2e-4):
            while time.monotonic() < end:
                with cache.acquire((memory, 8 * PAGE)):
                    calls += 1
                cache.invalidate((memory, 8 * PAGE))
        assert min(calls, nested, refused) > 10
        assert wrong(cache) is None
        cache.flush()
        assert registrar.live == {}


@pytest.mark.parametrize("method", ["register", "deregister"])
def test_within_a_registrar_it_is_not_called_again(memory: int, method: str) -> None:
    outcome: list[str] = []

    def inside() -> None:
        with cache.acquire((memory + PAGE, 1)):  # a hit
            outcome.append("found")
        for page in (0, 2):
            try:
                cache.acquire((memory + page * PAGE, PAGE))
            except RegistrationError as error:
                outcome.append(str(error))
        cache.flush()

    class Registrar(Recorder):
        def register(self, address: int, length: int) -> int:
            if method == "register" and address == memory:
                inside()
            return super().register(address, length)

        def deregister(self, handle: int) -> None:
            if method == "deregister" and not outcome:
                inside()
            super().deregister(handle)

    registrar = Registrar()
    with RegistrationCache(registrar) as cache:
        cache.acquire((memory + PAGE, PAGE)).release()
        cache.acquire((memory, PAGE)).release()
        cache.invalidate((memory, PAGE))
        assert outcome[0] == "found"
        assert ["within a method of the same registrar" in text for text in outcome[1:]] == [True, True]
        cache.flush()
        assert registrar.live == {}
        assert wrong(cache) is None


def test_a_registrar_with_a_cache_of_its_own(memory: int) -> None:
    lower = Recorder()

    class Upper(Recorder):
        def register(self, address: int, length: int) -> int:
            with below.acquire((address, length)):
                return super().register(address, length)

    with RegistrationCache(lower) as below, RegistrationCache(Upper()) as above:
        above.acquire((memory, PAGE)).release()
        assert lower.registered == 1


def test_ctrl_c_while_another_thread_registers(memory: int) -> None:
    registrar = Recorder()
    entered, go_on = threading.Event(), threading.Event()

    def before(_address: int, _length: int) -> None:
        entered.set()
        assert go_on.wait(60)

    registrar.before = before
    with RegistrationCache(registrar) as cache:
        thread = threading.Thread(target=lambda: cache.acquire((memory, PAGE)).release())
        thread.start()
        assert entered.wait(60)
        with timer(raise_interrupt, 0.05), pytest.raises(Interrupt):
            cache.acquire((memory, PAGE))
        go_on.set()
        thread.join()
        assert wrong(cache) is None
        with cache.acquire((memory, PAGE)):
            assert registrar.registered == 1
