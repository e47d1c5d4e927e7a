/* SPDX-License-Identifier: BSD-3-Clause */
/* What the operations cost, with regions that are watched in order of their addresses or at random. */
#include "common.h"

static struct world world;
static double begun;

/* This thread's own time: other programs disturb it less. */
static double nanoseconds(void)
{
	struct timespec t;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
	return t.tv_sec * 1e9 + t.tv_nsec;
}

static void begin(void)
{
	begun = nanoseconds();
}

static double each(uint32_t n)
{
	return (nanoseconds() - begun) / n;
}

static uint64_t address(uint32_t i)
{
	return 0x100000000 + i * 0x2000ull;
}

static void bench(uint32_t n, bool random)
{
	enum { OPERATIONS = 300000 };
	struct umn_region **regions = malloc(n * sizeof *regions);
	struct umn_event *events = calloc(n, sizeof *events);
	uint32_t *order = malloc(n * sizeof *order), *picks = malloc(OPERATIONS * sizeof *picks);
	struct umn_table_stats stats;
	uint32_t valid = 0, i;
	uint64_t start;

	for (i = 0; i < n; i++) {
		uint32_t j = random ? below(i + 1) : i;

		order[i] = order[j];
		order[j] = i;
	}
	for (i = 0; i < OPERATIONS; i++)
		picks[i] = random ? below(n) : i % n;
	make_world(&world, UINT64_MAX);
	printf("%s, %u regions\n", random ? "random" : "in order", n);

	begin();
	for (i = 0; i < n; i++)
		regions[order[i]] = watch(&world, address(order[i]), address(order[i]) + 0x1000, 0, NULL);
	printf("  watch all      %8.1f ns each\n", each(n));
	umn_table_stats(world.table, &stats);
	printf("  shared memory  %8.1f bytes each in use, %.1f in all; %u levels, %u segments\n",
	       (double)(stats.bytes - stats.free_bytes) / n, (double)stats.bytes / n, stats.levels, stats.segments);

	begin();
	for (i = 0; i < OPERATIONS; i++)
		umn_table_unwatch(world.table, watch(&world, address(picks[i]) + 64, address(picks[i]) + 128, 0, NULL));
	printf("  watch+unwatch  %8.1f ns one more\n", each(OPERATIONS));
	begin();
	for (i = 0; i < OPERATIONS; i++) {
		start = address(picks[i]);
		umn_table_unwatch(world.table, regions[picks[i]]);
		regions[picks[i]] = watch(&world, start, start + 0x1000, 0, NULL);
	}
	printf("  unwatch+watch  %8.1f ns one of them\n", each(OPERATIONS));

	begin();
	for (i = 0; i < OPERATIONS; i++)
		umn_feed(&world.memory, address(picks[i]) + 0x1000, address(picks[i]) + 0x2000, 0, 0);
	printf("  feed           %8.1f ns a miss", each(OPERATIONS));
	begin();
	for (i = 0; i < OPERATIONS; i++)
		umn_feed(&world.memory, address(picks[i]), address(picks[i]) + 0x1000, 0, 0);
	printf(", %.1f ns a hit", each(OPERATIONS));
	while (umn_table_drain(world.table, events, n))
		;
	begin();
	umn_feed(&world.memory, 0, UINT64_MAX, 0, 0);
	printf(", %.1f ns each for all at once\n", each(n));
	begin();
	check(umn_table_drain(world.table, events, n) == n);
	printf("  drain          %8.1f ns each, all in order", each(n));
	for (i = 0; i < n; i++)
		umn_feed(&world.memory, address(order[i]), address(order[i]) + 0x1000, 0, 0);
	begin();
	check(umn_table_drain(world.table, events, n) == n);
	printf(", %.1f ns each in the order of watching\n", each(n));
	begin();
	for (i = 0; i < OPERATIONS; i++)
		umn_table_drain(world.table, events, n);
	printf("  drain nothing  %8.1f ns\n", each(OPERATIONS));

	begin();
	for (i = 0; i < OPERATIONS; i++) {
		valid += umn_region_valid(regions[0]);
		__asm__ volatile("" : : : "memory");
	}
	printf("  valid          %8.1f ns one", each(OPERATIONS));
	begin();
	for (i = 0; i < OPERATIONS; i++)
		valid += umn_region_valid(regions[picks[i]]);
	printf(", %.1f ns any", each(OPERATIONS));
	begin();
	for (i = 0; i < OPERATIONS; i++) {
		valid += umn_table_changed(world.table);
		__asm__ volatile("" : : : "memory");
	}
	printf("; changed %.1f ns\n", each(OPERATIONS));
	check(!valid);

	begin();
	for (i = 0; i < n; i++)
		umn_table_unwatch(world.table, regions[order[i]]);
	printf("  unwatch all    %8.1f ns each\n", each(n));
	delete_world(&world);
	free(regions);
	free(events);
	free(order);
	free(picks);
}

int main(void)
{
	static const uint32_t sizes[] = {1, 100000, 1000000};

	for (uint32_t i = 0; i < 2 * LENGTH(sizes); i++)
		bench(sizes[i / 2], i % 2);
	return 0;
}
