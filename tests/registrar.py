"""A registrar that pins nothing, and checks how it is used."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator


class Recorder:
    """Its handles are numbers, each for one registration. It fails the test if one is deregistered twice.

    `before` is called in `register`, and `errors` are raised by the calls to come: one each, None for no error.
    """

    def __init__(self, **attributes: object) -> None:
        self.live: dict[int, tuple[int, int]] = {}
        self.register_errors: Iterator[BaseException | None] = iter(())
        self.deregister_errors: Iterator[BaseException | None] = iter(())
        self.before: Callable[[int, int], None] | None = None
        self.registered = 0
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        for name, value in attributes.items():
            setattr(self, name, value)

    def register(self, address: int, length: int) -> int:
        if self.before is not None:
            self.before(address, length)
        if (error := next(self.register_errors, None)) is not None:
            raise error
        with self._lock:
            number = next(self._numbers)
            self.live[number] = (address, length)
            self.registered += 1
            return number

    def deregister(self, handle: int) -> None:
        if (error := next(self.deregister_errors, None)) is not None:
            raise error
        with self._lock:
            del self.live[handle]

    @property
    def ranges(self) -> list[tuple[int, int]]:
        return sorted(self.live.values())
