/* SPDX-License-Identifier: BSD-3-Clause */
#ifndef UMN_KEEP_ONLY_H
#define UMN_KEEP_ONLY_H

#include <errno.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

static inline int umn_ascending(const void *a, const void *b)
{
	return *(const int *)a - *(const int *)b;
}

/* Closes all descriptors but these, at least one, which it sorts. `flags`: close_range's, for all together. 0 or an errno. */
static inline int umn_keep_only(int *fds, size_t count, unsigned int flags)
{
	unsigned int first = 0;

	qsort(fds, count, sizeof *fds, umn_ascending);
	/* The end first: only the call that unshares the table can fail. */
	if (syscall(SYS_close_range, fds[count - 1] + 1u, ~0u, flags))
		return errno;
	for (size_t i = 0; i < count; i++) {
		if ((unsigned int)fds[i] > first && syscall(SYS_close_range, first, fds[i] - 1u, 0))
			return errno;
		first = (unsigned int)fds[i] + 1;
	}
	return 0;
}

#endif
