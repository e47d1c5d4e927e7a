"""Registers memory with Mooncake's transfer engine (TransferEngine.register_memory), for RDMA and TCP.

It imports nothing of Mooncake's: it takes the program's engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from . import RegistrarError, RegistrationError, RegistrationLimitError
from ._owned import OwnedRegistrations

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


class MooncakeRegistrar(OwnedRegistrations[EngineMemory]):
    """Registers the host's memory with `engine`.

    A transfer names memory by its address, and the engine finds the registration. It keeps one of each byte, and
    refuses another: use one registrar and one cache for each engine. What another host is to write to or read from is
    published with each registration, as the engine always does.

    Threads: any thread may call any method. Fork: what is registered is the parent's; the child registers nothing with
    this registrar, and deregisters nothing.
    """

    _FORKED = "Mooncake's engine does not work in a forked child; make one there"

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._engine = engine

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

    def _undo(self, handle: EngineMemory) -> None:
        if code := self._engine.unregister_memory(handle.address):
            raise RegistrarError(f"Mooncake cannot deregister {handle}: error {code}")
