# cython: language_level=3
"""For other Cython modules: `from ummunotify cimport ...`. Compile them with `ummunotify.get_include()`."""

from ._cache cimport (
    Registration,
    RegistrationCache,
    ummunotify_cache,
    ummunotify_cache_find,
    ummunotify_cache_release,
    ummunotify_registration,
)
from ._core cimport Notifier, Region, ummunotify, ummunotify_region, ummunotify_valid
