"""What the examples for transfer engines share: buffers that are freed, and others that come to lie where they were."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

import ummunotify
from ummunotify.registrars import Registrar

PIECE = 256 << 10
LENGTHS = (PIECE, PIECE, 2 * PIECE)

NOTHING = 0  # PROT_NONE
MAP_FIXED = 0x10

Handle = TypeVar("Handle")

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)


def new_buffer(length: int, place: int | None = None, access: int = mmap.PROT_READ | mmap.PROT_WRITE) -> int:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (MAP_FIXED if place else 0)
    buffer = libc.mmap(place, length, access, flags, -1, 0)
    if buffer == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(buffer)


def compare(registrar: AbstractContextManager[Registrar[Handle]], transfer: Callable[[int, int], bytes]) -> bool:
    """Send with registrations kept by address, as programs do, and with the cache. Is only the first wrong?

    `transfer` gets the address and the length of registered memory, and returns what arrived.
    """
    with registrar as engine:
        print("Registrations kept by address")
        kept: dict[int, Handle] = {}

        def by_address(address: int, length: int) -> bytes:
            if address not in kept:
                kept[address] = engine.register(address, length)
            return transfer(address, length)

        wrong = not send_recycled(by_address)
        for handle in kept.values():
            engine.deregister(handle)

        print("Registrations in ummunotify's cache")
        with ummunotify.RegistrationCache(engine) as cache:

            def by_cache(address: int, length: int) -> bytes:
                with cache.acquire((address, length)):
                    return transfer(address, length)

            return send_recycled(by_cache) and wrong


def send_recycled(send: Callable[[int, int], bytes]) -> bool:
    """Send three buffers, one after the other at the same address. Does all arrive as it was sent?

    `send` gets a buffer's address and length, and returns what arrived.
    """
    place = new_buffer(max(LENGTHS), access=NOTHING)
    right = True
    for number, length in enumerate(LENGTHS, 1):
        buffer = new_buffer(length, place)
        content = bytes([number]) * length
        ctypes.memmove(buffer, content, length)
        try:
            arrived = send(buffer, length)
        except Exception as error:  # each engine has its own
            result = f"fails: {error}"
        else:
            result = "arrives" if arrived == content else f"WRONG, without an error: {sorted(set(arrived))} arrives"
        right &= result == "arrives"
        print(f"  buffer {number}, {length >> 10} KiB at {buffer:#x}: {result}")
        # As allocators do: the memory is gone, and no other mapping gets its address.
        new_buffer(length, place, NOTHING)
    return right
