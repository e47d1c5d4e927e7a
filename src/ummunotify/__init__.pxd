# cython: language_level=3
"""For other Cython modules: `from ummunotify cimport Notifier, Region`. Compile them with `ummunotify.get_include()`."""

from ._core cimport Notifier, Region, ummunotify, ummunotify_region, ummunotify_valid
