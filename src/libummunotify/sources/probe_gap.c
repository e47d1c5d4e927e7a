/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "sources/probe_gap.h"

#include "sources/platform.h"

#include <errno.h>
#include <sys/mman.h>
#include <time.h>

/* The acquire: what the feeder did to the tables before it took the doubt back is seen after. */
static bool delivered(struct umn_source *source)
{
	return !__atomic_load_n(&((struct umn_doubt *)source)->shared->cpus, __ATOMIC_ACQUIRE);
}

static bool wait_delivered(struct umn_source *source, unsigned int milliseconds)
{
	const struct timespec step = {.tv_nsec = 100000};

	for (unsigned int i = 0; i < 10 * milliseconds && !delivered(source); i++)
		nanosleep(&step, NULL);
	return delivered(source);
}

static int watch(struct umn_source *source, uint64_t start, uint64_t end)
{
	(void)source, (void)start, (void)end;
	return 0;
}

static void unwatch(struct umn_source *source, uint64_t start, uint64_t end)
{
	(void)source, (void)start, (void)end;
}

static void stop(struct umn_source *source)
{
	(void)source;
}

int umn_doubt_open(struct umn_doubt *doubt, int fd)
{
	void *shared = mmap(NULL, UMN_PAGE, PROT_READ, MAP_SHARED, fd, 0);

	if (shared == MAP_FAILED)
		return -errno;
	*doubt = (struct umn_doubt){
		.source = {.watch = watch, .unwatch = unwatch, .delivered = delivered, .wait_delivered = wait_delivered, .stop = stop},
		.shared = shared,
	};
	return 0;
}

int umn_doubt_show_secret(struct umn_doubt *doubt, uint64_t secret)
{
	int error = 0;
	bool certain = false;

	for (int i = 0; i < 1000 && !certain && !error; i++) {
		/*
		 * Read in this order, with the system call between the halves: were the program skipped there, then on a CPU whose
		 * doubt began either before the second line, which sees it, or after the first, and the last sees that.
		 */
		uint32_t times = __atomic_load_n(&doubt->shared->times, __ATOMIC_SEQ_CST);

		certain = wait_delivered(&doubt->source, 10);
		error = umn_show_secret(secret);
		certain = certain && __atomic_load_n(&doubt->shared->times, __ATOMIC_SEQ_CST) == times;
	}
	return error;
}

void umn_doubt_abandon(struct umn_doubt *doubt)
{
	if (doubt->shared)
		mmap((void *)doubt->shared, UMN_PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
}

void umn_doubt_close(struct umn_doubt *doubt)
{
	if (doubt->shared)
		munmap((void *)doubt->shared, UMN_PAGE);
	doubt->shared = NULL;
}
