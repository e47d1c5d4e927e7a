"""`ummunotify run`: a program that was written for /dev/ummunotify finds it."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import struct
from pathlib import Path

import click

from .._abi import SOCKET_ENVIRONMENT
from .._core import SOURCE_ENVIRONMENT, connect_to_daemon, source_names
from ..daemon import private
from ..errors import SourceUnavailableError, UnavailableError, UnknownSourceError

LIB = Path(__file__).parents[1] / "lib"
_PT_INTERP = 3


class _NotExecutable(click.ClickException):
    exit_code = 126  # as in a shell


class _NotFound(click.ClickException):
    exit_code = 127


def _find(program: str) -> str:
    """Where it is; as a shell finds it."""
    found = shutil.which(program)
    if found:
        return found
    if os.path.isdir(program):
        raise _NotExecutable(f"{program} is a directory")
    if "/" in program and os.path.lexists(program):
        raise _NotExecutable(f"{program} may not be executed; see its permissions")
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


def _warn_if_deaf(path: str) -> None:
    """The dynamic linker preloads nothing into some programs; then they find no device, as without this command."""
    mode = os.stat(path).st_mode
    if mode & stat.S_ISUID or (mode & stat.S_ISGID and mode & stat.S_IXGRP):
        click.echo(f"Warning: {path} is set-uid or set-gid, so nothing can be preloaded into it", err=True)
    elif _is_static(path):
        click.echo(f"Warning: {path} is statically linked, so nothing can be preloaded into it", err=True)


def _choose(source: str | None, environment: dict[str, str]) -> None:
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
            environment[SOCKET_ENVIRONMENT] = private.start(probe or None)
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
                environment[SOCKET_ENVIRONMENT] = private.start()


@click.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "--source",
    help="Insist on one: daemon, bpf or uffd, the first two also with a probe (bpf:kvm). Left out: the daemon if it "
    "runs, else bpf if this user may load BPF programs.",
)
@click.option("--quiet", is_flag=True, help="Do not print why there is no device or no monitor.")
@click.option("--libfabric", is_flag=True, help="Give libfabric a memory monitor, instead of the program a device.")
@click.option(
    "--ucx", is_flag=True, help="Tell UCX's registration caches of changes, instead of giving the program a device."
)
@click.argument("program")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(source: str | None, quiet: bool, libfabric: bool, ucx: bool, program: str, arguments: tuple[str, ...]) -> None:
    """Run PROGRAM with /dev/ummunotify: ummunotify run [OPTIONS] -- PROGRAM [ARGUMENTS].

    A dynamically linked program that was written for the kernel's device of 2009 finds it, unchanged, and so do the
    programs that it starts. It takes this command's place: its exit status, its signals and its process number are
    the program's own.

    With --source bpf a daemon of the program's own holds the BPF program, and ends with it. --source uffd needs
    nothing, but sees only what the process does to its private anonymous memory; see docs/c.md.

    With --libfabric there is no device; libfabric's cache of registrations is told of changes instead, and with
    --ucx UCX's caches are. Both may be given. A program that never used the library, or has it linked statically,
    says so at its end. See docs/libfabric.md and docs/ucx.md.

    Exits with 127 if there is no PROGRAM, and with 126 if it cannot be executed.
    """
    path = _find(program)
    _warn_if_deaf(path)
    environment = dict(os.environ)
    bridges = [name for name, wanted in (("libfabric", libfabric), ("ucx", ucx)) if wanted]
    libraries = [str(LIB / f"libummunotify-{name}.so") for name in bridges or ["device"]]
    if set(libraries[0]) & set(" :$"):
        raise click.ClickException(
            f"{libraries[0]} cannot be preloaded: a blank, a colon or a dollar sign is in its path"
        )
    environment["LD_PRELOAD"] = ":".join(filter(None, [*libraries, environment.get("LD_PRELOAD")]))
    if bridges:
        environment["UMMUNOTIFY_RUN_PROGRAM"] = str(os.getpid())  # the program's too
    if ucx:
        # Its default patches libc when it is loaded, before it can be told that this is not needed.
        environment.setdefault("UCX_MEM_MMAP_HOOK_MODE", "reloc")
    if quiet:
        environment["UMMUNOTIFY_QUIET"] = "1"
    try:
        _choose(source, environment)
    except UnknownSourceError as error:
        raise click.BadParameter(str(error), param_hint="--source" if source else SOURCE_ENVIRONMENT) from None
    except (UnavailableError, SourceUnavailableError) as error:
        raise click.ClickException(f"{source or environment[SOURCE_ENVIRONMENT]} does not work here: {error}") from None
    try:
        os.execve(path, [program, *arguments], environment)
    except OSError as error:
        why = "its interpreter is missing" if error.errno == errno.ENOENT else error.strerror
        raise _NotExecutable(f"{path} cannot be executed: {why}") from None
