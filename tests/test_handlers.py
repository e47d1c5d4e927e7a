"""Signal handlers that use the notifier which they interrupt. Those that raise: test_signals.py."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from support import LONG, hit, watch

import ummunotify
from ummunotify import (
    ClosedError,
    Notifier,
)
from ummunotify.selftest.changes import Memory

Alarm = Callable[[Callable[[], None], float], None]


def test_closing_in_a_signal_handler(umn: Notifier, alarm: Alarm) -> None:
    alarm(umn.close, 0.05)
    with pytest.raises(ClosedError):
        umn.read(None)


def test_a_signal_handler_that_does_not_raise(umn: Notifier, memory: Memory, alarm: Alarm) -> None:
    """The waiting goes on."""
    calls: list[None] = []
    watch(umn, memory, 0)

    def handler() -> None:
        calls.append(None)
        if len(calls) == 5:
            hit(memory, 0)

    alarm(handler, 0.01)
    assert len(umn.read(None)) == 1
    assert len(calls) >= 5


def test_closing_in_a_signal_handler_while_another_opens(keeper: Notifier, alarm: Alarm) -> None:
    """At any moment of opening and closing, in the same thread."""
    others = [ummunotify.open() for _ in range(8)]
    count = len(others)

    def handler() -> None:
        if others:
            others.pop().close()

    alarm(handler, 0.003)
    deadline = time.monotonic() + LONG
    while others:
        ummunotify.open().close()
        assert time.monotonic() < deadline
    assert count


def test_ctrl_c() -> None:
    code = """
import ummunotify
umn = ummunotify.open()
print("ready", flush=True)
try:
    umn.read(None)
except KeyboardInterrupt:
    print("interrupted", umn.closed, umn.read())
    umn.close()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=LONG)
    assert (output, errors, process.returncode) == ("interrupted False []\n", "", 0)
