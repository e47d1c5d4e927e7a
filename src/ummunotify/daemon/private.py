"""A daemon for one program, which whoever may load BPF programs can start; it ends when the program does."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import socket
import tempfile
from pathlib import Path

from ..errors import UnavailableError
from . import privileges
from .limits import Limits
from .listening import check_directory, refuse_descriptors
from .loading import load
from .server import Server

_LIMITS = Limits(clients=1024, clients_per_user=1024)
_READY = 2


def start(probe: str | None = None, ring: int | None = None) -> str:
    """Start it, for the program that takes this process's place. Its socket, which only this user can connect to.

    `probe`: this one, or else the first that works. `ring`: a ring buffer into which the stacks of changes go, if that
    is possible with this probe (_stacks.create_ring).

    Raises UnavailableError.
    """
    hear, say = os.pipe()
    program = os.pidfd_open(os.getpid())
    # A child of a child that has ended: not one that the program could be surprised by when it waits for its own.
    # While SIGCHLD is ignored, the kernel does not count it in getrusage(RUSAGE_CHILDREN) either. There the library
    # that is preloaded for libfabric sees whether the program has waited for children.
    handler = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        between = os.fork()
    except OSError as error:
        signal.signal(signal.SIGCHLD, handler)
        for fd in (hear, say, program):
            os.close(fd)
        raise UnavailableError(f"no process can be started for it ({error.strerror})", "raise `ulimit -u`") from None
    if not between:
        try:
            signal.signal(signal.SIGCHLD, handler)
            if not os.fork():
                _serve(program, say, probe, ring)
        finally:
            os._exit(0)
    os.close(program)
    os.close(say)
    with contextlib.suppress(ChildProcessError):  # that is how the wait ends
        os.waitpid(between, 0)
    signal.signal(signal.SIGCHLD, handler)
    with open(hear, encoding="utf-8") as answer:
        path, *why = answer.read().split("\n")
    if path:
        return path
    raise UnavailableError(*why) if len(why) == 2 else UnavailableError("the program's own daemon has failed", "")


def _serve(program: int, say: int, probe: str | None, ring: int | None) -> None:
    """Until the program ends. Says its path; or three lines: nothing, what is missing, and what to do about it."""
    os.setsid()  # no Ctrl-C
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with contextlib.ExitStack() as undo:
        try:
            directory = tempfile.mkdtemp(prefix="ummunotify-")
            undo.callback(shutil.rmtree, directory, ignore_errors=True)
            check_directory(Path(directory))
            os.chdir("/")
            path = os.path.join(directory, "socket")
            listener = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            refuse_descriptors(listener)
            listener.bind(path)
            listener.listen(socket.SOMAXCONN)
            _keep_only({program, say, listener.fileno(), *(() if ring is None else (ring,))})
            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
            loaded = load(probe, True, _LIMITS.clients + _READY)
            undo.callback(loaded.program.close)
            if ring is not None:
                from ..bpf import tracing  # here, as only an audit needs it

                with contextlib.suppress(UnavailableError):
                    undo.callback(tracing.attach(loaded.program, ring).close)
                os.close(ring)
            privileges.drop(None)
            server = Server(listener, loaded.program, loaded.kvm, _LIMITS, _READY)
            undo.callback(server.close)
        except UnavailableError as error:
            os.write(say, f"\n{error.reason}\n{error.remedy}".encode())
            return
        except OSError as error:
            os.write(say, f"\n{error.strerror or error}\n".encode())
            return
        server.loop.watch(program, server.loop.stop)

        def started() -> None:
            os.write(say, path.encode())
            os.close(say)

        server.run(started)


def _keep_only(fds: set[int]) -> None:
    """Whoever reads what the program writes must not wait for this process."""
    null = os.open("/dev/null", os.O_RDWR)
    for fd in {0, 1, 2} - fds:
        os.dup2(null, fd)
    first = 3
    for fd in sorted(fds):
        os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, os.sysconf("SC_OPEN_MAX"))
