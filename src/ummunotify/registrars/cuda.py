"""Registers memory with the CUDA driver (cuMemHostRegister), so that GPUs copy from and to it by themselves.

It uses the driver library alone: no toolkit, no Python package.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass

from . import RegistrarError, RegistrarUnavailableError, RegistrationError, RegistrationLimitError
from ._owned import OwnedRegistrations

__all__ = ["CudaRegistrar", "HostRegistration"]

# From cuda.h.
_OUT_OF_MEMORY = 2
_ALREADY_REGISTERED = 712
_PORTABLE = 1
_DEVICEMAP = 2


@dataclass(frozen=True, slots=True, eq=False)
class HostRegistration:
    """Registered memory: its address and its length in bytes, and its address on the device."""

    address: int
    length: int
    device_address: int


class CudaRegistrar(OwnedRegistrations[HostRegistration]):
    """Page-locks memory and maps it for the GPU numbered `device`, and for all others that can address it.

    It uses the device's primary context, as the CUDA runtime and what is built on it do (PyTorch, CuPy, ...).
    `library` is the driver library's name or path.

    The driver refuses to register memory twice, by whomever. Use one registrar, and one cache, for all.

    Threads: any thread may call any method; none changes the thread's current context. Fork: CUDA does not work in a
    forked child, so there the calls raise RegistrarError; `close` does nothing.

    Raises RegistrarUnavailableError if there is no driver or no such device.
    """

    # For the cache; see Registrar.
    granularity = mmap.PAGESIZE

    _FORKED = "CUDA does not work in a forked child; start other processes with spawn"

    def __init__(self, device: int = 0, *, library: str = "libcuda.so.1") -> None:
        super().__init__()
        self._context = ctypes.c_void_p()
        try:
            self._driver = ctypes.CDLL(library)
        except OSError as error:
            raise RegistrarUnavailableError(
                f"the CUDA driver library cannot be loaded ({error}); "
                "install NVIDIA's driver, or give a container access to it"
            ) from error
        number = ctypes.c_int()
        try:
            self._call("cuInit", 0)
            self._call("cuDeviceGet", ctypes.byref(number), device)
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), number)
        except _DriverError as error:
            raise RegistrarUnavailableError(f"CUDA device {device} cannot be used: {error}") from error
        self._device = number

    def register(self, address: int, length: int) -> HostRegistration:
        """Lock the pages of `length` bytes at `address` and map them for the device.

        Raises RegistrationLimitError if there is no memory for it, and RegistrationError if the driver refuses.
        """
        with self._ours():
            pointer = ctypes.c_void_p(address)
            try:
                self._call("cuMemHostRegister_v2", pointer, ctypes.c_size_t(length), _PORTABLE | _DEVICEMAP)
            except _DriverError as error:
                message = f"cannot register {length} bytes at {address:#x} with CUDA: {error}"
                if error.code == _OUT_OF_MEMORY:
                    raise RegistrationLimitError(f"{message}; deregister other memory") from error
                if error.code == _ALREADY_REGISTERED:
                    message += "; other code has registered a part of it"
                raise RegistrationError(message) from error
            on_device = ctypes.c_uint64()
            try:
                self._call("cuMemHostGetDevicePointer_v2", ctypes.byref(on_device), pointer, 0)
            except _DriverError as error:
                self._call("cuMemHostUnregister", pointer)
                raise RegistrationError(
                    f"cannot map {length} bytes at {address:#x} for the CUDA device: {error}"
                ) from error
            registered = HostRegistration(address, length, on_device.value)
            self._live.add(registered)
            return registered

    def _undo(self, handle: HostRegistration) -> None:
        try:
            self._call("cuMemHostUnregister", ctypes.c_void_p(handle.address))
        except _DriverError as error:
            raise RegistrarError(f"cannot deregister {handle}: {error}") from error

    def close(self) -> None:
        """Deregister everything and let go of the device. Closing again is harmless."""
        super().close()
        if self._pid != os.getpid():
            return
        with self._lock:
            if self._context:
                self._context = ctypes.c_void_p()
                self._call("cuDevicePrimaryCtxRelease_v2", self._device)

    @contextlib.contextmanager
    def _ours(self) -> Iterator[None]:
        with super()._ours():
            if not self._context:
                raise RegistrarError("this registrar is closed")
            self._call("cuCtxPushCurrent_v2", self._context)
            try:
                yield
            finally:
                self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _call(self, name: str, *arguments: object) -> None:
        """Call the driver, without the GIL."""
        code = getattr(self._driver, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            if self._driver.cuGetErrorString(code, ctypes.byref(text)) or text.value is None:
                text.value = b"unknown error"
            raise _DriverError(code, f"{name}: {text.value.decode()} ({code})")


class _DriverError(Exception):
    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
