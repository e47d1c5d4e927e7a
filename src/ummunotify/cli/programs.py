"""What `ummunotify run` and `ummunotify audit` have in common: the program, what is preloaded, and its source."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import shutil
import stat
import struct
from pathlib import Path

import click

from .._abi import SOCKET_ENVIRONMENT
from .._core import SOURCE_ENVIRONMENT, connect_to_daemon, source_names
from ..errors import SourceUnavailableError, UnavailableError, UnknownSourceError

LIB = Path(__file__).parents[1] / "lib"
_PT_INTERP = 3


class NotExecutable(click.ClickException):
    exit_code = 126  # as in a shell


class _NotFound(click.ClickException):
    exit_code = 127


def find(program: str) -> str:
    """Where it is; as a shell finds it."""
    found = shutil.which(program)
    if found:
        return found
    if os.path.isdir(program):
        raise NotExecutable(f"{program} is a directory")
    if "/" in program and os.path.lexists(program):
        raise NotExecutable(f"{program} may not be executed; see its permissions")
    raise _NotFound(f"there is no program {program}")


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


def deaf(path: str) -> str | None:
    """Why the dynamic linker preloads nothing into this program."""
    mode = os.stat(path).st_mode
    if mode & stat.S_ISUID or (mode & stat.S_ISGID and mode & stat.S_IXGRP):
        return f"{path} is set-uid or set-gid, so nothing can be preloaded into it"
    if _is_static(path):
        return f"{path} is statically linked, so nothing can be preloaded into it"
    return None


def _start_private(probe: str | None, ring: int | None) -> str:
    from ..daemon import private  # a quarter of this command's time, and where a daemon runs nothing of it is used

    return private.start(probe, ring)


def needs_sanitizer(path: str) -> str | None:
    """The shared library of AddressSanitizer that this program has: it insists on being preloaded first."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = re.search(rb"\0(libasan\.so\.\d+)\0", data)
            return found[1].decode() if found else None
    except (OSError, ValueError):  # ValueError: it is empty
        return None


def _choose(source: str | None, environment: dict[str, str], ring: int | None) -> None:
    """See to it that there is a source, if it is up to us.

    UnavailableError, SourceUnavailableError: what was insisted on does not work. UnknownSourceError.
    """
    wanted = environment.get(SOURCE_ENVIRONMENT, "")
    if source is None and wanted.partition(":")[0] == "bpf":
        source = wanted  # a C program does not load BPF programs by itself
    if source is not None:
        source_names(source)
        kind, _, probe = source.partition(":")
        if kind == "bpf":
            environment[SOCKET_ENVIRONMENT] = _start_private(probe or None, ring)
            source = "daemon"
        elif kind == "daemon":
            os.close(connect_to_daemon())
        environment[SOURCE_ENVIRONMENT] = source
    elif wanted:
        source_names()  # the program's open() could only say that there is no device
    else:
        try:
            os.close(connect_to_daemon())
        except SourceUnavailableError:
            # If neither works the program's open() says why.
            with contextlib.suppress(UnavailableError):
                environment[SOCKET_ENVIRONMENT] = _start_private(None, ring)


def choose(source: str | None, environment: dict[str, str], ring: int | None = None) -> None:
    """See to it that the program has a source, if it is up to us; a mistake ends the command.

    `ring`: for the stacks of changes, if a BPF program is loaded for this (see private.start).
    """
    try:
        _choose(source, environment, ring)
    except UnknownSourceError as error:
        raise click.BadParameter(str(error), param_hint="--source" if source else SOURCE_ENVIRONMENT) from None
    except (UnavailableError, SourceUnavailableError) as error:
        raise click.ClickException(f"{source or environment[SOURCE_ENVIRONMENT]} does not work here: {error}") from None


def preload(names: list[str], environment: dict[str, str]) -> None:
    """Have the dynamic linker load these of our libraries first."""
    libraries = [str(LIB / f"libummunotify-{name}.so") for name in names]
    if set(libraries[0]) & set(" :$"):
        raise click.ClickException(
            f"{libraries[0]} cannot be preloaded: a blank, a colon or a dollar sign is in its path"
        )
    environment["LD_PRELOAD"] = ":".join(filter(None, [*libraries, environment.get("LD_PRELOAD")]))


SHELL = "/bin/sh"


def is_script(path: str, error: OSError) -> bool:
    """A script without `#!`, which shells run by themselves?"""
    if error.errno != errno.ENOEXEC:
        return False
    with open(path, "rb") as file:
        return b"\0" not in file.read(128)


def why_not_executed(path: str, error: OSError) -> NotExecutable:
    why = "its interpreter is missing" if error.errno == errno.ENOENT else error.strerror
    return NotExecutable(f"{path} cannot be executed: {why}")
