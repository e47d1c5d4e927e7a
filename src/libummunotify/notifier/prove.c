/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "notifier/prove.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "process/error.h"
#include "sources/platform.h"

#define TRIES 10000 /* a millisecond apart */

/* ---- Ways in which a page of our own can go ---- */

struct page {
	void *at;
	void *other; /* mapped too */
	int fd;	     /* of the page's file, or -1 */
};

static bool map_anonymous(struct page *page)
{
	page->at = umn_test_page();
	return page->at;
}

static bool map_two(struct page *page)
{
	page->other = umn_test_page();
	return page->other && map_anonymous(page);
}

static bool map_file(struct page *page, int flags)
{
	page->fd = memfd_create("ummunotify", MFD_CLOEXEC);
	if (page->fd < 0 || ftruncate(page->fd, UMN_PAGE))
		return false;
	page->at = mmap(NULL, UMN_PAGE, PROT_READ | PROT_WRITE, flags, page->fd, 0);
	if (page->at == MAP_FAILED) {
		page->at = NULL;
		return false;
	}
	/* Mapped, but not written. */
	return *(volatile char *)page->at == 0;
}

static bool map_private_file(struct page *page)
{
	return map_file(page, MAP_PRIVATE);
}

static bool map_shared_file(struct page *page)
{
	return map_file(page, MAP_SHARED);
}

static void unmap(struct page *page)
{
	munmap(page->at, UMN_PAGE);
	page->at = NULL;
}

static void discard(struct page *page)
{
	madvise(page->at, UMN_PAGE, MADV_DONTNEED);
}

static void free_lazily(struct page *page)
{
	madvise(page->at, UMN_PAGE, MADV_FREE);
}

static void copy_on_write(struct page *page)
{
	*(volatile char *)page->at = 1;
}

static void truncate_file(struct page *page)
{
	if (ftruncate(page->fd, 0))
		return; /* then the change is not seen */
}

static void move(struct page *page)
{
	if (mremap(page->at, UMN_PAGE, UMN_PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, page->other) == page->other)
		page->at = NULL;
}

/* All but the first are for a probe at many functions: a compiler may have put one of them into its caller, where no program
 * can be attached to it. */
static const struct way {
	const char *what;
	bool (*map)(struct page *page);
	void (*change)(struct page *page);
} ways[] = {
	{"a page was unmapped", map_anonymous, unmap},
	{"a page was discarded", map_anonymous, discard},
	{"a page was freed lazily", map_anonymous, free_lazily},
	{"a page was copied on write", map_private_file, copy_on_write},
	{"a file was truncated", map_shared_file, truncate_file},
	{"a page was moved", map_two, move},
};

static void clean_up(struct page *page)
{
	if (page->at)
		munmap(page->at, UMN_PAGE);
	if (page->other)
		munmap(page->other, UMN_PAGE);
	if (page->fd >= 0)
		close(page->fd);
}

/* ---- Trying them ---- */

/* -EAGAIN, inconclusive: the source may have skipped events during the test. */
static int try_once(struct umn_table *table, struct umn_connection *connection, const struct way *way)
{
	struct page page = {.fd = -1};
	struct umn_region *region;
	struct umn_event events[2];
	bool seen, good;
	int error;

	if (!way->map(&page)) {
		error = errno;
		clean_up(&page);
		return umn_fail_errno(UMMUNOTIFY_NO_MEMORY, error, "a page for the self-test cannot be mapped");
	}
	error = umn_table_watch(table, (uint64_t)page.at, (uint64_t)page.at + UMN_PAGE, 0, NULL, &region);
	if (error) {
		clean_up(&page);
		return umn_fail_errno(UMMUNOTIFY_UNAVAILABLE, abs(error), "a page cannot be watched");
	}
	good = umn_region_valid(region);
	way->change(&page);
	seen = !umn_region_valid(region) && umn_table_changed(table);
	good &= seen;
	good &= umn_table_drain(table, events, 2) == 1 && events[0].region == region;
	umn_table_unwatch(table, region);
	umn_table_restart(table, 0);
	clean_up(&page);
	if (!good && seen && connection->source)
		return -EAGAIN;
	return good ? 0
		    : umn_fail(UMMUNOTIFY_UNAVAILABLE, ENODEV, "please report this with the kernel's version",
			       "it failed its self-test: %s and the event did not arrive as it should", way->what);
}

static int try_way(struct umn_table *table, struct umn_connection *connection, const struct way *way)
{
	const struct timespec step = {.tv_nsec = 1000000};
	int error = -EAGAIN;

	for (int i = 0; i < TRIES && error == -EAGAIN; i++) {
		if (i)
			nanosleep(&step, NULL);
		error = try_once(table, connection, way);
	}
	if (error == -EAGAIN)
		return umn_fail(UMMUNOTIFY_UNAVAILABLE, ENODEV, "try again",
				"so much else was changing that its self-test showed nothing");
	return error;
}

int umn_prove(struct umn_table *table, struct umn_connection *connection)
{
	size_t count = strstr(connection->name, ":zap") ? sizeof ways / sizeof *ways : 1;
	int error = 0;

	for (size_t i = 0; i < count && !error; i++)
		error = try_way(table, connection, &ways[i]);
	return error;
}
