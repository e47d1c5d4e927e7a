"""`ummunotify daemon`: hold the privileges for processes that have none."""

from __future__ import annotations

import contextlib
import errno
import grp
import logging
import os
import pwd
import resource
import shutil
import socket
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import click

from .._abi import SOCKET_PATH, Probe
from ..bpf import libbpf
from ..daemon import privileges
from ..daemon.limits import SPARE, Limits
from ..daemon.listening import listening, refuse_descriptors
from ..daemon.loading import Loaded, load, load_who
from ..daemon.log import event
from ..daemon.server import SEGMENTS_AT_ONCE, Server
from ..errors import UnavailableError

_LISTEN_FD = 3
_PRIORITY = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}


class _Journal(logging.Handler):
    """Writes to the journal, sd_journal_send(3), where each field can be asked for."""

    def __init__(self) -> None:
        """OSError: there is none."""
        super().__init__()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._socket.connect("/run/systemd/journal/socket")
        except OSError:
            self._socket.close()
            raise

    def emit(self, record: logging.LogRecord) -> None:
        fields = {"message": record.getMessage(), "priority": _PRIORITY.get(record.levelno, 5)}
        fields |= {f"ummunotify_{name}": value for name, value in getattr(record, "fields", {}).items()}
        # A field that no line feed ends is not stored.
        lines = (f"{name.upper()}={value}".replace("\n", " ") + "\n" for name, value in fields.items())
        # Not waiting: a client that fills the journal must not stop the daemon.
        with contextlib.suppress(OSError):
            self._socket.send("".join(lines).encode(), socket.MSG_DONTWAIT)


def _to_journal() -> bool:
    """Does standard error go there? systemd.exec(5)."""
    stderr = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}"


def _log(level: int) -> None:
    handler: logging.Handler | None = None
    if _to_journal():
        with contextlib.suppress(OSError):
            handler = _Journal()
    if handler is None:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("ummunotify.daemon")
    logger.addHandler(handler)
    logger.setLevel(level)


def _fail(what: str) -> click.ClickException:
    return click.ClickException(what)


def _inherited() -> socket.socket | None:
    """The socket at which systemd listens for the daemon, sd_listen_fds(3)."""
    if os.environ.pop("LISTEN_PID", None) != str(os.getpid()) or not int(os.environ.pop("LISTEN_FDS", "0")):
        return None
    os.set_inheritable(_LISTEN_FD, False)
    listener = socket.socket(fileno=_LISTEN_FD)
    if listener.type != socket.SOCK_SEQPACKET:
        raise _fail("the socket unit has to say ListenSequentialPacket=")
    refuse_descriptors(listener)
    return listener


def _notify(state: str) -> None:
    """sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, contextlib.suppress(OSError):
            sender.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)


def _room(clients: int, ready: int) -> None:
    """See that there may be enough descriptors: two for each client and each table."""
    needed = 2 * (clients + ready) + SPARE + 64
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Those that are on their way to clients must not be more than this either.
    wanted = max(needed, clients * (SEGMENTS_AT_ONCE + 20))
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if wanted < needed:
        raise _fail(f"{clients} clients need {needed} descriptors, and {hard} are allowed (ulimit -n); see --clients")
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _mode(context: click.Context, parameter: click.Parameter, value: str) -> int:
    try:
        mode = int(value, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise click.BadParameter(f"{value!r} is not a mode such as 0660")
    return mode


def _group(context: click.Context, parameter: click.Parameter, value: str | None) -> int:
    try:
        return -1 if value is None else grp.getgrnam(value).gr_gid
    except KeyError:
        raise click.BadParameter(f"there is no group {value!r}") from None


def _known(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """The name of a group that is there: systemd would not start the socket."""
    _group(context, parameter, value)
    return value


def _user(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    try:
        user = None if value is None else pwd.getpwnam(value)
    except KeyError:
        raise click.BadParameter(f"there is no user {value!r}") from None
    return user and (user.pw_uid, user.pw_gid)


def _owner(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    try:
        owner = None if value is None else os.stat(value)
    except OSError as error:
        raise click.BadParameter(f"{value} has no owner: {error.strerror}") from None
    return owner and (owner.st_uid, owner.st_gid)


@click.group("daemon", invoke_without_command=True)
@click.option("--socket", "path", default=SOCKET_PATH, show_default=True, help="Where to listen.")
@click.option("--mode", default="0666", show_default=True, callback=_mode, help="The socket's mode.")
@click.option("--group", callback=_group, help="The socket's group.")
@click.option("--user", callback=_user, help="The user to become. Left out: this user, without privileges.")
@click.option("--user-of", "owner", callback=_owner, help="The user to become: the owner of this directory.")
@click.option(
    "--clients",
    default=Limits.clients,
    show_default=True,
    type=click.IntRange(1, 65536),
    help="How many notifiers may be open.",
)
@click.option(
    "--clients-per-user",
    default=Limits.clients_per_user,
    show_default=True,
    type=click.IntRange(1),
    help="How many of them one user may open.",
)
@click.option(
    "--memory",
    default=Limits.memory >> 20,
    show_default="half of the machine's",
    type=click.IntRange(1),
    help="Kernel memory for tables, in MiB.",
)
@click.option(
    "--memory-per-user",
    default=Limits.memory_per_user >> 20,
    show_default="an eighth of the machine's",
    type=click.IntRange(1),
    help="How much of it one user may take, in MiB.",
)
@click.option(
    "--ready", default=16, show_default=True, type=click.IntRange(1, 4096), help="How many tables to make in advance."
)
@click.option(
    "--probe",
    type=click.Choice([probe.label for probe in Probe]),
    help="Where the program is attached. Left out, the first of these that works.",
)
@click.option("--kvm/--no-kvm", default=True, show_default=True, help="Give clients access to /dev/kvm.")
@click.option("--bpf-statistics", is_flag=True, help="Let the kernel time all BPF programs of the host.")
@click.option("--metrics", help="Serve figures for Prometheus at unix:PATH or 127.0.0.1:PORT.")
@click.option("-v", "--verbose", is_flag=True, help="Log each client that comes and goes.")
@click.pass_context
def daemon(context: click.Context, /, **options: Any) -> None:
    """Serve notifications to users who may not load BPF programs.

    Needs root, or CAP_BPF and CAP_PERFMON; gives up all other privileges. Ends on SIGTERM; connected clients
    receive changes as long as they live, also after the daemon has ended.
    """
    if context.invoked_subcommand is None:
        _serve(_Options(**options))


@dataclass(frozen=True)
class _Options:
    """The command's options, by their names."""

    path: str
    mode: int
    group: int
    user: tuple[int, int] | None
    owner: tuple[int, int] | None
    clients: int
    clients_per_user: int
    memory: int
    memory_per_user: int
    ready: int
    probe: str | None
    kvm: bool
    bpf_statistics: bool
    metrics: str | None
    verbose: bool

    @property
    def becomes(self) -> tuple[int, int] | None:
        """The uid and gid of the user to become."""
        return self.user or self.owner

    @property
    def limits(self) -> Limits:
        return Limits(
            self.clients,
            min(self.clients, self.clients_per_user),
            self.memory << 20,
            min(self.memory, self.memory_per_user) << 20,
        )


def _serve(options: _Options) -> None:
    _log(logging.DEBUG if options.verbose else logging.INFO)
    with contextlib.ExitStack() as undo:
        with _errors_said():
            _room(options.clients, options.ready)
            if options.bpf_statistics:
                undo.callback(os.close, libbpf.enable_statistics())
            listener, metrics = _listen(options, undo)
            # Privileges last: where kernel.perf_event_paranoid is above 2, as on Debian, kprobes take CAP_SYS_ADMIN.
            loaded = _load(options, undo)
            who = _load_who(undo)
            privileges.drop(options.becomes)
            server = Server(listener, loaded.program, loaded.kvm, options.limits, options.ready, who)
            undo.callback(server.close)
        if metrics is not None:
            from ..daemon.metrics import Endpoint

            Endpoint(server, metrics)
        _run(server, options, loaded)


@contextlib.contextmanager
def _errors_said() -> Iterator[None]:
    """What goes wrong at the start ends the command with one line."""
    try:
        yield
    except UnavailableError as error:
        raise _fail(str(error)) from None
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        as_root = os.geteuid() != 0 and error.errno in (errno.EPERM, errno.EACCES)
        raise _fail(what + ("; run this as root, or with CAP_BPF and CAP_PERFMON" if as_root else "")) from None
    except ValueError as error:
        raise _fail(str(error)) from None


def _listen(options: _Options, undo: contextlib.ExitStack) -> tuple[socket.socket, socket.socket | None]:
    """The daemon's socket, and that for figures. Raises UnavailableError, OSError."""
    owners = options.becomes[:1] if options.becomes else ()
    metrics = None
    if options.metrics is not None:
        try:
            from ..daemon.metrics import listen
        except ImportError:
            raise _fail("--metrics needs the package prometheus-client: pip install 'ummunotify[metrics]'") from None
        try:
            metrics = undo.enter_context(listen(options.metrics, owners))
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--metrics") from None
    listener = _inherited()
    if listener is None:
        return (
            undo.enter_context(
                listening(options.path, socket.SOCK_SEQPACKET, mode=options.mode, group=options.group, owners=owners)
            ),
            metrics,
        )
    return undo.enter_context(listener), metrics


def _load(options: _Options, undo: contextlib.ExitStack) -> Loaded:
    """Raises UnavailableError, OSError."""
    loaded = load(options.probe, options.kvm, options.clients + options.ready)
    undo.callback(loaded.program.close)
    if loaded.kvm >= 0:
        undo.callback(os.close, loaded.kvm)
    for probes, why in loaded.missing:
        event(logging.WARNING, "missing", probes=probes, why=why)
    return loaded


def _load_who(undo: contextlib.ExitStack) -> int:
    try:
        who = load_who()
    except libbpf.BpfError as error:  # a kernel that is locked down
        event(
            logging.WARNING, "missing", users="uids of user namespaces count as users", why=str(error).splitlines()[0]
        )
        return -1
    undo.callback(os.close, who)
    return who


def _run(server: Server, options: _Options, loaded: Loaded) -> None:
    """Until SIGTERM."""
    event(
        logging.INFO,
        "started",
        pid=os.getpid(),
        uid=os.geteuid(),
        socket=server.address,
        clients=options.clients,
        probe=loaded.program.probe.label,
        kvm="given" if loaded.kvm >= 0 else "not given",
    )
    server.run(lambda: _notify("READY=1"))
    _notify("STOPPING=1")
    event(logging.INFO, "stopped", clients=server.summary().clients)


def closed_folder(path: str) -> Path | None:
    """Why the service's user cannot read the file: a folder that others may not enter, or that the unit replaces."""
    for folder in reversed(Path(path).absolute().parents):
        if str(folder) in ("/tmp", "/var/tmp") or not folder.stat().st_mode & stat.S_IXOTH:
            return folder
    return None


@daemon.command()
@click.option("--directory", default="/etc/systemd/system", show_default=True, help="Where the units go.")
@click.option("--group", default="root", show_default=True, callback=_known, help="May connect, with --mode 0660.")
@click.option("--mode", default="0666", show_default=True, callback=_mode, help="The socket's mode.")
def install(directory: str, group: str, mode: int) -> None:
    """Write the units for systemd, and say how to start them."""
    program = shutil.which("ummunotify", path=os.path.dirname(sys.executable)) or shutil.which("ummunotify")
    if program is None:
        raise _fail("there is no command ummunotify next to this Python; install the package with pip")
    units = resources.files("ummunotify.daemon")
    try:
        for name in ("ummunotify.service", "ummunotify.socket"):
            text = units.joinpath(name).read_text()
            for word, value in (("@PROGRAM@", program), ("@GROUP@", group), ("@MODE@", f"{mode:04o}")):
                text = text.replace(word, value)
            target = Path(directory, name)
            target.write_text(text)
            click.echo(f"wrote {target}")
    except OSError as error:
        as_root = "run this as root, or " if error.errno in (errno.EPERM, errno.EACCES) else ""
        raise _fail(
            f"cannot write the units: {error.filename}: {error.strerror}; {as_root}choose another --directory"
        ) from None
    for needed in (program, os.path.realpath(sys.executable), __file__):
        if (folder := closed_folder(needed)) is not None:
            click.echo(
                f"But the service's user cannot read {needed}, because of {folder}; "
                "install Python and the package where every user can, such as /usr and /opt",
                err=True,
            )
    click.echo("Now: systemctl daemon-reload && systemctl enable --now ummunotify.socket")
