/* SPDX-License-Identifier: BSD-3-Clause */
/* A table in ordinary memory, for the tests of the core. */
#ifndef UMN_TEST_COMMON_H
#define UMN_TEST_COMMON_H

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* A feeder may be told to lose its chain, as if others had always been faster to change the list's head. */
static _Thread_local bool lose_chain;
#define UMN_REPEAT(n, f, w)                                                                                                        \
	do {                                                                                                                       \
		uint32_t n_ = (void *)(f) == (void *)umn_push && lose_chain ? 0 : (n);                                             \
		for (uint32_t i_ = 0; i_ < n_ && !f(i_, w); i_++)                                                                  \
			;                                                                                                          \
	} while (0)
#include "check.h"
#include "table/user_feeder.c"
#include "table_check.h"

/* xorshift64*: the same sequence on every run, per thread. */
static _Thread_local uint64_t random_state = 88172645463325252u;

static inline uint64_t random64(void)
{
	random_state ^= random_state >> 12;
	random_state ^= random_state << 25;
	random_state ^= random_state >> 27;
	return random_state * 2685821657736338717u;
}

static inline uint64_t below(uint64_t n)
{
	return (random64() >> 11) % n;
}

static inline bool one_in(uint64_t n)
{
	return below(n) == 0;
}

static inline double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

struct world {
	struct umn_table *table;
	struct umn_header *header;
	struct umn_memory memory;
	uint32_t segments;
};

/* Each segment lies between two pages that nobody may touch. */
static inline void *map_pages(uint32_t pages)
{
	const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
	const size_t page = (size_t)sysconf(_SC_PAGESIZE), length = ((size_t)pages * UMN_PAGE + page - 1) & ~(page - 1);
	uint8_t *memory = mmap(NULL, length + 2 * page, PROT_NONE, flags, -1, 0);

	if (memory == MAP_FAILED || mprotect(memory + page, length, PROT_READ | PROT_WRITE))
		fail("out of memory");
	return memory + page;
}

static inline void add_pages(struct world *world, uint32_t pages)
{
	void *memory = map_pages(pages);
	int error;

	umn_memory_add(&world->memory, memory, pages);
	error = umn_table_add_segment(world->table, memory, pages);
	if (error)
		fail("umn_table_add_segment: %d", error);
	world->segments++;
}

static inline void grow(struct world *world)
{
	add_pages(world, umn_table_next_pages(world->table));
}

static inline void make_world(struct world *world, uint64_t max_regions)
{
	memset(world, 0, sizeof *world);
	world->table = umn_table_new(max_regions);
	check(world->table);
	grow(world);
	world->header = (struct umn_header *)world->memory.segment[0];
}

static inline void delete_world(struct world *world)
{
	umn_table_delete(world->table);
	for (uint32_t i = 0; i < world->segments; i++) {
		munmap(world->memory.segment[i] - UMN_PAGE, UMN_PAGE);
		munmap(world->memory.segment[i] + (size_t)world->memory.pages[i] * UMN_PAGE, UMN_PAGE);
	}
}

/* Grows the table as needed. For one thread. */
static inline struct umn_region *watch(struct world *world, uint64_t start, uint64_t end, uint64_t cookie, void *user)
{
	struct umn_region *region;
	int error;

	while ((error = umn_table_watch(world->table, start, end, cookie, user, &region)) == -ENOSPC)
		grow(world);
	if (error)
		fail("umn_table_watch: %d", error);
	return region;
}

static inline void check_sound(struct world *world)
{
	const char *wrong = umn_table_check(world->table);

	if (wrong)
		fail("umn_table_check: %s", wrong);
}

static inline bool feed_bounded(struct world *world, uint64_t start, uint64_t end, uint32_t thread, int32_t syscall, uint32_t steps)
{
	struct umn_walk w = {.memory = &world->memory,
			     .header = world->header,
			     .start = start,
			     .end = end,
			     .thread = thread,
			     .syscall = syscall};

	return umn_in_hull(w.header, start, end) && umn_invalidate(&w, steps);
}

#endif
