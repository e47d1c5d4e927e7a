"""What the examples for transfer engines share: buffers that are freed, and others that come to lie where they were."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable

PIECE = 256 << 10
LENGTHS = (PIECE, PIECE, 2 * PIECE)

NOTHING = 0  # PROT_NONE
MAP_FIXED = 0x10

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)


def new_buffer(length: int, place: int | None = None, access: int = mmap.PROT_READ | mmap.PROT_WRITE) -> int:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (MAP_FIXED if place else 0)
    buffer = libc.mmap(place, length, access, flags, -1, 0)
    if buffer == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(buffer)


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
