"""How much a user may have, so that a hostile one cannot take it from the others.

A user is not a uid: see peers.bpf.c.
"""

from __future__ import annotations

import mmap
import os
from collections import Counter
from dataclasses import dataclass

from .._abi import PAGE, RING_BYTES, SEGMENT_PAGES, Status

SEGMENT = SEGMENT_PAGES * PAGE
"""What a segment costs, in bytes."""
TABLE = SEGMENT + RING_BYTES + 4 * mmap.PAGESIZE
"""What a table costs that has one, with its wake-up: a ring buffer has four pages beside its data."""
SPARE = 16
"""Connections that are not clients: of each user, and of all users that use up everything else."""


_PHYSICAL = mmap.PAGESIZE * os.sysconf("SC_PHYS_PAGES")


@dataclass(frozen=True)
class Limits:
    """The administrator's wishes."""

    clients: int = 1024
    clients_per_user: int = 512
    """Twice what an MPI job of 256 ranks needs."""
    memory: int = _PHYSICAL // 2
    """Of all tables, in bytes: some 75 a region."""
    memory_per_user: int = _PHYSICAL // 8

    @property
    def shared(self) -> bool:
        """Is it for more than one user? Then no user gets more than what is left for the others.

        Without that, as many users as fit into the limit could leave nothing to the next. With it each of them gets
        half of what the others have left.
        """
        return self.clients_per_user < self.clients


class Usage:
    """What each user has."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.connections: Counter[int] = Counter()
        self.clients: Counter[int] = Counter()
        self.memory: Counter[int] = Counter()

    def connect(self, user: int) -> bool:
        """Count a connection in. There may be some more than clients: for `ummunotify status`."""
        limits = self.limits
        if self.connections[user] >= self._most(
            self.connections, user, limits.clients + SPARE, limits.clients_per_user + SPARE
        ):
            return False
        self.connections[user] += 1
        return True

    def disconnect(self, user: int) -> None:
        self._subtract(self.connections, user, 1)

    def enter(self, user: int) -> tuple[Status, int]:
        """Count a client in, or say what limit it would exceed."""
        limits = self.limits
        most = self._most(self.clients, user, limits.clients, limits.clients_per_user)
        if self.clients[user] >= most:
            if most == limits.clients_per_user:
                return Status.USER_CLIENTS, most
            return Status.CLIENTS, limits.clients
        granted, status, limit = self._grant(user, TABLE, 1)
        self.clients[user] += granted
        return status, limit

    def grow(self, user: int, segments: int) -> tuple[int, Status, int]:
        """Count up to `segments` in; how many there may be, and if none what limit they would exceed."""
        return self._grant(user, SEGMENT, segments)

    def _grant(self, user: int, size: int, count: int) -> tuple[int, Status, int]:
        """Memory."""
        limits = self.limits
        most = self._most(self.memory, user, limits.memory, limits.memory_per_user)
        granted = min(count, max(0, most - self.memory[user]) // size)
        self.memory[user] += granted * size
        if granted:
            return granted, Status.OK, 0
        if most == limits.memory_per_user:
            return 0, Status.USER_MEMORY, most
        return 0, Status.MEMORY, limits.memory

    def _most(self, used: Counter[int], user: int, limit: int, limit_per_user: int) -> int:
        """How much the user may have in all."""
        left = limit - used.total() + used[user]
        return max(0, min(limit_per_user, (left + 1) // 2 if self.limits.shared else left))

    def shrink(self, user: int, segments: int) -> None:
        self._subtract(self.memory, user, segments * SEGMENT)

    def leave(self, user: int, segments: int) -> None:
        """Count a client out that had so many segments."""
        self._subtract(self.clients, user, 1)
        self._subtract(self.memory, user, TABLE + (segments - 1) * SEGMENT)

    @staticmethod
    def _subtract(counter: Counter[int], user: int, amount: int) -> None:
        counter[user] -= amount
        if not counter[user]:
            del counter[user]
