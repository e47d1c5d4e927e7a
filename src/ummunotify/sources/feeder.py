"""The in-process feeder: what the daemon is to its clients, for this process alone."""

from __future__ import annotations

import os
import threading

from .._abi import Gives, Op, Probe, Reply, Request, Status
from ..bpf import libbpf
from .base import UnavailableError
from .bpf import Maps, _why


class _Program:
    def __init__(self, probe: str) -> None:
        self.maps = Maps(probe=probe)
        self.users = 0
        try:
            self.maps.attach()
        except BaseException:
            self.maps.close()
            raise


_lock = threading.Lock()
_programs: dict[tuple[int, Probe], _Program] = {}


class Connection:
    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.key = os.getpid(), probe
        with _lock:
            program = _programs.get(self.key)
            if program is None:
                program = _programs[self.key] = _Program(probe.label)
            program.users += 1
        self.program = program
        self.maps = program.maps
        self.table = -1
        self.segments = 0
        self.skipped = libbpf.program_info(self.maps.fds["program"]).recursion_misses

    def exchange(self, data: bytes) -> tuple[bytes, list[int]]:
        request = Request.unpack(data)
        try:
            with _lock:
                reply, fds = self._answer(request.op)
        except OSError as error:
            raise _why(error) from error
        return reply.pack(), fds

    def _answer(self, op: int) -> tuple[Reply, list[int]]:
        if op == Op.HELLO:
            if not self.maps.free:
                return Reply(Status.PROCESS_CLIENTS, value=self.maps.used), []
            self.table = self.maps.take()
            (segment,) = self.maps.add_segments(self.table, 0, 1)
            self.segments = 1
            ring = self.maps.add_ring(self.table)
            fds = [ring, segment]
            gives = 0
            if "link doubt" in self.maps.fds:
                gives = Gives.PROBE_GAPS
                fds.append(os.dup(self.maps.fds["doubts"]))
            fds += [os.dup(fd) for fd in self.maps.links()]
            self.secret = self.maps.expect(self.table)
            return Reply(Status.OK, len(fds), gives, self.probe, self.secret), fds
        if op == Op.SETTLE:
            return Reply(Status.OK if self.maps.settle(self.table, self.secret) else Status.UNSEEN), []
        count = max(1, self.segments // 8)
        fds = self.maps.add_segments(self.table, self.segments, count)
        self.segments += count
        return Reply(Status.OK, len(fds)), fds

    def may_have_missed(self) -> bool:
        before, self.skipped = self.skipped, libbpf.program_info(self.maps.fds["program"]).recursion_misses
        return self.skipped != before

    def disconnect(self) -> None:
        with _lock:
            if self.table >= 0:
                self.maps.drop(self.table, self.segments, True)
                self.table = -1
            self.program.users -= 1
            if not self.program.users:
                _programs.pop(self.key).maps.close()


class Feeder:
    def connect(self, probe: int) -> Connection:
        try:
            return Connection(Probe(probe))
        except OSError as error:
            raise _why(error) from error


__all__ = ["Feeder", "UnavailableError"]
