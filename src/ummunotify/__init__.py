"""Learn, without missing a change, that the mapping of memory was changed.

with ummunotify.open() as umn:
    region = umn.watch(buffer)
    ...
    if not region.valid:
        ...  # the addresses no longer hold what was registered
"""

from ._cache import Registration, RegistrationCache
from ._core import Region
from ._core import version as __version__
from .errors import (
    ClosedError,
    CookieInUseError,
    DeregistrationError,
    DescriptorClosedError,
    ForkedError,
    InvalidBufferError,
    InvalidCookieError,
    InvalidRangeError,
    RegistrarError,
    RegistrarUnavailableError,
    RegistrationError,
    RegistrationLimitError,
    SourceUnavailableError,
    StacksUnavailableError,
    TooManyNotifiersError,
    TooManyRegionsError,
    UmmunotifyError,
    UnknownRegionError,
    UnknownSourceError,
    UnsupportedMemoryError,
)
from .notifier import Notifier, open
from .types import CacheStats, Invalidation, NotifierStats

__all__ = [
    "CacheStats",
    "ClosedError",
    "CookieInUseError",
    "DeregistrationError",
    "DescriptorClosedError",
    "ForkedError",
    "InvalidBufferError",
    "InvalidCookieError",
    "InvalidRangeError",
    "Invalidation",
    "Notifier",
    "NotifierStats",
    "Region",
    "RegistrarError",
    "RegistrarUnavailableError",
    "Registration",
    "RegistrationCache",
    "RegistrationError",
    "RegistrationLimitError",
    "SourceUnavailableError",
    "StacksUnavailableError",
    "TooManyNotifiersError",
    "TooManyRegionsError",
    "UmmunotifyError",
    "UnknownRegionError",
    "UnknownSourceError",
    "UnsupportedMemoryError",
    "__version__",
    "get_include",
    "open",
]


def get_include() -> str:
    """For a C compiler's -I: `#include <ummunotify.h>`, and what `cimport ummunotify` includes."""
    return __path__[0] + "/include"
