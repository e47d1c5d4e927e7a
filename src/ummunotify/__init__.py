"""Find out, without losing an event, that memory was unmapped behind your back.

with ummunotify.open() as umn:
    region = umn.watch(buffer)
    ...
    if not region.valid:
        ...  # the addresses no longer hold what was registered
"""

from ._cache import Registration
from ._core import Region
from .cache import CacheStats, RegistrationCache
from .errors import (
    ClosedError,
    CookieInUseError,
    DeregistrationError,
    ForkedError,
    InvalidBufferError,
    InvalidCookieError,
    InvalidRangeError,
    RegistrarError,
    RegistrarUnavailableError,
    RegistrationError,
    RegistrationLimitError,
    SourceUnavailableError,
    TooManyNotifiersError,
    TooManyRegionsError,
    UmmunotifyError,
    UnknownRegionError,
    UnknownSourceError,
    UnsupportedMemoryError,
)
from .notifier import Notifier, open
from .types import Invalidation

__all__ = [
    "CacheStats",
    "ClosedError",
    "CookieInUseError",
    "DeregistrationError",
    "ForkedError",
    "InvalidBufferError",
    "InvalidCookieError",
    "InvalidRangeError",
    "Invalidation",
    "Notifier",
    "Region",
    "RegistrarError",
    "RegistrarUnavailableError",
    "Registration",
    "RegistrationCache",
    "RegistrationError",
    "RegistrationLimitError",
    "SourceUnavailableError",
    "TooManyNotifiersError",
    "TooManyRegionsError",
    "UmmunotifyError",
    "UnknownRegionError",
    "UnknownSourceError",
    "UnsupportedMemoryError",
    "get_include",
    "open",
]


def get_include() -> str:
    """The directory for a C compiler's -I: for `#include "cache/cache.h"`, and Cython's `cimport ummunotify`."""
    return __path__[0]
