/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The source `uffd` without Python: the race between munmap and another thread's mmap, random changes by several threads against an
 * oracle, and memory that is freed under all kinds of locks.
 *
 *	uffd_test race COUNT	until the other thread was given the address so often while munmap had not returned
 *	uffd_test changes SECONDS [THREADS]
 *	uffd_test heap SECONDS [THREADS]
 *
 * Built with and without ThreadSanitizer (tests/test_uffd.py).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "table.h"
#include "uffd.h"

#define PAGE 4096ul
#define load(p) __atomic_load_n(p, __ATOMIC_ACQUIRE)
#define store(p, v) __atomic_store_n(p, v, __ATOMIC_RELEASE)
#define check(condition)                                                              \
	do {                                                                          \
		if (!(condition))                                                     \
			fail("%s:%d: not true: %s", __FILE__, __LINE__, #condition);  \
	} while (0)

__attribute__((noreturn, format(printf, 1, 2))) static void fail(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	fflush(stdout);
	vfprintf(stderr, format, args);
	fputc('\n', stderr);
	abort();
}

static struct umn_uffd *uffd;
static struct umn_table *table;
static pthread_mutex_t growing = PTHREAD_MUTEX_INITIALIZER;
static double deadline;

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static uint64_t random64(uint64_t *state)
{
	*state ^= *state >> 12;
	*state ^= *state << 25;
	*state ^= *state >> 27;
	return *state * 2685821657736338717u >> 11;
}

static void grow(void)
{
	uint32_t pages;
	void *memory;

	pthread_mutex_lock(&growing);
	pages = umn_table_next_pages(table);
	memory = umn_uffd_add_segment(uffd, pages);
	check(memory && !umn_table_add_segment(table, memory, pages));
	pthread_mutex_unlock(&growing);
}

static void set_up(void)
{
	struct umn_uffd_failure failure;

	uffd = umn_uffd_new(&failure);
	if (!uffd) {
		printf("userfaultfd does not work here: step %d, %s\n", failure.step, strerror(failure.error));
		exit(77);
	}
	table = umn_table_new(UINT64_MAX);
	umn_table_set_source(table, umn_uffd_source(uffd));
	grow();
}

static void tear_down(void)
{
	const char *wrong = umn_table_check(table);

	if (wrong)
		fail("%s", wrong);
	umn_table_close(table);
	umn_table_delete(table);
	umn_uffd_delete(uffd);
}

static int watch(void *start, size_t length, struct umn_region **region)
{
	uint64_t address = (uint64_t)start;
	int error;

	while ((error = umn_table_watch(table, address, address + length, 0, NULL, region)) == -ENOSPC)
		grow();
	return error;
}

static void *map(void *address, size_t length, int flags)
{
	return mmap(address, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE | flags, -1, 0);
}

/* ---- Another thread is given the address of an unfinished munmap ---- */

static struct {
	void *address;
	struct umn_region *region;
	uint64_t length;
	uint32_t round; /* the unmapper's */
	uint32_t taken; /* the round that the other thread is done with */
	uint32_t unmapped; /* the round whose munmap has returned */
	uint64_t inside, untouched, unchanged;
	bool stop;
} race;

static void *take_over(void *unused)
{
	struct umn_region *region;
	uint64_t generation;
	bool inside, untouched;
	void *address;

	for (uint32_t round = 1;; round++) {
		while (load(&race.round) != round)
			if (load(&race.stop))
				return unused;
		region = load(&race.region);
		address = MAP_FAILED;
		generation = umn_generation(umn_table_header(table));
		while (address == MAP_FAILED && load(&race.unmapped) != round)
			address = map(race.address, race.length, MAP_FIXED_NOREPLACE);
		if (address == MAP_FAILED) { /* too late */
			store(&race.taken, round);
			continue;
		}
		inside = load(&race.unmapped) != round;
		untouched = umn_region_untouched(region);
		race.inside += inside;
		race.untouched += untouched;
		/* Both orders, since either wait would let the other be right. */
		if (round & 1) {
			if (umn_region_valid(region))
				fail("a region is valid whose memory is another's");
			check(umn_table_changed(table));
		} else {
			race.unchanged += umn_generation(umn_table_header(table)) == generation;
			check(umn_table_changed(table));
			check(!umn_region_valid(region));
		}
		check(!umn_region_valid(region));
		munmap(address, race.length);
		store(&race.taken, round);
	}
}

static void run_race(uint64_t count)
{
	struct umn_event event;
	pthread_t other;
	uint32_t round;

	pthread_create(&other, NULL, take_over, NULL);
	for (round = 1; load(&race.untouched) < count; round++) {
		race.length = (1 + round % 16) * PAGE;
		race.address = map(NULL, race.length, 0);
		check(race.address != MAP_FAILED && !watch(race.address, race.length, &race.region));
		check(!umn_table_changed(table) && umn_region_valid(race.region));
		store(&race.round, round);
		munmap(race.address, race.length);
		check(!umn_region_valid(race.region) && umn_table_changed(table));
		store(&race.unmapped, round);
		while (load(&race.taken) != round)
			sched_yield();
		/* The other thread may have waited in vain, and called the region invalid itself. */
		check(umn_uffd_source(uffd)->settle(umn_uffd_source(uffd), 100000));
		check(umn_table_drain(table, &event, 1) == 1 && event.region == race.region);
		umn_table_unwatch(table, race.region);
	}
	store(&race.stop, true);
	pthread_join(other, NULL);
	printf("%u times unmapped; %lu times given away before munmap returned; of these the slot was still untouched %lu times, "
	       "and in half of them the generation unchanged %lu times\n",
	       round - 1, race.inside, race.untouched, race.unchanged);
}

/* ---- Random changes against an oracle ---- */

/* Each group of pages, in each half of the arena, is changed by one thread; anybody watches them. */
#define GROUP_PAGES 8
#define GROUPS_MAX 64
#define REGIONS 24 /* per thread */

static uint8_t *arena;
static uint32_t half; /* of the arena, in pages */
/* The number of the last change of each page that has begun, and of the last one that has succeeded. */
static uint64_t begun[2 * GROUPS_MAX * GROUP_PAGES], done[2 * GROUPS_MAX * GROUP_PAGES];
static uint64_t totals[8]; /* see the printf */
enum { CHANGES, CHECKS, VALID, INVALID, FALSE_ALARMS, REFUSED, RENEWED, EVENTS };

static void count(int what, uint64_t n)
{
	__atomic_fetch_add(&totals[what], n, __ATOMIC_RELAXED);
}

static void begin(uint32_t first, uint32_t last)
{
	for (uint32_t i = first; i < last; i++)
		store(&begun[i], begun[i] + 1);
}

static void end(uint32_t first, uint32_t last)
{
	for (uint32_t i = first; i < last; i++)
		store(&done[i], begun[i]);
}

/* One change of pages [first, last) of its own group, perhaps together with those in the other half. */
static void change(uint64_t *state, uint32_t first, uint32_t last)
{
	uint32_t other = (first + half) % (2 * half);
	uint8_t *start = arena + first * PAGE, *moved;
	size_t length = (last - first) * PAGE;
	int failed = 0;

	begin(first, last);
	switch (random64(state) % 7) {
	case 0:
	case 1:
		failed = munmap(start, length);
		break;
	case 2:
		failed = madvise(start, length, MADV_DONTNEED);
		break;
	case 3:
		failed = madvise(start, length, MADV_FREE);
		break;
	case 4:
		failed = map(start, length, MAP_FIXED) == MAP_FAILED;
		break;
	case 5:
		begin(other, other + last - first);
		/* Where there is a hole, newer kernels (6.17) leave alone what is at the destination; this looks for holes. */
		failed = msync(start, length, MS_ASYNC) ||
			 mremap(start, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, arena + other * PAGE) == MAP_FAILED;
		if (!failed)
			end(other, other + last - first);
		break;
	case 6:
		moved = mremap(start, length, length, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
		failed = moved == MAP_FAILED;
		if (!failed)
			munmap(moved, length);
		break;
	}
	if (!failed)
		end(first, last);
	count(CHANGES, !failed);
	/* Mostly other memory goes there at once, and some is left unmapped for a while. */
	if (random64(state) % 4)
		for (uint32_t i = first; i < last; i++)
			map(arena + i * PAGE, PAGE, MAP_FIXED_NOREPLACE);
}

struct watched {
	struct umn_region *region;
	uint32_t first, last;
	uint64_t since[3 * GROUP_PAGES]; /* the number of the last change that had begun when it was watched */
};

static void forget_older(struct watched *w)
{
	for (uint32_t i = w->first; i < w->last; i++)
		w->since[i - w->first] = load(&begun[i]);
}

static void check_region(uint64_t *state, struct watched *w)
{
	uint64_t before[3 * GROUP_PAGES];
	bool hit = false, valid, valid_again;

	for (uint32_t i = w->first; i < w->last; i++)
		hit |= (before[i - w->first] = load(&done[i])) > w->since[i - w->first];
	if (random64(state) % 4 == 0 && hit && !umn_table_changed(table) && umn_region_valid(w->region))
		fail("missed, and nothing has changed");
	valid = umn_region_valid(w->region);
	count(CHECKS, 1);
	count(valid ? VALID : INVALID, 1);
	if (valid && hit)
		fail("missed: a region is valid whose memory was changed");
	valid_again = umn_region_valid(w->region);
	if (!valid && valid_again)
		fail("a region is valid again by itself");
	if (valid)
		return;
	/* Was there a reason? A change may have begun and not have ended, or failed. */
	for (uint32_t i = w->first; i < w->last; i++)
		hit |= load(&begun[i]) > w->since[i - w->first];
	count(FALSE_ALARMS, !hit);
	if (random64(state) % 2) {
		if (!umn_table_renew(table, w->region)) {
			forget_older(w);
			count(RENEWED, 1);
			return;
		}
		check(!umn_region_valid(w->region));
	}
	umn_table_unwatch(table, w->region);
	w->region = NULL;
}

static void watch_some(uint64_t *state, struct watched *w)
{
	uint32_t length = 1 + random64(state) % (3 * GROUP_PAGES - 1);
	uint64_t from = random64(state) % PAGE, less = random64(state) % (PAGE - 1);
	int error;

	w->first = random64(state) % (2 * half - length);
	w->last = w->first + length;
	if (length == 1)
		from = less = 0;
	error = watch(arena + w->first * PAGE + from, length * PAGE - from - less, &w->region);
	if (error) {
		if (error != UMN_UFFD_UNMAPPED)
			fail("watch: %s", strerror(error));
		w->region = NULL;
		count(REFUSED, 1);
		return;
	}
	forget_older(w);
}

static void *change_and_watch(void *number)
{
	uint64_t state = 88172645463325252u + (uintptr_t)number;
	uint32_t group, first, last;
	struct watched watched[REGIONS] = {0}, *w;
	struct umn_event events[16];

	while (now() < deadline) {
		for (int i = 0; i < 20; i++) {
			w = &watched[random64(&state) % REGIONS];
			if (w->region)
				check_region(&state, w);
			else
				watch_some(&state, w);
		}
		group = (uint32_t)(uintptr_t)number * GROUP_PAGES + random64(&state) % 2 * half;
		first = random64(&state) % GROUP_PAGES;
		last = first + 1 + random64(&state) % (GROUP_PAGES - first);
		change(&state, group + first, group + last);
		if (random64(&state) % 8 == 0)
			count(EVENTS, umn_table_drain(table, events, 16));
	}
	for (int i = 0; i < REGIONS; i++)
		if (watched[i].region)
			umn_table_unwatch(table, watched[i].region);
	return NULL;
}

static void run_threads(void *(*run)(void *), uint32_t threads)
{
	pthread_t *all = calloc(threads, sizeof *all);

	for (uint32_t i = 0; i < threads; i++)
		pthread_create(&all[i], NULL, run, (void *)(uintptr_t)i);
	for (uint32_t i = 0; i < threads; i++)
		pthread_join(all[i], NULL);
	free(all);
}

static void run_changes(uint32_t threads)
{
	struct umn_event events[16];

	check(threads <= GROUPS_MAX);
	half = (threads < 2 ? 2 : threads) * GROUP_PAGES;
	arena = map(NULL, 2 * half * PAGE, 0);
	run_threads(change_and_watch, threads);
	while (umn_table_drain(table, events, 16))
		;
	check(!umn_table_changed(table));
	printf("%lu changes, %lu checks: %lu valid, %lu invalid, of these %lu without a reason; %lu refused, %lu renewed, %lu events\n",
	       totals[CHANGES], totals[CHECKS], totals[VALID], totals[INVALID], totals[FALSE_ALARMS], totals[REFUSED], totals[RENEWED],
	       totals[EVENTS]);
}

/* ---- Freeing watched memory of the heap, whatever locks are held ---- */

static void *allocate_and_free(void *number)
{
	uint64_t state = 88172645463325252u + (uintptr_t)number;
	struct umn_region *regions[8] = {0};
	struct umn_event events[16];
	void *memory[8] = {0};
	size_t length;

	while (now() < deadline) {
		int i = random64(&state) % 8;

		if (!memory[i]) {
			length = 1 + random64(&state) % (random64(&state) % 4 ? 3000 : 600000);
			memory[i] = malloc(length);
			memset(memory[i], 1, length);
			check(!watch(memory[i], length, &regions[i]));
			umn_region_valid(regions[i]);
			count(CHANGES, 1);
			continue;
		}
		if (random64(&state) % 4 == 0)
			memory[i] = realloc(memory[i], 1 + random64(&state) % 600000);
		free(memory[i]);
		memory[i] = NULL;
		count(umn_region_valid(regions[i]) ? VALID : INVALID, 1);
		count(EVENTS, umn_table_drain(table, events, 16));
		umn_table_unwatch(table, regions[i]);
	}
	for (int i = 0; i < 8; i++)
		if (memory[i]) {
			free(memory[i]);
			umn_table_unwatch(table, regions[i]);
		}
	return NULL;
}

static void run_heap(uint32_t threads)
{
	run_threads(allocate_and_free, threads);
	printf("%lu blocks of the heap watched; after free %lu valid, %lu invalid; %lu events\n", totals[CHANGES], totals[VALID],
	       totals[INVALID], totals[EVENTS]);
}

int main(int argc, char **argv)
{
	uint32_t threads = argc > 3 ? (uint32_t)atoi(argv[3]) : 4;

	if (argc < 3)
		return 2;
	set_up();
	deadline = now() + atof(argv[2]);
	if (!strcmp(argv[1], "race"))
		run_race(strtoull(argv[2], NULL, 10));
	else if (!strcmp(argv[1], "changes"))
		run_changes(threads);
	else if (!strcmp(argv[1], "heap"))
		run_heap(threads);
	else
		return 2;
	tear_down();
	return 0;
}
