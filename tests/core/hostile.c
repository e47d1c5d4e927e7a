/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Random writes over shared memory, before and while feeders and the owner are at work. Neither may crash, hang or leave the
 * segments (AddressSanitizer and the guard pages see to that), and once the writing has stopped and all was unwatched,
 * everything is as it should be again. Until then there may be false alarms, and a change may be missed.
 *
 *	hostile [OPERATIONS [SEED]]
 */
#include "common.h"

#include <pthread.h>
#include <unistd.h>

#define REGIONS 3000

static struct world world;
static struct umn_region *regions[REGIONS];
static struct umn_event events[REGIONS];
static uint32_t round_seen[REGIONS];
static int stop;

/* Waiting for a feeder that a random write has made up would take long. */
int hostile_nanosleep(const struct timespec *duration, struct timespec *rest)
{
	(void)duration, (void)rest;
	return 0;
}

/* ---- The attacker ---- */

static uint8_t *random_page(void)
{
	uint32_t segment = below(__atomic_load_n(&world.segments, __ATOMIC_ACQUIRE));

	return world.memory.segment[segment] + below(world.memory.pages[segment]) * UMN_PAGE;
}

static uint32_t random_ref(void)
{
	uint32_t segment = below(__atomic_load_n(&world.segments, __ATOMIC_ACQUIRE)), cell;

	if (one_in(10))
		return random64();
	cell = below(world.memory.pages[segment] * UMN_CELLS_PER_PAGE);
	return segment * UMN_CELLS_PER_SEGMENT + (one_in(2) ? cell & ~(UMN_CELLS_PER_CHUNK - 1) : cell);
}

static void attack(void)
{
	uint8_t *page = random_page();
	struct umn_node *node = (void *)(page + below(UMN_CHUNKS_PER_PAGE) * UMN_CHUNK);
	struct umn_slot *slot = (void *)(page + below(UMN_CELLS_PER_PAGE) * UMN_CELL);
	struct umn_header *header = world.header;

	switch (below(24)) {
	case 0:
		page[below(UMN_PAGE)] = random64();
		break;
	case 1:
		((uint64_t *)page)[below(UMN_PAGE / 8)] = random64();
		break;
	case 2: /* a whole chunk */
		if ((void *)node != (void *)header)
			for (uint32_t i = 0; i < UMN_CHUNK / 4; i++)
				((uint32_t *)node)[i] = one_in(2) ? random_ref() : random64();
		break;
	case 3:
		if ((void *)node != (void *)header)
			memmove(node, random_page() + below(UMN_CHUNKS_PER_PAGE) * UMN_CHUNK, UMN_CHUNK);
		break;
	case 4:
		node->level = below(10);
		break;
	case 5:
		node->used = random64();
		node->ordered = random64();
		break;
	case 6: /* loops, too */
		node->ref[below(UMN_FANOUT)] = one_in(2) ? header->root : random_ref();
		break;
	case 7:
		memset(node->start, 0, sizeof node->start);
		memset(node->end, 0xff, sizeof node->end);
		break;
	case 8:
		memset(node->ref, 0, sizeof node->ref);
		break;
	case 9:
		header->root = random_ref();
		break;
	case 10:
		header->head = random_ref();
		break;
	case 11:
		header->head = regions[0] ? regions[0]->ref : 0;
		break;
	case 12:
		if (one_in(10))
			header->readers[below(2)] = one_in(2) ? random64() : 0;
		break;
	case 13:
		header->phase = random64();
		break;
	case 14:
		header->low = one_in(2) ? 0 : random64();
		header->high = one_in(2) ? UINT64_MAX : random64();
		break;
	case 15:
		header->generation = random64();
		break;
	case 16:
		if (one_in(10))
			header->overflow = random64();
		break;
	case 17:
		header->zero = random64();
		break;
	case 18:
		header->armed = random64();
		break;
	default:
		if ((void *)slot < (void *)(header + 1) && (void *)slot >= (void *)header)
			break;
		if (one_in(2))
			slot->next = one_in(4) ? random64() : random_ref();
		if (one_in(2))
			slot->state = one_in(4) ? random64() : below(16);
		if (one_in(4))
			slot->hint_start = random64();
		if (one_in(4))
			slot->hint_end = random64();
	}
}

static void *attacker(void *argument)
{
	random_state += (uintptr_t)argument;
	while (!__atomic_load_n(&stop, __ATOMIC_ACQUIRE)) {
		for (uint32_t i = below(30); i--;)
			attack();
		usleep(below(100));
	}
	return NULL;
}

/* ---- The attacked ---- */

static void random_feed(void)
{
	uint64_t start = 0x1000 * below(REGIONS), end = start + 0x1000 * (one_in(10) ? below(REGIONS) : 1 + below(3));

	if (one_in(50))
		feed_bounded(&world, start, end, 0, 0, below(10));
	else
		umn_feed(&world.memory, start, end, 0, 0);
}

static void *feeder(void *argument)
{
	random_state += (uintptr_t)argument;
	while (!__atomic_load_n(&stop, __ATOMIC_ACQUIRE))
		random_feed();
	return NULL;
}

static void drain(void)
{
	static uint32_t round;
	size_t room = one_in(2) ? REGIONS : below(10), n = umn_table_drain(world.table, events, room);

	round++;
	check(n <= room);
	for (size_t i = 0; i < n; i++) {
		struct umn_region *region = events[i].region;

		check(region->cookie < REGIONS && regions[region->cookie] == region);
		check(round_seen[region->cookie] != round);
		round_seen[region->cookie] = round;
		check(events[i].start >= region->start && events[i].end <= region->end && events[i].start < events[i].end);
	}
}

static void operate(uint32_t limit)
{
	uint32_t i = below(limit);
	uint64_t start, end;
	int error;

	switch (below(8)) {
	case 0:
		drain();
		break;
	case 1:
		if (regions[i])
			umn_table_renew(world.table, regions[i]);
		break;
	case 2:
		umn_table_arm(world.table);
		(void)umn_table_changed(world.table);
		break;
	default:
		if (regions[i]) {
			(void)umn_region_valid(regions[i]);
			umn_table_unwatch(world.table, regions[i]);
			regions[i] = NULL;
			break;
		}
		start = 0x1000 * below(REGIONS);
		end = start + 1 + below(0x4000);
		while ((error = umn_table_watch(world.table, start, end, i, NULL, &regions[i])) == -ENOSPC && world.segments < 40)
			grow(&world);
		check(!error || error == -ENOSPC);
		if (error)
			regions[i] = NULL;
	}
}

/* Everything is well again. */
static void recover(void)
{
	uint64_t n;

	/* Two things the owner cannot know better. */
	world.header->readers[0] = world.header->readers[1] = 0;
	world.header->zero = 0;
	for (uint32_t i = 0; i < REGIONS; i++)
		if (regions[i]) {
			umn_table_unwatch(world.table, regions[i]);
			regions[i] = NULL;
		}
	while (umn_table_drain(world.table, events, REGIONS))
		;
	for (uint32_t round = 0; round < 2; round++) {
		for (uint32_t i = 0; i < REGIONS; i++)
			regions[i] = watch(&world, 0x1000 * (i + 1), 0x1000 * (i + 2), i, NULL);
		check_sound(&world);
		n = 0;
		for (uint32_t i = 0; i < REGIONS; i += 1 + below(10), n++) {
			check(umn_region_valid(regions[i]));
			umn_feed(&world.memory, regions[i]->start, regions[i]->end, 0, 0);
			check(!umn_region_valid(regions[i]));
		}
		check(umn_table_changed(world.table));
		check(umn_table_drain(world.table, events, REGIONS) == n);
		check(!umn_table_changed(world.table));
		for (uint32_t i = 0; i < REGIONS; i++)
			umn_table_unwatch(world.table, regions[i]);
		check_sound(&world);
	}
	memset(regions, 0, sizeof regions);
}

int main(int argc, char **argv)
{
	uint32_t operations = argc > 1 ? strtoul(argv[1], NULL, 0) : 100000;
	pthread_t threads[2];

	random_state += argc > 2 ? strtoull(argv[2], NULL, 0) : 0;
	/* One thread: the same on every run. */
	for (uint32_t round = 0; round < 20; round++) {
		make_world(&world, REGIONS);
		for (uint32_t i = 0; i < operations / 20; i++) {
			operate(round % 2 ? REGIONS : 60);
			if (one_in(3))
				random_feed();
			if (one_in(1 + round * round))
				attack();
		}
		recover();
		delete_world(&world);
	}
	/* Attacked at any moment. */
	for (uint32_t round = 0; round < 4; round++) {
		make_world(&world, REGIONS);
		__atomic_store_n(&stop, 0, __ATOMIC_RELEASE);
		check(!pthread_create(&threads[0], NULL, attacker, (void *)(uintptr_t)random64()));
		check(!pthread_create(&threads[1], NULL, feeder, (void *)(uintptr_t)random64()));
		for (uint32_t i = 0; i < operations / 4; i++)
			operate(round % 2 ? REGIONS : 60);
		__atomic_store_n(&stop, 1, __ATOMIC_RELEASE);
		for (uint32_t i = 0; i < LENGTH(threads); i++)
			pthread_join(threads[i], NULL);
		recover();
		delete_world(&world);
	}
	return 0;
}
