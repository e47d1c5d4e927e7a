/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Descriptors of ours in a table that is the program's: it may close them all (close_range, daemon(3)), and use the numbers for
 * other files. So nothing is done with a number before it has been found to lead to the same file still.
 *
 * Only for files with an inode of their own (pipes, sockets): anonymous inodes, of which epoll, eventfd and BPF objects are, cannot
 * be told apart by fstat.
 */
#ifndef UMN_DESCRIPTOR_H
#define UMN_DESCRIPTOR_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

struct umn_descriptor {
	int fd; /* -1: none */
	dev_t device;
	ino_t inode;
};
#define UMN_NO_DESCRIPTOR {.fd = -1}

/* Notes down an open descriptor, or that there is none (-1). Other threads may call umn_descriptor_intact meanwhile: they find the old
 * file, the new one, or that the two do not belong together. */
void umn_descriptor_set(struct umn_descriptor *descriptor, int fd);

/* Does the number still lead to the file? One system call; keeps errno. Another thread of the program can change that at any
 * time: what the program closes while it is in use by another of its threads is a race of the program's own. */
bool umn_descriptor_intact(const struct umn_descriptor *descriptor);

/* Closes it if it is intact, and forgets it. */
void umn_descriptor_close(struct umn_descriptor *descriptor);

/* Leaves this thread a descriptor table of its own, with these and no others: what the program closes is then closed. `fds` are
 * sorted. 0, or an errno: the kernel (before Linux 5.9) or a sandbox does not allow it, or one of `fds`
 * is closed (EBADF). */
int umn_descriptors_unshare(int *fds, size_t count);

/* Closes a descriptor that has never left the function that made it. */
void umn_close(int *fd);

#endif
