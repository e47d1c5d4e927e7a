"""The core's tests, which are programs in C: tests/core/meson.build."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import require

ROOT = Path(__file__).parent.parent
TESTS = (
    "interleave",
    "exact",
    "exact-asan",
    "hostile-asan",
    "stress",
    "stress-tsan",
    "stress-asan",
    "cache",
    "cache-tsan",
    "cache-asan",
    "uffd-race",
    "uffd-race-tsan",
    "uffd-fill",
    "uffd-fill-tsan",
    "uffd-heap",
    "uffd-heap-tsan",
    "uffd-changes-tsan",
    "uffd-closed",
    "uffd-closed-tsan",
    "uffd-clone",
    "uffd-mappings",
    "uffd-limits",
    "descriptor",
    "epoch",
    "epoch-tsan",
    "keeper-ring",
    "keeper-ring-asan",
    "keeper-thread",
    "keeper-thread-asan",
    "wakeup-asan",
)
# The compilers' ThreadSanitizers are not the same.
CHECKS = [*(("gcc", test) for test in TESTS), ("clang", "stress-tsan")]
SKIPPED = 77


def meson(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # of ninja
    command = [sys.executable, "-m", "mesonbuild.mesonmain", *arguments]
    return subprocess.run(
        command,
        env=os.environ | environment | {"PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that makes a build directory for a compiler, once."""
    directories: dict[str, Path] = {}

    def make(compiler: str) -> Path:
        if not shutil.which(compiler):
            require(compiler, "it is not installed")
        if compiler not in directories:
            directory = tmp_path_factory.mktemp(compiler)
            options = [
                "-Dpython=disabled",
                "-Dtests=true",
                f"-Dlong_tests={str('UMMUNOTIFY_SLOW' in os.environ).lower()}",
            ]
            setup = meson("setup", directory, ROOT, "-Dwerror=true", *options, CC=compiler)
            assert setup.returncode == 0, setup.stdout
            directories[compiler] = directory
        return directories[compiler]

    return make


def test_every_test_is_run(build: Callable[[str], Path]) -> None:
    listed = meson("introspect", "--tests", build("gcc"))
    assert {test["name"] for test in json.loads(listed.stdout) if test["suite"] == ["ummunotify:core"]} == set(TESTS)


@pytest.mark.parametrize(("compiler", "test"), CHECKS, ids=["-".join(check) for check in CHECKS])
def test_core(build: Callable[[str], Path], compiler: str, test: str) -> None:
    directory = build(compiler)
    run = meson("test", "-C", directory, "--print-errorlogs", test)
    assert run.returncode == 0, run.stdout
    result = json.loads((directory / "meson-logs/testlog.json").read_text().splitlines()[-1])
    if result["returncode"] == SKIPPED:
        require("io_uring" if test.startswith("keeper") else test.partition("-")[0], result["stdout"].strip())
    assert result["result"] == "OK"
