"""What makes the kernel notify of a process's changes: each in a process of its own, as a subscription stays.

Not every kernel has the probe mmu_notifier, so here it is kvm that is taken for it: that one sees nothing either, until
there is a virtual machine. tests/vm/test_circumstances.py does this with the real one.
"""

import ctypes
import fcntl
import os
from collections.abc import Callable

import pytest
from support import in_child, map_memory, require, require_root, unmap_memory

from ummunotify import Notifier, SourceUnavailableError, _core
from ummunotify._abi import Probe, Reply
from ummunotify.bpf import feeder
from ummunotify.selftest.changes import PAGE

_CLONE_NEWNS, _MS_REC_PRIVATE = 0x20000, 0x44000
_KVM_CREATE_VM = 0xAE01
REFUSED = "nothing has subscribed it: there is no /dev/kvm, and there is no RDMA device; load the module"


class Disguised:
    """The feeder with the probe kvm, and its connections, which say that it is mmu_notifier."""

    def __init__(self, real: feeder.FeederConnection | None = None) -> None:
        self._real = real

    def connect(self, probe: int) -> "Disguised":
        assert probe == Probe.MMU_NOTIFIER
        return Disguised(feeder.connect(Probe.KVM))

    def exchange(self, request: bytes) -> tuple[bytes, list[int]]:
        assert self._real is not None
        reply, fds = self._real.exchange(request)
        return Reply.unpack(reply)._replace(probe=Probe.MMU_NOTIFIER).pack(), fds

    def may_have_missed(self) -> bool:
        assert self._real is not None
        return self._real.may_have_missed()

    def disconnect(self) -> None:
        assert self._real is not None
        self._real.disconnect()


@pytest.fixture(autouse=True)
def kvm() -> None:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        require("bpf", "/dev/kvm cannot be used")


def opened() -> Notifier:
    return _core.open_notifier(Notifier, "bpf:mmu_notifier", None, Disguised())


def sees(umn: Notifier) -> bool:
    address = map_memory(PAGE)
    region = umn.watch((address, PAGE))
    assert region.valid
    unmap_memory(address, PAGE)
    return not region.valid


def is_refused() -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(SourceUnavailableError, match=REFUSED):
        opened()
    assert _core.subscribed_by() is None
    assert os.listdir("/proc/self/fd") == before


def hide_devices() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(_CLONE_NEWNS) == 0
    assert libc.mount(None, b"/", None, _MS_REC_PRIVATE, None) == 0
    assert libc.mount(b"none", b"/dev", b"tmpfs", 0, None) == 0


def in_fresh_process(program: Callable[[], None]) -> None:
    """In a child, whose address space nothing has subscribed."""
    require_root("the test mounts a file system")
    in_child(program)


def test_a_virtual_machine_is_made_where_that_is_needed() -> None:
    def program() -> None:
        for _ in range(2):
            with opened() as umn:
                assert _core.subscribed_by() == "an empty virtual machine"
                assert sees(umn)

    in_fresh_process(program)


def test_what_something_else_has_subscribed_needs_no_device() -> None:
    def program() -> None:
        kvm = os.open("/dev/kvm", os.O_RDWR)
        hide_devices()
        is_refused()
        machine = fcntl.ioctl(kvm, _KVM_CREATE_VM, 0)
        with opened() as umn:
            assert _core.subscribed_by() == "something else in this process"
            assert sees(umn)
            # A child's address space is another.
            in_child(is_refused)
            assert sees(umn)
        os.close(machine)
        os.close(kvm)

    in_fresh_process(program)
