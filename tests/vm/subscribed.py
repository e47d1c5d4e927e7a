"""A program on a machine without /dev/kvm that is subscribed all the same: `python subscribed.py SOURCE FD`.

FD is of /dev/kvm: a virtual machine that is made and closed stands for other drivers. -1: an RDMA device has to do.
"""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))
from support import in_child, map_memory, unmap_memory

import ummunotify
from ummunotify import _core
from ummunotify.selftest.changes import PAGE

_KVM_CREATE_VM = 0xAE01


def sees(umn: ummunotify.Notifier) -> bool:
    address = map_memory(PAGE)
    region = umn.watch((address, PAGE))
    assert region.valid
    unmap_memory(address, PAGE)
    return not region.valid and umn.changed


def is_refused(source: str) -> None:
    with pytest.raises(ummunotify.SourceUnavailableError, match="nothing has subscribed it: there is no /dev/kvm"):
        ummunotify.open(source)
    assert _core.subscribed_by() is None


def opens(source: str, by: str) -> None:
    with ummunotify.open(source) as umn:
        assert _core.subscribed_by() == by
        assert sees(umn)


def main(source: str, kvm: int) -> None:
    if kvm < 0:
        by = "RDMA memory that is paged on demand"
    else:
        os.close(fcntl.ioctl(kvm, _KVM_CREATE_VM, 0))
        os.close(kvm)
        by = "something else in this process"
    with ummunotify.open(source) as umn:
        assert _core.subscribed_by() == by
        assert sees(umn)
        # A child's address space is another, and is not subscribed.
        in_child(lambda: opens(source, by) if kvm < 0 else is_refused(source))
        # The subscription needs nothing that the program can close.
        os.closerange(3, 1024)
        opens(source, by)
        assert sees(umn)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
