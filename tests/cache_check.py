"""Is a cache's inner state in order? tests/core/cache_check.h says, of the cache behind RegistrationCache.capsule."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from ummunotify import RegistrationCache

HERE = Path(__file__).parent


@functools.cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "check.so")
        command = ["gcc", "-std=gnu11", "-O1", "-shared", "-fPIC", f"-I{HERE.parent / 'src/libummunotify'}"]
        subprocess.run([*command, str(HERE / "core/cache_check.c"), "-o", str(path)], check=True)
        library = ctypes.CDLL(str(path))
    library.umn_cache_wrong.restype = ctypes.c_char_p
    library.umn_cache_wrong.argtypes = (ctypes.c_void_p,)
    return library


def pointer_to(cache: RegistrationCache[Any]) -> int:
    """The `struct ummunotify_cache *`."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    return int(get(cache.capsule, b"ummunotify.cache"))


def wrong(cache: RegistrationCache[Any]) -> str | None:
    """What is wrong, or None."""
    text: bytes | None = _library().umn_cache_wrong(pointer_to(cache))
    return None if text is None else text.decode()
