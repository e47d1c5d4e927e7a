"""Lets other users read the checkout and Python, for tests that become one.

A clone often lies in root's home, which is closed to others. So the test process gets a mount namespace of its own,
in which an open folder with the same contents takes the place of each closed one. What tests put right into such a
folder is gone afterwards.
"""

from __future__ import annotations

import ctypes
import os
import stat
import sys
from pathlib import Path

from support import require, require_root

import ummunotify

_CLONE_NEWNS = 0x20000
_MS_BIND, _MS_REC, _MS_SLAVE = 0x1000, 0x4000, 0x80000
_libc = ctypes.CDLL(None, use_errno=True)

_closed: str | None = None
"""Why another user can read nothing, if so."""


def _call(name: str, *arguments: bytes | int | None) -> None:
    if getattr(_libc, name)(*arguments):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def _closed_folder() -> Path | None:
    """The uppermost on the way to what other users need that they may not enter."""
    needed = (Path(__file__), Path(sys.executable), Path(os.__file__), Path(ummunotify.__file__))
    for path in (*needed, *(path.resolve() for path in needed)):
        for folder in reversed(path.absolute().parents):
            if not folder.stat().st_mode & stat.S_IXOTH:
                return folder
    return None


def _open(folder: Path) -> None:
    """Cover it with an open folder that has the same in it. OSError."""
    names = os.listdir(folder)
    below = os.open(folder, os.O_PATH)
    try:
        _call("mount", b"tmpfs", bytes(folder), b"tmpfs", 0, b"mode=755")
        for name in names:
            covered, target = Path(f"/proc/self/fd/{below}", name), folder / name
            if covered.is_symlink():
                target.symlink_to(covered.readlink())
                continue
            if covered.is_dir():
                target.mkdir()
            else:
                target.touch()
            _call("mount", bytes(covered), bytes(target), None, _MS_BIND | _MS_REC, None)
    finally:
        os.close(below)


def let_in() -> None:
    """To be called before there are threads: only the calling one gets another namespace."""
    global _closed
    if os.geteuid() or _closed_folder() is None:
        return
    try:
        _call("unshare", _CLONE_NEWNS)
        _call("mount", None, b"/", None, _MS_REC | _MS_SLAVE, None)
        while (folder := _closed_folder()) is not None:
            _open(folder)
        os.chdir(os.getcwd())  # what it was is covered
    except OSError as error:
        _closed = f"{_closed_folder()} is closed to other users, and no mount can take its place: {error}"


def require_another_user() -> None:
    """Skip the test if no other user can read the checkout and Python here."""
    require_root("the test becomes another user")
    if _closed is not None:
        require("root", _closed)
