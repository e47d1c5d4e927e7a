/* SPDX-License-Identifier: BSD-3-Clause */
/* Is a cache's inner state in order? For tests, in C and Python. */
#ifndef UMN_TEST_CACHE_CHECK_H
#define UMN_TEST_CACHE_CHECK_H

#include <string.h>

#include "cache/entries.h"

static inline const char *check_entry(struct ummunotify_cache *c, struct umn_entry *e)
{
	const struct umn_rest *rest = umn_rest(e);
	uint64_t blocks[2] = {e->shown.start >> rest->order, (e->shown.end - 1) >> rest->order};
	int links = blocks[0] == blocks[1] ? 1 : 2, found = 0;
	const struct umn_entry *parent;

	if ((rest->place == UMN_OPEN) != umn_entry_is_open(e))
		return "an entry is open that should not be, or the other way round";
	if (rest->place != UMN_OPEN)
		return NULL;
	if (rest->position >= c->count || c->heap[rest->position] != e)
		return "an open entry is not where it should be in the heap";
	parent = rest->position ? c->heap[(rest->position - 1) / 2] : NULL;
	if (parent && (int32_t)(rest->key - umn_rest(parent)->key) < 0)
		return "the heap is not in order";
	for (int i = 0; i < links; i++)
		for (umn_link link = *umn_bucket(c->all, blocks[i], rest->order); link; link = *umn_next_link(link))
			found += link == ((umn_link)e | (umn_link)i);
	return found == links ? NULL : "an open entry is not in the index, or more than once";
}

/* NULL, or what is wrong. Any thread, at any time. */
static inline const char *check_cache(struct ummunotify_cache *c)
{
	uint64_t registrations = 0, bytes = 0, kept = 0, of_order[64] = {0};
	size_t open = 0, leaving = 0;
	const char *wrong = NULL;

	pthread_mutex_lock(&c->lock);
	umn_for_each_entry(c, e)
	{
		uint8_t place = umn_rest(e)->place, order = umn_rest(e)->order;

		if (!wrong)
			wrong = check_entry(c, e);
		open += place == UMN_OPEN;
		of_order[order] += place == UMN_OPEN;
		kept += place == UMN_KEPT;
		leaving += place == UMN_LEAVING;
		registrations += place != UMN_FREE;
		bytes += place == UMN_FREE ? 0 : e->shown.end - e->shown.start;
	}
	if (!wrong && (open != c->count || leaving != c->leaving_count || kept != c->stats.not_deregistered ||
		       registrations != c->stats.registrations || bytes != c->stats.registered_bytes))
		wrong = "entries are miscounted";
	for (uint32_t order = 0; order < 64 && !wrong; order++)
		if (of_order[order] != c->of_order[order] || !of_order[order] != !(c->orders >> order & 1))
			wrong = "orders are miscounted";
	pthread_mutex_unlock(&c->lock);
	return wrong;
}

#endif
