"""What docs/cache.md shows works."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import require

import ummunotify

PAGE = (Path(__file__).parent.parent / "docs/cache.md").read_text()


def snippets(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_python(keeper: object, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    assert len(snippets("python")) == 3
    for snippet in snippets("python"):
        exec(snippet, names)
    assert names["reg"].__class__ is ummunotify.Registration
    assert re.match(r"LockedRange\(.*\) \d+ 8388608\n", capsys.readouterr().out)
    assert len([line for line in snippets("python")[1].split("class ")[1].splitlines() if line]) <= 10
    names["cache"].close()


def test_c(tmp_path: Path) -> None:
    source = tmp_path / "snippet.c"
    source.write_text(snippets("c")[0])
    command = ["gcc", "-fsyntax-only", "-Wall", "-Wno-unused-function", "-Werror", f"-I{ummunotify.get_include()}"]
    subprocess.run([*command, str(source)], check=True)


def test_cython(tmp_path: Path) -> None:
    if importlib.util.find_spec("Cython") is None:
        require("cython", "it is not installed")
    source = tmp_path / "snippet.pyx"
    source.write_text("# cython: language_level=3\n" + snippets("cython")[0])
    subprocess.run([sys.executable, "-m", "cython", "-3", str(source)], check=True)
    assert source.with_suffix(".c").exists()
