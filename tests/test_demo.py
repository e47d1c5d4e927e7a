"""`ummunotify demo`, run as a user runs it."""

import os
import pty
import re
import subprocess
import sys
from collections.abc import Mapping

import pytest
from support import LONG, require

ADDRESS = re.compile(r"0x[0-9a-f]+")
ZEROS = "00 00 00 00 00 00 00 00  ........"
DATA = "6e 65 77 20 64 61 74 61  new data"

COMMAND = [sys.executable, "-m", "ummunotify", "demo"]


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=plain(environment), capture_output=True, text=True, timeout=LONG, check=False)


def plain(more: Mapping[str, str]) -> dict[str, str]:
    """The environment without what makes a program think that it has a terminal."""
    ignored = {"FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR", "COLUMNS"}
    return {name: text for name, text in os.environ.items() if name not in ignored} | dict(more)


@pytest.fixture(scope="module")
def output() -> str:
    result = run(COMMAND)
    if result.returncode == 2:
        require("demo", result.stderr.strip())
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    return result.stdout


def halves(output: str) -> tuple[list[str], list[str]]:
    """The lines of the half without and of the half with ummunotify."""
    _, without, with_it = re.split(r"^With(?:out)? ummunotify.*\n", output, flags=re.MULTILINE)
    return without.splitlines(), with_it.splitlines()


def lines_with(lines: list[str], text: str) -> list[str]:
    return [line for line in lines if text in line]


def test_the_data_is_lost_without(output: str) -> None:
    without, _ = halves(output)
    assert len(set(ADDRESS.findall("\n".join(without)))) == 1  # a and b
    assert ZEROS in lines_with(without, "contents of b")[0]
    assert DATA in lines_with(without, "the old page")[0]
    assert lines_with(without, "Wrong")


def test_the_data_arrives_with(output: str) -> None:
    _, with_it = halves(output)
    assert len(set(ADDRESS.findall("\n".join(with_it)))) == 1
    valid = [re.findall("True|False", line)[0] for line in lines_with(with_it, ".valid")]
    assert valid == ["True", "False", "True"]
    assert lines_with(with_it, "stale")
    assert lines_with(with_it, "a hit")
    assert DATA in lines_with(with_it, "contents of b")[0]
    assert lines_with(with_it, "Right")


def test_it_is_short_and_plain(output: str) -> None:
    lines = output.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in output


def test_colour_on_a_terminal(output: str) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(COMMAND, stdout=theirs, stderr=theirs, env=plain({"TERM": "xterm-256color"}))
    os.close(theirs)
    text = b""
    try:
        while chunk := os.read(ours, 4096):
            text += chunk
    except OSError:  # EIO: the other end is closed
        pass
    finally:
        os.close(ours)
    assert process.wait(60) == 0, text
    assert b"\x1b[" in text


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("ummunotify.registrars.io_uring._syscall", "the kernel refuses io_uring"),
        ("ummunotify.open", "no source of invalidations.*ummunotify doctor"),
    ],
)
def test_what_is_missing_is_said_in_one_line(missing: str, reason: str) -> None:
    code = f"""
import runpy, sys, unittest.mock
import ummunotify.registrars.io_uring

def fail(*arguments):
    if arguments:
        raise PermissionError(1, "Operation not permitted")
    raise ummunotify.SourceUnavailableError("no source of invalidations is available", {{"bpf": "reason"}})

sys.argv = ["ummunotify", "demo"]
with unittest.mock.patch("{missing}", fail):
    runpy.run_module("ummunotify", run_name="__main__")
"""
    result = run([sys.executable, "-c", code])
    assert result.returncode == 2
    assert result.stdout == ""
    assert re.search(reason, result.stderr)
    assert len(result.stderr.splitlines()) == 1
