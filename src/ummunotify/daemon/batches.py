"""What waits for running BPF programs: it is collected, and done in batches by a thread that does nothing else.

Putting maps in or taking them out takes 8 to 16 ms however many there are (`Tables.put_segments`). So tables are made
in advance, and one batch at a time does everything that is due.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import queue
import threading
import time
from typing import NamedTuple, Protocol

from .._bpf import Tables, create_ring, create_segment
from .clients import Client
from .log import event

_RETRY_SECONDS = 1.0
_MADE_AT_ONCE = 32
"""Tables, in a batch."""


class Batch(NamedTuple):
    """What goes into the maps of maps and out of them together."""

    released: list[tuple[int, int, int | None]]
    """A table, how many segments, and whose it was."""
    made: list[tuple[int, int, int]]
    grown: list[tuple[Client, int, list[int]]]
    """The number of the first new segment, and their descriptors."""

    def segments(self, blank: int) -> list[tuple[int, int, int]]:
        out = [(table, number, blank) for table, count, _ in self.released for number in range(count)]
        new = [(table, 0, segment) for table, segment, _ in self.made]
        more = [(client.table, first + i, fd) for client, first, fds in self.grown for i, fd in enumerate(fds)]
        return out + new + more

    def rings(self, blank: int) -> list[tuple[int, int]]:
        return [(table, blank) for table, _, _ in self.released] + [(table, ring) for table, _, ring in self.made]


class Shortage(NamedTuple):
    """What a batch could not do, as the kernel had no memory or no descriptors."""

    error: int
    """An errno."""
    growing: list[tuple[Client, int]]
    made: int
    """So many tables were made all the same."""


class Stock:
    """Tables that are ready for clients, and what is to be put in and taken out next."""

    def __init__(self, tables: Tables, target: int) -> None:
        """`target`: as many are to be ready. OSError."""
        self.ready: list[tuple[int, int, int]] = []  # table, its first segment, its ring
        self.growing: list[tuple[Client, int]] = []
        self.batch: Batch | None = None
        """What is being done."""
        self.preparing = False
        """Is `prepare` to be called for it?"""
        self._to_make = self._to_grow = 0
        self.target = target
        self._tables = tables
        self._released: list[tuple[int, int, int | None]] = []  # as in Batch
        self._poor_until = 0.0
        self._blank = create_segment(), create_ring()  # what takes the place of what is taken out
        self._updater = MapUpdater(tables)
        self.fd = self._updater.fd
        """Readable when the batch is done."""

    def release(self, client: Client) -> None:
        """Its table, which is unlinked, is to be taken out."""
        self._released.append((client.table, client.segments, client.user))

    def idle_work(self) -> bool:
        """Is there something to do that no client waits for?"""
        if len(self.ready) < self.target:
            return time.monotonic() >= self._poor_until
        return bool(self._released) or len(self.ready) > self.target

    def begin(self, waiting: int) -> None:
        """Begin with everything that is due to be put in and taken out, with tables for clients that are waiting."""
        while len(self.ready) > self.target and not waiting:
            # Made for clients that did not stay.
            table, *fds = self.ready.pop()
            for fd in fds:
                os.close(fd)
            self._released.append((table, 1, None))
        self.batch = Batch(self._released, [], [])
        self._released = []
        self._to_make = min(_MADE_AT_ONCE, self.target + waiting - len(self.ready))
        self._to_grow = len(self.growing)
        self.preparing = True

    def prepare(self) -> Shortage | None:
        """Prepare a part of the batch, a table or what one client has asked for, or begin it when all is there.

        A part in a turn of the loop, which does nothing else meanwhile.
        """
        batch = self.batch
        assert batch is not None
        shortage = None
        try:
            if self._tables.free and len(batch.made) < self._to_make:
                batch.made.append(self._make())
                return None
            if self.growing and len(batch.grown) < self._to_grow:
                client, count = self.growing[0]
                batch.grown.append((client, client.segments, self._extend(client.table, count)))
                client.segments += count
                del self.growing[0]
                return None
        except OSError as error:
            failure = error.errno or errno.ENOMEM
            self._poor_until = time.monotonic() + 1
            event(logging.ERROR, "memory", error=errno.errorcode.get(failure))
            shortage = Shortage(failure, self.growing, len(batch.made))
            self.growing = []
        self.preparing = False
        self._updater.begin(batch.segments(self._blank[0]), batch.rings(self._blank[1]))
        return shortage

    def _make(self) -> tuple[int, int, int]:
        """A table, its first segment and its ring. OSError, with nothing left behind."""
        with contextlib.ExitStack() as undo:
            segment = create_segment()
            undo.callback(os.close, segment)
            ring = create_ring()
            undo.callback(os.close, ring)
            table = self._tables.take()
            undo.callback(self._tables.give_back, table)
            self._tables.allow(table, 1)
            undo.pop_all()
        return table, segment, ring

    def _extend(self, table: int, count: int) -> list[int]:
        """So many segments for the table. OSError, with none left behind."""
        fds: list[int] = []
        with contextlib.ExitStack() as undo:
            for _ in range(count):
                fds.append(create_segment())
                undo.callback(os.close, fds[-1])
            self._tables.allow(table, count)
            undo.pop_all()
        return fds

    def end(self) -> Batch:
        """The batch is done. Raises what went wrong."""
        self._updater.end()
        assert self.batch is not None
        batch, self.batch = self.batch, None
        self.ready += batch.made
        for table, _, _ in batch.released:
            self._tables.give_back(table)
        return batch

    def close(self) -> None:
        self._updater.close()
        batch = self.batch or Batch([], [], [])
        for _, *fds in [*self.ready, *batch.made, *((0, *fds) for _, _, fds in batch.grown)]:
            for fd in fds:
                os.close(fd)
        for fd in self._blank:
            os.close(fd)


class PutsMaps(Protocol):
    """What waits for the kernel: see Tables."""

    def put_segments(self, items: list[tuple[int, int, int]], /) -> None: ...
    def put_rings(self, items: list[tuple[int, int]], /) -> None: ...


class MapUpdater:
    """A thread that waits for the kernel, so that the loop does not."""

    def __init__(self, tables: PutsMaps) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """Readable when what was begun is done."""
        self._tables = tables
        self._orders: queue.SimpleQueue[tuple[list[tuple[int, int, int]], list[tuple[int, int]]] | None]
        self._orders = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="map updater")
        self._thread.start()

    def begin(self, segments: list[tuple[int, int, int]], rings: list[tuple[int, int]]) -> None:
        self._orders.put((segments, rings))

    def end(self) -> None:
        """Raises what went wrong."""
        os.eventfd_read(self.fd)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self._closing.set()
        self._orders.put(None)
        self._thread.join()
        os.close(self.fd)

    def _work(self) -> None:
        while (order := self._orders.get()) is not None:
            try:
                while not self._done(*order):
                    if self._closing.wait(_RETRY_SECONDS):
                        return
            except BaseException as error:
                self._error = error
            os.eventfd_write(self.fd, 1)

    def _done(self, segments: list[tuple[int, int, int]], rings: list[tuple[int, int]]) -> bool:
        """False: the kernel had no memory for it; what was put in already may be put in again."""
        try:
            if segments:
                self._tables.put_segments(segments)
            if rings:
                self._tables.put_rings(rings)
        except OSError as error:
            if error.errno not in (errno.ENOMEM, errno.EAGAIN):
                raise
            event(logging.ERROR, "memory", error=errno.errorcode[error.errno])
            return False
        return True
