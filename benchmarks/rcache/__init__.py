"""What the section "cache" measures."""

import contextlib
import os
from pathlib import Path

import ummunotify


def undisturbed() -> None:
    """From now on no ordinary process interrupts this one, where that is allowed. For some seconds only."""
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


def compiler_flags(*libraries: str) -> list[str]:
    """For a program that uses these libraries of the package."""
    folder = Path(ummunotify.__file__).parent / "lib"
    names = [f"-l{name}" for name in libraries]
    return [f"-I{ummunotify.get_include()}", f"-L{folder}", *names, f"-Wl,-rpath,{folder}"]
