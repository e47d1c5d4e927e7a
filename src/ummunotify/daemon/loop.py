"""The daemon's event loop: one thread."""

from __future__ import annotations

import contextlib
import selectors
import signal
import socket
from collections.abc import Callable, Iterator


class Loop:
    """Calls back what waits for descriptors, until it is stopped or gets SIGTERM or SIGINT."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._stop = False

    def watch(self, fd: int | socket.socket, callback: Callable[[], None]) -> None:
        """Call back whenever it is readable."""
        self._selector.register(fd, selectors.EVENT_READ, callback)

    def unwatch(self, fd: int | socket.socket) -> None:
        self._selector.unregister(fd)

    def stop(self) -> None:
        """Called back in the loop: end it."""
        self._stop = True

    def run(
        self, started: Callable[[], None], timeout: Callable[[], float | None], turn: Callable[[bool], None]
    ) -> None:
        """In the main thread. Calls `started` when it is ready for signals.

        After each turn calls `turn`, with True if nothing was readable within `timeout()` seconds.
        """
        with self._signals():
            started()
            while not self._stop:
                events = self._selector.select(timeout())
                for key, _ in events:
                    key.data()
                turn(not events)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        awake, alarm = socket.socketpair()
        with awake, alarm:
            awake.setblocking(False)
            alarm.setblocking(False)

            def drain() -> None:
                awake.recv(64)

            self.watch(awake, drain)
            before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
            fd = signal.set_wakeup_fd(alarm.fileno())
            try:
                yield
            finally:
                signal.set_wakeup_fd(fd)
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _on_signal(self, *_: object) -> None:
        self.stop()

    def close(self) -> None:
        self._selector.close()
