/* SPDX-License-Identifier: BSD-3-Clause */
/* A device's regions by their cookies: a hash table with linear probing, at most half full. */
#ifndef UMN_DEVICE_COOKIES_H
#define UMN_DEVICE_COOKIES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct umn_region;

struct cookies {
	struct umn_region **at;
	size_t mask; /* its size - 1 */
	size_t count;
};

struct umn_region *device_find_cookie(const struct cookies *cookies, uint64_t cookie);
/* Makes room for one more. */
bool device_reserve_cookie(struct cookies *cookies);
void device_add_cookie(struct cookies *cookies, struct umn_region *region);
void device_remove_cookie(struct cookies *cookies, uint64_t cookie);

#endif
