/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The source `uffd` without Python: the race between munmap and another thread's mmap, random changes by several threads against an
 * oracle, and memory that is freed under all kinds of locks.
 *
 *	uffd_test race COUNT	until the other thread was given the address so often while munmap had not returned
 *	uffd_test fill COUNT	until memory could be watched so often though another thread makes holes in it and fills them
 *	uffd_test changes SECONDS [THREADS]
 *	uffd_test heap SECONDS [THREADS]
 *
 * Built with and without ThreadSanitizer (Makefile).
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

#include "changes.h"
#include "sources/uffd.h"
#include "table_check.h"

#define PAGE ((unsigned long)sysconf(_SC_PAGESIZE))
#define load(p) __atomic_load_n(p, __ATOMIC_ACQUIRE)
#define store(p, v) __atomic_store_n(p, v, __ATOMIC_RELEASE)
#define check(condition)                                                                                                           \
	do {                                                                                                                       \
		if (!(condition))                                                                                                  \
			fail("%s:%d: not true: %s", __FILE__, __LINE__, #condition);                                               \
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
	uint32_t round;	   /* the unmapper's */
	uint32_t taken;	   /* the round that the other thread is done with */
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
		check(umn_uffd_source(uffd)->wait_delivered(umn_uffd_source(uffd), 100000));
		check(umn_table_drain(table, &event, 1) == 1 && event.region == race.region);
		umn_table_unwatch(table, race.region);
	}
	store(&race.stop, true);
	pthread_join(other, NULL);
	printf("%u times unmapped; %lu times given away before munmap returned; of these the slot was still untouched %lu times, "
	       "and in half of them the generation unchanged %lu times\n",
	       round - 1, race.inside, race.untouched, race.unchanged);
}

/* ---- Another thread makes a hole and fills it while the memory around it is being watched ---- */

static struct {
	uint8_t *hole;
	uint32_t stop, stopped; /* rounds */
	bool end;
} flip;

static void *make_holes(void *unused)
{
	uint32_t round;

	while (!load(&flip.end)) {
		munmap(flip.hole, PAGE);
		check(map(flip.hole, PAGE, MAP_FIXED_NOREPLACE) == flip.hole);
		round = load(&flip.stop);
		store(&flip.stopped, round);
		while (round && load(&flip.stop) == round && !load(&flip.end))
			sched_yield();
	}
	return unused;
}

static void run_fill(uint64_t count)
{
	uint64_t refused = 0, watched = 0, invalid = 0;
	uint8_t *arena = map(NULL, 5 * PAGE, 0);
	struct umn_region *region;
	struct umn_event events[4];
	pthread_t other;
	uint32_t round = 0;

	check(arena != MAP_FAILED);
	flip.hole = arena + 2 * PAGE;
	pthread_create(&other, NULL, make_holes, NULL);
	while (watched < count) {
		store(&flip.stop, 0);
		if (watch(arena, 5 * PAGE, &region)) {
			refused++;
			continue;
		}
		watched++;
		store(&flip.stop, ++round);
		while (load(&flip.stopped) != round)
			sched_yield();
		/* What is there now is there to stay. If it is not what is watched, it must be invalid already. */
		invalid += !umn_region_valid(region);
		madvise(flip.hole, PAGE, MADV_DONTNEED);
		if (umn_region_valid(region))
			fail("a region is valid of which a page was filled in unseen, and changed");
		umn_table_drain(table, events, 4);
		umn_table_unwatch(table, region);
	}
	store(&flip.end, true);
	pthread_join(other, NULL);
	munmap(arena, 5 * PAGE);
	printf("%lu times watched, %lu of them changed before the other thread had stopped; %lu times refused\n", watched, invalid,
	       refused);
}

/* ---- Random changes against an oracle ---- */

static void run_changes(uint32_t threads, double seconds)
{
	const struct changes_options options = {
		.source = umn_uffd_source(uffd), .threads = threads, .changes = UINT64_MAX, .seconds = seconds};
	struct changes_totals totals;
	const char *wrong = changes_run(table, &options, &totals);

	if (wrong)
		fail("%s", wrong);
	printf("%lu changes, %lu checks: %lu valid, %lu had to be invalid, %lu were without a reason; %lu addresses taken over\n",
	       totals.changes, totals.checks, totals.valid, totals.hit, totals.false_alarms, totals.taken);
}

/* ---- Freeing watched memory of the heap, whatever locks are held ---- */

static uint64_t totals[4]; /* see the printf */
enum { BLOCKS, VALID, INVALID, EVENTS };

static void count(int what, uint64_t n)
{
	__atomic_fetch_add(&totals[what], n, __ATOMIC_RELAXED);
}

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
			count(BLOCKS, 1);
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

static void run_threads(void *(*run)(void *), uint32_t threads)
{
	pthread_t *all = calloc(threads, sizeof *all);

	for (uint32_t i = 0; i < threads; i++)
		pthread_create(&all[i], NULL, run, (void *)(uintptr_t)i);
	for (uint32_t i = 0; i < threads; i++)
		pthread_join(all[i], NULL);
	free(all);
}

static void run_heap(uint32_t threads)
{
	run_threads(allocate_and_free, threads);
	printf("%lu blocks of the heap watched; after free %lu valid, %lu invalid; %lu events\n", totals[BLOCKS], totals[VALID],
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
	else if (!strcmp(argv[1], "fill"))
		run_fill(strtoull(argv[2], NULL, 10));
	else if (!strcmp(argv[1], "changes"))
		run_changes(threads, atof(argv[2]));
	else if (!strcmp(argv[1], "heap"))
		run_heap(threads);
	else
		return 2;
	tear_down();
	return 0;
}
