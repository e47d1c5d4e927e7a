/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * /dev/ummunotify in user space: what preload.c does with descriptors of it.
 *
 * The functions are to be called only for descriptors that device_at finds, and return what the system call would, with errno. All
 * may be called in a signal handler but for device_open and the first ioctls (which allocate memory), and by any thread.
 */
#ifndef UMN_DEVICE_H
#define UMN_DEVICE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define DEVICE_PATH "/dev/ummunotify"
#define DEVICE_FDS (1 << 20) /* as many as a process may have (the default of the sysctl fs.nr_open) */

struct device;
/* The device of each descriptor, NULL if it is of another kind. Pages of it that are never written take no memory. */
extern struct device *device_fds[DEVICE_FDS];

static inline bool is_device(int fd)
{
	return (unsigned int)fd < DEVICE_FDS && __builtin_expect(__atomic_load_n(&device_fds[fd], __ATOMIC_RELAXED) != NULL, 0);
}

/* The C library's functions that preload.c interposes. */
struct next {
	ssize_t (*read)(int fd, void *buffer, size_t length);
	int (*close)(int fd);
	int (*close_range)(unsigned int first, unsigned int last, int flags);
	int (*ioctl)(int fd, unsigned long request, ...);
	int (*fcntl)(int fd, int command, ...);
	int (*dup)(int fd);
	int (*dup2)(int fd, int to);
	int (*dup3)(int fd, int to, int flags);
	void *(*mmap)(void *address, size_t length, int protection, int flags, int fd, off_t offset);
};
extern struct next next;

int device_open(int flags);
ssize_t device_read(int fd, void *buffer, size_t length);
int device_ioctl(int fd, unsigned long request, void *argument);
int device_fcntl(int fd, int command, long argument);
void *device_mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset);
int device_close(int fd);
int device_close_range(unsigned int first, unsigned int last, int flags); /* there need be none in it */
int device_dup(int fd);
int device_dup_to(int fd, int to, int flags, bool dup3); /* `fd` or `to` is one */

#endif
