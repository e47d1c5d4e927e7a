/* SPDX-License-Identifier: BSD-3-Clause */
#include "process/descriptor.h"

#include <errno.h>
#include <sys/stat.h>
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

void umn_close(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}
