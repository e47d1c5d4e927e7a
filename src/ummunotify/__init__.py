"""Find out, without losing an event, that memory was unmapped behind your back.

with ummunotify.open() as umn:
    region = umn.watch(buffer)
    ...
    if not region.valid:
        ...  # the addresses no longer hold what was registered
"""

from ._core import Region
from .errors import (
    ClosedError,
    CookieInUseError,
    ForkedError,
    InvalidBufferError,
    InvalidCookieError,
    InvalidRangeError,
    SourceUnavailableError,
    TooManyRegionsError,
    UmmunotifyError,
    UnknownRegionError,
    UnknownSourceError,
)
from .notifier import Notifier, open
from .types import Invalidation

__all__ = [
    "ClosedError",
    "CookieInUseError",
    "ForkedError",
    "InvalidBufferError",
    "InvalidCookieError",
    "InvalidRangeError",
    "Invalidation",
    "Notifier",
    "Region",
    "SourceUnavailableError",
    "TooManyRegionsError",
    "UmmunotifyError",
    "UnknownRegionError",
    "UnknownSourceError",
    "open",
]
