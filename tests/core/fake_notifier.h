/* SPDX-License-Identifier: BSD-3-Clause */
/* A notifier in the place of libummunotify's, for tests of what uses one: over a table in ordinary memory, which umn_feed changes. */
#ifndef UMN_TEST_FAKE_NOTIFIER_H
#define UMN_TEST_FAKE_NOTIFIER_H

#include <pthread.h>

#include "common.h"
#include "include/ummunotify.h"
#include "notifier/notifier.h"
#include "process/error.h"

struct ummunotify {
	struct world world;
	pthread_mutex_t lock;	  /* growing */
	pthread_mutex_t dispatch; /* delivering */
	unsigned int delivering;
	uint64_t max_regions;
};

static int opened, closed_count;
static int fail_open, fail_watch; /* an errno, with the code that goes with it */
static enum ummunotify_code fail_code;

int ummunotify_open_with(struct ummunotify **umn, const struct ummunotify_options *options)
{
	if (fail_open)
		return umn_fail(fail_code, fail_open, "", "no source works");
	*umn = calloc(1, sizeof **umn);
	make_world(&(*umn)->world, options->max_regions ? options->max_regions : UINT64_MAX);
	pthread_mutex_init(&(*umn)->lock, NULL);
	pthread_mutex_init(&(*umn)->dispatch, NULL);
	__sync_fetch_and_add(&opened, 1);
	return 0;
}

void ummunotify_close(struct ummunotify *umn)
{
	if (!umn)
		return;
	delete_world(&umn->world);
	free(umn);
	__sync_fetch_and_add(&closed_count, 1);
}

int ummunotify_watch(struct ummunotify *umn, const void *address, size_t length, uint64_t cookie, struct ummunotify_region **region)
{
	const uint64_t start = (uintptr_t)address;
	int error;

	if (fail_watch)
		return umn_fail(fail_code, fail_watch, "", "it cannot be watched");
	pthread_mutex_lock(&umn->lock);
	while ((error = umn_table_watch(umn->world.table, start, start + length, cookie, NULL, (struct umn_region **)region)) ==
	       -ENOSPC)
		grow(&umn->world);
	pthread_mutex_unlock(&umn->lock);
	return error ? umn_fail(UMMUNOTIFY_LIMIT, ENOSPC, "", "too many regions are watched") : 0;
}

int ummunotify_unwatch(struct ummunotify *umn, struct ummunotify_region *region)
{
	/* Not while it is drained and its cookie is read. */
	pthread_mutex_lock(&umn->lock);
	umn_table_unwatch(umn->world.table, (struct umn_region *)region);
	pthread_mutex_unlock(&umn->lock);
	return 0;
}

bool ummunotify_valid(const struct ummunotify_region *region)
{
	return umn_region_valid((const struct umn_region *)region);
}

bool ummunotify_changed(const struct ummunotify *umn)
{
	return umn_table_changed(umn->world.table);
}

const uint64_t *umn_generation_of(const struct ummunotify *umn)
{
	return &umn_table_header(umn->world.table)->generation;
}

void umn_begin_at_one(struct ummunotify *umn)
{
	umn_table_restart(umn->world.table, 1);
}

uint64_t umn_dispatched(const struct ummunotify *umn)
{
	uint64_t seen = umn_table_seen(umn->world.table);

	return __atomic_load_n(&umn->delivering, __ATOMIC_ACQUIRE) ? 0 : seen;
}

ptrdiff_t ummunotify_dispatch(struct ummunotify *umn, int (*callback)(const struct ummunotify_event *event, void *context),
			      void *context)
{
	struct ummunotify_event events[8];
	struct umn_event drained[8];
	ptrdiff_t count = 0;
	size_t n;

	pthread_mutex_lock(&umn->dispatch);
	__atomic_add_fetch(&umn->delivering, 1, __ATOMIC_SEQ_CST);
	do {
		pthread_mutex_lock(&umn->lock);
		n = umn_table_drain(umn->world.table, drained, LENGTH(drained));
		for (size_t i = 0; i < n; i++)
			events[i] = (struct ummunotify_event){.region = (struct ummunotify_region *)drained[i].region,
							      .cookie = drained[i].region->cookie};
		pthread_mutex_unlock(&umn->lock);
		for (size_t i = 0; i < n; i++)
			callback(&events[i], context);
		count += (ptrdiff_t)n;
	} while (n == LENGTH(drained));
	__atomic_sub_fetch(&umn->delivering, 1, __ATOMIC_SEQ_CST);
	pthread_mutex_unlock(&umn->dispatch);
	return count;
}

#endif
