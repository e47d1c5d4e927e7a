"""`ummunotify run`: a program that was written for /dev/ummunotify finds it."""

from __future__ import annotations

import os

import click

from . import programs


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
    path = programs.find(program)
    why = programs.deaf(path)
    if why:
        click.echo(f"Warning: {why}", err=True)  # it finds no device, as without this command
    environment = dict(os.environ)
    bridges = [name for name, wanted in (("libfabric", libfabric), ("ucx", ucx)) if wanted]
    programs.preload(bridges or ["device"], environment)
    if bridges:
        environment["UMMUNOTIFY_RUN_PROGRAM"] = str(os.getpid())  # the program's too
    if ucx:
        # Its default patches libc when it is loaded, before it can be told that this is not needed.
        environment.setdefault("UCX_MEM_MMAP_HOOK_MODE", "reloc")
    if quiet:
        environment["UMMUNOTIFY_QUIET"] = "1"
    programs.choose(source, environment)
    try:
        os.execve(path, [program, *arguments], environment)
    except OSError as error:
        if not programs.is_script(path, error):
            raise programs.why_not_executed(path, error) from None
        os.execve(programs.SHELL, [programs.SHELL, path, *arguments], environment)
