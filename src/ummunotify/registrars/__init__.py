"""What a registrar is, and how one fails. Each registrar is a module of its own in this package.

A registrar pins memory for a device or for the kernel ("registers" it) and gives back a handle.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from ..errors import UmmunotifyError

__all__ = [
    "Registrar",
    "RegistrarError",
    "RegistrarUnavailableError",
    "RegistrationError",
    "RegistrationLimitError",
]

Handle = TypeVar("Handle")


class Registrar(Protocol[Handle]):
    """Two methods are all it takes to write a registrar."""

    def register(self, address: int, length: int) -> Handle:
        """Pin `length` bytes at `address`; the result is what I/O then names them by.

        Raise RegistrationLimitError where it could succeed once other memory is deregistered.
        """
        ...

    def deregister(self, handle: Handle) -> None:
        """Undo `register`. If this raises, the memory counts as still registered."""
        ...


class RegistrarError(UmmunotifyError):
    """A registrar was used wrongly (closed, in a forked child, a handle that is not its own)."""


class RegistrarUnavailableError(RegistrarError):
    """This registrar cannot work here: a missing package, device, permission or kernel feature."""


class RegistrationError(RegistrarError):
    """The memory was not registered."""


class RegistrationLimitError(RegistrationError):
    """The memory was not registered because a limit is reached; deregistering other helps."""
