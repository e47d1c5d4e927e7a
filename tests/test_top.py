"""`ummunotify top`, on a terminal and off one."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import termios
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Self

import pytest
from daemons import COMMAND, NOBODY, PAGE, Child, Daemon
from support import LONG, map_memory, unmap_memory

import ummunotify
from ummunotify._abi import Record, Summary
from ummunotify.cli.top import _rows, _Snapshot


def busy(pipe: Connection) -> None:
    """Watch 3 regions and change one all the time."""
    with ummunotify.open(source="daemon") as umn:
        regions = [umn.watch((1 << 20, PAGE)) for _ in range(2)]
        pipe.send("busy")
        while not pipe.poll():
            address = map_memory(PAGE)
            regions.append(umn.watch((address, PAGE)))
            unmap_memory(address, PAGE)
            regions.pop().close()


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Child]:
    child = Child(busy, NOBODY)
    assert child.hear() == "busy"
    yield child
    child.pipe.send("end")
    child.result()


def top(*options: str, columns: int = 200) -> subprocess.CompletedProcess[str]:
    width = os.environ | {"COLUMNS": str(columns)}
    return subprocess.run(
        [*COMMAND, "top", *options], capture_output=True, text=True, stdin=subprocess.DEVNULL, env=width
    )


def test_json(client: Child) -> None:
    said = top("--json", "--interval", "0.2")
    assert said.returncode == 0, said.stderr
    (found,) = json.loads(said.stdout)["clients"]
    assert (found["pid"], found["uid"], found["memory"] > 0) == (client.pid, NOBODY, True)
    assert found["changes_per_second"] > 0


def test_batch(client: Child) -> None:
    said = top("--batch", "--count", "2", "--interval", "0.2", "--sort", "memory")
    assert said.returncode == 0, said.stderr
    first, second = said.stdout.split("\n\n")
    for text in (first, second):
        lines = text.splitlines()
        assert re.fullmatch(r"daemon \d+: 1 of \d+ clients, [\d.]+ MiB of kernel memory, up for \d+ s", lines[0])
        assert lines[1].startswith("BPF program: 0 runs skipped; the kernel does not time them")
        assert lines[2].split() == ["pid", "uid", "regions", "changes/s", "changes", "overflows", "memory", "command"]
        row = lines[3].replace(",", "").split()
        assert row[:2] == [str(client.pid), str(NOBODY)]
        assert int(row[3]) > 0
        assert len(lines) == 4


def test_narrow_terminal(client: Child) -> None:
    """What there is no room for is on the right; no number is shortened."""
    said = top("--batch", columns=40)
    *_, titles, row = said.stdout.splitlines()
    assert titles.split()[:4] == ["pid", "uid", "regions", "changes/s"]
    assert row.split()[:2] == [str(client.pid), str(NOBODY)]
    assert "…" not in row[: titles.index("changes/s")]


def test_not_a_client(client: Child) -> None:
    said = top("--pid", "1")
    assert (said.returncode, said.stdout) == (1, "")
    assert "process 1 is no client of the daemon's that this user may see" in said.stderr


class Screen:
    """A terminal, and `ummunotify top` on it."""

    def __init__(self, *options: str, **environment: str) -> None:
        self.master, self.slave = pty.openpty()
        termios.tcsetwinsize(self.slave, (12, 100))
        self.before = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            [*COMMAND, "top", "--interval", "0.1", *options],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            env=os.environ | {"TERM": "xterm"} | environment,
            start_new_session=True,
        )

    def read_until(self, *wanted: str) -> str:
        """What is printed from here on, without colours."""
        text = ""
        deadline = time.monotonic() + LONG
        while not all(each in text for each in wanted):
            assert time.monotonic() < deadline, text
            assert self.process.poll() is None, text
            if select.select([self.master], [], [], 0.1)[0]:
                text += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", os.read(self.master, 1 << 16).decode())
        return text

    def press(self, key: str) -> None:
        os.write(self.master, key.encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)

    def end(self) -> int:
        deadline = time.monotonic() + LONG
        while self.process.poll() is None:  # it has to be read, or it waits for room
            assert time.monotonic() < deadline
            if select.select([self.master], [], [], 0.05)[0]:
                os.read(self.master, 1 << 16)
        assert termios.tcgetattr(self.slave) == self.before
        return self.process.returncode


@pytest.mark.parametrize("how", ["key", "signal"])
def test_live(daemon: Daemon, how: str) -> None:
    child = Child(busy, NOBODY)
    assert child.hear() == "busy"
    with Screen() as screen:
        screen.read_until("q quit", "changes/s", str(child.pid))
        screen.press("m")
        screen.read_until("q quit", str(child.pid))
        child.pipe.send("end")
        child.result()
        screen.read_until("no clients that this user may see")
        assert daemon.end() == 0
        screen.read_until("it has ended")
        daemon.start()
        screen.read_until("no clients that this user may see", "q quit")
        if how == "key":
            screen.press("q")
        else:
            screen.process.send_signal(signal.SIGINT)
        assert screen.end() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.usefixtures("daemon")
def test_a_signal_leaves_the_terminal_as_it_was(number: signal.Signals) -> None:
    with Screen() as screen:
        screen.read_until("q quit")
        screen.process.send_signal(number)
        assert screen.end() == 128 + number


@pytest.mark.usefixtures("daemon")
def test_standard_input_is_closed() -> None:
    command = ["sh", "-c", 'exec "$@" <&-', "sh", *COMMAND, "top", "--interval", "0.1"]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout.startswith("daemon ")


@pytest.mark.usefixtures("daemon")
def test_dumb_terminal() -> None:
    """It gets what a file does."""
    with Screen(TERM="dumb") as screen:
        screen.read_until("no clients that this user may see")
        assert screen.end() == 0


def test_many_clients_fit(daemon: Daemon) -> None:
    def many(pipe: Connection) -> None:
        umns = [ummunotify.open(source="daemon") for _ in range(9)]
        pipe.send(len(umns))
        pipe.recv()

    child = Child(many, NOBODY)
    child.hear()
    with Screen() as screen:
        assert screen.read_until("and 4 more", "q quit").count("python") >= 5
        screen.press("q")
        assert screen.end() == 0
    child.pipe.send("end")
    child.result()


def test_rates() -> None:
    """A table's number is given anew, and its owner can write what it likes as the count."""
    summary = Summary(1, 1, 0, 1, 0, 0, 0, 0, 0)

    def at(seconds: float, *records: tuple[int, int, int]) -> _Snapshot:
        return _Snapshot(seconds, summary, [Record(t, pid, 0, 0, count, 0, 0, b"") for t, pid, count in records])

    rows = _rows(at(10, (0, 7, 100), (1, 8, 100), (2, 9, 100)), at(12, (0, 7, 150), (1, 99, 500), (2, 9, 3), (3, 4, 5)))
    assert [row.rate for row in rows] == [25, 0, 0, 0]
    assert [row.rate for row in _rows(None, at(1, (0, 7, 100)))] == [0]


# ---- Without a daemon ----


def test_without_a_daemon(directory: Path) -> None:
    said = top()
    assert (said.returncode, said.stdout) == (1, "")
    assert "no daemon runs here" in said.stderr
    assert "Traceback" not in said.stderr


@pytest.mark.parametrize(("source", "uses"), [("bpf", r"BPF: 0\.\d MiB of tables"), ("uffd", "userfaultfd")])
def test_a_process_without_a_daemon(directory: Path, source: str, uses: str) -> None:
    with ummunotify.open(source) as umn:
        address = map_memory(PAGE)
        with umn.watch((address, PAGE)):
            said = top("--pid", str(os.getpid()))
        unmap_memory(address, PAGE)
    assert said.returncode == 0, said.stderr
    assert re.match(rf"process {os.getpid()} \(.*\) uses (.* and )?{uses}", said.stdout), said.stdout


def test_errors(directory: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert f"there is no process {gone.pid}" in top("--pid", str(gone.pid)).stderr
    with subprocess.Popen(["sleep", "1000"]) as other:
        said = top("--pid", str(other.pid))
        other.kill()
    assert said.stdout.startswith(f"process {other.pid} (sleep) has no notifier that can be seen from outside: ")
    for options in (["--interval", "0"], ["--sort", "nothing"], ["--pid", "-1"], ["--count", "0"]):
        assert top(*options).returncode == 2


def test_another_users_process(directory: Path) -> None:
    said = subprocess.run(
        [*COMMAND, "top", "--pid", str(os.getpid())],
        capture_output=True,
        text=True,
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
    )
    assert said.returncode == 1
    assert f"process {os.getpid()} is another user's: run this as root" in said.stderr
