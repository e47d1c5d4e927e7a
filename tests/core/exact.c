/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * One thread: the table does exactly what a plain array of regions says.
 *
 *	exact [OPERATIONS [OPERATIONS_FOR_MEMORY]]
 */
#include "common.h"

#define REGIONS_MAX 20000

struct expected {
	struct umn_region *region;
	uint64_t start, end, cookie;
	bool invalid;
	uint32_t hits;	/* since it was last reported */
	uint64_t order; /* of the first of these, its range, and who made it */
	uint64_t hit_start, hit_end;
	uint32_t thread;
	int32_t syscall;
};

static struct world world;
static struct expected regions[REGIONS_MAX];
static struct umn_event events[REGIONS_MAX];
static uint32_t region_count, unreported;
static uint64_t generation, next_cookie, change_count;
static bool armed, overflow;

static uint64_t clip(uint64_t value, uint64_t low, uint64_t high)
{
	return value < low ? low : value > high ? high : value;
}

static void add(uint64_t start, uint64_t end)
{
	struct expected *e = &regions[region_count++];

	*e = (struct expected){.start = start, .end = end, .cookie = next_cookie++};
	e->region = watch(&world, start, end, e->cookie, e);
	check(umn_region_valid(e->region));
}

static void drop(uint32_t i)
{
	umn_table_unwatch(world.table, regions[i].region);
	unreported -= regions[i].hits > 0;
	regions[i] = regions[--region_count];
	if (i < region_count)
		regions[i].region->user = &regions[i];
}

static void hit(struct expected *e, uint64_t start, uint64_t end, uint32_t thread, int32_t syscall)
{
	if (!e->hits++) {
		unreported++;
		e->order = change_count;
		e->hit_start = start;
		e->hit_end = end;
		e->thread = thread;
		e->syscall = syscall;
	}
	e->invalid = true;
}

static void change(uint64_t start, uint64_t end)
{
	uint32_t thread = below(100000), n = 0;
	int32_t syscall = (int32_t)below(400) - 1;
	bool wake = umn_feed(&world.memory, start, end, thread, syscall);

	change_count++;
	for (uint32_t i = 0; i < region_count; i++) {
		if (regions[i].start >= end || regions[i].end <= start)
			continue;
		n++;
		hit(&regions[i], start, end, thread, syscall);
		check(!umn_region_valid(regions[i].region));
	}
	check(wake == (armed && n));
	armed = armed && !n;
	generation += n > 0;
	check(umn_generation(world.header) == generation);
}

/* What a feeder does that gives up: with its walk, or with putting its chain on the list. */
static void give_up(uint64_t start, uint64_t end)
{
	uint32_t before = world.header->overflow;
	bool wake;

	if (!region_count || !umn_in_hull(world.header, start, end))
		return;
	lose_chain = one_in(2);
	wake = feed_bounded(&world, start, end, 1, 1, lose_chain && one_in(2) ? UINT32_MAX : 0);
	lose_chain = false;
	overflow = world.header->overflow != before;
	change_count++;
	generation = umn_generation(world.header);
	check(!overflow || wake == armed);
	armed = armed && !wake;
	for (uint32_t i = 0; i < region_count; i++) {
		if (overflow) {
			check(!umn_region_valid(regions[i].region));
			hit(&regions[i], 0, UINT64_MAX, 0, -1);
			regions[i].hits = 2;
		} else if (regions[i].start < end && regions[i].end > start) {
			hit(&regions[i], start, end, 1, 1);
		}
	}
}

static void drain(size_t room, bool after_overflow)
{
	uint64_t order = 0;
	size_t n;

	check(umn_table_changed(world.table) || !unreported);
	n = umn_table_drain(world.table, events, room);
	check(n == (unreported < room ? unreported : room));
	for (size_t i = 0; i < n; i++) {
		struct umn_event *event = &events[i];
		struct expected *e = event->region->user;

		check(e->region == event->region && event->region->cookie == e->cookie);
		check(e->hits);
		check(event->exact == (e->hits == 1));
		check(event->start == (event->exact ? clip(e->hit_start, e->start, e->end) : e->start));
		check(event->end == (event->exact ? clip(e->hit_end, e->start, e->end) : e->end));
		if (!after_overflow) {
			check(event->thread == e->thread && event->syscall == e->syscall);
			check(e->order >= order);
			order = e->order;
		}
		e->hits = 0;
		unreported--;
	}
	if (!unreported)
		check(!umn_table_changed(world.table));
	for (uint32_t i = 0; i < region_count; i++)
		check(umn_region_valid(regions[i].region) == !regions[i].invalid);
}

static void random_range(uint64_t span, uint64_t *start, uint64_t *end)
{
	const uint64_t base = 0x7f0000000000;

	*start = base + below(span);
	switch (below(6)) {
	case 0:
		*end = *start + 1;
		break;
	case 1:
		*start = base + (*start - base) / 4096 * 4096;
		*end = *start + 4096 * (1 + below(4));
		break;
	case 2:
		*end = *start + 1 + below(span / 64 + 1);
		break;
	case 3:
		*end = one_in(100) ? 1ull << 62 : *start + 1 + below(span);
		*start = one_in(100) ? 0 : *start;
		break;
	default: /* many with the same start */
		*start = base + below(4) * 4096;
		*end = *start + 1 + below(3) * 4096;
	}
}

/* Goes up to `most` regions and down to none again, with overlapping, nested, identical, tiny and huge ones. */
static void randomly(uint32_t most, uint32_t operations, uint64_t span, bool overflows)
{
	bool up = true, after_overflow = false;
	uint64_t start, end;

	make_world(&world, most);
	region_count = unreported = generation = 0;
	armed = overflow = false;
	for (uint32_t i = 0; i < operations; i++) {
		if (region_count == most)
			up = false;
		if (region_count == 0)
			up = true;
		for (uint32_t j = below(most / 20 + 2); j--;)
			if (region_count < most && (up ? !one_in(4) : !region_count || one_in(4))) {
				random_range(span, &start, &end);
				add(start, end);
			} else if (region_count) {
				drop(one_in(2) ? below(region_count) : region_count - 1);
			}
		switch (below(8)) {
		case 0:
			drain(below(unreported + 2), after_overflow);
			break;
		case 1:
			drain(REGIONS_MAX, after_overflow);
			after_overflow = false;
			break;
		case 2:
			umn_table_arm(world.table);
			armed = true;
			break;
		case 3:
			if (overflows && one_in(10)) {
				random_range(span, &start, &end);
				give_up(start, end);
				after_overflow |= overflow;
				drain(0, after_overflow); /* else unwatch could come before it */
			}
			break;
		default:
			random_range(span, &start, &end);
			change(start, end >> 62 ? UINT64_MAX : end);
		}
		if (region_count && one_in(2)) {
			struct expected *e = &regions[below(region_count)];

			umn_table_renew(world.table, e->region);
			check(umn_region_valid(e->region));
			e->invalid = false;
		}
		if (one_in(20))
			check_sound(&world);
	}
	while (region_count)
		drop(below(region_count));
	check_sound(&world);
	check(umn_table_drain(world.table, events, REGIONS_MAX) == 0);
	delete_world(&world);
}

/* ---- Memory is constant ---- */

static uint64_t bytes_used(void)
{
	struct umn_table_stats stats;

	umn_table_stats(world.table, &stats);
	return stats.bytes - stats.free_bytes;
}

static void memory_is_constant(uint32_t operations)
{
	struct umn_region *live[1000] = {0}, *region;
	uint64_t used = 0, start;

	make_world(&world, 1001);
	for (uint32_t i = 0; i < operations; i++) {
		uint32_t j = below(LENGTH(live));

		if (live[j])
			umn_table_unwatch(world.table, live[j]);
		start = 0x1000 + below(1ull << 40);
		live[j] = watch(&world, start, start + 1 + below(100000), 0, NULL);
		if (one_in(2))
			umn_feed(&world.memory, start, start + 1, 0, 0);
		/* Watched, hit and unwatched, and nobody ever drains. */
		region = watch(&world, start, start + 1, 0, NULL);
		umn_feed(&world.memory, start, start + 1, 0, 0);
		umn_table_unwatch(world.table, region);
		if (i == operations / 4)
			used = bytes_used();
	}
	/* How full the nodes are may vary by chance. */
	check(bytes_used() <= used * 5 / 4);
	check_sound(&world);
	used = bytes_used();
	for (uint32_t i = 0; i < operations * 10; i++) {
		start = 0x1000 + below(1ull << 40);
		umn_feed(&world.memory, start, start + (one_in(1000) ? 1ull << 40 : 1ull << 32), 0, 0);
	}
	check(bytes_used() == used);
	delete_world(&world);
}

/* A feeder that stays inside keeps what was freed from being reused. When it has left, all is as it was. */
static void memory_comes_back(void)
{
	enum { N = 60000 };
	static struct umn_region *many[N];
	uint64_t empty = 0;
	uint32_t phase;

	make_world(&world, N + 1);
	for (uint32_t round = 0; round < 4; round++) {
		for (uint32_t i = 0; i < N; i++)
			many[i] = watch(&world, 0x1000ull * (i + 1), 0x1000ull * (i + 2), 0, NULL);
		phase = world.header->phase;
		__atomic_fetch_add(&world.header->readers[phase], 1, __ATOMIC_SEQ_CST);
		for (uint32_t i = 0; i < N; i++)
			umn_table_unwatch(world.table, many[round & 1 ? i : (i * 7919ul) % N]);
		check(world.header->root); /* or this was no test: for want of memory, empty leaves have stayed */
		check_sound(&world);
		__atomic_fetch_sub(&world.header->readers[phase], 1, __ATOMIC_SEQ_CST);
		/* By itself each of these would remove one leaf. */
		for (uint32_t i = 0; i < N / 60; i++)
			umn_table_unwatch(world.table, watch(&world, 0x1000, 0x2000, 0, NULL));
		check_sound(&world);
		check(!world.header->root);
		if (round == 0)
			empty = bytes_used();
		check(bytes_used() == empty);
	}
	delete_world(&world);
}

/* The bound on a feeder's steps is never hit in a sound table, even if it is all leaves that were full once. */
static void walks_are_bounded(void)
{
	enum { LEAVES = 4000, N = LEAVES * UMN_FANOUT };
	static struct umn_region *many[N];
	uint32_t kept = 0;

	make_world(&world, N);
	for (uint32_t i = 0; i < N; i++) {
		many[i] = watch(&world, 0x1000ull * (i + 1), 0x1000ull * (i + 2), 0, NULL);
		if (i >= 2 * UMN_FANOUT && i % UMN_FANOUT >= 6)
			umn_table_unwatch(world.table, many[i - 2 * UMN_FANOUT]);
		else
			kept++;
	}
	umn_feed(&world.memory, 0, UINT64_MAX, 0, 0);
	check(world.header->overflow == 0);
	check(umn_table_drain(world.table, events, REGIONS_MAX) == REGIONS_MAX);
	check_sound(&world);
	check(kept > REGIONS_MAX);
	delete_world(&world);
}

/* Where no region reaches over another, the walk to one leaf takes one step, whatever the order in which they are watched. */
static void descends_to_the_leaf(void)
{
	enum { N = 20000, PRIME = 7919 };

	make_world(&world, N);
	for (uint64_t i = 0; i < N; i++) {
		uint64_t start = 0x2000 * (i * PRIME % N + 1);

		watch(&world, start, start + 0x1000, 0, NULL);
	}
	for (uint64_t i = 1; i <= N; i++) {
		feed_bounded(&world, 0x2000 * i, 0x2000 * i + 0x1000, 0, 0, 1);
		feed_bounded(&world, 0x2000 * i + 0x1000, 0x2000 * (i + 1), 0, 0, 1);
	}
	check(world.header->overflow == 0 && world.header->generation == N);
	check(umn_table_drain(world.table, events, REGIONS_MAX) == REGIONS_MAX);
	check_sound(&world);
	delete_world(&world);
}

/* ---- Limits, and the end ---- */

static void limits(void)
{
	struct umn_region *region, *first = NULL;
	struct umn_table_stats before, after;
	uint32_t n = 0;
	int error;

	make_world(&world, 100000);
	while (!(error = umn_table_watch(world.table, 0x1000, 0x2000, 0, NULL, &region)))
		first = n++ ? first : region;
	check(error == -ENOSPC && n > 300);
	check_sound(&world);
	umn_table_stats(world.table, &before);
	check(umn_table_watch(world.table, 0x1000, 0x2000, 0, NULL, &region) == -ENOSPC);
	umn_table_stats(world.table, &after);
	check(!memcmp(&before, &after, sizeof before) && before.regions == n);
	grow(&world);
	check(umn_table_watch(world.table, 0x1000, 0x2000, 0, NULL, &region) == 0);
	umn_table_invalidate_all(world.table);
	check(!umn_region_valid(first) && umn_table_changed(world.table));
	check(umn_table_drain(world.table, events, REGIONS_MAX) == n + 1 && !umn_table_changed(world.table));
	umn_table_renew(world.table, first);
	check(umn_region_valid(first));

	umn_table_close(world.table);
	check(!umn_region_valid(first) && umn_table_changed(world.table));
	check(umn_table_watch(world.table, 0x1000, 0x2000, 0, NULL, &region) == -EBADF);
	check(umn_table_drain(world.table, events, REGIONS_MAX) == 0);
	umn_table_renew(world.table, first);
	umn_table_unwatch(world.table, first);
	check(umn_table_next_pages(world.table) == 0);
	delete_world(&world);

	make_world(&world, 2);
	check(umn_table_watch(world.table, 1, 1, 0, NULL, &region) == -EINVAL);
	check(umn_table_watch(world.table, 1, UINT64_MAX, 0, NULL, &region) == -EINVAL);
	check(umn_table_watch(world.table, 0, 1, 0, NULL, &region) == 0);
	check(umn_table_watch(world.table, 0, 1, 0, NULL, &region) == 0);
	check(umn_table_watch(world.table, 0, 1, 0, NULL, &first) == -EDQUOT);
	umn_table_unwatch(world.table, region);
	check(umn_table_watch(world.table, 0, 1, 0, NULL, &region) == 0);
	delete_world(&world);
}

int main(int argc, char **argv)
{
	uint32_t operations = argc > 1 ? strtoul(argv[1], NULL, 0) : 100000;
	uint32_t constant = argc > 2 ? strtoul(argv[2], NULL, 0) : 1000000;

	for (int overflows = 0; overflows < 2; overflows++) {
		randomly(10, operations, 1 << 16, overflows);
		randomly(200, operations / 10, 1 << 20, overflows);
		randomly(3000, operations / 100, 1 << 24, overflows);
		randomly(REGIONS_MAX, operations / 500, 1ull << 36, overflows);
	}
	memory_is_constant(constant);
	memory_comes_back();
	walks_are_bounded();
	descends_to_the_leaf();
	limits();
	return 0;
}
