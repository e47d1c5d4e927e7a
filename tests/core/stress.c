/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Feeders, owners and drainers, all at the same time, on indexes of one to four levels.
 *
 *	stress [SECONDS [SEED]]
 *
 * A feeder holds some of the regions that its change will hit, so that no owner touches these, and afterwards knows what must be
 * true of them. All else is in motion.
 */
#include "common.h"

#include <pthread.h>
#include <sched.h>

#define HELD_MAX 16
#define FEEDERS 3
#define OWNERS 2

enum { NONE, WATCHING, WATCHED, UNWATCHING };

struct record {
	uint64_t start, end;
	struct umn_region *region;
	int held; /* by so many feeders; -1: by an owner */
	int state;
	uint32_t renewals; /* odd: in one */
	uint64_t last_hit; /* the clock when the last change by who held it began */
	uint64_t reported; /* the clock after the last drain that reported it */
};

static struct world world;
static struct record *records;
static uint32_t record_count;
static uint64_t span;
static uint64_t now_clock = 1;
static int stop;
static bool overflows;
static uint64_t feed_count, event_count, change_count;
/* The one who reads events must know which regions still exist: so unwatching and draining exclude each other here. */
static pthread_mutex_t drain_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t grow_lock = PTHREAD_MUTEX_INITIALIZER;

static _Thread_local uint32_t chaos; /* one in so many accesses; 0: never */

#define get(p) __atomic_load_n(p, __ATOMIC_SEQ_CST)
#define set(p, v) __atomic_store_n(p, v, __ATOMIC_SEQ_CST)

void umn_chaos(void)
{
	if (chaos && one_in(chaos))
		sched_yield();
}

/* For what is the test's own. */
static bool quiet_begin(uint32_t *saved)
{
	*saved = chaos;
	chaos = 0;
	return true;
}
#define QUIETLY for (uint32_t saved_, once_ = quiet_begin(&saved_); once_; once_ = 0, chaos = saved_)

static uint64_t tick(void)
{
	uint64_t value = 0;

	QUIETLY
	value = __sync_fetch_and_add(&now_clock, 1);
	return value;
}

static bool hold(struct record *r)
{
	int held = get(&r->held);

	return held >= 0 && __sync_bool_compare_and_swap(&r->held, held, held + 1);
}

static void let_go(struct record *r)
{
	__sync_fetch_and_sub(&r->held, 1);
}

static bool own(struct record *r)
{
	return __sync_bool_compare_and_swap(&r->held, 0, -1);
}

static void disown(struct record *r)
{
	set(&r->held, 0);
}

/* ---- Owners ---- */

static void random_range(uint64_t *start, uint64_t *end)
{
	*start = 0x10000 + below(span);
	switch (below(8)) {
	case 0:
		*end = *start + 1;
		break;
	case 1: /* identical starts */
		*start = 0x10000 + below(3) * 4096;
		*end = *start + 1 + below(100);
		break;
	case 2:
		*end = *start + 1 + (one_in(50) ? below(span) : below(span / 100 + 1));
		break;
	case 3: /* at the end */
		*start = 0x10000 + span + below(1000);
		*end = *start + 1;
		break;
	default:
		*start &= ~4095ull;
		*end = *start + 4096 * (1 + below(3));
	}
}

static void do_watch(struct record *r)
{
	struct umn_region *region;
	uint64_t start, end;
	int error;

	random_range(&start, &end);
	set(&r->start, start);
	set(&r->end, end);
	set(&r->last_hit, 0);
	set(&r->reported, 0);
	set(&r->state, WATCHING);
	while ((error = umn_table_watch(world.table, start, end, r - records, r, &region)) == -ENOSPC) {
		pthread_mutex_lock(&grow_lock);
		grow(&world);
		pthread_mutex_unlock(&grow_lock);
	}
	if (error)
		fail("umn_table_watch: %d", error);
	r->region = region;
	set(&r->state, WATCHED);
}

static void do_unwatch(struct record *r)
{
	set(&r->state, UNWATCHING);
	/* A drain may be under way, ... */
	pthread_mutex_lock(&drain_lock);
	umn_table_unwatch(world.table, r->region);
	/* ... but here none is. */
	set(&r->state, NONE);
	pthread_mutex_unlock(&drain_lock);
}

static void do_renew(struct record *r)
{
	__sync_fetch_and_add(&r->renewals, 1);
	umn_table_renew(world.table, r->region);
	__sync_fetch_and_add(&r->renewals, 1);
}

static void *owner(void *argument)
{
	struct record *r;
	uint64_t done = 0;
	bool more = true;

	random_state += (uintptr_t)argument * 7777777;
	while (!get(&stop)) {
		chaos = one_in(2) ? 0 : 1 + below(300);
		/* Waves: the table fills and empties. */
		if (one_in(record_count))
			more = !more;
		r = &records[below(record_count)];
		QUIETLY
		if (!own(r))
			r = NULL;
		if (!r)
			continue;
		done++;
		if (r->state == NONE) {
			if (more || one_in(4))
				do_watch(r);
		} else if (one_in(3)) {
			do_renew(r);
		} else if (!more || one_in(4)) {
			do_unwatch(r);
			if (one_in(2))
				do_watch(r);
		}
		QUIETLY
		disown(r);
	}
	__sync_fetch_and_add(&change_count, done);
	return NULL;
}

/* ---- Drainers ---- */

static struct umn_event events[4096];

/* With drain_lock held. */
static size_t drain(size_t room)
{
	size_t n = umn_table_drain(world.table, events, room);
	uint64_t after = tick();

	QUIETLY
	{
		for (size_t i = 0; i < n; i++) {
			struct record *r = events[i].region->user;
			int state = get(&r->state);

			if (state == NONE || events[i].region->cookie != (uint64_t)(r - records))
				fail("reported after it was unwatched");
			if (state != WATCHING && r->region != events[i].region)
				fail("reported under another's name");
			if (events[i].start < r->start || events[i].end > r->end || events[i].start >= events[i].end)
				fail("reported with a range that is not in the region");
			set(&r->reported, after);
		}
	}
	event_count += n;
	return n;
}

static void *drainer(void *argument)
{
	(void)argument;
	while (!get(&stop)) {
		chaos = one_in(2) ? 0 : 1 + below(300);
		pthread_mutex_lock(&drain_lock);
		drain(one_in(4) ? LENGTH(events) : below(20));
		pthread_mutex_unlock(&drain_lock);
		if (one_in(2))
			sched_yield();
		if (one_in(100))
			umn_table_arm(world.table);
	}
	return NULL;
}

/* ---- Feeders ---- */

static void *feeder(void *argument)
{
	struct record *held[HELD_MAX], *r;
	uint32_t renewals[HELD_MAX], count;
	uint64_t start, end, began, done = 0;
	bool valid, missing;

	random_state += (uintptr_t)argument * 999999999;
	for (; !get(&stop); done++) {
		chaos = 0;
		r = &records[below(record_count)];
		start = get(&r->start) & ~4095ull;
		end = start + 4096 * (1 + (one_in(4) ? below((span >> below(16)) / 4096 + 1) : below(4)));
		if (one_in(record_count + 100)) {
			start = 0;
			end = UINT64_MAX;
		}
		count = 0;
		for (uint32_t tries = below(2 * HELD_MAX); tries-- && count < HELD_MAX;) {
			if (hold(r)) {
				if (r->state == WATCHED && r->start < end && r->end > start) {
					renewals[count] = get(&r->renewals);
					held[count++] = r;
				} else {
					let_go(r);
				}
			}
			r = one_in(2) ? &records[below(record_count)] : r + 1 < records + record_count ? r + 1 : records;
		}

		began = tick();
		chaos = one_in(4) ? 0 : 1 + below(100) * (1 + (end - start) / 100000 % 1000);
		if (overflows && one_in(1000)) {
			lose_chain = one_in(2);
			feed_bounded(&world, start, end, 1, 1, below(20));
			lose_chain = false;
		} else {
			umn_feed(&world.memory, start, end, 1, 1);
		}

		missing = false;
		for (uint32_t i = 0; i < count; i++) {
			r = held[i];
			valid = umn_region_valid(r->region);
			/* Another who holds it cannot have renewed it; it may be held several times. */
			if (valid && renewals[i] == get(&r->renewals) && !(renewals[i] & 1))
				fail("valid after a change");
			if (get(&r->reported) <= began)
				missing = true;
			QUIETLY
			for (uint64_t last = get(&r->last_hit); last < began; last = get(&r->last_hit))
				__sync_bool_compare_and_swap(&r->last_hit, last, began);
		}
		if (missing && one_in(4)) {
			pthread_mutex_lock(&drain_lock);
			missing = false;
			for (uint32_t i = 0; i < count; i++)
				missing |= get(&held[i]->reported) <= began;
			if (missing && !umn_table_changed(world.table))
				fail("umn_table_changed is false, yet a change is unreported");
			while (drain(LENGTH(events)) == LENGTH(events))
				;
			for (uint32_t i = 0; i < count; i++)
				if (get(&held[i]->reported) <= began)
					fail("a change is not reported");
			pthread_mutex_unlock(&drain_lock);
		}
		chaos = 0;
		for (uint32_t i = 0; i < count; i++)
			let_go(held[i]);
	}
	__sync_fetch_and_add(&feed_count, done);
	return NULL;
}

/* ---- */

static void round_of(double seconds)
{
	pthread_t threads[FEEDERS + OWNERS + 1];
	uintptr_t n = 0;
	uint64_t seed = random64();

	set(&stop, 0);
	for (int i = 0; i < FEEDERS; i++, n++)
		check(!pthread_create(&threads[n], NULL, feeder, (void *)(seed + n)));
	for (int i = 0; i < OWNERS; i++, n++)
		check(!pthread_create(&threads[n], NULL, owner, (void *)(seed + n)));
	check(!pthread_create(&threads[n], NULL, drainer, (void *)(seed + n)));
	nanosleep(&(struct timespec){(time_t)seconds, (long)((seconds - (time_t)seconds) * 1e9)}, NULL);
	set(&stop, 1);
	for (uintptr_t i = 0; i <= n; i++)
		pthread_join(threads[i], NULL);

	check_sound(&world);
	while (drain(LENGTH(events)))
		;
	check(!umn_table_changed(world.table));
	for (uint32_t i = 0; i < record_count; i++)
		if (records[i].state == WATCHED && records[i].last_hit && records[i].reported <= records[i].last_hit)
			fail("a change was never reported");
}

static void stress(uint32_t count, double seconds, bool with_overflows)
{
	struct umn_table_stats stats;
	uint32_t levels;

	record_count = count;
	overflows = with_overflows;
	feed_count = event_count = change_count = 0;
	span = count * 4096ull;
	records = calloc(count, sizeof *records);
	check(records);
	make_world(&world, UINT64_MAX);
	for (uint32_t i = 0; i < count / 2; i++)
		do_watch(&records[i]);
	umn_table_stats(world.table, &stats);
	levels = stats.levels;
	for (int i = 0; i < 3; i++)
		round_of(seconds / 3);
	umn_table_stats(world.table, &stats);
	printf("%6u regions, %u levels, %u segments%s: ", count, levels, stats.segments, with_overflows ? ", giving up" : "");
	printf("%lu feeds, %lu changes of the index, %lu events, %u overflows\n", feed_count, change_count, event_count,
	       stats.overflows);
	for (uint32_t i = 0; i < count; i++)
		if (records[i].state == WATCHED)
			umn_table_unwatch(world.table, records[i].region);
	check_sound(&world);
	delete_world(&world);
	free(records);
}

int main(int argc, char **argv)
{
	double seconds = argc > 1 ? atof(argv[1]) : 5;

	random_state += argc > 2 ? strtoull(argv[2], NULL, 0) : 0;
	stress(12, seconds / 5, false);
	stress(300, seconds / 5, false);
	stress(6000, seconds / 5, false);
	stress(40000, seconds / 5, false);
	stress(300, seconds / 5, true);
	return 0;
}
