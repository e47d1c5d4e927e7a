/* SPDX-License-Identifier: BSD-3-Clause */
/* cache_check.h for tests in Python: built against the sources that the library was built from. */
#include "cache_check.h"

const uint32_t *umn_process_epoch;

const char *umn_cache_wrong(struct ummunotify_cache *cache)
{
	return check_cache(cache);
}
