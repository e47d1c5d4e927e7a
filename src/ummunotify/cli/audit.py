"""`ummunotify audit`: finds memory that a program changes while it is pinned."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

import click
from rich.console import Console

from .._stacks import create_ring
from ..audit import page, records, report, text, traced
from ..audit.findings import Report, SuppressionError, Suppressions, judge, read_suppressions
from . import programs

_PASSED_ON = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def _start(path: str, command: list[str], environment: dict[str, str], mask: set[int]) -> int:
    """A process's number. `mask`: the signals that the program has blocked."""

    def spawn(program: str, arguments: list[str]) -> int:
        # Python ignores these two, which the program would inherit.
        return os.posix_spawn(
            program, arguments, environment, setsigmask=mask, setsigdef=(signal.SIGPIPE, signal.SIGXFSZ)
        )

    try:
        return spawn(path, command)
    except OSError as error:
        if not programs.is_script(path, error):
            raise programs.why_not_executed(path, error) from None
    return spawn(programs.SHELL, [programs.SHELL, path, *command[1:]])


def _run(path: str, command: list[str], environment: dict[str, str]) -> int:
    """Its exit status; negative: the signal that ended it."""
    # What is ignored stays so, for the program too.
    passed_on = {each for each in _PASSED_ON if signal.getsignal(each) is not signal.SIG_IGN}
    for each in passed_on:
        signal.signal(each, lambda *_: None)  # what comes after the program has ended
    waited_for = {*passed_on, signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, waited_for)
    try:
        pid = _start(path, command, environment, before)
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            came = signal.sigwaitinfo(waited_for)
            # What the kernel sends comes from the terminal, and the program gets that, too.
            if came.si_signo in passed_on and came.si_code <= 0:
                os.kill(pid, came.si_signo)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ring() -> int | None:
    """A ring buffer for the stacks of changes; None where this user may not have one."""
    try:
        return create_ring()
    except OSError:
        return None


def _directory() -> tempfile.TemporaryDirectory[str]:
    """For the records of the processes."""
    try:
        return tempfile.TemporaryDirectory(
            prefix="ummunotify-audit-",
            ignore_cleanup_errors=True,  # what goes on in the background may put another file there
        )
    except OSError as error:
        raise click.ClickException(f"the audit needs a temporary directory: {error.strerror}") from None


def _print(result: Report, every: bool) -> None:
    console = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
    console.print()
    for each in text.findings(result, every):
        console.print(each)
    for line in text.summary(result, every):
        console.print(f"ummunotify audit: {text.plain(line)}")


def _output(context: click.Context, _: click.Parameter, path: str | None) -> IO[str] | None:
    """It is opened before the program runs, so that a mistake does not cost the report."""
    if path is None:
        return None
    if path == "-" and sys.stdout is None:
        raise click.BadParameter("standard output is closed")
    if path.startswith("-") and path != "-":
        raise click.BadParameter(f"the name of a file is missing before {path!r}")
    try:
        file: IO[str] = click.open_file(path, "w", encoding="utf-8", errors="replace")
    except OSError as error:
        raise click.BadParameter(f"{path!r} cannot be written: {error.strerror}") from None
    if path != "-":
        context.call_on_close(file.close)
    return file


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("--source", help="Insist on a source, as with `ummunotify run`.")
@click.option(
    "--json",
    "json_file",
    metavar="FILE",
    callback=_output,
    help="Write the report as JSON to this file; - is standard output.",
)
@click.option("--html", "html_file", metavar="FILE", callback=_output, help="Write the report as an HTML page, too.")
@click.option("--all", "every", is_flag=True, help="Show what was deregistered without a use, too.")
@click.option(
    "--error-exitcode",
    type=click.IntRange(1, 255),
    help="Exit with this if there are findings. Else: as the program did.",
)
@click.option(
    "--suppressions", type=click.Path(exists=True, dir_okay=False), help="Findings that are known; see below."
)
@click.option("--no-stacks", is_flag=True, help="Take no stacks: then pinning costs less.")
@click.option("--mlock", is_flag=True, help="Take what mlock locks for pinned.")
@click.argument("program")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def audit(
    source: str | None,
    json_file: IO[str] | None,
    html_file: IO[str] | None,
    every: bool,
    error_exitcode: int | None,
    suppressions: str | None,
    no_stacks: bool,
    mlock: bool,
    program: str,
    arguments: tuple[str, ...],
) -> None:
    """Run PROGRAM, and report memory that changed while it was pinned.

    ummunotify audit [OPTIONS] -- PROGRAM [ARGUMENTS]

    PROGRAM is not changed; what it registers with libibverbs, io_uring or CUDA is watched until it is deregistered.
    The report, on standard error, says what was pinned, what changed it, and whether the pin was used after that, each
    with its stack. It includes the processes that PROGRAM starts. One that is killed has its report up to then.

    A line of the file for --suppressions is pin:, change:, use: or any: and a pattern: a function, a source file or a
    library, with * and ?. A finding is left out if a frame of that stack matches.

    Exits as PROGRAM does (128 and the signal's number if that ended it), with 127 if there is no PROGRAM, with 126 if
    it cannot be executed. See docs/audit.md.
    """
    path = programs.find(program)
    why = programs.deaf(path)
    if why:
        raise click.ClickException(f"{why}: it cannot be audited")
    try:
        known = read_suppressions(Path(suppressions)) if suppressions else Suppressions()
    except SuppressionError as error:
        raise click.BadParameter(str(error), param_hint="--suppressions") from None
    environment = dict(os.environ)
    programs.preload(["audit"], environment)
    if mlock:
        environment["UMMUNOTIFY_AUDIT_MLOCK"] = "1"
    if sanitizer := programs.needs_sanitizer(path):
        environment["LD_PRELOAD"] = f"{sanitizer}:{environment['LD_PRELOAD']}"
    if no_stacks:
        environment["UMMUNOTIFY_AUDIT_NO_STACKS"] = "1"
    ring = None if no_stacks else _ring()
    programs.choose(source, environment, ring)
    listener = None
    if ring is not None:
        listener = traced.Listener(ring)  # a thread: now that a daemon was forked
        os.close(ring)
    command = [program, *arguments]
    with _directory() as directory:
        environment["UMMUNOTIFY_AUDIT_DIRECTORY"] = directory
        began = time.time()
        status = _run(path, command, environment)
        ended = time.time()
        stacks = listener.end() if listener else []
        result = judge(command, status, began, ended, records.read(Path(directory)), known, stacks)
    if not result.processes:
        click.echo(
            f"Warning: {program} was not audited: nothing could be preloaded into it, or it could not write a file of "
            "16 MiB (ulimit -f, or a full disk)",
            err=True,
        )
    _print(result, every)
    if json_file:
        json_file.write(json.dumps(report.as_json(result), indent=1) + "\n")
    if html_file:
        html_file.write(page.render(result))
    if error_exitcode and result.wrong:
        sys.exit(error_exitcode)
    sys.exit(status if status >= 0 else 128 - status)
