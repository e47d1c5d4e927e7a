/* SPDX-License-Identifier: BSD-3-Clause */
#include "device/cookies.h"

#include <stdlib.h>

#include "table/table.h"

static size_t home_of(const struct cookies *c, uint64_t cookie)
{
	return (cookie * UINT64_C(0x9e3779b97f4a7c15)) >> 20 & c->mask;
}

static size_t place_of(const struct cookies *c, uint64_t cookie)
{
	size_t i = home_of(c, cookie);

	while (c->at[i] && c->at[i]->cookie != cookie)
		i = (i + 1) & c->mask;
	return i;
}

struct umn_region *device_find_cookie(const struct cookies *c, uint64_t cookie)
{
	return c->at ? c->at[place_of(c, cookie)] : NULL;
}

bool device_reserve_cookie(struct cookies *c)
{
	struct cookies larger = {.mask = c->at ? 2 * c->mask + 1 : 63, .count = c->count};

	if (c->at && 2 * (c->count + 1) <= c->mask + 1)
		return true;
	larger.at = calloc(larger.mask + 1, sizeof *larger.at);
	if (!larger.at)
		return false;
	for (size_t i = 0; c->at && i <= c->mask; i++)
		if (c->at[i])
			larger.at[place_of(&larger, c->at[i]->cookie)] = c->at[i];
	free(c->at);
	*c = larger;
	return true;
}

void device_add_cookie(struct cookies *c, struct umn_region *region)
{
	c->at[place_of(c, region->cookie)] = region;
	c->count++;
}

void device_remove_cookie(struct cookies *c, uint64_t cookie)
{
	size_t hole = place_of(c, cookie), i = hole, home;

	c->at[hole] = NULL;
	c->count--;
	/* What was pushed past the hole, from a place before it, moves there. */
	while (c->at[i = (i + 1) & c->mask]) {
		home = home_of(c, c->at[i]->cookie);
		if (((i - home) & c->mask) < ((i - hole) & c->mask))
			continue;
		c->at[hole] = c->at[i];
		c->at[i] = NULL;
		hole = i;
	}
}
