"""Registers memory with an RDMA device (ibv_reg_mr), through the package pyverbs of rdma-core."""

from __future__ import annotations

import errno
import importlib
import os
import threading
from typing import Any

from . import RegistrarError, RegistrarUnavailableError, RegistrationError, RegistrationLimitError
from ._owned import Closing

__all__ = ["VerbsRegistrar"]

# RLIMIT_MEMLOCK and the device's tables.
_LIMITS = {errno.ENOMEM, errno.EAGAIN, errno.ENOSPC, errno.EMFILE, errno.ENFILE, errno.EDQUOT}


class VerbsRegistrar(Closing):
    """Registers memory in a protection domain: a `pyverbs.pd.PD`, or one of the device named, then opened here.

    The handle is a `pyverbs.mr.MR`, with `lkey` and `rkey`. `access` consists of the flags IBV_ACCESS_*; without it,
    this side may read and write the memory and whoever is told the rkey may too.

    Threads: any thread may call any method. Fork: what is registered is the parent's; the child registers nothing with
    this registrar, and deregisters nothing.
    """

    def __init__(self, domain: Any, *, access: int | None = None) -> None:
        """Raises RegistrarUnavailableError if pyverbs is missing or the device cannot be opened."""
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._live: set[Any] = set()
        self._opened: list[Any] = []
        self._mr = _pyverbs("mr").MR
        self._error = _pyverbs("pyverbs_error").PyverbsError
        enums = _pyverbs("enums")
        if access is None:
            access = enums.IBV_ACCESS_LOCAL_WRITE | enums.IBV_ACCESS_REMOTE_READ | enums.IBV_ACCESS_REMOTE_WRITE
        self._access = access
        if isinstance(domain, str):
            try:
                self._opened.append(_pyverbs("device").Context(name=domain))
                self._opened.append(_pyverbs("pd").PD(self._opened[0]))
            except self._error as error:
                self.close()
                raise RegistrarUnavailableError(
                    f"the RDMA device {domain} cannot be opened: {_text(error)}; `rdma link` lists them, and "
                    f"`rdma link add rxe0 type rxe netdev lo` makes one where there is no hardware"
                ) from error
            domain = self._opened[1]
        self.domain: Any = domain
        """The protection domain."""

    def register(self, address: int, length: int) -> Any:
        """Pin `length` bytes at `address` and let the device reach them.

        Raises RegistrationLimitError if that would exceed RLIMIT_MEMLOCK or what the device can hold, and
        RegistrationError if the memory is not mapped or may not be written.
        """
        self._check()
        try:
            region = self._mr(self.domain, length, self._access, address)
        except self._error as error:
            message = f"cannot register {length} bytes at {address:#x} with the RDMA device: {_text(error)}"
            if getattr(error, "error_code", None) in _LIMITS:
                raise RegistrationLimitError(
                    f"{message}; raise RLIMIT_MEMLOCK (ulimit -l), or deregister other memory"
                ) from error
            raise RegistrationError(message) from error
        with self._lock:
            self._live.add(region)
        return region

    def deregister(self, handle: Any) -> None:
        """Take the memory from the device and unpin it. If the device refuses, it still is registered."""
        self._check()
        with self._lock:
            if handle not in self._live:
                # Not the handle itself: pyverbs crashes when a closed one is printed.
                raise RegistrarError("this memory is not registered here (was it deregistered before?)")
            self._live.remove(handle)
        try:
            handle.close()
        except self._error as error:
            with self._lock:
                self._live.add(handle)
            raise RegistrarError(f"the RDMA device cannot deregister memory: {_text(error)}") from error

    def close(self) -> None:
        """Deregister everything, and close the device if it was opened here. Closing again is harmless."""
        if self._pid != os.getpid():
            return
        for handle in list(self._live):
            self.deregister(handle)
        while self._opened:
            self._opened.pop().close()

    def _check(self) -> None:
        if self._pid != os.getpid():
            raise RegistrarError("registered memory is the parent's; open the RDMA device anew in a forked child")


def _pyverbs(module: str) -> Any:
    try:
        return importlib.import_module(f"pyverbs.{module}")
    except ImportError as error:
        raise RegistrarUnavailableError(
            f"the package pyverbs cannot be imported ({error}); install rdma-core's: apt-get install python3-pyverbs"
        ) from error


def _text(error: Exception) -> str:
    return " ".join(str(error).split())
