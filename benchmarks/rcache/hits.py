"""Hits in C: hits.c, built and called. `python -m benchmarks.rcache.hits` is what `measure` runs.

In a process of its own, because UCX patches libc's functions in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import mmap
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import ummunotify

from . import compiler_flags, undisturbed

HERE = Path(__file__).parent
PAGE = mmap.PAGESIZE
REGISTRATIONS = 10_000
STRIDE = 2 * PAGE
THREADS = 4
NOT_FOUND = 2**64 - 1
OURS, APART, UCX = "ours", "each with a cache of its own", "UCX"
IN_ORDER, AT_RANDOM = "in order", "at random"


class Native(NamedTuple):
    pairs: dict[str, list[tuple[float, float | None]]]
    """Of a hit, ours and UCX's in ns, by the order of the addresses."""
    threads: dict[str, list[tuple[float, float]]]
    """Of a hit by one thread, and by all of several, in turns."""
    miss: float
    """In C, with a registrar that does nothing."""
    ucx: str
    """Which it is."""


Told = dict[str, list[tuple[float, float]]]
"""Of a hit in UCX's cache in ns, by the order of the addresses: past what `run --ucx` preloads, and through it."""


def _run(*arguments: str) -> Any:
    return json.loads(subprocess.run([sys.executable, "-m", *arguments], check=True, stdout=subprocess.PIPE).stdout)


def measure(quick: bool) -> Native:
    return Native(**_run(__name__, *(["--quick"] if quick else [])))


def measure_told(quick: bool) -> Told:
    """Nothing, if there is no UCX."""
    preload = ["ummunotify", "run", "--quiet", "--ucx", "--", sys.executable, "-m"]
    told: Told = _run(*preload, __name__, "--told", *(["--quick"] if quick else []))
    return told


class _Registrar:
    def register(self, address: int, length: int) -> int:
        return address

    def deregister(self, handle: int) -> None:
        pass


def _ucx() -> tuple[str, list[str]] | None:
    """UCX's newest that there is, and what the compiler needs for it: the wheel libucx-cu12, or Debian's package."""
    wheel = importlib.util.find_spec("libucx")
    if wheel is not None and wheel.submodule_search_locations:
        root = Path(wheel.submodule_search_locations[0])
        flags = [f"-I{root / 'include'}", f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}"]
        if "size_t alignment, int prot" in (root / "include/ucs/memory/rcache.h").read_text():
            flags.append("-DUCX_ALIGNMENT_IN_GET")
        return f"UCX {metadata.version('libucx-cu12')} (PyPI's)", flags
    if Path("/usr/include/ucs/memory/rcache.h").exists():
        version = subprocess.run(["pkg-config", "--modversion", "ucx"], capture_output=True, text=True).stdout.strip()
        return f"UCX {version} (the system's)", []
    return None


def _build(folder: str) -> tuple[ctypes.CDLL, str]:
    """The library, and which UCX is in it."""
    path = f"{folder}/hits.so"
    compile_it = ["gcc", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", str(HERE / "hits.c"), "-o", path]
    compile_it += compiler_flags("ummunotify")
    ucx = _ucx()
    subprocess.run([*compile_it, *(["-DWITH_UCX", *ucx[1], "-lucs", "-lucm"] if ucx else [])], check=True)
    library = ctypes.CDLL(path)
    pointer, size, count = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32
    library.bench_ucx_new.restype = pointer
    for function in (library.bench_hits, library.bench_ucx_hits, library.bench_ucx_hits_past):
        function.argtypes, function.restype = (pointer, pointer, count, size), size
    library.bench_misses.argtypes = (pointer, count, size, count)
    library.bench_threads.argtypes = (pointer, pointer, pointer, count, size, count, count)
    library.bench_misses.restype = library.bench_threads.restype = size
    return library, ucx[0] if ucx else ""


def _native_cache(cache: ummunotify.RegistrationCache[int]) -> int:
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    return int(pointer(cache.capsule, b"ummunotify.cache"))


def _interruptions() -> int:
    usage = resource.getrusage(resource.RUSAGE_THREAD)
    return usage.ru_nivcsw + usage.ru_nvcsw


def _found(time: int) -> int:
    if time == NOT_FOUND:
        raise RuntimeError("something was not found")
    return time


def _undisturbed(run: Any, *arguments: Any, tries: int = 20) -> Iterator[float]:
    """The time of a run, after one to warm up, that was not interrupted; nothing if there was none."""
    for _ in range(tries):
        run(*arguments)
        before = _interruptions()
        time = _found(run(*arguments))
        if before == _interruptions():
            yield time
            return


def _places(area: mmap.mmap) -> list[int]:
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    return [base + i * STRIDE for i in range(REGISTRATIONS)]


def _orders(places: list[int]) -> Iterator[tuple[str, tuple[Any, int, int]]]:
    """What the functions take, by the order."""
    for order, those in ((IN_ORDER, places), (AT_RANDOM, random.Random(2).sample(places, len(places)))):
        yield order, ((ctypes.c_uint64 * REGISTRATIONS)(*those), REGISTRATIONS, PAGE)


def _told(rounds: int) -> Told:
    times: Told = {}
    with tempfile.TemporaryDirectory() as folder:
        library, ucx = _build(folder)
    if not ucx:
        return times
    area = mmap.mmap(-1, REGISTRATIONS * STRIDE, flags=mmap.MAP_PRIVATE)
    cache = library.bench_ucx_new()
    for order, arguments in _orders(_places(area)):
        library.bench_ucx_hits(cache, *arguments)  # registers
        times[order] = []
        for _ in range(rounds):
            for past in _undisturbed(library.bench_ucx_hits_past, cache, *arguments):
                for through in _undisturbed(library.bench_ucx_hits, cache, *arguments):
                    times[order].append((past / REGISTRATIONS, through / REGISTRATIONS))
    return times


def _main(rounds: int) -> Native:
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        caches = [stack.enter_context(ummunotify.RegistrationCache(_Registrar())) for _ in range(THREADS)]
        library, ucx = _build(folder)
        area = mmap.mmap(-1, REGISTRATIONS * STRIDE, flags=mmap.MAP_PRIVATE)
        places = _places(area)
        for cache in caches:
            for place in places:
                cache.acquire((place, PAGE)).release()
        natives = [_native_cache(cache) for cache in caches]
        ours, theirs = natives[0], library.bench_ucx_new() if ucx else None
        pairs: dict[str, list[tuple[float, float | None]]] = {}
        for order, arguments in _orders(places):
            pairs[order] = []
            if theirs:
                library.bench_ucx_hits(theirs, *arguments)  # registers
            for _ in range(rounds):
                for time in _undisturbed(library.bench_hits, ours, *arguments):
                    if not theirs:
                        pairs[order].append((time / REGISTRATIONS, None))
                    for other in _undisturbed(library.bench_ucx_hits, theirs, *arguments) if theirs else ():
                        pairs[order].append((time / REGISTRATIONS, other / REGISTRATIONS))
        addresses = arguments[0]
        each = REGISTRATIONS // THREADS
        array = ctypes.c_void_p * THREADS
        kinds = {
            OURS: (array(*[ours] * THREADS), None),
            APART: (array(*natives), None),
            **({UCX: (array(), theirs)} if theirs else {}),
        }
        threads: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
        for _ in range(rounds):
            for name, those_used in kinds.items():
                one, many = (
                    _found(library.bench_threads(*those_used, addresses, each, PAGE, count, 40)) / (each * 40)
                    for count in (1, THREADS)
                )
                threads[name].append((one, many))
        miss = _found(library.bench_misses(addresses, REGISTRATIONS, PAGE, 3)) / REGISTRATIONS
        assert all(cache.stats.misses == REGISTRATIONS for cache in caches)
        del area
    return Native(pairs, threads, miss, ucx)


if __name__ == "__main__":
    undisturbed()
    _rounds = 20 if "--quick" in sys.argv else 300
    json.dump(_told(_rounds) if "--told" in sys.argv else _main(_rounds)._asdict(), sys.stdout)
