/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "sources/probe_gap.h"

#include "sources/platform.h"

#include <errno.h>
#include <sys/mman.h>
#include <time.h>

/* The acquire: what the feeder did to the tables before it ended the gap is seen after. */
static bool delivered(struct umn_source *source)
{
	return !__atomic_load_n(&((struct umn_probe_gap *)source)->shared->cpus, __ATOMIC_ACQUIRE);
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

int umn_probe_gap_open(struct umn_probe_gap *gap, int fd)
{
	void *shared = mmap(NULL, UMN_PAGE, PROT_READ, MAP_SHARED, fd, 0);

	if (shared == MAP_FAILED)
		return -errno;
	madvise(shared, UMN_PAGE, MADV_DONTFORK);
	*gap = (struct umn_probe_gap){
		.source = {.watch = watch,
			   .unwatch = unwatch,
			   .delivered = delivered,
			   .wait_delivered = wait_delivered,
			   .stop = stop},
		.shared = shared,
	};
	return 0;
}

int umn_probe_gap_show_secret(struct umn_probe_gap *gap, uint64_t secret)
{
	int error = 0;
	bool certain = false;

	for (int i = 0; i < 1000 && !certain && !error; i++) {
		/*
		 * Read in this order, with the system call between the halves: were the program skipped there, then on a CPU whose
		 * gap began either before the second line, which sees it, or after the first, and the last sees that.
		 */
		uint32_t times = __atomic_load_n(&gap->shared->times, __ATOMIC_SEQ_CST);

		certain = wait_delivered(&gap->source, 10);
		error = umn_show_secret(secret);
		certain = certain && __atomic_load_n(&gap->shared->times, __ATOMIC_SEQ_CST) == times;
	}
	return error;
}

void umn_probe_gap_abandon(struct umn_probe_gap *gap)
{
	if (gap->shared)
		mmap((void *)gap->shared, UMN_PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
}

void umn_probe_gap_close(struct umn_probe_gap *gap)
{
	if (gap->shared)
		munmap((void *)gap->shared, UMN_PAGE);
	gap->shared = NULL;
}
