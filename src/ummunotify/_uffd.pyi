from typing import Final, Self, final

OPEN: Final[int]
IOCTL: Final[int]
FEATURES: Final[int]
PROOF: Final[int]
TABLES: Final[int]
MEMORY: Final[int]
THREAD: Final[int]
READER: Final[int]

UNMAPPED: Final[int]
KIND: Final[int]
OTHER: Final[int]
OWN: Final[int]
MAPPINGS: Final[int]
NO_PROC: Final[int]
CLOSED: Final[int]
START: Final[int]

class Failure(Exception):
    step: int
    error: int
    device_error: int
    def __init__(self, step: int, error: int, device_error: int) -> None: ...

def start_failure() -> Failure: ...

@final
class Uffd:
    def __new__(cls) -> Self: ...
    @property
    def address(self) -> int: ...
    def add_segment(self, pages: int) -> int: ...
    def wake_fd(self) -> int: ...
    def acknowledge(self) -> None: ...
    def settle(self, milliseconds: int) -> bool: ...
    def close(self) -> None: ...
