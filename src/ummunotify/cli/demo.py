"""`ummunotify demo`: what goes wrong with a kept registration, and how ummunotify tells."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile

import click
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table

import ummunotify

from ..registrars.io_uring import FixedBuffer, IoUringRegistrar
from .output import console

_PAGE = mmap.PAGESIZE
_DATA = b"new data"
_MAP_FIXED_NOREPLACE = 0x100000  # the same on every architecture that has io_uring but Alpha


class _MissingError(click.ClickException):
    """Something that the demo needs is not there."""

    exit_code = 2


@click.command("demo")
def demo() -> None:
    """Show, with real pages, the error that ummunotify prevents.

    Exits with 0 if both halves turn out as told, with 1 if one does not, and with 2 if something
    is missing.
    """
    try:
        with (
            IoUringRegistrar(slots=1) as registrar,
            ummunotify.open() as umn,
            tempfile.TemporaryFile() as file,
        ):
            file.write(_DATA)
            file.flush()
            told = _Demo(console(), registrar, file.fileno()).run(umn)
    except ummunotify.SourceUnavailableError as error:
        raise _MissingError(f"{_one_line(error)} (`ummunotify doctor` says more)") from error
    except ummunotify.UmmunotifyError as error:
        raise _MissingError(_one_line(error)) from error
    except OSError as error:
        raise click.ClickException(f"the demo could not go on: {error}") from error
    if not told:
        raise click.exceptions.Exit(1)


class _Demo:
    def __init__(self, printer: Console, registrar: IoUringRegistrar, file: int) -> None:
        self._console = printer
        self._registrar = registrar
        self._file = file

    def run(self, umn: ummunotify.Notifier) -> bool:
        """Show both halves; whether they turned out as told."""
        self._console.print(
            "Fast I/O wants pinned memory: the kernel keeps hold of its pages and moves data "
            "straight to them. Pinning is slow, so programs do it once and keep the handle. This "
            "shows what happens when the memory is freed and its address used again."
        )
        self._title("Without ummunotify")
        told = self._without()
        self._title(f"With ummunotify (it learns of changes from {umn.source})")
        return self._with(umn) and told

    def _without(self) -> bool:
        a = self._map_first()
        handle = self._register("a", a)
        _unmap(a)
        b, how = _map_again(a)
        self._step("munmap(a)", "a is freed; the owner of the handle is not told")
        self._step(f"b = mmap({_PAGE})", f"b is at {b:#x}: {how}")
        self._step("", "we have a handle for that address, so we use it:")
        self._read(handle, b)
        seen = ctypes.string_at(b, len(_DATA))
        self._step("contents of b", _dump(seen), "red")

        # Where did the data go? Only the handle still leads to the old page: write from it.
        with tempfile.TemporaryFile() as copy:
            self._registrar.write_fixed(copy.fileno(), handle, handle.address, len(_DATA), 0)
            old = os.pread(copy.fileno(), len(_DATA), 0)
        self._step("the old page of a", f"{_dump(old)}  (through the handle)")
        self._registrar.deregister(handle)
        _unmap(b)
        return self._verdict(
            seen != _DATA and old == _DATA,
            "Wrong, and no error: the data went to a page that the program no longer has.",
        )

    def _with(self, umn: ummunotify.Notifier) -> bool:
        with ummunotify.RegistrationCache(self._registrar, notifier=umn) as cache:
            a = self._map_first()
            first = cache.acquire((a, _PAGE))
            self._step("first = acquire(a)", "a miss: a is watched, then its page is pinned")
            before = first.valid
            self._check("first", before)
            _unmap(a)
            b, how = _map_again(a)
            after = first.valid
            self._step("munmap(a)", "a is freed; the kernel reports it")
            self._step(f"b = mmap({_PAGE})", f"b is at {b:#x}: {how}")
            self._check("first", after)
            first.release()
            with cache.acquire((b, _PAGE)) as second:
                stats = cache.stats
                renewed = stats.stale == 1 and stats.misses == 2 and second.valid
                if renewed:
                    self._step("second = acquire(b)", "stale: the old handle is let go, and b is pinned")
                self._check("second", second.valid)
                self._read(second.handle, b)
                seen = ctypes.string_at(b, len(_DATA))
                self._step("contents of b", _dump(seen), "green")
            with cache.acquire((b, _PAGE)):
                kept = cache.stats.hits == 1
                if kept:
                    self._step("acquire(b)", "a hit: nothing has changed, so nothing is to do")
        _unmap(b)
        return self._verdict(before and not after and renewed and kept and seen == _DATA, "Right: the data is in b.")

    def _map_first(self) -> int:
        address = _map()
        self._step(f"a = mmap({_PAGE})", f"a is at {address:#x}")
        return address

    def _register(self, name: str, address: int) -> FixedBuffer:
        handle = self._registrar.register(address, _PAGE)
        self._step(f"handle = register({name})", f"the page at {address:#x} is pinned")
        return handle

    def _read(self, handle: FixedBuffer, address: int) -> None:
        count = self._registrar.read_fixed(self._file, handle, address, len(_DATA), 0)
        self._step("read(file, handle)", f"{_dump(_DATA)}  ({count} bytes, no error)")

    def _check(self, name: str, valid: bool) -> None:
        meaning = "the handle can be used" if valid else "the handle must not be used"
        self._step(f"{name}.valid", f"{valid}: {meaning}", "" if valid else "green")

    def _title(self, text: str) -> None:
        self._console.print(f"\n{text}", style="bold")

    def _step(self, call: str, result: str, style: str = "") -> None:
        row = Table.grid(padding=(0, 2, 0, 0))
        row.add_column(width=20, style="cyan")
        row.add_column(style=style)
        row.add_row(call, result)
        self._console.print(_indented(row))

    def _verdict(self, as_told: bool, text: str) -> bool:
        style = "bold"
        if not as_told:
            text = "This did not turn out as it should. Please report it, with the output of `ummunotify doctor`."
            style = "bold red"
        self._console.print(_indented(text), style=style)
        return as_told


def _indented(what: RenderableType) -> Padding:
    return Padding(what, (0, 0, 0, 2), expand=False)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _dump(data: bytes) -> str:
    text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in data)
    return f"{data.hex(' ')}  {text}"


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.restype = ctypes.c_int
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def _map(address: int | None = None) -> int:
    """Map one page, where the kernel likes or exactly at `address`. The mmap module cannot."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (_MAP_FIXED_NOREPLACE if address else 0)
    mapped = _libc.mmap(address, _PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if mapped == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, f"mmap: {os.strerror(number)}")
    return int(mapped)


def _unmap(address: int) -> None:
    if _libc.munmap(address, _PAGE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"munmap: {os.strerror(number)}")


def _map_again(address: int) -> tuple[int, str]:
    """Map a page that gets the address of one just unmapped, and how it came to that address."""
    mapped = _map()
    if mapped == address:
        return mapped, "the same address"
    _unmap(mapped)
    return _map(address), "the same address (asked for: the kernel had picked another)"
