/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "process/descriptor.h"

#include <errno.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "process/keep_only.h"
#include "process/process.h"

#define load(p) __atomic_load_n(p, __ATOMIC_ACQUIRE)
#define store(p, v) __atomic_store_n(p, v, __ATOMIC_RELEASE)

/* The system call itself. A thread may have a descriptor table of its own; in libummunotify-device.so, close() is the device's, whose
 * account is of the program's table: it would take a device's descriptor of the same number for closed. */
static void close_number(int fd)
{
	syscall(SYS_close, fd);
}

void umn_descriptor_set(struct umn_descriptor *descriptor, int fd)
{
	struct stat file = {0};

	if (fd >= 0)
		fstat(fd, &file);
	store(&descriptor->device, file.st_dev);
	store(&descriptor->inode, file.st_ino);
	store(&descriptor->fd, fd);
}

bool umn_descriptor_intact(const struct umn_descriptor *descriptor)
{
	int fd = load(&descriptor->fd), kept = errno;
	struct stat file;
	bool intact =
		fd >= 0 && !fstat(fd, &file) && file.st_dev == load(&descriptor->device) && file.st_ino == load(&descriptor->inode);

	errno = kept;
	return intact;
}

void umn_descriptor_close(struct umn_descriptor *descriptor)
{
	int fd = descriptor->fd;
	bool intact = umn_descriptor_intact(descriptor);

	store(&descriptor->fd, -1);
	if (intact && !umn_process_shares_descriptors())
		close_number(fd);
}

#ifndef CLOSE_RANGE_UNSHARE
#define CLOSE_RANGE_UNSHARE 2u
#endif

int umn_descriptors_unshare(int *fds, size_t count)
{
	int error = umn_keep_only(fds, count, CLOSE_RANGE_UNSHARE);
	struct stat status;

	if (error)
		return error;
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
		close_number(*fd);
	*fd = -1;
}
