"""A table that another side makes, through the messages of abi/protocol.h: the daemon, or this process's own feeder.

After `bind` the other side is on no path but growing: the kernel feeds the table through the link, which this process
holds too. Of its own the process has an empty virtual machine, without which the kernel notifies no probe of it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading

from .._abi import PAGE, Gives, Op, Probe, Reply, Status
from .._core import Doubt, Ring, map_shared, show_secret
from .base import UnavailableError

_KVM_CREATE_VM = 0xAE01


def open_kvm() -> int:
    """A descriptor of /dev/kvm. Raises UnavailableError."""
    try:
        return os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise UnavailableError(
            "there is no /dev/kvm",
            "load the module (modprobe kvm-intel or kvm-amd), enable virtualisation in the firmware, or "
            "pass the device into the container",
        ) from error
    except OSError as error:
        raise UnavailableError(
            f"/dev/kvm cannot be opened ({error.strerror})", "become a member of its group (kvm)"
        ) from error


def _create_vm(kvm: int) -> int:
    """An empty virtual machine, which subscribes this address space to MMU notifications.

    Its descriptor. KVM is told until it is closed everywhere; the kernel goes on calling the function that tells all
    who have subscribed, for as long as the address space exists (mmu_notifier_unregister leaves
    mm->notifier_subscriptions). Raises UnavailableError.
    """
    try:
        return fcntl.ioctl(kvm, _KVM_CREATE_VM, 0)
    except OSError as error:
        raise UnavailableError(f"KVM cannot create a virtual machine ({error.strerror})", "") from error


class _Machine:
    """The process's empty virtual machine; made for the first notifier and closed with the last."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.fd = -1

    def enter(self, kvm: int | None) -> None:
        """`kvm` is a descriptor of /dev/kvm. Raises UnavailableError."""
        with self.lock:
            if not self.users:
                if kvm is not None:
                    self.fd = _create_vm(kvm)
                else:
                    kvm = open_kvm()
                    try:
                        self.fd = _create_vm(kvm)
                    finally:
                        os.close(kvm)
            self.users += 1

    def leave(self) -> None:
        with self.lock:
            self.users -= 1
            if not self.users:
                self.close()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


_machine = _Machine()


def _forget() -> None:
    """In the child of a fork: the machine is the parent's."""
    global _machine
    machine, _machine = _machine, _Machine()
    machine.close()


os.register_at_fork(after_in_child=_forget)


class ClientFeed:
    """A table that another side makes, for this process's own changes."""

    name: str
    source_address: int
    """Only with a probe that the kernel may skip, and which knows when: see probe_gap.h."""

    def __init__(self, kind: str, reply: Reply, fds: list[int]) -> None:
        """With the answer to HELLO, which was OK. Takes the descriptors over. Raises UnavailableError."""
        self.name = f"{kind}:{Probe(reply.probe).label}"
        self._secret = reply.value
        self._machine: _Machine | None = None
        self._ring: Ring | None = None
        self._gaps: Doubt | None = None
        self._wake = fds.pop(0)
        self._segments = [fds.pop(0)]  # descriptors of those that are not mapped yet, the last one first
        self._links = fds
        kvm = fds.pop(0) if reply.gives & Gives.KVM else None
        try:
            if reply.gives & Gives.PROBE_GAPS:
                try:
                    self._gaps = Doubt(fds[0])
                except OSError as error:
                    raise UnavailableError(f"the map of skipped runs cannot be mapped ({error})", "") from error
                self.source_address = self._gaps.address
            # A machine that is closed at once would do for mmu_notifier. But it costs little, and some kernel may
            # tell of more while there is one.
            if reply.probe != Probe.ZAP:
                machine = _machine
                machine.enter(kvm)
                self._machine = machine
        except BaseException:
            self.close()
            raise
        finally:
            if kvm is not None:
                os.close(kvm)

    def _ask(self, op: Op) -> tuple[Reply, list[int]]:
        """The answer, and descriptors that the caller closes. OSError, UnavailableError."""
        raise NotImplementedError

    def _hang_up(self) -> None:
        """No more requests. May be called more than once; also in the child of a fork."""
        raise NotImplementedError

    def refusal(self, number: int, start: int, end: int) -> Exception:
        raise AssertionError("it refuses nothing")

    def add_segment(self, pages: int) -> int:
        if not self._segments:
            try:
                reply, fds = self._ask(Op.GROW)
            except ConnectionError as error:
                raise OSError(
                    error.errno, "the daemon that this notifier was opened with has ended; open a new one"
                ) from error
            except UnavailableError as error:
                raise OSError(errno.EBADF, str(error)) from error
            if reply.status != Status.OK:
                raise OSError(errno.ENOSPC, "; ".join(self._refusal(reply.status, reply.value)))
            self._segments = fds[::-1]
        fd = self._segments.pop()
        try:
            # The mapping keeps the map: one descriptor less.
            return map_shared(fd, pages * PAGE)
        finally:
            os.close(fd)

    def bind(self) -> None:
        try:
            if self._gaps is not None:
                self._gaps.show_secret(self._secret)
            else:
                show_secret(self._secret)
            reply, _ = self._ask(Op.SETTLE)
        except OSError as error:
            raise self._lost(error) from error
        if reply.status != Status.OK:
            raise UnavailableError(*self._refusal(reply.status, reply.value))

    def _refusal(self, status: int, value: int) -> tuple[str, str]:
        """What and why, and what to do about it."""
        raise NotImplementedError

    def _lost(self, error: OSError) -> UnavailableError:
        raise NotImplementedError

    def wake_fd(self) -> int:
        if self._ring is None:
            self._ring = Ring(self._wake)
        return self._wake

    def acknowledge(self) -> None:
        if self._ring is not None:
            self._ring.clear()

    def doubtful(self) -> bool:
        return False

    def close(self) -> None:
        self.abandon()
        machine, self._machine = self._machine, None
        if machine is not None:
            machine.leave()

    def abandon(self) -> None:
        self._hang_up()
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1
        for fds in (self._links, self._segments):
            while fds:
                os.close(fds.pop())
        if self._gaps is not None:
            self._gaps.abandon()
