"""Registers memory with Mooncake's transfer engine (TransferEngine.register_memory), for RDMA and TCP.

It imports nothing of Mooncake's: it takes the program's engine.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from . import RegistrarError, RegistrationError, RegistrationLimitError

__all__ = ["Engine", "EngineMemory", "MooncakeRegistrar"]

_OVERLAPS = -7
"""Mooncake's ERR_ADDRESS_OVERLAPPED."""


class Engine(Protocol):
    """What is used of a `mooncake.engine.TransferEngine`. 0 is success."""

    def register_memory(self, buffer_addr: int, capacity: int, /) -> int: ...

    def unregister_memory(self, buffer_addr: int, /) -> int: ...


@dataclass(frozen=True, slots=True, eq=False)
class EngineMemory:
    """Registered memory: its address and its length in bytes."""

    address: int
    length: int


class MooncakeRegistrar:
    """Registers the host's memory with `engine`.

    A transfer names memory by its address, and the engine finds the registration. It keeps one of each byte, and
    refuses another: use one registrar and one cache for each engine. What another host is to write to or read from is
    published with each registration, as the engine always does.

    Threads: any thread may call any method. Fork: what is registered is the parent's; the child registers nothing with
    this registrar, and deregisters nothing.
    """

    # For the cache; see Registrar.
    overlap = False

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._live: set[EngineMemory] = set()

    def register(self, address: int, length: int) -> EngineMemory:
        """Register `length` bytes at `address`.

        Raises RegistrationError if a part of it is registered already, by other code, and RegistrationLimitError if
        Mooncake refuses for another reason: it does not tell limits from the rest.
        """
        with self._ours():
            code = self._engine.register_memory(address, length)
            if code:
                message = f"cannot register {length} bytes at {address:#x} with Mooncake: error {code}"
                if code == _OVERLAPS:
                    raise RegistrationError(f"{message}; other code has registered a part of it")
                raise RegistrationLimitError(
                    f"{message}; if it is mapped, raise RLIMIT_MEMLOCK (ulimit -l), or deregister other memory"
                )
            registered = EngineMemory(address, length)
            self._live.add(registered)
            return registered

    def deregister(self, handle: EngineMemory) -> None:
        """Undo it. No transfer may use the memory.

        Raises RegistrarError if `handle` is not registered here or Mooncake refuses; then it still is registered.
        """
        with self._ours():
            if handle not in self._live:
                raise RegistrarError(f"{handle} is not registered here (was it deregistered before?)")
            if code := self._engine.unregister_memory(handle.address):
                raise RegistrarError(f"Mooncake cannot deregister {handle}: error {code}")
            self._live.remove(handle)

    def close(self) -> None:
        """Deregister everything. The engine stays. Closing again is harmless."""
        if self._pid != os.getpid():
            return
        for handle in list(self._live):
            self.deregister(handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _ours(self) -> threading.Lock:
        if self._pid != os.getpid():
            raise RegistrarError("Mooncake's engine does not work in a forked child; make one there")
        return self._lock
