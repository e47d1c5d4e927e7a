"""RDMA through a registration whose memory was freed reads the old bytes; watching the memory tells.

It needs an RDMA device, or the one that Linux makes of any network interface (docs/rdma.md has the commands):

    modprobe rdma_rxe && rdma link add rxe0 type rxe netdev lo
    python examples/rdma_stale_mr.py [DEVICE]

Exits with 0 if both halves turn out as told.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import sys
from typing import Any

from rdma import Endpoint

import ummunotify
from ummunotify.registrars.verbs import VerbsRegistrar

PAGE = mmap.PAGESIZE
MAP_FIXED_NOREPLACE = 0x100000

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def new_page(content: bytes, address: int | None = None) -> int:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (MAP_FIXED_NOREPLACE if address else 0)
    page = libc.mmap(address, PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if page == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    ctypes.memmove(page, content, len(content))
    return int(page)


def free(page: int) -> None:
    if libc.munmap(page, PAGE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def step(call: str, result: str) -> None:
    print(f"  {call:<22}{result}")


class Demo:
    def __init__(self, endpoint: Endpoint, registrar: VerbsRegistrar) -> None:
        self.endpoint = endpoint
        self.registrar = registrar
        self.target = new_page(b"")
        self.target_region = registrar.register(self.target, PAGE)

    def read(self, region: Any, address: int) -> bytes:
        """What a peer gets that was told the address and the registration's key."""
        self.endpoint.read(self.target, self.target_region, 8, address, region.rkey)
        got = ctypes.string_at(self.target, 8)
        step("RDMA read of b", f"{got!r}")
        return got

    def replace(self, a: int) -> int:
        free(a)
        step("munmap(a)", "a is freed; the owner of the registration is not told")
        b = new_page(b"new data", a)
        step("b = mmap(4096)", f"b is at {b:#x} too, and contains {ctypes.string_at(b, 8)!r}")
        return b

    def register(self, name: str, page: int) -> Any:
        region = self.registrar.register(page, PAGE)
        step(
            f"mr = ibv_reg_mr({name})", f"the page at {page:#x} is pinned, lkey {region.lkey:#x}, rkey {region.rkey:#x}"
        )
        return region

    def first(self) -> int:
        a = new_page(b"old data")
        step("a = mmap(4096)", f"a is at {a:#x}, and contains {ctypes.string_at(a, 8)!r}")
        return a

    def without(self) -> bool:
        a = self.first()
        region = self.register("a", a)
        b = self.replace(a)
        got = self.read(region, b)
        self.registrar.deregister(region)
        free(b)
        return got == b"old data"

    def watched(self, umn: ummunotify.Notifier) -> bool:
        a = self.first()
        with umn.watch((a, PAGE)) as watched:
            step("region = watch(a)", "from now on we can ask whether a has changed")
            region = self.register("a", a)
            before = watched.valid
            b = self.replace(a)
            after = watched.valid
            step("region.valid", f"{after}: " + ("use it" if after else "the registration must not be used"))
            if not after:
                self.registrar.deregister(region)
                watched.renew()
                step("region.renew()", "from now on we can ask whether b has changed")
                region = self.register("b", b)
            got = self.read(region, b)
            self.registrar.deregister(region)
        free(b)
        return before and not after and got == b"new data"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", nargs="?", default="rxe0")
    device = parser.parse_args().device
    with ummunotify.open() as umn, Endpoint(device) as endpoint, VerbsRegistrar(endpoint.domain) as registrar:
        endpoint.connect(endpoint.name)  # to itself: reading its own memory is enough
        demo = Demo(endpoint, registrar)
        print(f"RDMA device {device}\n\nWithout ummunotify")
        wrong = demo.without()
        print(
            "  Wrong, and no error: these are the bytes of a page that the program no longer has." if wrong else "  ?"
        )
        print(f"\nWith ummunotify (it learns of changes from {umn.source})")
        right = demo.watched(umn)
        print("  Right: these are the bytes in b." if right else "  ?")
    if not (wrong and right):
        print("This did not turn out as it should.", file=sys.stderr)
    return 0 if wrong and right else 1


if __name__ == "__main__":
    sys.exit(main())
