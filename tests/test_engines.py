"""The registrars for NIXL and Mooncake, with their wheels; without RDMA: docs/engines.md says what it shows."""

from __future__ import annotations

import importlib
import importlib.util
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import LONG, in_child, map_memory, remap, require, require_source, unmap_memory

from ummunotify import RegistrarError, RegistrationCache, RegistrationError, RegistrationLimitError
from ummunotify.registrars.mooncake import MooncakeRegistrar
from ummunotify.registrars.nixl import NixlRegistrar
from ummunotify.selftest.changes import PAGE, madvise

EXAMPLES = Path(__file__).parents[1] / "examples"
QUIET = {"NIXL_LOG_LEVEL": "FATAL", "MC_LOG_LEVEL": "FATAL"}
SIZE = 4 * PAGE
ENGINES = ["nixl", "mooncake"]


def require_wheel(engine: str) -> None:
    module = {"nixl": "nixl_cu12", "mooncake": "mooncake"}[engine]
    if importlib.util.find_spec(module) is None:
        # Mooncake has no wheel for Python 3.14.
        require(engine, f"there is no {module}: make .venv/engines", always=sys.version_info < (3, 14))


def nixl_registrar() -> NixlRegistrar:
    nixl = importlib.import_module("nixl_cu12")
    return NixlRegistrar(nixl.nixl_agent("agent", nixl.nixl_agent_config(backends=["UCX"])), backends=["UCX"])


def mooncake_registrar() -> MooncakeRegistrar:
    engine = importlib.import_module("mooncake.engine").TransferEngine()
    assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    return MooncakeRegistrar(engine)


MAKE: dict[str, Callable[[], Any]] = {"nixl": nixl_registrar, "mooncake": mooncake_registrar}


@pytest.mark.parametrize("engine", ENGINES)
def test_recycled_memory(engine: str) -> None:
    """Registrations kept by address fail the program, those in the cache do not."""
    require_wheel(engine)
    require_source("uffd")
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{engine}_stale.py"],
        capture_output=True,
        text=True,
        timeout=LONG,
        env=os.environ | QUIET,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = re.findall(r"^  buffer \d.*: (\w+)", done.stdout.replace(": NIXL", ""), re.MULTILINE)
    assert len(results) == 6
    assert results[2] != "arrives"
    assert results[3:] == ["arrives"] * 3


@pytest.mark.parametrize("engine", ENGINES)
def test_registrar(engine: str) -> None:
    """In a child: what the engines load patches libc and starts threads, which other tests would notice."""
    require_wheel(engine)
    os.environ |= QUIET

    def child() -> None:
        registrar = MAKE[engine]()
        memory = map_memory(SIZE)
        first = registrar.register(memory, SIZE)
        assert (first.address, first.length) == (memory, SIZE)
        registrar.deregister(first)
        for strange in (first, object()):
            with pytest.raises(RegistrarError, match="not registered here"):
                registrar.deregister(strange)

        def grandchild() -> None:
            with pytest.raises(RegistrarError, match="forked child"):
                registrar.register(memory, SIZE)
            registrar.close()
            os._exit(0)  # the engine's threads are not here, and its end would wait for them

        second = registrar.register(memory, SIZE)
        in_child(grandchild)
        registrar.deregister(second)

        with RegistrationCache(registrar) as cache:
            for _ in range(50):
                with cache.acquire((memory, SIZE)) as whole, cache.acquire((memory + PAGE, PAGE)) as part:
                    assert part.handle is whole.handle
                remap(memory, SIZE)
            assert (cache.stats.hits, cache.stats.stale) == (50, 49)
            with ThreadPoolExecutor(4) as pool:

                def use(number: int) -> None:
                    mine = map_memory(SIZE)
                    for _ in range(50):
                        with cache.acquire((mine, SIZE)) as registered:
                            assert registered.handle.address <= mine
                        madvise(mine, SIZE, mmap.MADV_DONTNEED)
                    unmap_memory(mine, SIZE)

                list(pool.map(use, range(4)))
        third = registrar.register(memory, SIZE)
        registrar.close()
        registrar.close()
        with pytest.raises(RegistrarError, match="not registered here"):
            registrar.deregister(third)
        os._exit(0)  # without the engine's own end, which is not what is tested

    in_child(child)


def test_refusals() -> None:
    """What the engines answer where they refuse, as they accept nearly all memory without RDMA."""

    class Agent:
        def register_memory(self, reg_list: Any, mem_type: str | None = None, backends: list[str] | None = None) -> Any:
            raise LookupError

        def deregister_memory(self, dereg_list: Any, backends: list[str] | None = None) -> None:
            raise LookupError("no")

    with pytest.raises(RegistrationLimitError, match=rf"{PAGE} bytes at 0x1000 with NIXL: LookupError.*; .*ulimit -l"):
        NixlRegistrar(Agent()).register(0x1000, PAGE)

    class Engine:
        code = 0

        def register_memory(self, buffer_addr: int, capacity: int) -> int:
            return self.code

        def unregister_memory(self, buffer_addr: int) -> int:
            return self.code

    engine = Engine()
    registrar = MooncakeRegistrar(engine)
    handle = registrar.register(0x1000, PAGE)
    engine.code = -7
    with pytest.raises(RegistrationError, match="other code has registered") as caught:
        registrar.register(0x1000, PAGE)
    assert not isinstance(caught.value, RegistrationLimitError)
    with pytest.raises(RegistrarError, match=r"cannot deregister EngineMemory.*: error -7"):
        registrar.deregister(handle)
    engine.code = -202
    with pytest.raises(RegistrationLimitError, match="error -202; "):
        registrar.register(0x2000, PAGE)
    engine.code = 0
    registrar.deregister(handle)
