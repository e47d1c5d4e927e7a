# cython: language_level=3
"""For other Cython modules: `from ummunotify cimport ...`. Compile them with `ummunotify.get_include()`."""

from ._cache cimport CacheTable, Registration, umn_cache, umn_cache_acquire, umn_cache_release, umn_entry
from ._core cimport Region, WatchTable, umn_generation, umn_header, umn_region, umn_region_valid
