/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Hits of libfabric's cache, with its own monitor `memhooks` and with libummunotify's, in turns.
 *
 *	libfabric REGISTRATIONS ROUNDS		prints a line for each order of addresses and round: memhooks, ours (ns a hit)
 *
 * Debian's libfabric exports nothing of its cache but has it in libfabric.a. The layouts are those of 1.17; main() checks what it
 * relies on. The providers are left out.
 */
#define _GNU_SOURCE
#include <err.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "ummunotify.h"
#include "ummunotify_libfabric.h"

#define MEMORY_KINDS 6
#define PAGE 4096u
#define STRIDE (2 * PAGE)

struct monitor;

struct mr_info {
	const void *base;
	size_t length;
	uint64_t unused[11];
};

struct entry;

struct mr_cache {
	void *domain;
	struct monitor *monitors[MEMORY_KINDS];
	void *lists[2 * MEMORY_KINDS];
	size_t entry_data_size;
	char unused0[0x128 - 0xa0];
	size_t cached, cached_size, uncached, uncached_size, searches, deletes, hits, notices;
	void *entry_pool;
	int (*add_region)(struct mr_cache *cache, struct entry *entry);
	void (*delete_region)(struct mr_cache *cache, struct entry *entry);
	char unused1[512];
};

extern struct monitor *memhooks_monitor, *import_monitor;
void ofi_mem_init(void);
void ofi_monitors_init(void);
int ofi_open_mr_cache(uint32_t version, void *attr, size_t attr_length, uint64_t flags, struct fid **fid, void *context);
int ofi_mr_cache_init(void *domain, struct monitor **monitors, struct mr_cache *cache);
int ofi_mr_cache_search(struct mr_cache *cache, const struct mr_info *info, struct entry **entry);
void ofi_mr_cache_delete(struct mr_cache *cache, struct entry *entry);

/* In the place of libfabric's, which would start all providers. */
int fi_open(uint32_t version, const char *name, void *attr, size_t attr_length, uint64_t flags, struct fid **fid, void *context)
{
	(void)name;
	return ofi_open_mr_cache(version, attr, attr_length, flags, fid, context);
}

static int add_region(struct mr_cache *cache, struct entry *entry)
{
	(void)cache, (void)entry;
	return 0;
}

static void delete_region(struct mr_cache *cache, struct entry *entry)
{
	(void)cache, (void)entry;
}

static struct mr_cache *new_cache(struct monitor *monitor)
{
	static uint64_t domain[1024]; /* has a count of its users */
	struct monitor *monitors[MEMORY_KINDS] = {monitor};
	struct mr_cache *cache = calloc(1, sizeof *cache);

	cache->entry_data_size = 64;
	cache->add_region = add_region;
	cache->delete_region = delete_region;
	if (ofi_mr_cache_init(domain, monitors, cache))
		errx(1, "libfabric's cache cannot be opened");
	return cache;
}

static double walk(struct mr_cache *cache, char *const *addresses, size_t count)
{
	struct mr_info info = {.length = PAGE};
	struct timespec begin, end;
	struct entry *entry;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &begin);
	for (size_t i = 0; i < count; i++) {
		info.base = addresses[i];
		if (ofi_mr_cache_search(cache, &info, &entry))
			errx(1, "libfabric's cache does not find or register anything");
		ofi_mr_cache_delete(cache, entry);
	}
	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &end);
	return ((double)(end.tv_sec - begin.tv_sec) * 1e9 + (double)(end.tv_nsec - begin.tv_nsec)) / (double)count;
}

int main(int argc, char **argv)
{
	size_t count = argc > 1 ? strtoul(argv[1], NULL, 0) : 1000, rounds = argc > 2 ? strtoul(argv[2], NULL, 0) : 100;
	char *memory = mmap(NULL, count * STRIDE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char **addresses = calloc(count, sizeof *addresses), *swapped;
	struct mr_cache *memhooks, *ours;
	struct fid *monitor;
	double theirs;

	_Static_assert(offsetof(struct mr_cache, entry_data_size) == 0x98 && offsetof(struct mr_cache, entry_pool) == 0x168,
		       "1.17");
	ofi_mem_init();
	ofi_monitors_init();
	if (ummunotify_libfabric_import(&monitor)) /* before there is a cache */
		errx(1, "%s", ummunotify_error());
	ours = new_cache(import_monitor);
	memhooks = new_cache(memhooks_monitor);
	for (size_t i = 0; i < count; i++)
		addresses[i] = memory + i * STRIDE;
	walk(memhooks, addresses, count);
	walk(ours, addresses, count);
	for (int order = 0; order < 2; order++) {
		for (size_t i = count; order && i > 1; i--) {
			size_t j = (size_t)random() % i;

			swapped = addresses[i - 1];
			addresses[i - 1] = addresses[j];
			addresses[j] = swapped;
		}
		for (size_t i = 0; i < rounds; i++) {
			walk(memhooks, addresses, count);
			theirs = walk(memhooks, addresses, count);
			walk(ours, addresses, count);
			printf("%d %.1f %.1f\n", order, theirs, walk(ours, addresses, count));
		}
	}
	/* All but the first walk of each found everything. */
	if (memhooks->cached != count || memhooks->hits != memhooks->searches - count || ours->cached != count ||
	    ours->hits != ours->searches - count)
		errx(1, "this libfabric's cache is another than 1.17's, or did not keep what it registered");
	fflush(NULL);
	_exit(0);
}
