"""`ummunotify run`: a program that was written for /dev/ummunotify finds it."""

from __future__ import annotations

import os
import shutil
import stat
import struct
from pathlib import Path
from typing import NoReturn

import click

from ..daemon import private
from ..daemon.protocol import ENVIRONMENT as SOCKET_ENVIRONMENT
from ..sources import ENVIRONMENT as SOURCE_ENVIRONMENT
from ..sources import daemon
from ..sources.base import UnavailableError

LIB = Path(__file__).parents[1] / "lib"
_NOT_EXECUTABLE, _NOT_FOUND = 126, 127
"""What a shell exits with."""
_PT_INTERP = 3


def _fail(what: str, code: int = 1) -> NoReturn:
    error = click.ClickException(what)
    error.exit_code = code
    raise error


def _find(program: str) -> str:
    """Where it is; as a shell finds it."""
    found = shutil.which(program)
    if found:
        return found
    if os.path.isdir(program):
        _fail(f"{program} is a directory", _NOT_EXECUTABLE)
    if "/" in program and os.path.lexists(program):
        _fail(f"{program} may not be executed; see its permissions", _NOT_EXECUTABLE)
    _fail(f"there is no program {program}", _NOT_FOUND)


def _is_static(path: str) -> bool:
    """A 64-bit ELF program that names no dynamic linker."""
    try:
        with open(path, "rb") as file:
            head = file.read(64)
            if len(head) < 64 or head[:5] != b"\x7fELF\x02":
                return False
            offset, size, count = *struct.unpack_from("=Q", head, 32), *struct.unpack_from("=HH", head, 54)
            file.seek(offset)
            table = file.read(size * count)
    except OSError:
        return False
    kinds = [struct.unpack_from("=I", table, i * size)[0] for i in range(len(table) // size)] if size >= 4 else []
    return bool(kinds) and _PT_INTERP not in kinds


def _warn_if_deaf(path: str) -> None:
    """The dynamic linker preloads nothing into some programs; then they find no device, as without this command."""
    mode = os.stat(path).st_mode
    if mode & stat.S_ISUID or (mode & stat.S_ISGID and mode & stat.S_IXGRP):
        click.echo(f"Warning: {path} is set-uid or set-gid, so nothing can be preloaded into it", err=True)
    elif _is_static(path):
        click.echo(f"Warning: {path} is statically linked, so nothing can be preloaded into it", err=True)


def _choose(source: str | None, environment: dict[str, str]) -> None:
    """See to it that there is a source, if it is up to us. UnavailableError: what was insisted on does not work."""
    if source in ("daemon", "uffd"):
        environment[SOURCE_ENVIRONMENT] = source
    elif source == "bpf":
        environment[SOURCE_ENVIRONMENT] = "daemon"
        environment[SOCKET_ENVIRONMENT] = private.start()
    if source == "daemon":
        daemon.connect().close()
    if source is None and not environment.get(SOURCE_ENVIRONMENT):
        try:
            daemon.connect().close()
        except UnavailableError:
            # If neither works the program's open() says why.
            try:
                environment[SOCKET_ENVIRONMENT] = private.start()
            except UnavailableError:
                pass


@click.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "--source",
    type=click.Choice(["daemon", "bpf", "uffd"]),
    help="Insist on one. Left out: the daemon if it runs, else bpf if this user may load BPF programs.",
)
@click.option("--quiet", is_flag=True, help="Do not let the program's open() say on standard error why there is no device.")
@click.argument("program")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(source: str | None, quiet: bool, program: str, arguments: tuple[str, ...]) -> None:
    """Run PROGRAM with /dev/ummunotify: ummunotify run [OPTIONS] -- PROGRAM [ARGUMENTS].

    A dynamically linked program that was written for the kernel's device of 2009 finds it, unchanged, and so do the
    programs that it starts. It takes this command's place: its exit status, its signals and its process number are
    the program's own.

    With --source bpf a daemon of the program's own holds the BPF program, and ends with it. --source uffd needs
    nothing, but sees only what the process does to its private anonymous memory; see docs/c.md.

    Exits with 127 if there is no PROGRAM, and with 126 if it cannot be executed.
    """
    path = _find(program)
    _warn_if_deaf(path)
    environment = dict(os.environ)
    library = str(LIB / "libummunotify-device.so")
    if set(library) & set(" :$"):
        _fail(f"{library} cannot be preloaded, because of a blank, a colon or a dollar sign in its path")
    environment["LD_PRELOAD"] = ":".join(filter(None, [library, environment.get("LD_PRELOAD")]))
    if quiet:
        environment["UMMUNOTIFY_QUIET"] = "1"
    try:
        _choose(source, environment)
    except UnavailableError as error:
        _fail(f"{source} does not work here: {error}")
    try:
        os.execve(path, [program, *arguments], environment)
    except OSError as error:
        _fail(f"{path} cannot be executed: {error.strerror}", _NOT_EXECUTABLE)
