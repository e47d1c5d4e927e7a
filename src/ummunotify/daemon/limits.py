"""How much a user may have, so that a hostile one cannot take it from the others."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass

from .._abi import PAGE, RING_BYTES, SEGMENT_PAGES, Status

SEGMENT = SEGMENT_PAGES * PAGE
"""What a segment costs, in bytes."""
TABLE = SEGMENT + RING_BYTES + 4 * PAGE
"""What a table costs that has one, with its wake-up: a ring buffer has four pages beside its data."""
SPARE = 16
"""Connections that are not clients: of each user, and of all users that use up everything else."""


_PHYSICAL = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass(frozen=True)
class Limits:
    """The administrator's wishes."""

    clients: int = 1024
    clients_per_user: int = 512
    """Twice what an MPI job of 256 ranks needs."""
    memory: int = _PHYSICAL // 2
    """Of all tables, in bytes: some 75 a region."""
    memory_per_user: int = _PHYSICAL // 8


class Usage:
    """What each user has."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.connections: Counter[int] = Counter()
        self.clients: Counter[int] = Counter()
        self.memory: Counter[int] = Counter()

    def connect(self, uid: int) -> bool:
        """Count a connection in. There may be some more than clients: for `ummunotify status`."""
        if self.connections.total() >= self.limits.clients + SPARE:
            return False
        if self.connections[uid] >= self.limits.clients_per_user + SPARE:
            return False
        self.connections[uid] += 1
        return True

    def disconnect(self, uid: int) -> None:
        self._subtract(self.connections, uid, 1)

    def enter(self, uid: int) -> tuple[Status, int]:
        """Count a client in, or say what limit it would exceed."""
        if self.clients.total() >= self.limits.clients:
            return Status.CLIENTS, self.limits.clients
        if self.clients[uid] >= self.limits.clients_per_user:
            return Status.USER_CLIENTS, self.limits.clients_per_user
        if self.memory.total() + TABLE > self.limits.memory:
            return Status.MEMORY, self.limits.memory
        if self.memory[uid] + TABLE > self.limits.memory_per_user:
            return Status.USER_MEMORY, self.limits.memory_per_user
        self.clients[uid] += 1
        self.memory[uid] += TABLE
        return Status.OK, 0

    def grow(self, uid: int, segments: int) -> tuple[int, Status, int]:
        """Count up to `segments` in; how many there may be, and if none what limit they would exceed."""
        of_all, of_user = self.limits.memory - self.memory.total(), self.limits.memory_per_user - self.memory[uid]
        granted = min(segments, max(0, min(of_all, of_user)) // SEGMENT)
        if not granted:
            if of_user < SEGMENT:
                return 0, Status.USER_MEMORY, self.limits.memory_per_user
            return 0, Status.MEMORY, self.limits.memory
        self.memory[uid] += granted * SEGMENT
        return granted, Status.OK, 0

    def shrink(self, uid: int, segments: int) -> None:
        self._subtract(self.memory, uid, segments * SEGMENT)

    def leave(self, uid: int, segments: int) -> None:
        """Count a client out that had so many segments."""
        self._subtract(self.clients, uid, 1)
        self._subtract(self.memory, uid, TABLE + (segments - 1) * SEGMENT)

    @staticmethod
    def _subtract(counter: Counter[int], uid: int, amount: int) -> None:
        counter[uid] -= amount
        if not counter[uid]:
            del counter[uid]
