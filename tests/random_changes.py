"""core/changes.pyx, compiled: threads that change mappings at random, against an oracle of what each has changed."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support import require

import ummunotify

HERE = Path(__file__).parent
LIBRARY = HERE.parent / "src/libummunotify"
PACKAGE = Path(ummunotify.__path__[0])


def run(*command: str | Path) -> None:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except FileNotFoundError:
        require(str(command[0]), "it is not installed")
    assert done.returncode == 0, done.stdout


def build(
    package: Path = PACKAGE,
    compiler: Sequence[str | Path] = ("gcc",),
    suffix: str = sysconfig.get_config_var("EXT_SUFFIX"),
) -> Path:
    """The module, compiled from these very files, but only once: in a guest it takes minutes, and is there already.

    A guest of another architecture has `package` where this machine has its own.
    """
    sources = [HERE / "core/changes.pyx", HERE / "core/changes.c"]
    headers = [*LIBRARY.glob("include/*.h"), *HERE.glob("core/*.h"), *PACKAGE.glob("*.pxd")]
    contents = b"".join(path.read_bytes() for path in [Path(__file__), *sources, *sorted(headers)])
    name = f"changes-{hashlib.sha256(contents).hexdigest()[:16]}{suffix}"
    library = HERE.parent / "build/tests" / name
    if library.exists():
        return library
    if importlib.util.find_spec("Cython") is None:
        require("cython", "it is not installed")
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        source, made = Path(scratch, "changes.c"), Path(scratch, name)
        run(sys.executable, "-m", "cython", "-3", sources[0], "-o", source)
        flags = [
            "-shared",
            "-fPIC",
            "-O2",
            "-g",
            "-pthread",
            "-DCHANGES_NOTIFIER",
            f"-I{sysconfig.get_path('include')}",
        ]
        includes = [f"-I{LIBRARY}", f"-I{LIBRARY / 'include'}", f"-I{HERE / 'core'}"]
        # The library that the package has loaded.
        links = [f"-L{package / 'lib'}", "-lummunotify", f"-Wl,-rpath,{PACKAGE / 'lib'}"]
        run(*compiler, *flags, *includes, source, *sources[1:], *links, "-o", made)
        made.rename(library)
    return library


@pytest.fixture(scope="session")
def native() -> Any:
    """The module, which works on notifiers."""
    spec = importlib.util.spec_from_file_location("changes", build())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
