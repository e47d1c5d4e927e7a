/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The registration cache, used by several threads at the same time, and a few things about it that threads hide.
 *
 *	cache_test [SECONDS [SEED]]
 *
 * Memory here is numbers: each page has one, which changes when it is "mapped anew". To register is to copy the numbers of the
 * pages, so a registration shows whether it is of the memory that is there now. Numbers and registrations are ordinary memory, so
 * that ThreadSanitizer sees if the cache's atomic operations do not order what they should.
 *
 * The sources of the cache are compiled with chaos.h: at some accesses to shared memory another thread gets the processor.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cache/entries.h"
#include "cache_check.h"
#include "fake_notifier.h"

#define PAGE 4096u
#define BASE UINT64_C(0x10000000)
#define BUFFERS 24u
#define BUFFER_PAGES 8u
#define THREADS 5
#define REGISTRATIONS_MAX 40u

static _Thread_local uint32_t chaotic; /* one in so many accesses; 0: never */

void umn_chaos(void)
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
	uint64_t start, end;
	uint64_t numbers[BUFFER_PAGES];
	int users; /* atomic */
};

static struct ummunotify *umn;
static struct ummunotify_cache *cache;
static struct buffer buffers[BUFFERS];
static uint64_t last_number;
static uint64_t registered, deregistered, hit_count, remap_count, nested_count, fork_count;
static int64_t live;
static int stop;

static uint64_t start_of(uint32_t buffer)
{
	/* Gaps of all lengths, so that blocks of the index hold the ends of several buffers. */
	return BASE + (buffer * (BUFFER_PAGES + 4) + buffer % 5) * (uint64_t)PAGE;
}

static uint32_t buffer_of(uint64_t address)
{
	uint32_t b = 0;

	while (b + 1 < BUFFERS && start_of(b + 1) <= address)
		b++;
	return b;
}

static void change(uint64_t start, uint64_t end)
{
	umn_feed(&umn->world.memory, start, end, 0, 0);
}

static void map_anew(uint32_t b, uint32_t from, uint32_t to)
{
	struct buffer *buffer = &buffers[b];

	/* The kernel tells of a change before it is done. */
	change(start_of(b) + from * PAGE, start_of(b) + to * PAGE);
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

/* ---- The registrar ---- */

static void use(uint32_t b, bool nested);

static int register_numbers(void *context, uint64_t address, size_t length, void *argument, void **result)
{
	struct handle *handle = calloc(1, sizeof *handle);
	uint32_t b = buffer_of(address), from = (address - start_of(b)) / PAGE, pages;

	(void)context;
	check(argument);
	handle->start = address;
	handle->end = address + length;
	pages = length / PAGE;
	check(address % PAGE == 0 && length % PAGE == 0 && from + pages <= BUFFER_PAGES);
	memcpy(handle->numbers, &buffers[b].numbers[from], pages * sizeof *handle->numbers);
	if (one_in(10))
		change(address, address + length); /* a change that changes nothing */
	if (one_in(20) && *(bool *)argument) {
		use(b, true); /* a registrar, or a signal handler, that uses the same memory */
		__sync_fetch_and_add(&nested_count, 1);
	}
	switch (below(60)) {
	case 0:
		free(handle);
		return -EFAULT;
	case 1:
		free(handle);
		return -ENOMEM;
	case 2:
		free(handle);
		return 77;
	}
	handle->live = true;
	*result = handle;
	__sync_fetch_and_add(&registered, 1);
	check((uint64_t)__sync_add_and_fetch(&live, 1) <= REGISTRATIONS_MAX);
	return 0;
}

static int deregister_numbers(void *context, void *argument_handle, void *argument)
{
	struct handle *handle = argument_handle;

	(void)context;
	if (argument && one_in(20))
		return one_in(2) ? -EBUSY : 78;
	check(handle->live && !__atomic_load_n(&handle->users, __ATOMIC_RELAXED));
	handle->live = false;
	free(handle);
	__sync_fetch_and_add(&deregistered, 1);
	__sync_fetch_and_sub(&live, 1);
	return 0;
}

static const struct ummunotify_registrar registrar = {
	.size = sizeof registrar,
	.register_memory = register_numbers,
	.deregister = deregister_numbers,
	.granularity = PAGE,
	.max_length = BUFFER_PAGES * PAGE,
};

/* ---- Threads ---- */

/* `nested`: the caller holds the buffer, and is registering some of it. */
static void use(uint32_t b, bool nested)
{
	uint32_t from = below(BUFFER_PAGES), to = from + 1 + below(BUFFER_PAGES - from);
	uint64_t start = start_of(b) + from * PAGE + below(100), end = start_of(b) + to * PAGE - below(100);
	struct ummunotify_registration *registration;
	struct buffer *buffer = &buffers[b];
	bool may_nest = !nested, last;
	struct handle *handle;
	int error;

	if (!nested && !hold(buffer, false))
		return;
	registration = one_in(2) ? ummunotify_cache_find(cache, (void *)start, end - start) : NULL;
	if (registration) {
		__sync_fetch_and_add(&hit_count, 1);
	} else {
		error = ummunotify_cache_acquire(cache, (void *)start, end - start, &may_nest, &registration);
		check(!error == !!registration);
		if (error) {
			check(error == -EFAULT || error == 77 || error == 78 || error == -ENOMEM || error == -ENOSPC);
			if (!nested)
				let_go(buffer, false);
			return;
		}
	}
	handle = registration->handle;
	__sync_fetch_and_add(&handle->users, 1);
	check(handle->live && handle->start == registration->start && handle->end == registration->end);
	check(registration->start <= start && registration->end >= end);
	for (uint32_t page = from; page < to; page++)
		check(handle->numbers[(start_of(b) + page * PAGE - handle->start) / PAGE] == buffer->numbers[page]);
	last = !nested && one_in(2);
	if (last)
		let_go(buffer, false); /* from here on it may be mapped anew */
	if (one_in(8))
		sched_yield();
	check(handle->live);
	__sync_fetch_and_sub(&handle->users, 1);
	if (ummunotify_cache_release(cache, registration) == 1 && one_in(2)) {
		error = ummunotify_cache_collect(cache, &may_nest);
		check(!error || error == -EBUSY || error == 78);
	}
	if (!nested && !last)
		let_go(buffer, false);
}

#ifndef UMN_TSAN /* which cannot follow forks of programs with threads */
/* Nothing of the parent's is given out in a child, however it was made, and nothing is deregistered. */
static void fork_once(void)
{
	struct ummunotify_cache_stats stats;
	struct ummunotify_registration *held;
	bool argument = false;
	uint64_t before;
	pid_t pid;
	int status, error;

	do
		error = ummunotify_cache_acquire(cache, (void *)start_of(0), PAGE, &argument, &held);
	while (error);
	pid = one_in(2) ? fork() : (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
	check(pid >= 0);
	if (!pid) {
		before = deregistered;
		for (uint32_t b = 0; b < BUFFERS; b++)
			if (ummunotify_cache_find(cache, (void *)start_of(b), PAGE))
				_exit(1);
		if (ummunotify_cache_release(cache, held))
			_exit(2);
		if (ummunotify_registration_valid(held))
			_exit(3);
		/* The cache's notifier is the parent's, if it was given. */
		if (cache->given && ummunotify_cache_acquire(cache, (void *)start_of(0), PAGE, &argument, &held) != -EBADF)
			_exit(4);
		if (cache->given && ummunotify_failure()->code != UMMUNOTIFY_FORKED)
			_exit(5);
		ummunotify_cache_stats(cache, &stats);
		if (stats.registrations || stats.in_use || stats.hits)
			_exit(6);
		ummunotify_cache_collect(cache, NULL);
		ummunotify_cache_flush(cache, NULL);
		_exit(deregistered == before ? 0 : 7);
	}
	check(waitpid(pid, &status, 0) == pid);
	if (status)
		fail("the child: %#x", status);
	ummunotify_cache_release(cache, held);
	__sync_fetch_and_add(&fork_count, 1);
}
#endif

static void *run(void *seed)
{
	uint32_t b, from, to;
	bool argument = false;
	int error;

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
		use(b, false);
		error = 0;
		if (one_in(500))
			error = ummunotify_cache_invalidate(cache, (void *)start_of(b), PAGE, &argument);
		if (one_in(500))
			error = ummunotify_cache_flush(cache, &argument);
		if (one_in(100))
			error = ummunotify_cache_collect(cache, &argument);
		check(!error || error == -EBUSY || error == 78);
	}
	return NULL;
}

/* Has it been made to do all that it can? */
static bool enough(bool merge)
{
	struct ummunotify_cache_stats stats;

	ummunotify_cache_stats(cache, &stats);
	return __atomic_load_n(&hit_count, __ATOMIC_RELAXED) && __atomic_load_n(&remap_count, __ATOMIC_RELAXED) &&
	       __atomic_load_n(&nested_count, __ATOMIC_RELAXED) && stats.retries && stats.stale && stats.evictions &&
	       !merge == !stats.merges;
}

static void test_threads(double seconds, uint64_t seed, bool merge, bool given)
{
	struct ummunotify_registrar merging = registrar;
	struct ummunotify_cache_options options = {.size = sizeof options, .max_registrations = REGISTRATIONS_MAX};
	struct ummunotify_options nothing = {.size = sizeof nothing};
	struct ummunotify_cache_stats stats;
	pthread_t threads[THREADS];
	const char *wrong;
	double end = now() + seconds;

	options.shared = &nothing;
	if (given) {
		check(!ummunotify_open_with(&umn, &nothing));
		options.umn = umn;
	}
	merging.merge = merge;
	check(!ummunotify_cache_open(&cache, &merging, &options));
	umn = cache->umn;
	stop = 0;
	registered = deregistered = hit_count = remap_count = nested_count = fork_count = 0;
	for (uint32_t b = 0; b < BUFFERS; b++)
		map_anew(b, 0, BUFFER_PAGES);
	for (uintptr_t i = 0; i < THREADS; i++)
		check(!pthread_create(&threads[i], NULL, run, (void *)(seed * THREADS + i)));
	/* On a busy machine each chaotic moment takes as long as others like. */
	while (now() < end || (now() < end + 100 && !enough(merge))) {
		usleep(1000);
		wrong = check_cache(cache);
		if (wrong)
			fail("check_cache: %s", wrong);
#ifndef UMN_TSAN
		if (one_in(50) && hold(&buffers[0], false)) {
			fork_once();
			let_go(&buffers[0], false);
		}
#endif
	}
	__atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
	for (uint32_t i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	check(!check_cache(cache));
	check(enough(merge));
	ummunotify_cache_stats(cache, &stats);
	check(stats.hits >= hit_count && !stats.in_use);
	while (ummunotify_cache_shutdown(cache, NULL))
		;
	printf("%llu hits, %llu registrations, %llu nested, %llu retries, %llu remapped, %llu stale, %llu evicted, %llu merged, "
	       "%llu forks\n",
	       (unsigned long long)stats.hits, (unsigned long long)registered, (unsigned long long)nested_count,
	       (unsigned long long)stats.retries, (unsigned long long)remap_count, (unsigned long long)stats.stale,
	       (unsigned long long)stats.evictions, (unsigned long long)stats.merges, (unsigned long long)fork_count);
	ummunotify_cache_stats(cache, &stats);
	check(registered == deregistered && !stats.registrations && !stats.registered_bytes && !stats.not_deregistered);
	ummunotify_cache_close(cache);
	if (given)
		ummunotify_close(umn);
}

/* ---- Without threads ---- */

static int register_plain(void *context, uint64_t address, size_t length, void *argument, void **handle)
{
	(void)context, (void)argument;
	*handle = (void *)(address + length);
	__sync_fetch_and_add(&registered, 1);
	return 0;
}

static int deregister_plain(void *context, void *handle, void *argument)
{
	(void)context, (void)handle, (void)argument;
	__sync_fetch_and_add(&deregistered, 1);
	return 0;
}

static const struct ummunotify_registrar plain = {
	.size = sizeof plain, .register_memory = register_plain, .deregister = deregister_plain};

static struct ummunotify_registration *acquire(uint64_t start, uint64_t length)
{
	struct ummunotify_registration *registration;

	check(!ummunotify_cache_acquire(cache, (void *)start, length, NULL, &registration));
	return registration;
}

static void touch(uint64_t start, uint64_t length)
{
	ummunotify_cache_release(cache, acquire(start, length));
}

static struct ummunotify_cache_stats stats_now(void)
{
	struct ummunotify_cache_stats stats;

	ummunotify_cache_stats(cache, &stats);
	check(!check_cache(cache));
	return stats;
}

static void begin(uint64_t max_registrations)
{
	struct ummunotify_cache_options options = {.size = sizeof options, .max_registrations = max_registrations};

	registered = deregistered = 0;
	check(!ummunotify_cache_open(&cache, &plain, &options));
}

static void finish(void)
{
	check(!check_cache(cache));
	ummunotify_cache_close(cache);
	check(registered == deregistered);
}

/* Another thread has found the entry but not counted itself in yet, when it leaves and comes back. */
static void test_a_hit_on_what_has_become_another(void)
{
	struct umn_entry *entry;

	begin(0);
	entry = umn_entry(acquire(BASE, 1));
	ummunotify_cache_release(cache, &entry->shown);
	check(!ummunotify_cache_invalidate(cache, (void *)BASE, 1, NULL));
	umn_users_add(entry->users, &umn_rest(entry)->others, 1); /* it counts itself in: closed, so it counts itself out again */
	check(acquire(BASE + 64, 1) == &entry->shown);
	ummunotify_cache_release(cache, &entry->shown);
	pthread_mutex_lock(&cache->lock);
	check(!umn_entries_evict(cache, 1)); /* it counts as a user so far */
	umn_entry_retire(cache, entry);
	check(umn_rest(entry)->place == UMN_RETIRED);
	pthread_mutex_unlock(&cache->lock);
	check(!umn_entry_hit_slowly(cache, BASE, BASE + 1, entry));
	check(umn_rest(entry)->place == UMN_LEAVING);
	finish();
}

static void *release_elsewhere(void *registration)
{
	ummunotify_cache_release(cache, registration);
	return NULL;
}

static void test_released_by_another_thread(void)
{
	struct ummunotify_registration *registration;
	pthread_t thread;

	begin(0);
	for (int i = 0; i < 1000; i++) {
		registration = acquire(BASE, PAGE);
		check(stats_now().in_use == 1);
		pthread_create(&thread, NULL, release_elsewhere, registration);
		pthread_join(thread, NULL);
		check(!stats_now().in_use);
	}
	check(registered == 1 && stats_now().hits == 999);
	check(!ummunotify_cache_flush(cache, NULL) && deregistered == 1);
	finish();
}

/* The order of use is known to within one miss. */
static void test_least_recently_used(void)
{
	enum { N = 200 };
	struct ummunotify_registration *registration;
	uint64_t last_used[N], oldest, other = BASE * 2;
	uint32_t i, victim;

	begin(N + 1);
	for (i = 0; i < N; i++) {
		touch(BASE + i * PAGE, PAGE);
		last_used[i] = i;
	}
	for (uint64_t time = N; time < 100 * N;) {
		i = below(N);
		registration = ummunotify_cache_find(cache, (void *)(BASE + i * PAGE), PAGE);
		check(registration);
		ummunotify_cache_release(cache, registration);
		last_used[i] = time++;
		/* A miss, which takes the place of the last one that this made. */
		check(!ummunotify_cache_invalidate(cache, (void *)other, 1, NULL));
		touch(other += PAGE, PAGE);
		if (!one_in(3))
			continue;
		touch(other += PAGE, PAGE); /* makes one leave */
		check(!ummunotify_cache_invalidate(cache, (void *)other, 1, NULL));
		check(!ummunotify_cache_invalidate(cache, (void *)(other - PAGE), 1, NULL));
		for (victim = 0, oldest = UINT64_MAX, i = 0; i < N; i++)
			if (last_used[i] < oldest) {
				oldest = last_used[i];
				victim = i;
			}
		check(!ummunotify_cache_find(cache, (void *)(BASE + victim * PAGE), PAGE));
		touch(BASE + victim * PAGE, PAGE);
		last_used[victim] = time++;
		touch(other += PAGE, PAGE);
	}
	finish();
}

static void test_one_notifier_for_many(void)
{
	struct ummunotify_cache *caches[100];
	struct ummunotify_registration *registration;
	struct ummunotify_cache_stats stats;
	int opened_before = opened, closed_before = closed_count;

	registered = deregistered = 0;
	for (size_t i = 0; i < LENGTH(caches); i++) {
		check(!ummunotify_cache_open(&caches[i], &plain, NULL));
		check(!ummunotify_cache_acquire(caches[i], (void *)BASE, PAGE, NULL, &registration));
		ummunotify_cache_release(caches[i], registration);
	}
	check(opened == opened_before + 1);
	umn = caches[0]->umn;
	change(BASE, BASE + 1);
	for (size_t i = 0; i < LENGTH(caches); i++)
		check(!ummunotify_cache_find(caches[i], (void *)BASE, PAGE));
	check(!ummunotify_cache_collect(caches[0], NULL) && deregistered == 1); /* tells the others too */
	for (size_t i = 1; i < LENGTH(caches); i++) {
		ummunotify_cache_stats(caches[i], &stats);
		check(stats.stale == 1 && stats.registrations == 1);
		check(!ummunotify_cache_collect(caches[i], NULL) && deregistered == i + 1);
	}
	for (size_t i = 0; i < LENGTH(caches); i++)
		ummunotify_cache_close(caches[i]);
	check(closed_count == closed_before + 1);
}

static void test_without_a_source(void)
{
	struct ummunotify_registration *first, *second;

	fail_open = ENODEV;
	fail_code = UMMUNOTIFY_UNAVAILABLE;
	begin(0);
	fail_open = 0;
	check(strstr(ummunotify_cache_uncached(cache), "no source works"));
	first = acquire(BASE, PAGE);
	second = acquire(BASE, PAGE);
	check(first != second && registered == 2 && !ummunotify_registration_valid(first));
	check(ummunotify_cache_release(cache, first) == 1 && ummunotify_cache_release(cache, second) == 1);
	check(stats_now().uncached == 2 && !ummunotify_cache_collect(cache, NULL) && deregistered == 2);
	finish();

	begin(0);
	check(!ummunotify_cache_uncached(cache));
	fail_watch = EOPNOTSUPP;
	fail_code = UMMUNOTIFY_UNSUPPORTED;
	check(ummunotify_cache_release(cache, acquire(BASE, PAGE)) == 1);
	fail_watch = 0;
	check(strstr(ummunotify_cache_uncached(cache), "it cannot be watched"));
	finish();

	fail_open = ENOSPC;
	fail_code = UMMUNOTIFY_LIMIT;
	check(ummunotify_cache_open(&cache, &plain, NULL) == -ENOSPC && !cache);
	fail_open = 0;
}

static int counts_while_registering;

static int register_and_change(void *context, uint64_t address, size_t length, void *argument, void **handle)
{
	(void)context;
	/* The first time, as where a huge page is split for it. */
	if (!counts_while_registering++)
		change(address, address + length);
	/* What was split stays so: the first registration is still there. */
	check(!deregistered);
	return register_plain(NULL, address, length, argument, handle);
}

static void test_the_last_try_stays_until_the_next_is_made(void)
{
	struct ummunotify_registrar changing = plain;

	registered = deregistered = 0;
	changing.register_memory = register_and_change;
	check(!ummunotify_cache_open(&cache, &changing, NULL));
	umn = cache->umn;
	touch(BASE, PAGE);
	check(registered == 2 && deregistered == 1 && stats_now().retries == 1);
	finish();
}

static int register_changed(void *context, uint64_t address, size_t length, void *argument, void **handle)
{
	struct ummunotify_cache *other = argument;

	(void)context;
	if (counts_while_registering++)
		return -EIO;
	/* The change is known to all caches before its registration is published. */
	change(address, address + length);
	check(!ummunotify_cache_collect(other, NULL));
	return register_plain(NULL, address, length, argument, handle);
}

static void test_what_is_stale_when_it_is_published(void)
{
	struct ummunotify_registrar changing = plain;
	struct ummunotify_registration *registration;
	struct ummunotify_cache *other;

	registered = deregistered = 0;
	counts_while_registering = 0;
	changing.register_memory = register_changed;
	check(!ummunotify_cache_open(&other, &plain, NULL));
	check(!ummunotify_cache_open(&cache, &changing, NULL));
	umn = cache->umn;
	check(ummunotify_cache_acquire(cache, (void *)BASE, PAGE, other, &registration) == -EIO);
	check(!ummunotify_cache_find(cache, (void *)BASE, PAGE));
	check(!ummunotify_cache_collect(cache, NULL) && !stats_now().registrations);
	finish();
	ummunotify_cache_close(other);
}

static void *collect_often(void *unused)
{
	chaotic = 3;
	while (!__atomic_load_n(&stop, __ATOMIC_RELAXED))
		ummunotify_cache_collect(cache, NULL);
	return unused;
}

/* A thread does not find what it has changed, however soon other threads have made the change known. */
static void test_known_by_other_threads(double seconds)
{
	struct ummunotify_registration *registration;
	pthread_t threads[2];
	double end = now() + seconds;

	begin(0);
	umn = cache->umn;
	stop = 0;
	for (size_t i = 0; i < LENGTH(threads); i++)
		check(!pthread_create(&threads[i], NULL, collect_often, NULL));
	chaotic = 3;
	while (now() < end) {
		touch(BASE, PAGE);
		change(BASE, BASE + 1);
		registration = ummunotify_cache_find(cache, (void *)BASE, PAGE);
		check(!registration);
	}
	chaotic = 0;
	__atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
	for (size_t i = 0; i < LENGTH(threads); i++)
		pthread_join(threads[i], NULL);
	finish();
}

#ifndef UMN_TSAN
static int fork_while_registering(void *context, uint64_t address, size_t length, void *argument, void **handle)
{
	(void)context;
	*(pid_t *)argument = fork();
	return register_plain(NULL, address, length, argument, handle);
}

static void test_a_fork_by_the_registrar(void)
{
	struct ummunotify_registrar forking = plain;
	struct ummunotify_registration *registration;
	pid_t pid = -1;
	int error, status;

	registered = deregistered = 0;
	forking.register_memory = fork_while_registering;
	check(!ummunotify_cache_open(&cache, &forking, NULL));
	error = ummunotify_cache_acquire(cache, (void *)BASE, PAGE, &pid, &registration);
	if (!pid) {
		struct ummunotify_cache_stats stats;

		if (error != -EBADF || ummunotify_failure()->code != UMMUNOTIFY_FORKED)
			_exit(1);
		/* It is empty, and works. */
		cache->registrar.register_memory = register_plain;
		if (ummunotify_cache_acquire(cache, (void *)BASE, PAGE, NULL, &registration))
			_exit(2);
		ummunotify_cache_release(cache, registration);
		ummunotify_cache_stats(cache, &stats);
		_exit(stats.registrations == 1 && stats.misses == 1 && !stats.in_use ? 0 : 3);
	}
	check(!error && waitpid(pid, &status, 0) == pid && !status);
	ummunotify_cache_release(cache, registration);
	check(stats_now().registrations == 1);
	finish();
}
#endif

static void test_closed_with_a_registration_in_use(void)
{
	struct ummunotify_registration *registration;
	int closed_before = closed_count;

	begin(0);
	registration = acquire(BASE, PAGE);
	check(!ummunotify_cache_shutdown(cache, NULL) && !deregistered && closed_count == closed_before);
	check(ummunotify_registration_valid(registration));
	check(ummunotify_cache_acquire(cache, (void *)BASE, PAGE, NULL, &(struct ummunotify_registration *){NULL}) == -ESHUTDOWN);
	check(ummunotify_cache_release(cache, registration) == 1);
	check(!ummunotify_cache_collect(cache, NULL) && deregistered == 1 && closed_count == closed_before + 1);
	finish();
}

int main(int argc, char **argv)
{
	double seconds = argc > 1 ? strtod(argv[1], NULL) : 2;
	uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 0) : 1;

	test_a_hit_on_what_has_become_another();
	test_released_by_another_thread();
	test_least_recently_used();
	test_one_notifier_for_many();
	test_without_a_source();
	test_the_last_try_stays_until_the_next_is_made();
	test_what_is_stale_when_it_is_published();
	test_known_by_other_threads(seconds / 4);
#ifndef UMN_TSAN
	test_a_fork_by_the_registrar();
#endif
	test_closed_with_a_registration_in_use();
	for (int kind = 0; kind < 4; kind++)
		test_threads(seconds / 4, seed, kind & 1, kind & 2);
	return 0;
}
