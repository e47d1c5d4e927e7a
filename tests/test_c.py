"""libummunotify from C and C++: the tests are programs, in tests/c."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from daemons import COMMAND, NOBODY, Daemon
from support import LONG, SLOW, require, require_source

import ummunotify

HERE = Path(__file__).parent / "c"
DAEMON, UFFD = "daemon", "uffd"


def output(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def build(source: Path, target: Path, *options: str, compiler: str = "gcc") -> str:
    """Compile a program. Its path."""
    if not shutil.which(compiler):
        require(compiler, "it is not installed")
    command = [
        compiler,
        "-Wall",
        "-Wextra",
        "-Werror",
        "-O1",
        "-g",
        str(source),
        "-o",
        str(target),
        "-pthread",
        *options,
    ]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 0, result.stderr
    target.chmod(0o755)
    return str(target)


def run(*command: str, user: int | None = None, **environment: str) -> str:
    """What the program says, which must not fail."""
    result = subprocess.run(
        command,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        user=user,
        group=user,
        extra_groups=None if user is None else [],
        timeout=None if SLOW else LONG,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(params=[DAEMON, UFFD])
def source(request: pytest.FixtureRequest) -> str:
    """Starts a daemon if it takes one."""
    name = str(request.param)
    if name == DAEMON:
        request.getfixturevalue("daemon")
    else:
        require_source(name)
    return name


def flags() -> list[str]:
    return output(*COMMAND, "config", "--cflags", "--libs").split()


@pytest.fixture(scope="module")
def public() -> Iterator[Path]:
    """A directory that other users can get into."""
    with tempfile.TemporaryDirectory(prefix="umn") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module", params=["gcc", "g++"])
def program(request: pytest.FixtureRequest, public: Path) -> str:
    return build(HERE / "library.c", public / f"library-{request.param}", *flags(), compiler=str(request.param))


def test_library(program: str, source: str) -> None:
    says = run(program, UMMUNOTIFY_SOURCE=source)
    assert says.startswith(f"source: {source}")
    assert "threads" in says


@pytest.fixture(scope="module")
def processes(public: Path) -> dict[str, str]:
    """The programs about children and descriptors."""
    return {name: build(HERE / f"{name}.c", public / name, *flags()) for name in ("forks", "descriptors")}


@pytest.mark.parametrize("name", ["forks", "descriptors"])
def test_processes(name: str, processes: dict[str, str], source: str) -> None:
    assert "replaced" in run(processes[name], UMMUNOTIFY_SOURCE=source) or name == "forks"


def library_sources() -> list[str]:
    """What builds a program that has the library in itself."""
    library = Path(__file__).parents[1] / "src" / "libummunotify"
    folders = ("process", "table", "sources", "notifier")
    sources = sorted(path for path in library.glob("*/*.c") if path.parent.name in folders)
    return [*map(str, sources), f"-I{library}", f"-I{library / 'include'}", '-DUMN_VERSION="0.1"', "-ldl"]


def sanitizing(kind: str) -> list[str]:
    # GCC warns that ThreadSanitizer does not understand fences.
    return [f"-fsanitize={kind}", "-fno-sanitize-recover=all", "-Wno-tsan"]


@pytest.fixture(scope="module", params=["address,undefined", "thread"])
def sanitized(request: pytest.FixtureRequest, public: Path) -> dict[str, str]:
    options = [*library_sources(), *sanitizing(request.param)]
    return {
        name: build(HERE / f"{name}.c", public / f"{name}-{request.param}", *options)
        for name in ("library", "forks", "descriptors")
    }


@pytest.mark.parametrize("name", ["library", "forks", "descriptors"])
def test_sanitizers(name: str, sanitized: dict[str, str], source: str) -> None:
    if name != "library" and sanitized[name].endswith("thread"):
        return  # ThreadSanitizer knows neither of clone() nor of threads with a descriptor table of their own
    # A child leaves alone what the parent had, as it may be half changed.
    leaks = "0" if name == "forks" else "1"
    # What the tests leave to children and to the process's end: threads that start in a child, the uffd reader.
    threads = "die_after_fork=0 report_thread_leaks=0"
    run(sanitized[name], UMMUNOTIFY_SOURCE=source, ASAN_OPTIONS=f"detect_leaks={leaks}", TSAN_OPTIONS=threads)


def test_both_headers(tmp_path: Path) -> None:
    """In any order; struct ummunotify_event is then the library's."""
    headers = ("ummunotify.h", "linux/ummunotify.h")
    for order in (headers, headers[::-1], headers[1:]):
        program = tmp_path / "both.c"
        tag = "ummunotify_device_event"
        library = "_Static_assert(sizeof(((struct ummunotify_event *)0)->region) == sizeof(void *), "
        program.write_text(
            "".join(f"#include <{header}>\n" for header in order)
            + (f'{library}"");\n' if len(order) == 2 else "struct ummunotify_event event;\n")
            + f'_Static_assert(sizeof(struct {tag}) == 32, "");\nint main(void) {{ return 0; }}\n'
        )
        run(build(program, tmp_path / "both", flags()[0]))


def test_as_another_user(program: str, daemon: Daemon) -> None:
    assert run(program, user=NOBODY).startswith("source: daemon:kvm")


def test_pkgconfig_and_the_version(tmp_path: Path) -> None:
    if not shutil.which("pkg-config"):
        require("pkg-config", "it is not installed")
    directory = output(*COMMAND, "config", "--pkgconfig")
    words = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "ummunotify"],
        env=os.environ | {"PKG_CONFIG_PATH": directory},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout.split()
    program = tmp_path / "version.c"
    program.write_text(
        "#include <stdio.h>\n#include <ummunotify.h>\nint main(void) { return puts(ummunotify_version()) < 0; }\n"
    )
    said = run(build(program, tmp_path / "version", *words)).strip()
    modversion = output("env", f"PKG_CONFIG_PATH={directory}", "pkg-config", "--modversion", "ummunotify")
    command = output(*COMMAND, "--version").removeprefix("ummunotify, version ")
    assert {said, modversion, command, metadata.version("ummunotify")} == {ummunotify.__version__}


def test_installed_by_itself(tmp_path: Path, source: str) -> None:
    """Without Python: meson installs it, and pkg-config is all that a program needs."""
    root = Path(__file__).parents[1]
    tools = Path(sys.executable).parent
    if not (tools / "meson").exists() or not shutil.which("pkg-config"):
        require("meson", "meson or pkg-config is not installed")
    environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    prefix, build_folder = tmp_path / "prefix", str(tmp_path / "build")
    for command in (
        ["meson", "setup", "-Dpython=disabled", f"--prefix={prefix}", build_folder, str(root)],
        ["meson", "install", "-C", build_folder],
    ):
        result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert result.returncode == 0, result.stdout
    assert "python" not in " ".join(str(path) for path in prefix.rglob("*"))
    [description] = prefix.rglob("ummunotify.pc")
    words = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "ummunotify"],
        env=environment | {"PKG_CONFIG_PATH": str(description.parent)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout.split()
    program = build(HERE / "library.c", tmp_path / "library", *words)
    assert run(program, "the_case", UMMUNOTIFY_SOURCE=source).endswith("the_case\n")


def test_man_pages() -> None:
    """They name every function, and every option."""
    manual = Path(__file__).parents[1] / "man"
    header = (Path(flags()[0].removeprefix("-I")) / "ummunotify.h").read_text()
    functions = set(re.findall(r"\b(ummunotify_\w+)\(", header)) - {"ummunotify_event"}
    page = (manual / "ummunotify.3").read_text()
    assert len(functions) > 10
    assert all(function in page.partition(".SH SYNOPSIS")[2] for function in functions)
    for name, commands in {
        "ummunotify-audit": [["audit"]],
        "ummunotify-run": [["run"]],
        "ummunotify": [["config"], ["daemon"], ["daemon", "install"], ["doctor"], ["selftest"], ["status"], ["top"]],
    }.items():
        page = (manual / f"{name}.1").read_text().replace("\\-", "-")
        for command in commands:
            assert " ".join(command) in page
            options = re.findall(r"--[\w-]+", output(*COMMAND, *command, "--help").partition("Options:")[2])
            assert not [option for option in options if option not in page and option != "--help"]
