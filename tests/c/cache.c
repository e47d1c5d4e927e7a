/* SPDX-License-Identifier: BSD-3-Clause */
/* The cache in C, with a notifier of its own: hits, a change, and what is said of both. */
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ummunotify.h>
#include <ummunotify_cache.h>

static int live;

static int reg(void *context, uint64_t address, size_t length, void *argument, void **handle)
{
	(void)context, (void)length, (void)argument;
	*handle = (void *)(address + 1);
	live++;
	return 0;
}

static int dereg(void *context, void *handle, void *argument)
{
	(void)context, (void)handle, (void)argument;
	live--;
	return 0;
}

int main(void)
{
	struct ummunotify_registrar registrar = {.size = sizeof registrar, .register_memory = reg, .deregister = dereg};
	struct ummunotify_registration *first, *second;
	struct ummunotify_cache_stats stats;
	uint64_t causes[UMMUNOTIFY_CACHE_CAUSES];
	struct ummunotify_cache *cache;
	char *memory = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	memset(memory, 1, 8192);
	if (ummunotify_cache_open(&cache, &registrar, NULL) || ummunotify_cache_uncached(cache) ||
	    ummunotify_cache_acquire(cache, memory, 8192, NULL, &first) || ummunotify_cache_release(cache, first) ||
	    ummunotify_cache_acquire(cache, memory + 5, 100, NULL, &second) || second != first || second->handle != memory + 1 ||
	    !ummunotify_registration_valid(second)) {
		puts(ummunotify_error());
		return 1;
	}
	munmap(memory, 8192);
	if (ummunotify_registration_valid(second) || ummunotify_cache_find(cache, memory, 1) ||
	    ummunotify_cache_release(cache, second) != 1 || live != 1 || ummunotify_cache_collect(cache, NULL) || live)
		return 2;
	ummunotify_cache_stats(cache, &stats);
	if (stats.hits != 1 || stats.misses != 1 || stats.stale != 1 || stats.registrations)
		return 3;
	ummunotify_cache_causes(cache, causes);
	if (causes[SYS_munmap] + causes[UMMUNOTIFY_CACHE_CAUSES - 1] != 1) /* uffd does not know */
		return 5;
	if (ummunotify_cache_acquire(cache, memory, 0, NULL, &first) >= 0 || !strstr(ummunotify_error(), "it is empty"))
		return 4;
	ummunotify_cache_close(cache);
	return 0;
}
