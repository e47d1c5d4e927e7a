/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Grace periods: feeders walk the index without a lock, so the memory of a node or slot is reused only after every feeder that
 * may have reached it has left.
 *
 * A feeder adds one to readers[phase] of the header, walks, and subtracts it. It may add to either count: it reads the phase
 * before it counts itself in, and the owner may have changed the phase in between.
 */
#include <sched.h>
#include <time.h>

#include "table/internal.h"

#define WAIT_YIELDS 1000u
#define WAIT_SLEEPS 20000u /* of 100 us at least: 2 s */

/*
 * How many feeders are counted under a phase, ordered after all of the owner's earlier stores.
 *
 * A read-modify-write although it changes nothing: it and the feeder's count-in are both read-modify-writes of the same word,
 * so one comes after the other and reads what the other left. If the feeder's is first, the owner sees the feeder here. If the
 * owner's is first, it releases the unlinking stores before it, the feeder's acquires them, and the feeder's load of the root
 * finds the index without what was unlinked. With a plain load both can miss each other, on x86 too: the load may be done while
 * the unlinking store is still in the store buffer; on Arm it may be done before the store in any case. A fence and a plain
 * load would do as well, but ThreadSanitizer does not model fences.
 */
static uint64_t feeders(struct umn_table *t, uint32_t phase)
{
	return __sync_fetch_and_add(&t->header->readers[phase], 0);
}

void umn_grace_retire_node(struct umn_table *t, uint32_t ref)
{
	struct chunk *chunk = chunk_at(t, ref);

	chunk->node->next = t->spare_nodes;
	t->spare_nodes = chunk->node;
	t->spare_node_count++;
	chunk->node = NULL;
	chunk->next = t->fresh.chunks;
	t->fresh.chunks = ref;
}

void umn_grace_retire_region(struct umn_table *t, struct umn_region *region)
{
	region->place = LIMBO;
	region->next = t->fresh.regions;
	t->fresh.regions = region;
}

static void free_regions(struct umn_table *t, struct umn_region *region)
{
	struct umn_region *next;

	for (; region; region = next) {
		next = region->next;
		/* It was hit just before it was unwatched. That feeder has left, and it pushed its slots before it left; so the
		 * slot is on the list and must leave it before it is reused. */
		if (load(&region->slot->state) & UMN_PENDING)
			umn_pending_take(t);
		store(&slot_of(region)->state, 0);
		region->place = FREE;
		region->next = t->free_regions;
		t->free_regions = region;
	}
}

static void free_limbo(struct umn_table *t, struct limbo *limbo)
{
	uint32_t ref, next;

	for (ref = limbo->chunks; ref; ref = next) {
		next = chunk_at(t, ref)->next;
		free_chunk(t, ref);
	}
	free_regions(t, limbo->regions);
	*limbo = (struct limbo){0};
}

static void begin(struct umn_table *t)
{
	t->waiting = t->fresh;
	t->fresh = (struct limbo){0};
	t->grace = 1;
}

/*
 * One step of a grace period, without waiting. What is in `waiting` was unlinked before the period began. A feeder that may
 * still reach it counted itself in before that, under one phase or the other:
 *
 * 1. No feeder is counted under the other phase. (New feeders count there only if they read the phase long ago.) So each feeder
 *    that may reach `waiting` is counted under the current phase. Make the other phase the current one.
 * 2. No feeder is counted under what was the current phase. So no feeder can reach `waiting` any more.
 *
 * One look at each count would not do without the change of phase: feeders that come later would keep the count above 0 for
 * ever. One look without step 1 would not do either: a feeder that read the phase long ago may be counted where step 2 does not
 * look.
 *
 * What a feeder reads in the index is ordered before its count-out (a release), and the look that finds it gone (an acquire)
 * before the stores that reuse the memory. Without either, Arm may let the feeder read memory after it is reused.
 */
static void step(struct umn_table *t)
{
	if (feeders(t, !t->phase))
		return;
	if (t->grace == 1) {
		t->phase = !t->phase;
		store(&t->header->phase, t->phase);
		t->grace = 2;
		if (feeders(t, !t->phase))
			return;
	}
	t->grace = 0;
	free_limbo(t, &t->waiting);
}

void umn_grace_reclaim(struct umn_table *t)
{
	if (t->grace == 0) {
		if (!t->fresh.chunks && !t->fresh.regions)
			return;
		begin(t);
	}
	step(t);
}

/* Lets feeders run. False: after more than two seconds. */
static bool pause_for_feeders(uint32_t tries)
{
	const struct timespec interval = {.tv_nsec = 100000};

	if (tries == WAIT_YIELDS + WAIT_SLEEPS)
		return false;
	/* A feeder of lower priority does not run while this thread only yields. */
	if (tries < WAIT_YIELDS)
		sched_yield();
	else
		nanosleep(&interval, NULL);
	return true;
}

bool umn_grace_wait(struct umn_table *t)
{
	uint32_t tries = 0;

	/* A feeder that is in the table is counted in one of the two all the time. */
	if (!feeders(t, 0) && !feeders(t, 1)) {
		t->stuck = false;
		return true;
	}
	/* Further feeders keep coming, so it takes a grace period that begins now; one that is running began before. */
	for (int periods = t->grace ? 2 : 1; periods; periods--) {
		if (!t->grace)
			begin(t);
		for (step(t); t->grace; step(t))
			if (t->stuck || !pause_for_feeders(tries++)) {
				t->stuck = true; /* do not wait so long each time */
				return false;
			}
	}
	t->stuck = false;
	return true;
}
