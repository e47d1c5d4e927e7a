/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The registration cache, used by several threads at the same time, and a few things about it that threads hide.
 *
 *	cache_test [SECONDS [SEED]]
 *
 * Memory here is numbers: each page has one, which changes when it is "mapped anew". To register is to copy the numbers of the
 * pages, so whoever gets a registration can tell whether it is of the memory that is there now. Numbers and registrations are
 * ordinary memory, so that ThreadSanitizer sees if the cache's atomic operations do not order what they should.
 */
#include <pthread.h>
#include <sched.h>
#include <stdint.h>

/* At some accesses to shared memory another thread gets the processor. */
static void chaos(void);
#define __atomic_load_n(p, order) (chaos(), __atomic_load_n(p, order))
#define __atomic_store_n(p, v, order) (chaos(), __atomic_store_n(p, v, order))
#define __atomic_fetch_add(p, v, order) (chaos(), __atomic_fetch_add(p, v, order))
#define __atomic_fetch_sub(p, v, order) (chaos(), __atomic_fetch_sub(p, v, order))
#define __atomic_fetch_xor(p, v, order) (chaos(), __atomic_fetch_xor(p, v, order))
#include "cache/cache.c"
#include "common.h"

#define PAGE 4096u
#define BASE UINT64_C(0x10000000)
#define BUFFERS 24u
#define BUFFER_PAGES 8u
#define THREADS 5
#define REGISTRATIONS_MAX 40u

static _Thread_local uint32_t chaotic; /* one in so many accesses; 0: never */

static void chaos(void)
{
	if (chaotic && one_in(chaotic))
		sched_yield();
}

/* ---- Memory that is numbers, and registrations that are copies ---- */

struct buffer {
	int held; /* by so many users, who rely on its numbers; -1: by one who changes them */
	uint64_t numbers[BUFFER_PAGES];
};

struct handle {
	bool live;
	uint64_t start;
	uint64_t numbers[BUFFER_PAGES];
	int users; /* atomic */
};

static struct world world;
static struct umn_cache *cache;
static struct buffer buffers[BUFFERS];
static uint64_t last_number;
static uint64_t registered, deregistered, hit_count, retry_count, remap_count;
static int stop;
/* The one who reads events must know which entries still exist. */
static pthread_mutex_t drain_lock = PTHREAD_MUTEX_INITIALIZER;
/* Growing the table, and keeping to the limit. */
static pthread_mutex_t miss_lock = PTHREAD_MUTEX_INITIALIZER;

static uint64_t start_of(uint32_t buffer)
{
	/* Gaps of all lengths, so that blocks of the index hold the ends of several buffers. */
	return BASE + (buffer * (BUFFER_PAGES + 4) + buffer % 5) * (uint64_t)PAGE;
}

static void map_anew(uint32_t b, uint32_t from, uint32_t to)
{
	struct buffer *buffer = &buffers[b];

	/* The kernel tells of a change before it is done. */
	umn_feed(&world.memory, start_of(b) + from * PAGE, start_of(b) + to * PAGE, 0, 0);
	for (; from < to; from++)
		buffer->numbers[from] = __sync_add_and_fetch(&last_number, 1);
}

static bool hold(struct buffer *buffer, bool exclusively)
{
	int held = __atomic_load_n(&buffer->held, __ATOMIC_RELAXED);

	if (exclusively)
		return held == 0 && __sync_bool_compare_and_swap(&buffer->held, 0, -1);
	return held >= 0 && __sync_bool_compare_and_swap(&buffer->held, held, held + 1);
}

static void let_go(struct buffer *buffer, bool exclusively)
{
	__sync_fetch_and_add(&buffer->held, exclusively ? 1 : -1);
}

/* ---- What cache.py does ---- */

static void deregister_leaving(void)
{
	struct umn_entry *entry;
	struct handle *handle;

	while ((entry = umn_cache_take(cache))) {
		if (one_in(20)) {
			umn_cache_keep(cache, entry); /* it failed */
			continue;
		}
		handle = entry->handle;
		check(handle->live && !handle->users);
		handle->live = false;
		pthread_mutex_lock(&drain_lock);
		umn_table_unwatch(world.table, entry->watch);
		umn_cache_free(cache, entry);
		pthread_mutex_unlock(&drain_lock);
		free(handle);
		__sync_fetch_and_add(&deregistered, 1);
	}
}

static void drop_stale(void)
{
	struct umn_event events[8];
	size_t n;

	pthread_mutex_lock(&drain_lock);
	do {
		n = umn_table_drain(world.table, events, LENGTH(events));
		for (size_t i = 0; i < n; i++)
			if (events[i].region->user && !umn_region_valid(events[i].region))
				umn_cache_retire(cache, events[i].region->user);
	} while (n == LENGTH(events));
	pthread_mutex_unlock(&drain_lock);
}

/* Of a page of the buffer, when it was registered. */
static uint64_t *number_in(struct handle *handle, uint32_t b, uint32_t page)
{
	return &handle->numbers[(start_of(b) + page * PAGE - handle->start) / PAGE];
}

/* Registers pages of a buffer that the caller holds; NULL: they changed meanwhile. */
static struct umn_entry *register_pages(uint32_t b, uint32_t from, uint32_t to)
{
	uint64_t start = start_of(b) + from * PAGE, end = start_of(b) + to * PAGE;
	struct handle *handle = calloc(1, sizeof *handle);
	struct umn_entry *entry;
	struct umn_region *region;

	pthread_mutex_lock(&miss_lock);
	if (one_in(4))
		umn_cache_merge(cache, &start, &end, UINT64_MAX, false);
	entry = umn_cache_reserve(cache, start, end);
	check(entry);
	pthread_mutex_lock(&drain_lock);
	region = watch(&world, start, end, 0, entry);
	pthread_mutex_unlock(&drain_lock);
	pthread_mutex_unlock(&miss_lock);

	handle->live = true;
	handle->start = start;
	from = (start - start_of(b)) / PAGE;
	to = (end - start_of(b)) / PAGE;
	memcpy(handle->numbers, &buffers[b].numbers[from], (to - from) * sizeof *handle->numbers);
	__sync_fetch_and_add(&registered, 1);
	if (one_in(10))
		umn_feed(&world.memory, start, end, 0, 0); /* a change that changes nothing */
	umn_cache_publish(cache, entry, region, handle, region, true);
	if (umn_region_valid(region))
		return entry;
	__sync_fetch_and_add(&retry_count, 1);
	umn_cache_release(cache, entry);
	return NULL;
}

static struct umn_entry *acquire(uint32_t b, uint32_t from, uint32_t to)
{
	uint64_t start = start_of(b) + from * PAGE + below(100), end = start_of(b) + to * PAGE - below(100);
	struct umn_entry *entry = umn_cache_acquire(cache, start, end);
	struct umn_cache_load load;

	if (entry) {
		__sync_fetch_and_add(&hit_count, 1);
		return entry;
	}
	while (!entry) {
		drop_stale();
		entry = umn_cache_find(cache, start, end);
		if (entry)
			break;
		umn_cache_load(cache, &load);
		if (load.registrations >= REGISTRATIONS_MAX && !umn_cache_evict(cache, 1 + below(3)))
			umn_cache_retry(cache);
		deregister_leaving();
		entry = register_pages(b, from, to);
	}
	return entry;
}

/* ---- Threads ---- */

static void use(uint32_t b)
{
	uint32_t from = below(BUFFER_PAGES), to = from + 1 + below(BUFFER_PAGES - from);
	struct buffer *buffer = &buffers[b];
	struct umn_entry *entry;
	struct handle *handle;
	bool last;

	if (!hold(buffer, false))
		return;
	entry = acquire(b, from, to);
	handle = entry->handle;
	__sync_fetch_and_add(&handle->users, 1);
	check(handle->live);
	check(entry->start <= start_of(b) + from * PAGE && entry->end >= start_of(b) + to * PAGE);
	for (uint32_t page = from; page < to; page++)
		check(*number_in(handle, b, page) == buffer->numbers[page]);
	last = one_in(2);
	if (last)
		let_go(buffer, false); /* from here on it may be mapped anew */
	if (one_in(8))
		sched_yield();
	check(handle->live);
	__sync_fetch_and_sub(&handle->users, 1);
	if (umn_cache_release(cache, entry) && one_in(2))
		deregister_leaving();
	if (!last)
		let_go(buffer, false);
}

static void *run(void *seed)
{
	uint32_t b, from, to;

	random_state += (uintptr_t)seed * 0x9e3779b97f4a7c15;
	chaotic = 20;
	while (!__atomic_load_n(&stop, __ATOMIC_RELAXED)) {
		b = below(BUFFERS);
		if (one_in(10) && hold(&buffers[b], true)) {
			from = below(BUFFER_PAGES);
			to = from + 1 + below(BUFFER_PAGES - from);
			map_anew(b, from, to);
			let_go(&buffers[b], true);
			__sync_fetch_and_add(&remap_count, 1);
		}
		use(b);
		if (one_in(500))
			umn_cache_retire_range(cache, start_of(b), start_of(b) + PAGE);
		if (one_in(500))
			umn_cache_evict(cache, 3);
		if (one_in(500))
			umn_cache_retry(cache);
		if (one_in(100))
			deregister_leaving();
	}
	return NULL;
}

static void test_threads(double seconds, uint64_t seed)
{
	struct umn_cache_stats stats;
	struct umn_cache_load load;
	pthread_t threads[THREADS];
	const char *wrong;
	double end = now() + seconds;

	make_world(&world, UINT64_MAX);
	cache = umn_cache_new();
	for (uint32_t b = 0; b < BUFFERS; b++)
		map_anew(b, 0, BUFFER_PAGES);
	for (uintptr_t i = 0; i < THREADS; i++)
		check(!pthread_create(&threads[i], NULL, run, (void *)(seed * THREADS + i)));
	while (now() < end) {
		sched_yield();
		wrong = umn_cache_check(cache);
		/* An entry that leaves is between two places for a moment. */
		if (wrong && strcmp(wrong, "an entry is still to be made to leave"))
			fail("umn_cache_check: %s", wrong);
	}
	__atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
	for (uint32_t i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	check(!umn_cache_check(cache));
	umn_cache_stats(cache, &stats);
	check(stats.hits >= hit_count && !stats.in_use);
	umn_cache_evict(cache, SIZE_MAX);
	do {
		umn_cache_retry(cache);
		deregister_leaving();
		umn_cache_load(cache, &load);
	} while (load.registrations);
	check(registered == deregistered && !load.bytes && !load.leaving && !load.kept);
	printf("%llu hits, %llu registrations, %llu retries, %llu remapped, %llu stale\n", (unsigned long long)hit_count,
	       (unsigned long long)registered, (unsigned long long)retry_count, (unsigned long long)remap_count,
	       (unsigned long long)stats.stale);
	check(hit_count && retry_count && remap_count && stats.stale);
	umn_cache_delete(cache);
	delete_world(&world);
}

/* ---- Without threads ---- */

static struct umn_entry *add(uint64_t start, uint64_t end)
{
	struct umn_entry *entry = umn_cache_reserve(cache, start, end);

	check(entry);
	umn_cache_publish(cache, entry, watch(&world, start, end, 0, NULL), NULL, NULL, true);
	check(!umn_cache_release(cache, entry));
	return entry;
}

static void test_hits_are_carried_over(void)
{
	struct umn_entry *entry = add(BASE, BASE + 1);
	struct umn_cache_stats stats;
	const uint64_t many = UMN_MANY_HITS / UMN_HIT;

	entry->state += UMN_MANY_HITS - UMN_HIT; /* so many hits so far */
	for (int i = 0; i < 3; i++)
		check(!umn_cache_release(cache, umn_cache_acquire(cache, BASE, BASE + 1)));
	check(entry->state == UMN_OPEN + 2 * UMN_HIT);
	umn_cache_stats(cache, &stats);
	check(stats.hits == many + 2);
	umn_cache_retire(cache, entry);
	umn_cache_free(cache, umn_cache_take(cache));
	umn_cache_stats(cache, &stats);
	check(stats.hits == many + 2);
	check(!umn_cache_check(cache));
}

static void test_a_hit_on_what_has_become_another(void)
{
	struct umn_entry *entry = add(BASE, BASE + 1);

	/* Another thread has found the entry but not counted itself in yet, when it leaves and comes back. */
	umn_cache_retire(cache, entry);
	umn_cache_free(cache, umn_cache_take(cache));
	entry->state += UMN_USER + UMN_HIT; /* it counts itself in: closed, so it counts itself out again */
	check(add(BASE + 64, BASE + 65) == entry);
	check(!umn_cache_evict(cache, 1)); /* it counts as a user so far */
	umn_cache_retire(cache, entry);
	check(!umn_cache_take(cache));
	check(own(cache)->shared.left(cache, entry, __atomic_fetch_sub(&entry->state, UMN_USER + UMN_HIT, __ATOMIC_ACQ_REL)));
	check(umn_cache_take(cache) == entry);
	umn_cache_free(cache, entry);
	check(!umn_cache_check(cache));
}

/* The order of use is known to within one miss. */
static void miss(void)
{
	umn_cache_retire(cache, add(1, 2));
	umn_cache_free(cache, umn_cache_take(cache));
}

static void test_least_recently_used(void)
{
	enum { N = 200 };
	uint64_t last_used[N], oldest;
	struct umn_entry *entries[N], *gone;
	uint32_t i, victim;

	for (i = 0; i < N; i++) {
		entries[i] = add(BASE + i * PAGE, BASE + (i + 1) * PAGE);
		last_used[i] = i;
		miss();
	}
	for (uint64_t time = N; time < 100 * N;) {
		i = below(N);
		check(!umn_cache_release(cache, umn_cache_acquire(cache, entries[i]->start, entries[i]->end)));
		last_used[i] = time++;
		miss();
		if (!one_in(3))
			continue;
		check(umn_cache_evict(cache, 1) == 1);
		gone = umn_cache_take(cache);
		for (victim = 0, oldest = UINT64_MAX, i = 0; i < N; i++)
			if (last_used[i] < oldest) {
				oldest = last_used[i];
				victim = i;
			}
		check(entries[victim] == gone);
		umn_cache_free(cache, gone);
		entries[victim] = add(BASE + victim * PAGE, BASE + (victim + 1) * PAGE);
		last_used[victim] = time++;
		miss();
	}
	check(!umn_cache_check(cache));
	check(umn_cache_evict(cache, SIZE_MAX) == N);
	while ((gone = umn_cache_take(cache)))
		umn_cache_free(cache, gone);
}

static void test_a_child_has_nothing(void)
{
	struct umn_entry *entry = add(BASE, BASE + PAGE);
	struct umn_cache_load load;

	check(umn_cache_acquire(cache, BASE, BASE + 1) == entry);
	umn_cache_abandon(cache);
	check(!umn_cache_acquire(cache, BASE, BASE + 1) && !umn_cache_find(cache, BASE, BASE + 1));
	umn_feed(&world.memory, BASE, BASE + PAGE, 0, 0);
	check(!umn_cache_release(cache, entry) && !umn_cache_take(cache));
	umn_cache_load(cache, &load);
	check(!load.registrations && !load.bytes);
	check(add(BASE, BASE + PAGE) != entry);
	check(!umn_cache_check(cache));
}

int main(int argc, char **argv)
{
	double seconds = argc > 1 ? strtod(argv[1], NULL) : 2;
	uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 0) : 1;

	make_world(&world, UINT64_MAX);
	cache = umn_cache_new();
	test_hits_are_carried_over();
	test_a_hit_on_what_has_become_another();
	test_least_recently_used();
	test_a_child_has_nothing();
	umn_cache_delete(cache);
	delete_world(&world);
	test_threads(seconds, seed);
	return 0;
}
