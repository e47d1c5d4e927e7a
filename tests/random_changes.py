"""core/changes.pyx, compiled: threads that change mappings at random, against an oracle of what each has changed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from support import require

import ummunotify

HERE = Path(__file__).parent
CORE = HERE.parent / "src/ummunotify/core"


def run(*command: str | Path) -> None:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except FileNotFoundError:
        require(str(command[0]), "it is not installed")
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The module, with a copy of the owner's side of the table."""
    if importlib.util.find_spec("Cython") is None:
        require("cython", "it is not installed")
    folder = tmp_path_factory.mktemp("changes")
    source, library = folder / "changes.c", folder / "changes.so"
    run(sys.executable, "-m", "cython", "-3", HERE / "core/changes.pyx", "-o", source)
    flags = ["-shared", "-fPIC", "-O2", "-g", "-pthread", f"-I{sysconfig.get_path('include')}"]
    includes = [f"-I{ummunotify.get_include()}", f"-I{CORE}", f"-I{HERE / 'core'}"]
    run("gcc", *flags, *includes, source, HERE / "core/changes.c", CORE / "table.c", "-o", library)
    spec = importlib.util.spec_from_file_location("changes", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
