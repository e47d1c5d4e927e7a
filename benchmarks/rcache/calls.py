"""What hits cost in Python: `python -m benchmarks.rcache.calls` is a pyperf script."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
import timeit
from pathlib import Path

import numpy as np
import pyperf  # type: ignore[import-untyped]

import ummunotify

from . import undisturbed

PAIR = "cache.acquire(pair).release()"
ARRAY = "cache.acquire(array).release()"
WITH_PAIR = "with cache.acquire(pair): pass"
WITH_ARRAY = "with cache.acquire(array): pass"
BASELINE = "with lock: pass"
MISS = "acquire what is not registered"
_FULL = ("--processes=8", "--values=3", "--min-time=0.03")
_QUICK = ("--processes=1", "--values=2", "--warmups=0", "--min-time=0.005")


class _Registrar:
    def register(self, address: int, length: int) -> int:
        return address

    def deregister(self, handle: int) -> None:
        pass


def measure(quick: bool) -> dict[str, float]:
    """In ns, by the names above."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "calls.json")
        script = (sys.executable, "-m", __name__, "--quiet", f"--output={result}")
        subprocess.run([*script, *(_QUICK if quick else _FULL)], check=True, stdout=subprocess.DEVNULL)
        suite = pyperf.BenchmarkSuite.load(str(result))
        return {benchmark.get_name(): benchmark.median() * 1e9 for benchmark in suite}


def _main() -> None:
    undisturbed()
    runner = pyperf.Runner(program_args=("-m", "benchmarks.rcache.calls"))
    cache = ummunotify.RegistrationCache(_Registrar())
    array = np.zeros(1 << 20, dtype=np.uint8)
    names = {"cache": cache, "array": array, "pair": (array.ctypes.data, array.nbytes), "lock": threading.Lock()}
    cache.acquire(array).release()

    def run(loops: int, statement: str) -> float:
        return timeit.Timer(statement, timer=time.thread_time, globals=names).timeit(loops)

    for statement in (PAIR, ARRAY, WITH_PAIR, WITH_ARRAY, BASELINE):
        runner.bench_time_func(statement, run, statement)
    assert cache.stats.misses == 1
    places = [(array.ctypes.data + offset, 64) for offset in range(0, 1 << 20, 4096)]

    def miss(loops: int) -> float:
        total = 0.0
        for _ in range(loops):
            with ummunotify.RegistrationCache(_Registrar()) as fresh:
                begun = time.thread_time()
                for place in places:
                    fresh.acquire(place).release()
                total += time.thread_time() - begun
        return total

    runner.bench_time_func(MISS, miss, inner_loops=len(places))


if __name__ == "__main__":
    _main()
