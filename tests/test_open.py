"""Opening: which source, how many notifiers, and what is said where it does not work."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import threading
from contextlib import ExitStack
from typing import Any

import pytest
from other_users import require_another_user
from support import LONG, bpf_map, hit, require_root, watch

import ummunotify
from ummunotify import Notifier, SourceUnavailableError, TooManyNotifiersError, _core
from ummunotify._abi import Op, Request
from ummunotify.bpf import feeder
from ummunotify.selftest.changes import Memory


def test_insisting_on_a_source(keeper: Notifier, monkeypatch: pytest.MonkeyPatch) -> None:
    name, _, probe = keeper.source.partition(":")
    monkeypatch.delenv("UMMUNOTIFY_SOURCE")
    for arguments in ((name, probe), (None, probe)):
        with ummunotify.open(arguments[0], probe=arguments[1]) as umn:
            assert umn.source == keeper.source
    for named in ("bpf", ""):
        monkeypatch.setenv("UMMUNOTIFY_SOURCE", named)
        with ummunotify.open() as umn, ummunotify.open("bpf") as other:
            assert umn.source == other.source
            assert umn.source.startswith("bpf:")
    monkeypatch.setenv("UMMUNOTIFY_SOURCE", keeper.source)
    with ummunotify.open() as umn:
        assert umn.source == keeper.source


@pytest.mark.parametrize("named", ["nonsense", "bpf:nonsense", ":nonsense", "bpf:kvm:more", "BPF", " ", "kvm"])
def test_a_source_that_there_is_not(named: str, keeper: Notifier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UMMUNOTIFY_SOURCE", named)
    with pytest.raises(ValueError, match=r"UMMUNOTIFY_SOURCE.*bpf:kvm"):
        ummunotify.open()
    # Arguments go before the environment.
    with ummunotify.open(source="bpf") as umn:
        assert umn.source.startswith("bpf:")
    monkeypatch.delenv("UMMUNOTIFY_SOURCE")
    source, _, probe = named.partition(":")
    with pytest.raises(ValueError, match="bpf:kvm"):
        ummunotify.open(source=source or None, probe=probe or None)


def test_many_notifiers(keeper: Notifier, memory: Memory) -> None:
    """Until there are no more to be had, which is said and disturbs nobody."""
    with ExitStack() as stack:
        opened: list[Notifier] = []

        def open_all() -> None:
            for _ in range(1000):
                opened.append(stack.enter_context(ummunotify.open()))

        # With bpf a limit is an error of its own: another source would be weaker.
        with pytest.raises(TooManyNotifiersError, match="as many as it can have") as caught:
            open_all()
        assert f" {len(opened) + 1} notifiers" in str(caught.value)
        assert keeper.source in str(caught.value)
        assert len(opened) >= 10
        regions = [watch(umn, memory, 0) for umn in opened]
        hit(memory, 0)
        assert not any(region.valid for region in regions)
        # Whichever of them are closed, the others are fed.
        order = random.Random(2).sample(range(len(opened)), len(opened))
        for done, i in enumerate(order):
            opened[i].close()
            for j in order[done + 1 :]:
                assert [event.region for event in opened[j].read()] == [regions[j]]
            hit(memory, 0)
        stack.enter_context(ummunotify.open())


def test_a_table_number_is_used_again(keeper: Notifier, memory: Memory) -> None:
    for page in range(30):
        with ummunotify.open() as umn:
            region = watch(umn, memory, page % 8)
            hit(memory, page % 8)
            assert [event.region for event in umn.read()] == [region]


def test_several_threads_open_and_close(keeper: Notifier, memory: Memory) -> None:
    errors: list[BaseException] = []

    def work(page: int) -> None:
        try:
            for _ in range(10):
                with ummunotify.open() as umn:
                    region = watch(umn, memory, page)
                    hit(memory, page)
                    assert not region.valid
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(page,)) for page in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert errors == []


class Blind:
    """A feeder that hands out memory which nothing feeds."""

    def __init__(self, real: Any = feeder) -> None:
        self.real = real

    def connect(self, probe: int) -> Blind:
        return Blind(self.real.connect(probe))

    def exchange(self, request: bytes) -> tuple[bytes, list[int]]:
        reply, fds = self.real.exchange(request)
        if Request.unpack(request).op == Op.HELLO:
            os.close(fds[1])
            fds[1] = bpf_map()
        return reply, fds

    def may_have_missed(self) -> bool:
        return bool(self.real.may_have_missed())

    def disconnect(self) -> None:
        self.real.disconnect()


def test_the_self_test_decides(keeper: Notifier) -> None:
    """A source that does not show a change of our own is not used."""
    for _ in range(20):
        with pytest.raises(SourceUnavailableError, match="self-test"):
            _core.open_notifier(Notifier, keeper.source, None, Blind())


@pytest.mark.parametrize(
    ("denied", "reason"),
    [(False, r"no /dev/kvm.*modprobe kvm"), (True, r"/dev/kvm cannot be opened.*Permission denied.*group")],
)
def test_what_is_missing_is_said(denied: bool, reason: str) -> None:
    """In a process that has no notifier yet, with another /dev."""
    require_root("the test mounts a file system")
    code = f"""
import ctypes, os, stat, ummunotify
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x20000) == 0
assert libc.mount(None, b"/", None, 0x44000, None) == 0  # MS_REC, MS_PRIVATE
number = os.stat("/dev/kvm").st_rdev
assert libc.mount(b"none", b"/dev", b"tmpfs", 4, None) == 0  # MS_NODEV
if {denied}:
    os.mknod("/dev/kvm", 0o666 | stat.S_IFCHR, number)
before = os.listdir("/proc/self/fd")
try:
    ummunotify.open("bpf:kvm")
except ummunotify.SourceUnavailableError as error:
    print(error)
assert os.listdir("/proc/self/fd") == before
assert libc.umount2(b"/dev", 2) == 0
ummunotify.open("bpf:kvm").close()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.stderr, result.returncode) == ("", 0)
    assert re.search(reason, result.stdout)


def test_without_privileges() -> None:
    """It says what to do about it."""
    require_another_user()
    code = """
import os, ummunotify
os.setuid(65534)
before = os.listdir("/proc/self/fd")
try:
    ummunotify.open("bpf")
except ummunotify.SourceUnavailableError as error:
    print(error)
    print(*error.reasons)
assert os.listdir("/proc/self/fd") == before
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.stderr, result.returncode) == ("", 0)
    message, sources = result.stdout.splitlines()
    assert "run as root or with CAP_BPF" in message
    assert sources == "bpf:mmu_notifier bpf:kvm bpf:zap"
    assert f"({sources.replace(' ', ', ')}: " in message
    assert message.count("CAP_PERFMON") == 1  # a reason is said once
