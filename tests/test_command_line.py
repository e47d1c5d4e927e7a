"""What all commands and examples have in common: help, mistakes, output that is not a terminal, Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import click
import pytest
from daemons import Daemon
from support import LONG, require_module, require_root, require_source

from ummunotify import cli

COMMAND = str(Path(sys.executable).with_name("ummunotify"))
ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(
    path
    for path in (ROOT / "examples").glob("*.py")
    if '"""' in path.read_text() and path.name not in ("rdma.py", "recycled.py")
)


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR")}
    return subprocess.run(
        command, env=inherited | environment, capture_output=True, text=True, timeout=LONG, check=False
    )


def test_similar_command() -> None:
    result = run(COMMAND, "docter")
    assert result.returncode == 2
    assert "No such command 'docter'. Did you mean 'doctor'?" in result.stderr
    result = run(COMMAND, "xyzzy")
    assert result.stderr.endswith("No such command 'xyzzy'.\n")


def test_lines_stay_whole_in_a_pipe(daemon: Daemon) -> None:
    """A sentence is never cut by a line's end, and no line is filled up with blanks."""
    found = run(COMMAND, "doctor", UMMUNOTIFY_SOCKET="/nowhere/socket").stdout
    assert "no daemon runs here: there is no /nowhere/socket (from UMMUNOTIFY_SOCKET)\n" in found
    assert not [line for line in found.splitlines() if line != line.rstrip()]
    assert "tables ready" in run(COMMAND, "status", UMMUNOTIFY_SOCKET=daemon.path).stdout.splitlines()[0]


def test_a_narrow_terminal_keeps_names_whole() -> None:
    assert "bpf:mmu_notifier" in run(COMMAND, "doctor", COLUMNS="40").stdout


def test_a_width_that_is_not_known() -> None:
    for command, word in (("doctor", "bpf:mmu_notifier"), ("demo", "munmap(a)")):
        assert word in run(COMMAND, command, COLUMNS="0").stdout


@pytest.mark.parametrize("arguments", [["doctor"], ["config", "--cflags"], ["demo"], ["selftest", "--source", "uffd"]])
def test_full_disk(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run([COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode != 0
    assert result.stderr.startswith("Error: ")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("arguments", [["doctor"], ["config", "--cflags"]])
def test_closed_output(arguments: list[str]) -> None:
    require_source("uffd")
    result = subprocess.run(
        [COMMAND, *arguments], preexec_fn=lambda: os.close(1), stderr=subprocess.PIPE, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("arguments", [["run", "--source", "WRONG", "true"], ["selftest", "--source", "WRONG"]])
def test_sources_that_are_not_there(arguments: list[str]) -> None:
    for wrong, shown in ((b"bfp", "'bfp'"), (b"\xff", "'\\udcff'")):
        result = run(COMMAND, *(os.fsdecode(word.encode().replace(b"WRONG", wrong)) for word in arguments))
        assert result.returncode == 2
        assert f"Invalid value for --source: there is no source {shown}; there are bpf" in result.stderr


def test_a_wrong_source_in_the_environment() -> None:
    result = run(COMMAND, "run", "true", UMMUNOTIFY_SOURCE="bfp")
    assert result.returncode == 2
    assert "Invalid value for UMMUNOTIFY_SOURCE: there is no source 'bfp'" in result.stderr
    result = run(COMMAND, "doctor", UMMUNOTIFY_SOURCE="bfp")
    assert result.returncode == 1
    assert "ummunotify does not work here: there is no source 'bfp' (from UMMUNOTIFY_SOURCE)" in result.stdout


def test_doctor_knows_what_the_environment_insists_on() -> None:
    require_source("uffd")
    found = run(COMMAND, "doctor", UMMUNOTIFY_SOURCE="uffd")
    assert (found.returncode, found.stdout.splitlines()[-1]) == (0, "ummunotify works here: it will use uffd.")
    found = run(COMMAND, "doctor", UMMUNOTIFY_SOURCE="daemon", UMMUNOTIFY_SOCKET="/nowhere/socket")
    assert found.returncode == 1
    assert "does not work here with UMMUNOTIFY_SOURCE=daemon; without it, " in found.stdout


def test_doctor_without_proc_and_sys() -> None:
    require_root("the test mounts file systems")
    hide = "mount -t tmpfs none /proc && mount -t tmpfs none /sys && exec"
    found = run("unshare", "--mount", "sh", "-c", f"{hide} {COMMAND} doctor")
    assert "capabilities not known: /proc is not mounted\n" in found.stdout
    assert "not available: no /sys/kernel/btf/vmlinux\n" in found.stdout
    assert re.search(r"bpf:kvm +not available: /sys is not mounted\n +-> mount -t sysfs sysfs /sys\n", found.stdout)
    assert "kprobes" not in found.stdout
    assert found.stderr == ""


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1:65536", "127.0.0.1:", "0.0.0.0:9401", "unix:"])
def test_addresses_for_metrics(address: str, tmp_path: Path) -> None:
    require_module("prometheus_client")
    result = run(COMMAND, "daemon", "--socket", tmp_path / "socket", "--metrics", address)
    assert result.returncode == 2
    assert f"metrics are served at unix:PATH or 127.0.0.1:PORT, not at '{address}'" in result.stderr


def test_a_port_for_metrics_that_is_taken(tmp_path: Path) -> None:
    require_module("prometheus_client")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = run(COMMAND, "daemon", "--socket", tmp_path / "socket", "--metrics", address)
    assert result.returncode == 1
    what = f"metrics cannot be served at {address}: Address already in use; choose another port"
    assert result.stderr == f"Error: {what}\n"


def test_the_manual_has_every_command() -> None:
    manual = (ROOT / "man" / "ummunotify.1").read_text()
    commands = cli.main.list_commands(click.Context(cli.main))
    assert [name for name in commands if f"\n.B ummunotify {name}\n" not in manual] == []


def test_ctrl_c_while_the_package_is_imported(tmp_path: Path) -> None:
    """The first module that the package needs tells when it is imported, and waits."""
    (tmp_path / "_ummunotify_slow.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    code = "import sys, _ummunotify_command as c; sys.modules['ummunotify'] = None; import builtins; "
    code += "real = builtins.__import__; "
    code += (
        "builtins.__import__ = lambda name, *a: real('_ummunotify_slow' if name == 'ummunotify.cli' else name, *a); "
    )
    code += "c.main()"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        errors = process.communicate()[1]
    assert (process.returncode, errors) == (-signal.SIGINT, "")


def test_ctrl_c_that_the_caller_ignores_stays_ignored() -> None:
    code = "import signal, _ummunotify_command; print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        stdout=subprocess.PIPE,
        check=True,
    )
    assert done.stdout == b"True\n"


def test_selftest_explains_every_outcome() -> None:
    from ummunotify.selftest import Outcome

    says = run(COMMAND, "selftest", "--help").stdout
    assert not [outcome for outcome in Outcome if f"{outcome} " not in says]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_without_what_they_need(example: Path, tmp_path: Path) -> None:
    """They say what they are for, and what is missing."""
    for name in ("mooncake", "mpi4py", "nixl", "nixl_cu12", "pyverbs"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('there is no module {name}')")
    helped = run(sys.executable, example, "--help", PYTHONPATH=str(tmp_path))
    assert (helped.returncode, helped.stderr) == (0, "")
    assert f"python examples/{example.name}" in helped.stdout
    if example.stem not in ("file_server", "stale_buffer"):
        missing = run(sys.executable, example, PYTHONPATH=str(tmp_path))
        assert missing.returncode == 2
        assert missing.stderr.startswith("there is no module ")
        assert "Traceback" not in missing.stderr


def test_examples_for_mpi_that_are_started_wrongly() -> None:
    for name, words in (("mpi_ranks.py", "invalid int value: 'many'"), ("mpi_libfabric.py", "it takes two ranks: ")):
        [example] = [each for each in EXAMPLES if each.name == name]
        result = run(sys.executable, example, "many")
        assert result.returncode == 2
        assert words in result.stderr
        assert "Traceback" not in result.stderr


def test_units_for_a_group_that_is_not_there(tmp_path: Path) -> None:
    result = run(COMMAND, "daemon", "install", "--directory", str(tmp_path), "--group", "nosuch")
    assert result.returncode == 2
    assert "there is no group 'nosuch'" in result.stderr
    assert not list(tmp_path.iterdir())
