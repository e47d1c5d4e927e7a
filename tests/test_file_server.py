"""examples/file_server.py in each of its modes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import LONG, require

EXAMPLE = Path(__file__).parent.parent / "examples/file_server.py"


@pytest.mark.parametrize(("mode", "right"), [((), True), (("--no-cache",), True), (("--naive",), False)])
def test_file_server(keeper: object, mode: tuple[str, ...], right: bool) -> None:
    command = [sys.executable, str(EXAMPLE), *mode, "--connections=5"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=LONG, check=False)
    if result.returncode == 2:
        require("io_uring", result.stderr.strip())
    assert result.stderr == ""
    found = re.search(r": (\d+) requests, .* (\d+) wrong answers$", result.stdout.strip())
    assert found is not None, result.stdout
    assert found[1] == "100"
    assert (found[2] == "0") == right
    assert result.returncode == (not right)
