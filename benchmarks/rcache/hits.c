/* SPDX-License-Identifier: BSD-3-Clause */
/* Hits of the registration cache, and of UCX's, without Python in between. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "ummunotify_cache.h"

#ifdef WITH_UCX
#include <ucm/api/ucm.h>
#include <ucs/memory/rcache.h>
#endif

static uint64_t now(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

/* ---- One thread ---- */

/* Each returns the thread's own time in ns, which can be 0 where a hypervisor takes its time back; or NOT_FOUND. */
#define NOT_FOUND UINT64_MAX

uint64_t bench_hits(struct ummunotify_cache *cache, const uint64_t *addresses, uint32_t n, uint64_t length)
{
	uint64_t begun = now(CLOCK_THREAD_CPUTIME_ID);
	struct ummunotify_registration *registration;

	for (uint32_t i = 0; i < n; i++) {
		registration = ummunotify_cache_find(cache, (void *)addresses[i], length);
		if (!registration)
			return NOT_FOUND;
		ummunotify_cache_release(cache, registration);
	}
	return now(CLOCK_THREAD_CPUTIME_ID) - begun;
}

/* ---- Misses ---- */

static int register_nothing(void *context, uint64_t address, size_t length, void *argument, void **handle)
{
	(void)context, (void)length, (void)argument;
	*handle = (void *)address;
	return 0;
}

static int deregister_nothing(void *context, void *handle, void *argument)
{
	(void)context, (void)handle, (void)argument;
	return 0;
}

/* Of a cache with the notifier that those of the process share: it registers each of n addresses, and then forgets them. In ns; or
 * NOT_FOUND. */
uint64_t bench_misses(const uint64_t *addresses, uint32_t n, uint64_t length, uint32_t rounds)
{
	const struct ummunotify_registrar registrar = {
		.size = sizeof registrar, .register_memory = register_nothing, .deregister = deregister_nothing};
	struct ummunotify_registration *registration;
	struct ummunotify_cache *cache;
	uint64_t total = 0, begun;

	if (ummunotify_cache_open(&cache, &registrar, NULL))
		return NOT_FOUND;
	for (uint32_t round = 0; round <= rounds; round++) {
		begun = now(CLOCK_THREAD_CPUTIME_ID);
		for (uint32_t i = 0; i < n; i++) {
			if (ummunotify_cache_acquire(cache, (void *)addresses[i], length, NULL, &registration))
				return NOT_FOUND;
			ummunotify_cache_release(cache, registration);
		}
		if (round) /* the first is to warm up */
			total += now(CLOCK_THREAD_CPUTIME_ID) - begun;
		ummunotify_cache_flush(cache, NULL);
	}
	ummunotify_cache_close(cache);
	return total / rounds;
}

#ifdef WITH_UCX

#ifdef UCX_ALIGNMENT_IN_GET /* in newer versions */
#define ALIGNMENT UCS_RCACHE_MIN_ALIGNMENT,
#else
#define ALIGNMENT
#endif

static ucs_status_t reg(void *context, ucs_rcache_t *rcache, void *arg, ucs_rcache_region_t *region, uint16_t flags)
{
	(void)context, (void)rcache, (void)arg, (void)region, (void)flags;
	return UCS_OK;
}

static void dereg(void *context, ucs_rcache_t *rcache, ucs_rcache_region_t *region)
{
	(void)context, (void)rcache, (void)region;
}

static void dump(void *context, ucs_rcache_t *rcache, ucs_rcache_region_t *region, char *text, size_t max)
{
	(void)context, (void)rcache, (void)region, (void)max;
	*text = 0;
}

/* As UCX's own transports make it, for CPU memory. NULL: it failed. */
void *bench_ucx_new(void)
{
	static const ucs_rcache_ops_t ops = {.mem_reg = reg, .mem_dereg = dereg, .dump_region = dump};
	const ucs_rcache_params_t params = {
		.region_struct_size = sizeof(ucs_rcache_region_t) + 16,
#ifndef UCX_ALIGNMENT_IN_GET
		.alignment = UCS_RCACHE_MIN_ALIGNMENT,
		.max_alignment = 4096,
#endif
		.ucm_events = UCM_EVENT_VM_UNMAPPED,
		.ucm_event_priority = 1000,
		.ops = &ops,
		.max_regions = -1ul,
		.max_size = -1ul,
		.max_unreleased = -1ul,
	};
	ucs_rcache_t *rcache;

	return ucs_rcache_create(&params, "benchmark", NULL, &rcache) == UCS_OK ? rcache : NULL;
}

static inline uint64_t ucx_hits(typeof(ucs_rcache_get) *get, void *rcache, const uint64_t *addresses, uint32_t n, uint64_t length)
{
	uint64_t begun = now(CLOCK_THREAD_CPUTIME_ID);
	ucs_rcache_region_t *region;

	for (uint32_t i = 0; i < n; i++) {
		if (get(rcache, (void *)addresses[i], length, ALIGNMENT PROT_READ | PROT_WRITE, NULL, &region) != UCS_OK)
			return NOT_FOUND;
		ucs_rcache_region_put(rcache, region);
	}
	return now(CLOCK_THREAD_CPUTIME_ID) - begun;
}

uint64_t bench_ucx_hits(void *rcache, const uint64_t *addresses, uint32_t n, uint64_t length)
{
	return ucx_hits(ucs_rcache_get, rcache, addresses, n, length);
}

/* Of UCX's own function, past that of `ummunotify run --ucx`. */
uint64_t bench_ucx_hits_past(void *rcache, const uint64_t *addresses, uint32_t n, uint64_t length)
{
	typeof(ucs_rcache_get) *get =
		(typeof(ucs_rcache_get) *)dlsym(dlopen("libucs.so.0", RTLD_LAZY | RTLD_NOLOAD), "ucs_rcache_get");

	return get ? ucx_hits(get, rcache, addresses, n, length) : NOT_FOUND;
}

#else
void *bench_ucx_new(void)
{
	return NULL;
}

uint64_t bench_ucx_hits(void *rcache, const uint64_t *addresses, uint32_t n, uint64_t length)
{
	(void)rcache, (void)addresses, (void)n, (void)length;
	return NOT_FOUND;
}

uint64_t bench_ucx_hits_past(void *rcache, const uint64_t *addresses, uint32_t n, uint64_t length)
{
	return bench_ucx_hits(rcache, addresses, n, length);
}
#endif

/* ---- Several threads ---- */

struct worker {
	pthread_t thread;
	struct ummunotify_cache *cache;
	void *rcache;
	const uint64_t *addresses;
	uint32_t n, rounds;
	uint64_t length;
	pthread_barrier_t *barrier;
	int failed;
};

static void *work(void *argument)
{
	struct worker *w = argument;

	pthread_barrier_wait(w->barrier);
	for (uint32_t i = 0; i < w->rounds; i++)
		w->failed |= (w->rcache ? bench_ucx_hits(w->rcache, w->addresses, w->n, w->length)
					: bench_hits(w->cache, w->addresses, w->n, w->length)) == NOT_FOUND;
	return NULL;
}

/* Each thread has its own n addresses, and one of the caches, or all share UCX's. The time that passes until all are done, in ns;
 * or NOT_FOUND. */
uint64_t bench_threads(struct ummunotify_cache *const *caches, void *rcache, const uint64_t *addresses, uint32_t n, uint64_t length,
		       uint32_t threads, uint32_t rounds)
{
	struct worker *workers = calloc(threads, sizeof *workers);
	pthread_barrier_t barrier;
	uint64_t begun;
	int failed = 0;

	pthread_barrier_init(&barrier, NULL, threads + 1);
	for (uint32_t i = 0; i < threads; i++) {
		workers[i] = (struct worker){.cache = caches[i],
					     .rcache = rcache,
					     .addresses = addresses + (size_t)i * n,
					     .n = n,
					     .rounds = rounds,
					     .length = length,
					     .barrier = &barrier};
		pthread_create(&workers[i].thread, NULL, work, &workers[i]);
	}
	begun = now(CLOCK_MONOTONIC);
	pthread_barrier_wait(&barrier);
	for (uint32_t i = 0; i < threads; i++) {
		pthread_join(workers[i].thread, NULL);
		failed |= workers[i].failed;
	}
	begun = now(CLOCK_MONOTONIC) - begun;
	pthread_barrier_destroy(&barrier);
	free(workers);
	return failed ? NOT_FOUND : begun;
}
