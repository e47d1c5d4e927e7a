"""The command line: one module for each subcommand."""

from __future__ import annotations

import errno
import importlib
from typing import Any

import click

from .. import __version__

_COMMANDS = {
    "audit": "Run a program, and report memory that changed while it was pinned.",
    "config": "Print the compiler options for C programs that use libummunotify.",
    "daemon": "Serve notifications to users who may not load BPF programs.",
    "demo": "Show, with real pages, the error that ummunotify prevents.",
    "doctor": "Report what works on this machine, what does not, and what to do about it.",
    "run": "Run a program with /dev/ummunotify, or tell libfabric's or UCX's caches of changes.",
    "selftest": "Make every known kind of change of a mapping, and check that it is seen.",
    "status": "Show the daemon's clients.",
    "top": "Watch the daemon's clients, live.",
}


class _Group(click.Group):
    """Imports a subcommand's module only when it is asked for: each may need a package of its own."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f".{cmd_name}", __package__)
        command: click.Command = getattr(module, cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in _COMMANDS and not name.startswith("-"):  # click itself would look in `commands`, which is empty
            from difflib import get_close_matches  # takes time, and only mistakes need it

            similar = " or ".join(map(repr, get_close_matches(name, _COMMANDS)))
            ctx.fail(f"No such command {name!r}." + (f" Did you mean {similar}?" if similar else ""))
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise click.ClickException(f"the output cannot be written: {error.strerror}") from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ummunotify")
def main() -> None:
    """Learn, without missing a change, that the mapping of memory was changed."""
