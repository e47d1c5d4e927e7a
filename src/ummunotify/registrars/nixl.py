"""Registers memory with an agent of NIXL (nixl_agent.register_memory), for transfers over UCX and the other backends.

It imports nothing of NIXL's: it takes the program's agent.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from . import RegistrarError, RegistrationLimitError
from ._owned import OwnedRegistrations

__all__ = ["Agent", "AgentMemory", "NixlRegistrar"]


class Agent(Protocol):
    """What is used of a `nixl_agent`."""

    def register_memory(self, reg_list: Any, mem_type: str | None = None, backends: list[str] = ...) -> Any: ...

    def deregister_memory(self, dereg_list: Any, backends: list[str] = ...) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class AgentMemory:
    """Registered memory: its address and its length in bytes, and NIXL's descriptors (a `nixlRegDList`)."""

    address: int
    length: int
    descriptors: Any


class NixlRegistrar(OwnedRegistrations[AgentMemory]):
    """Registers the host's memory ("DRAM") with `agent`, for `backends`, or for all that the agent has for such memory.

    A transfer names memory by its address, and NIXL finds the registration: `get_xfer_descs([(address, length, 0)],
    "DRAM")`. NIXL accepts memory twice, and then may find the registration that is stale. So there is one registration
    of each byte at a time, in one cache for each agent.

    Agents on other hosts reach the memory by metadata that they were sent. They have to be sent it again after each
    registration, and to forget the old first (`remove_remote_agent`): NIXL keeps what it has for an address.

    Threads: any thread may call any method. An agent whose `sync_mode` is NIXL_THREAD_SYNC_NONE, NIXL's default,
    permits one call at a time, so then no other call to it may be made meanwhile. Fork: what is registered is the
    parent's; the child registers nothing with this registrar, and deregisters nothing.
    """

    _FORKED = "a NIXL agent does not work in a forked child; make one there"

    def __init__(self, agent: Agent, *, backends: Iterable[str] = ()) -> None:
        super().__init__()
        self._agent = agent
        self._backends = list(backends)

    def register(self, address: int, length: int) -> AgentMemory:
        """Register `length` bytes at `address`.

        Raises RegistrationLimitError if NIXL refuses. It does not tell limits from other reasons.
        """
        with self._ours():
            try:
                descriptors = self._agent.register_memory([(address, length, 0, "")], "DRAM", self._backends)
            except Exception as error:  # NIXL's exceptions have no base of their own
                raise RegistrationLimitError(
                    f"cannot register {length} bytes at {address:#x} with NIXL: {error!r}; "
                    "if it is mapped, raise RLIMIT_MEMLOCK (ulimit -l), or deregister other memory"
                ) from error
            registered = AgentMemory(address, length, descriptors)
            self._live.add(registered)
            return registered

    def _undo(self, handle: AgentMemory) -> None:
        try:
            self._agent.deregister_memory(handle.descriptors, self._backends)
        except Exception as error:
            raise RegistrarError(f"NIXL cannot deregister {handle}: {error!r}") from error
