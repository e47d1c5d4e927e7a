"""What registrars share: the `with` statement, and which registrations are live, and whose."""

from __future__ import annotations

import abc
import os
import threading
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, ClassVar, Generic, Self

from . import Handle, RegistrarError


class Closing(abc.ABC):
    """Closed at the end of a `with` statement."""

    @abc.abstractmethod
    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class OwnedRegistrations(Closing, Generic[Handle]):
    """Of a device that finds a registration by the address. `_live` is used in the context that `_ours` returns."""

    # For the cache; see Registrar.
    overlap = False

    _FORKED: ClassVar[str]
    """The error in the child of a fork."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._live: set[Handle] = set()

    @abc.abstractmethod
    def _undo(self, handle: Handle) -> None:
        """Raises RegistrarError; then it still is registered."""

    def deregister(self, handle: Handle) -> None:
        """Undo it. No transfer may use the memory.

        Raises RegistrarError if `handle` is not registered here or what has it refuses; then it still is registered.
        """
        with self._ours():
            if handle not in self._live:
                raise RegistrarError(f"{handle} is not registered here (was it deregistered before?)")
            self._undo(handle)
            self._live.remove(handle)

    def close(self) -> None:
        """Deregister everything. The engine stays. Closing again is harmless."""
        if self._pid != os.getpid():
            return
        for handle in list(self._live):
            self.deregister(handle)

    def _ours(self) -> AbstractContextManager[Any]:
        """Raises RegistrarError in the child of a fork."""
        if self._pid != os.getpid():
            raise RegistrarError(self._FORKED)
        return self._lock
