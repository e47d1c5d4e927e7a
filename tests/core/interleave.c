/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Tries every interleaving of a few short threads, feeders and owners, that has at most a given number of preemptions. The threads
 * are coroutines; interleave.h makes every access to shared memory a point where one may be preempted. So this sees no
 * effects of weak memory order, but in exchange it misses nothing else.
 *
 *	interleave [-p PREEMPTIONS] [SCENARIO ...]	PREEMPTIONS is added to each scenario's own bound
 */
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <ucontext.h>

/* A feeder may be told to lose its chain. */
static int lose_chain;
#define UMN_REPEAT(n, f, w)                                                                                                        \
	do {                                                                                                                       \
		for (uint32_t i_ = 0; i_ < ((void *)(f) == (void *)umn_push && lose_chain ? 0 : (n)) && !f(i_, w); i_++)           \
			;                                                                                                          \
	} while (0)
#include "table/user_feeder.c"
#include "table_check.h"

#define THREADS 3
#define STACK 65536
#define PAGES_USED 16 /* of the only segment */
#define SLOTS 1024    /* of the test's own regions */
#define CHANGES 8     /* in one run */

/* ---- Threads and their interleaving ---- */

struct choice {
	unsigned point;
	int thread;
};

static ucontext_t main_context, contexts[THREADS];
static char stacks[THREADS][STACK];
static int current = -1; /* -1: not in a thread */
static int thread_count, done[THREADS];
static unsigned point_count, idle;
static const struct choice *choices;
static unsigned choice_count, choice_next;
/* What the last run could have chosen: for each point, the thread that was running and whether it had to stop. */
#define POINTS 100000
static struct {
	signed char thread, others;
} trace[POINTS];
static const char *scenario_name;
static unsigned long run_count;

__attribute__((noreturn, format(printf, 1, 2))) static void fail(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	fprintf(stderr, "%s, run %lu: ", scenario_name, run_count);
	vfprintf(stderr, format, args);
	fprintf(stderr, "\n  thread %d, point %u; preempted at:", current, point_count);
	for (unsigned i = 0; i < choice_count; i++)
		fprintf(stderr, " %u->%d", choices[i].point, choices[i].thread);
	fprintf(stderr, "\n");
	exit(1);
}

static void switch_to(int thread)
{
	int from = current;

	current = thread;
	swapcontext(&contexts[from], thread < 0 ? &main_context : &contexts[thread]);
}

/* Which other threads could go on here, as bits. */
static int others(void)
{
	int bits = 0;

	for (int i = 0; i < thread_count; i++)
		if (i != current && !done[i])
			bits |= 1 << i;
	return bits;
}

static int next_thread(void)
{
	for (int i = 1; i < thread_count; i++)
		if (!done[(current + i) % thread_count])
			return (current + i) % thread_count;
	return -1;
}

static void at_point(int must_stop)
{
	int to = current;

	if (current < 0)
		return;
	if (point_count == POINTS)
		fail("it does not end");
	trace[point_count].thread = current;
	trace[point_count].others = others();
	if (must_stop)
		to = next_thread();
	/* While more places are being found written, points move, and a choice may no longer make sense. */
	if (choice_next < choice_count && choices[choice_next].point == point_count) {
		if (!done[choices[choice_next].thread])
			to = choices[choice_next].thread;
		choice_next++;
	}
	point_count++;
	if (to != current)
		switch_to(to);
}

/* The table's memory, and what of it is written while the threads run. Nobody can tell when the rest is loaded. */
static uint8_t pages[UMN_SEGMENT_PAGES * UMN_PAGE] __attribute__((aligned(UMN_PAGE)));
static uint8_t written[sizeof pages / 4];
static int newly_written;

void umn_point(const void *at, size_t size, int write)
{
	size_t offset = (const uint8_t *)at - pages;

	if (current < 0)
		return;
	if (offset < sizeof pages) {
		if (write)
			for (size_t i = offset / 4; i <= (offset + size - 1) / 4; i++) {
				newly_written |= !written[i];
				written[i] = 1;
			}
		else if (!written[offset / 4] && !written[(offset + size - 1) / 4])
			return;
	}
	idle = 0;
	at_point(0);
}

/* The calling thread waits for another. */
int umn_yield(void)
{
	if (current >= 0) {
		if (++idle > 1000)
			fail("all threads wait");
		if (others())
			at_point(1);
	}
	return 0;
}

int umn_nanosleep(const struct timespec *duration, struct timespec *rest)
{
	(void)duration, (void)rest;
	return umn_yield();
}

static int locked;

int umn_mutex_lock(pthread_mutex_t *mutex)
{
	umn_point(mutex, 1, 1);
	while (locked)
		umn_yield();
	locked = 1;
	return 0;
}

int umn_mutex_unlock(pthread_mutex_t *mutex)
{
	(void)mutex;
	locked = 0;
	return 0;
}

int umn_munmap(void *address, size_t length)
{
	(void)address, (void)length;
	return 0;
}

static void (*thread_functions[THREADS])(void);

static void thread_main(int thread)
{
	for (;;) {
		thread_functions[thread]();
		done[thread] = 1;
		/* The next one to run is a choice, too. */
		if (others())
			at_point(1);
		else
			switch_to(-1);
	}
}

/* ---- The oracle. It knows the order of everything, since nothing really is concurrent. ---- */

enum { UNWATCHED, BEING_WATCHED, WATCHED, BEING_UNWATCHED };

/* A change that overlaps a region and asks to be reported for it. */
struct claim {
	uint64_t start, end; /* clipped to the region */
	int completed;
	int cleared;  /* the region's report was prepared after it began */
	int reported; /* by an event that covers it */
};

static struct watched {
	struct umn_region *region;
	uint64_t start, end;
	int state;
	int renewed; /* how often */
	int grants;  /* events that may still come: one for each change, and one more after giving up */
	struct claim claims[CHANGES];
	int claim_count;
} watched[SLOTS];
static int watched_count;

static struct umn_memory memory;
static struct umn_table *table;
static int feeds_under_way, given_up;
static int armed, wakes;
static int foreign; /* changes may be others', as the BPF program's feed_table takes them */

static void add_segment(void)
{
	memset(pages, 0, PAGES_USED * UMN_PAGE);
	memory.pages[0] = memory.cells = 0;
	umn_memory_add(&memory, pages, UMN_SEGMENT_PAGES);
	if (umn_table_add_segment(table, pages, UMN_SEGMENT_PAGES))
		fail("umn_table_add_segment failed");
}

static void watch(int i, uint64_t start, uint64_t end)
{
	struct watched *w = &watched[i];
	int error;

	*w = (struct watched){.start = start, .end = end, .state = BEING_WATCHED, .grants = 2 * feeds_under_way + given_up};
	if (i >= watched_count)
		watched_count = i + 1;
	error = umn_table_watch(table, start, end, i, w, &w->region);
	if (error)
		fail("umn_table_watch: %d", error);
	w->state = WATCHED;
}

static void unwatch(int i)
{
	watched[i].state = BEING_UNWATCHED;
	umn_table_unwatch(table, watched[i].region);
	watched[i].state = UNWATCHED;
}

static void renew(int i)
{
	watched[i].renewed++;
	umn_table_renew(table, watched[i].region);
	watched[i].renewed++;
}

void umn_clearing(const void *state, uint32_t bits)
{
	if (!(bits & UMN_PENDING))
		return;
	for (int i = 0; i < watched_count; i++)
		if (watched[i].region && &watched[i].region->slot->state == state)
			for (int c = 0; c < watched[i].claim_count; c++)
				watched[i].claims[c].cleared = 1;
}

static void check_changed(const char *where)
{
	int changed = umn_table_changed(table);

	for (int i = 0; i < watched_count; i++)
		for (int c = 0; c < watched[i].claim_count; c++)
			if (watched[i].state == WATCHED && watched[i].claims[c].completed && !watched[i].claims[c].reported &&
			    !changed)
				fail("%s: umn_table_changed is false, yet change %d of region %d is unreported", where, c, i);
}

/* The changes that had completed when this was called and are unreported. */
struct owed {
	unsigned char claims[SLOTS][CHANGES];
};

static void find_owed(struct owed *owed)
{
	for (int i = 0; i < watched_count; i++)
		for (int c = 0; c < CHANGES; c++)
			owed->claims[i][c] = watched[i].state == WATCHED && c < watched[i].claim_count &&
					     watched[i].claims[c].completed && !watched[i].claims[c].reported;
}

static void check_paid(const struct owed *owed, int count, const char *where)
{
	for (int i = 0; i < count; i++)
		for (int c = 0; c < CHANGES; c++)
			if (owed->claims[i][c] && watched[i].state == WATCHED && !watched[i].claims[c].reported)
				fail("%s leaves out change %d of region %d", where, c, i);
}

/* The same, with points inside. */
static void changed(void)
{
	int count = watched_count;
	struct owed owed;

	find_owed(&owed);
	if (!umn_table_changed(table))
		check_paid(&owed, count, "umn_table_changed");
}

static size_t drain(size_t room)
{
	struct umn_event events[SLOTS];
	struct watched *w;
	struct claim *claim;
	int count = watched_count;
	struct owed owed;
	size_t n;

	find_owed(&owed);
	n = umn_table_drain(table, events, room);
	for (size_t e = 0; e < n; e++) {
		w = events[e].region->user;
		if (w->region != events[e].region && w->state != BEING_WATCHED)
			fail("an event for another watch's region");
		if (w->state == UNWATCHED)
			fail("region %d is reported after umn_table_unwatch", (int)(w - watched));
		if (events[e].start < w->start || events[e].end > w->end || events[e].start >= events[e].end)
			fail("region %d is reported with a range that is not in it", (int)(w - watched));
		if (!w->grants--)
			fail("a false alarm for region %d", (int)(w - watched));
		for (int c = 0; c < w->claim_count; c++) {
			claim = &w->claims[c];
			if (claim->cleared && events[e].start <= claim->start && events[e].end >= claim->end)
				claim->reported = 1;
			claim->cleared = 0;
		}
	}
	if (n < room)
		check_paid(&owed, count, "umn_table_drain");
	check_changed("drain");
	return n;
}

/* A change, by a feeder that gives up after `steps` steps. */
static void feed_bounded(uint64_t start, uint64_t end, uint32_t steps)
{
	struct {
		int known, renewed, claim;
	} before[SLOTS];
	struct umn_walk w = {.memory = &memory, .header = (struct umn_header *)pages, .start = start, .end = end};
	int count = watched_count, gives_up = steps != UINT32_MAX || lose_chain;

	given_up += gives_up;
	for (int i = 0; i < count; i++) {
		struct watched *r = &watched[i];

		before[i].known = r->state == WATCHED && r->start < end && r->end > start;
		before[i].renewed = r->renewed;
		before[i].claim = r->claim_count;
		r->grants += gives_up;
		if (r->state == UNWATCHED || r->start >= end || r->end <= start)
			continue;
		r->grants++;
		if (!before[i].known)
			continue; /* may be reported or not */
		if (r->claim_count == CHANGES)
			fail("the test has too many changes");
		r->claims[r->claim_count++] =
			(struct claim){.start = start > r->start ? start : r->start, .end = end < r->end ? end : r->end};
	}
	feeds_under_way++;
	if (umn_in_hull(w.header, start, end))
		wakes += foreign && umn_all_invalid(w.header)
				 ? __sync_fetch_and_add(&w.header->generation, 1) != UINT64_MAX && umn_disarm(w.header)
				 : umn_invalidate(&w, steps);
	feeds_under_way--;
	for (int i = 0; i < count; i++) {
		struct watched *r = &watched[i];
		int thread = current;

		if (!before[i].known || r->state != WATCHED)
			continue;
		r->claims[before[i].claim].completed = 1;
		current = -1; /* no points */
		if (r->renewed == before[i].renewed && umn_region_valid(r->region))
			fail("region %d is valid after a change", i);
		check_changed("feed");
		current = thread;
	}
}

static void feed(uint64_t start, uint64_t end)
{
	feed_bounded(start, end, UINT32_MAX);
}

/* ---- Scenarios ---- */

static uint64_t at(int i)
{
	return 0x10000 + (uint64_t)i * 0x1000;
}

static void watch_page(int i)
{
	watch(i, at(i), at(i + 1));
}

static void feed_page(int i)
{
	feed(at(i), at(i + 1));
}

static void watch_pages(int n)
{
	for (int i = 0; i < n; i++)
		watch_page(i);
}

static void setup_one_large(void)
{
	watch(0, at(0), at(8));
}

static void setup_two_large(void)
{
	watch(0, at(0), at(8));
	watch(1, at(0), at(8));
}

static void setup_3(void)
{
	watch_pages(3);
}

static void setup_full_leaf(void)
{
	watch_pages(UMN_FANOUT);
}

static void setup_levels(void)
{
	watch_pages(2 * UMN_FANOUT + 2);
}

/* Three levels, the last leaf of which is full. */
static void setup_3_levels(void)
{
	watch_pages((UMN_FANOUT + 1) * UMN_FANOUT);
}

/* Three leaves, with room in each. */
static void setup_room(void)
{
	watch_pages(2 * UMN_FANOUT + 2);
	unwatch(6);
	unwatch((int)UMN_FANOUT + 6);
}

/* Regions in the first and the second reach into the third, so the ends in the root are in order ... */
static void setup_reaching(void)
{
	setup_room();
	watch(60, at(UMN_FANOUT + 6), at(2 * UMN_FANOUT + 1));
	watch(61, at(6), at(2 * UMN_FANOUT + 1));
}

/* Two leaves of which one is nearly empty. */
static void setup_merge(void)
{
	watch_pages(UMN_FANOUT + 3);
	for (int i = 6; i < (int)UMN_FANOUT; i++)
		unwatch(i);
}

static void feed_first(void)
{
	feed_page(0);
}

static void feed_second(void)
{
	feed_page(1);
}

static void feed_third(void)
{
	feed_page(2);
}

static void feed_all(void)
{
	feed(at(0), at(200));
}

static void feed_all_giving_up(void)
{
	feed_bounded(at(0), at(200), 2);
}

static void feed_second_giving_up(void)
{
	feed_bounded(at(1), at(2), 0);
}

static void setup_foreign(void)
{
	setup_3();
	foreign = 1;
}

static void feed_giving_up_and_third(void)
{
	feed_bounded(at(0), at(200), 2);
	feed_page(2);
}

static void drain_renew_third(void)
{
	drain(SLOTS);
	renew(2);
	feed_page(2);
}

static void drain_one_renew_third(void)
{
	drain(1);
	renew(2);
	feed_page(2);
	drain(SLOTS);
}

static void watch_third(void)
{
	watch(60, at(2), at(4));
	feed_page(2);
}

static void feed_all_losing(void)
{
	lose_chain = 1;
	feed(at(0), at(200));
	lose_chain = 0;
}

static void drain_all(void)
{
	drain(SLOTS);
}

static void drain_twice(void)
{
	drain(SLOTS);
	drain(SLOTS);
}

static void drain_one(void)
{
	drain(1);
}

static void arm_and_drain(void)
{
	umn_table_arm(table);
	armed = 1;
	drain(SLOTS);
}

static void drain_renew(void)
{
	drain(SLOTS);
	renew(0);
}

static void feed_and_drain(void)
{
	feed_page(0);
	drain(SLOTS);
}

static void feed_second_and_drain(void)
{
	feed_page(1);
	drain(SLOTS);
}

static void feed_twice(void)
{
	feed_page(0);
	feed_page(1);
}

static void unwatch_first(void)
{
	unwatch(0);
}

/* The slot is used again as soon as it may be. */
static void unwatch_watch(void)
{
	unwatch(0);
	watch(10, at(0), at(1));
	watch(11, at(1), at(2));
}

static void unwatch_watch_drain(void)
{
	unwatch(0);
	watch(10, at(0), at(1));
	drain(SLOTS);
}

/* The leaf's entry is used again, for something else. */
static void reuse_entry(void)
{
	unwatch(0);
	watch(10, at(100), at(101));
}

static void watch_drain(void)
{
	watch(60, at(2), at(4));
	drain(SLOTS);
}

static void watch_split(void)
{
	watch(60, at(10), at(12));
}

static void watch_split_last(void)
{
	watch(60, at(100), at(101));
}

static void watch_split_early(void)
{
	watch(SLOTS - 1, at(30), at(32));
}

/* The second takes the chunk of the root that the first replaced. */
static void watch_split_twice(void)
{
	watch(60, at(100), at(101));
	watch(61, at(10), at(12));
}

static void feed_end(void)
{
	feed_page(UMN_FANOUT - 1);
}

static void unwatch_one(void)
{
	unwatch(30);
}

/* ... until the second no longer does. */
static void unwatch_reaching(void)
{
	unwatch(60);
}

/* The first leaf comes to reach over the second. */
static void watch_reaching(void)
{
	watch(60, at(6), at(2 * UMN_FANOUT));
	feed_page(2 * UMN_FANOUT - 1);
}

static void feed_third_leaf(void)
{
	feed_page(2 * UMN_FANOUT);
}

static void feed_around_30(void)
{
	feed(at(29), at(33));
}

static void unwatch_merge(void)
{
	unwatch(0);
	unwatch(1);
}

static void unwatch_all(void)
{
	for (int i = 0; i < watched_count; i++)
		if (watched[i].state == WATCHED)
			unwatch(i);
}

static void unwatch_all_watch(void)
{
	unwatch(0);
	unwatch(1);
	unwatch(2);
	watch(10, at(2), at(4));
}

static void feed_third_changed(void)
{
	feed_page(2);
	changed();
}

static const struct scenario {
	const char *name;
	void (*setup)(void);
	void (*threads[THREADS])(void);
	int preemptions;
} scenarios[] = {
	{"hint", setup_one_large, {feed_first, feed_second, drain_twice}, 3},
	{"hint, drained by feeders", setup_one_large, {feed_and_drain, feed_second_and_drain}, 3},
	{"hint, twice", setup_one_large, {feed_twice, feed_third, drain_twice}, 2},
	{"two regions", setup_two_large, {feed_first, feed_second_and_drain, drain_all}, 2},
	{"renew", setup_one_large, {feed_twice, feed_third, drain_renew}, 2},
	{"changed", setup_3, {feed_all, feed_third_changed, drain_one}, 2},
	{"wake-up", setup_3, {feed_all, feed_third, arm_and_drain}, 2},
	{"drainers", setup_3, {feed_all, drain_one, drain_twice}, 2},
	{"unwatch", setup_3, {feed_all, feed_first, unwatch_first}, 3},
	{"unwatch and watch", setup_3, {feed_all, feed_first, unwatch_watch}, 2},
	{"unwatch, watch and drain", setup_3, {feed_all, unwatch_watch_drain}, 3},
	{"entry reused", setup_3, {feed_all, feed_first, reuse_entry}, 2},
	{"watch", setup_3, {feed_all, feed_third, watch_drain}, 2},
	{"split", setup_full_leaf, {watch_split, feed_first}, 2},
	{"split, last", setup_full_leaf, {watch_split_last, feed_all}, 1},
	{"split, twice", setup_full_leaf, {feed_end, watch_split_twice}, 2},
	{"split above", setup_levels, {watch_split, feed_first}, 2},
	{"split, 3 levels", setup_3_levels, {watch_split_early, feed_around_30}, 1},
	{"unwatch, 3 levels", setup_3_levels, {unwatch_one, feed_around_30}, 2},
	{"ends in order no more", setup_reaching, {unwatch_reaching, feed_third_leaf}, 2},
	{"reaching over a leaf", setup_room, {watch_reaching, feed_around_30}, 2},
	{"merge", setup_merge, {feed_all, unwatch_merge}, 2},
	{"unwatch all", setup_3, {feed_all, unwatch_all, feed_third}, 2},
	{"unwatch all, levels", setup_merge, {unwatch_all, feed_all}, 1},
	{"unwatch all and watch", setup_3, {feed_all, feed_third, unwatch_all_watch}, 2},
	{"overflow, hint", setup_one_large, {feed_first, feed_second_giving_up, drain_all}, 3},
	{"overflow", setup_3, {feed_all_giving_up, feed_third, drain_all}, 2},
	{"overflow, unwatch", setup_3, {feed_all_giving_up, feed_all, unwatch_watch_drain}, 2},
	{"foreign", setup_foreign, {feed_giving_up_and_third, feed_third, drain_twice}, 2},
	{"foreign, two give up", setup_foreign, {feed_giving_up_and_third, feed_giving_up_and_third, drain_twice}, 2},
	{"foreign, renew", setup_foreign, {feed_giving_up_and_third, drain_renew_third}, 3},
	{"foreign, renew one", setup_foreign, {feed_giving_up_and_third, drain_one_renew_third}, 3},
	{"foreign, watch", setup_foreign, {feed_giving_up_and_third, watch_third, drain_all}, 2},
	{"foreign, wake-up", setup_foreign, {feed_giving_up_and_third, feed_third, arm_and_drain}, 2},
	{"chain lost", setup_3, {feed_all_losing, feed_third, drain_twice}, 2},
	{"chain lost, unwatch", setup_3, {feed_all_losing, feed_all, unwatch_watch_drain}, 2},
};

static void run(const struct scenario *scenario, const struct choice *with, unsigned count)
{
	const char *wrong;

	choices = with;
	choice_count = count;
	choice_next = 0;
	point_count = 0;
	watched_count = 0;
	locked = feeds_under_way = given_up = armed = wakes = foreign = 0;
	table = umn_table_new(SLOTS);
	add_segment();
	scenario->setup();

	for (thread_count = 0; thread_count < THREADS && scenario->threads[thread_count]; thread_count++) {
		thread_functions[thread_count] = scenario->threads[thread_count];
		done[thread_count] = 0;
	}
	current = 0;
	swapcontext(&main_context, &contexts[0]);
	/* switch_to(-1) has set `current` */

	if (armed ? !wakes && umn_table_changed(table) : wakes)
		fail("%d wake-ups", wakes);
	while (drain(SLOTS))
		;
	if (umn_table_changed(table))
		fail("umn_table_changed is true, yet everything was reported");
	for (int i = 0; i < watched_count; i++)
		for (int c = 0; c < watched[i].claim_count; c++)
			if (watched[i].state == WATCHED && !watched[i].claims[c].reported)
				fail("change %d of region %d was never reported", c, i);
	wrong = umn_table_check(table);
	if (wrong)
		fail("umn_table_check: %s", wrong);
	unwatch_all();
	wrong = umn_table_check(table);
	if (wrong)
		fail("umn_table_check: %s", wrong);
	umn_table_delete(table);
	run_count++;
}

/* All runs that begin with these choices. */
static void explore(const struct scenario *scenario, struct choice *prefix, unsigned count, int preemptions)
{
	unsigned from = count ? prefix[count - 1].point + 1 : 0, points, i;
	struct {
		signed char thread, others;
	} *seen;

	run(scenario, prefix, count);
	points = point_count;
	if (!preemptions || points <= from)
		return;
	seen = malloc((points - from) * sizeof *seen);
	memcpy(seen, trace + from, (points - from) * sizeof *seen);
	for (i = 0; i < points - from; i++)
		for (int thread = 0; thread < THREADS; thread++)
			if (seen[i].others & 1 << thread) {
				prefix[count] = (struct choice){from + i, thread};
				explore(scenario, prefix, count + 1, preemptions - 1);
			}
	free(seen);
}

int main(int argc, char **argv)
{
	struct choice prefix[32];
	static int more; /* not on the stack: the threads come back to it */
	int chosen;

	argv++, argc--;
	if (argc >= 2 && !strcmp(argv[0], "-p")) {
		more = atoi(argv[1]);
		argv += 2, argc -= 2;
	}
	for (int i = 0; i < THREADS; i++) {
		getcontext(&contexts[i]);
		contexts[i].uc_stack.ss_sp = stacks[i];
		contexts[i].uc_stack.ss_size = STACK;
		makecontext(&contexts[i], (void (*)(void))thread_main, 1, i);
	}
	for (size_t i = 0; i < sizeof scenarios / sizeof *scenarios; i++) {
		struct timespec begin, end;

		chosen = !argc;
		for (int j = 0; j < argc; j++)
			chosen |= !strcmp(argv[j], scenarios[i].name);
		if (!chosen)
			continue;
		scenario_name = scenarios[i].name;
		clock_gettime(CLOCK_MONOTONIC, &begin);
		memset(written, 0, sizeof written);
		for (int preemptions = 0; preemptions <= scenarios[i].preemptions + more;) {
			run_count = 0;
			newly_written = 0;
			explore(&scenarios[i], prefix, 0, preemptions);
			preemptions += !newly_written;
		}
		for (size_t j = PAGES_USED * UMN_PAGE; j < sizeof pages; j++)
			if (pages[j])
				fail("more than PAGES_USED pages were used");
		clock_gettime(CLOCK_MONOTONIC, &end);
		printf("%-30s %9lu runs, %.1f s\n", scenario_name, run_count,
		       end.tv_sec - begin.tv_sec + (end.tv_nsec - begin.tv_nsec) / 1e9);
		fflush(stdout);
	}
	return 0;
}
