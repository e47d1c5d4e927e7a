"""What a registrar is, and how one fails. Each registrar is a module of its own in this package.

A registrar pins memory for a device or for the kernel ("registers" it) and gives back a handle.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from ..errors import (
    RegistrarError,
    RegistrarUnavailableError,
    RegistrationError,
    RegistrationLimitError,
)

__all__ = [
    "Registrar",
    "RegistrarError",
    "RegistrarUnavailableError",
    "RegistrationError",
    "RegistrationLimitError",
]

Handle = TypeVar("Handle")


class Registrar(Protocol[Handle]):
    """Two methods are all it takes to write a registrar.

    The registration cache calls them from several threads at once, and takes from the exceptions of `register` what to
    do: RegistrationLimitError, and OSError with an error number of that sense (ENOMEM, EAGAIN, ENOSPC, ...), make it
    deregister others and try again.

    A registrar may have these attributes too, which the cache reads when it is made:

    - `granularity`, a number of bytes, a power of two; 1 if it is missing. The cache registers whole multiples of it,
      at multiples of it. Where whole pages are pinned anyway, the page size makes more accesses hits; but a device
      can then reach what else is on these pages.
    - `merge`; False if it is missing. If it is true, memory that overlaps registrations that are not in use is
      registered in one piece with them.
    - `max_length`, in bytes; unlimited if it is missing. What is merged gets no longer.
    - `overlap`; True if it is missing. If it is false, memory cannot be registered twice at the same time. The cache
      then merges too, and fails where what overlaps is in use.
    """

    def register(self, address: int, length: int) -> Handle:
        """Pin `length` bytes at `address`; the result is what I/O then names them by.

        Raise RegistrationLimitError where it could succeed once other memory is deregistered.
        """
        ...

    def deregister(self, handle: Handle) -> None:
        """Undo `register`. If this raises, the memory counts as still registered."""
        ...
