"""Listening sockets in the file system.

Only a dead socket of this daemon's own is replaced, and no other user can put a socket in the place of this one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from ..errors import UnavailableError

BACKLOG = 16
"""Connections that wait to be accepted; others wait in connect(). In a flood this is what each client waits for."""
_SO_PASSRIGHTS = 83
"""Since Linux 6.16. Connections have it from the listening socket."""
_PATH_ROOM = 108
"""sun_path in unix(7), with the 0 at its end."""
_SYMLINKS_MOST = 40
"""As many as the kernel follows."""


@contextlib.contextmanager
def listening(
    path: str,
    kind: socket.SocketKind,
    *,
    mode: int | None = None,
    group: int = -1,
    owners: Collection[int] = (),
) -> Iterator[socket.socket]:
    """A socket that listens at `path`, in place of one that a daemon has left there.

    The file PATH.lock is locked meanwhile. It stays afterwards, and shows the next daemon that PATH is a daemon's.
    `mode`: left out, the umask decides. `owners`: see `check_directory`.

    Raises UnavailableError: the path is in use, is not a daemon's, or is not safe; OSError.
    """
    if not 0 < len(os.fsencode(path)) < _PATH_ROOM:
        reason = f"{path} is too long for a socket's path" if path else "the socket's path is empty"
        raise UnavailableError(reason, "choose another path")
    directory = Path(path).absolute().parent
    _make(directory)
    check_directory(directory, owners)
    with _locked(path) as known, socket.socket(socket.AF_UNIX, kind) as listener:
        refuse_descriptors(listener)
        _clear(path, kind, known)
        # No connection before the mode is what it should be.
        mask = os.umask(0o777)
        try:
            listener.bind(path)
        finally:
            os.umask(mask)
        os.chown(path, -1, group)
        os.chmod(path, 0o777 & ~mask if mode is None else mode)
        listener.listen(BACKLOG)
        yield listener


def refuse_descriptors(listener: socket.socket) -> None:
    """Let no client send descriptors (EPERM), as far as the kernel can do that: see peers.h."""
    with contextlib.suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)


def check_directory(directory: Path, owners: Collection[int] = ()) -> None:
    """Raises UnavailableError if a user could replace what is in this directory; OSError.

    Not meant are root, this user, and `owners`. Each directory and symbolic link on the way has to be theirs, and no
    directory may be writable to others, unless it is sticky: there only the owner of a file can replace it.
    """
    trusted = {0, os.geteuid(), *owners}
    symlinks = 0
    left = list(reversed(directory.absolute().parts))
    here = Path(left.pop())
    while True:
        what = os.lstat(here)
        if what.st_uid not in trusted:
            raise UnavailableError(
                f"{here} belongs to uid {what.st_uid}, which could replace the socket", "choose a directory of root's"
            )
        if stat.S_ISLNK(what.st_mode):
            symlinks += 1
            if symlinks > _SYMLINKS_MOST:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(here))
            target = Path(os.readlink(here))
            left += reversed(target.parts)
            here = Path(left.pop()) if target.is_absolute() else here.parent
            continue
        if what.st_mode & 0o022 and not what.st_mode & stat.S_ISVTX:
            raise UnavailableError(
                f"{here} is writable to others (mode {stat.S_IMODE(what.st_mode):04o}), who could replace the socket",
                f"chmod go-w {here}, or choose another directory",
            )
        if not left:
            return
        here = here.parent if left[-1] == ".." else here / left[-1]
        left.pop()


def _make(directory: Path) -> None:
    """No other user can write to it. Those above it have to be there: a mistyped path makes nothing.

    UnavailableError, OSError.
    """
    mask = os.umask(0o022)
    try:
        directory.mkdir(mode=0o755, exist_ok=True)
    except FileNotFoundError:
        raise UnavailableError(
            f"{directory} cannot be made: there is no {directory.parent}", "make that, or choose another path"
        ) from None
    except FileExistsError:
        raise UnavailableError(f"{directory} is no directory", "choose another path") from None
    finally:
        os.umask(mask)


@contextlib.contextmanager
def _locked(path: str) -> Iterator[bool]:
    """Hold the lock. True: there was a lock file, so what is at `path` may be a daemon's. UnavailableError, OSError."""
    name = f"{path}.lock"
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    known = False
    try:
        lock = os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        lock = _open_lock(name, flags)
        known = True
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UnavailableError(f"a daemon listens at {path} already", "stop it, or choose another path") from None
        yield known
    finally:
        os.close(lock)


def _open_lock(name: str, flags: int) -> int:
    """UnavailableError, OSError."""
    try:
        lock = os.open(name, flags)
        what = os.fstat(lock)
        if stat.S_ISREG(what.st_mode) and what.st_uid == os.geteuid() and what.st_nlink == 1:
            return lock
        os.close(lock)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EACCES, errno.EISDIR, errno.ENXIO):
            raise
    raise UnavailableError(f"{name} is not a lock file of this user's", "remove it, or choose another path")


def _clear(path: str, kind: socket.SocketKind, known: bool) -> None:
    """Remove the socket that a daemon has left. The lock is held. UnavailableError, OSError."""
    try:
        what = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(what.st_mode):
        raise UnavailableError(f"{path} is there and is not a socket", "choose another path")
    # Not blocking: a socket whose queue is full is alive.
    with socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK) as probe:
        if probe.connect_ex(path) != errno.ECONNREFUSED:
            raise UnavailableError(f"a program listens at {path} already", "stop it, or choose another path")
    if not known or what.st_uid != os.geteuid():
        raise UnavailableError(
            f"{path} is a socket that no daemon of this user's has left",
            "remove it if no program needs it, or choose another path",
        )
    os.unlink(path)
