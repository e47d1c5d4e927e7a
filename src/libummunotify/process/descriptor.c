/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "process/descriptor.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

void umn_descriptor_set(struct umn_descriptor *descriptor, int fd)
{
	struct stat status;

	descriptor->fd = fd;
	if (fd >= 0 && !fstat(fd, &status)) {
		descriptor->device = status.st_dev;
		descriptor->inode = status.st_ino;
	}
}

bool umn_descriptor_intact(const struct umn_descriptor *descriptor)
{
	struct stat status;
	int kept = errno;
	bool intact = descriptor->fd >= 0 && !fstat(descriptor->fd, &status) && status.st_dev == descriptor->device &&
		      status.st_ino == descriptor->inode;

	errno = kept;
	return intact;
}

void umn_descriptor_close(struct umn_descriptor *descriptor)
{
	if (umn_descriptor_intact(descriptor))
		close(descriptor->fd);
	descriptor->fd = -1;
}

#ifndef CLOSE_RANGE_UNSHARE
#define CLOSE_RANGE_UNSHARE 2u
#endif

static int ascending(const void *a, const void *b)
{
	return *(const int *)a - *(const int *)b;
}

int umn_descriptors_unshare(int *fds, size_t count)
{
	unsigned int first = 0;
	struct stat status;

	qsort(fds, count, sizeof *fds, ascending);
	/* The end first: only the call that unshares the table can fail. */
	if (syscall(SYS_close_range, fds[count - 1] + 1u, ~0u, CLOSE_RANGE_UNSHARE))
		return errno;
	for (size_t i = 0; i < count; i++) {
		if ((unsigned int)fds[i] > first && syscall(SYS_close_range, first, fds[i] - 1u, 0))
			return errno;
		first = (unsigned int)fds[i] + 1;
	}
	/* Another thread may have closed one while this thread still shared its table. (Not fcntl: the device's library stands before
	 * that, and its numbers are the program's.) */
	for (size_t i = 0; i < count; i++)
		if (fstat(fds[i], &status))
			return errno;
	return 0;
}

void umn_close(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}
