/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Preloaded into a program, this lets it find /dev/ummunotify. Each function here looks whether it is about a descriptor of the device
 * (one load from a table) and calls the C library's if not. open() is the C library's; only if there is no such file is the name
 * looked at.
 */
#define _GNU_SOURCE
/* With these the headers have other functions in the place of those defined here. */
#undef _FORTIFY_SOURCE
#undef _FILE_OFFSET_BITS
#include "device/device.h"
#include "device/memory.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

struct next next;
static struct {
	int (*open)(const char *path, int flags, ...);
	int (*openat)(int directory, const char *path, int flags, ...);
	ssize_t (*readv)(int fd, const struct iovec *pieces, int count);
	ssize_t (*read_chk)(int fd, void *buffer, size_t length, size_t room);
	int (*open_2)(const char *path, int flags);
	int (*openat_2)(int directory, const char *path, int flags);
} also;
static bool found, secure;

static int close_range_itself(unsigned int first, unsigned int last, int flags)
{
	return (int)syscall(SYS_close_range, first, last, flags);
}

static void find(void)
{
	/* dlsym's result is a function, whatever its type says. */
#define FIND(where, name, symbol) (*(void **)&(where).name = dlsym(RTLD_NEXT, symbol))
	FIND(next, read, "read");
	FIND(next, close, "close");
	FIND(next, close_range, "close_range");
	FIND(next, ioctl, "ioctl");
	FIND(next, fcntl, "fcntl");
	FIND(next, dup, "dup");
	FIND(next, dup2, "dup2");
	FIND(next, dup3, "dup3");
	FIND(next, mmap, "mmap");
	if (!next.close_range)
		next.close_range = close_range_itself; /* before glibc 2.34 */
	FIND(also, open, "open");
	FIND(also, openat, "openat");
	FIND(also, readv, "readv");
	FIND(also, read_chk, "__read_chk");
	FIND(also, open_2, "__open_2");
	FIND(also, openat_2, "__openat_2");
	/* The dynamic linker preloads nothing from a path into a program with more rights than its user. Where this was installed in
	 * a directory from which it does, such a program sees no device. */
	secure = getauxval(AT_SECURE);
	__atomic_store_n(&found, true, __ATOMIC_RELEASE);
}

/* Other libraries' constructors may come first, and then signal handlers, in which dlsym must not be called. */
__attribute__((constructor)) static void find_first(void)
{
	if (!found)
		find();
}

static inline void ready(void)
{
	if (__builtin_expect(!__atomic_load_n(&found, __ATOMIC_ACQUIRE), 0))
		find();
}

/* ---- Opening ---- */

static int opened(int fd, const char *path, int flags)
{
	/* The kernel could read the name, so it is one. */
	if (__builtin_expect(fd >= 0 || errno != ENOENT, 1) || secure || strcmp(path, DEVICE_PATH))
		return fd;
	return device_open(flags);
}

static bool has_mode(int flags)
{
	return (flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE;
}

/* Only then is there one to read. */
#define READ_MODE(mode, flags)                                                                                                     \
	do {                                                                                                                       \
		va_list arguments;                                                                                                 \
                                                                                                                                   \
		if (!has_mode(flags))                                                                                              \
			break;                                                                                                     \
		va_start(arguments, flags);                                                                                        \
		mode = va_arg(arguments, mode_t);                                                                                  \
		va_end(arguments);                                                                                                 \
	} while (0)

/* On 64-bit systems a file is as large as it likes to be, so open64 is open. */
#define OPEN(name)                                                                                                                 \
	EXPORT int name(const char *path, int flags, ...)                                                                          \
	{                                                                                                                          \
		mode_t mode = 0;                                                                                                   \
                                                                                                                                   \
		READ_MODE(mode, flags);                                                                                            \
		ready();                                                                                                           \
		return opened(also.open(path, flags, mode), path, flags);                                                          \
	}
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                                                               \
	EXPORT int name(int directory, const char *path, int flags, ...)                                                           \
	{                                                                                                                          \
		mode_t mode = 0;                                                                                                   \
                                                                                                                                   \
		READ_MODE(mode, flags);                                                                                            \
		ready();                                                                                                           \
		return opened(also.openat(directory, path, flags, mode), path, flags);                                             \
	}
OPENAT(openat)
OPENAT(openat64)

/* What programs compiled with _FORTIFY_SOURCE call. */
#define OPEN_2(name)                                                                                                               \
	EXPORT int name(const char *path, int flags);                                                                              \
	int name(const char *path, int flags)                                                                                      \
	{                                                                                                                          \
		ready();                                                                                                           \
		return opened(also.open_2(path, flags), path, flags);                                                              \
	}
OPEN_2(__open_2)
OPEN_2(__open64_2)

#define OPENAT_2(name)                                                                                                             \
	EXPORT int name(int directory, const char *path, int flags);                                                               \
	int name(int directory, const char *path, int flags)                                                                       \
	{                                                                                                                          \
		ready();                                                                                                           \
		return opened(also.openat_2(directory, path, flags), path, flags);                                                 \
	}
OPENAT_2(__openat_2)
OPENAT_2(__openat64_2)

/* ---- Reading ---- */

EXPORT ssize_t read(int fd, void *buffer, size_t length)
{
	ready();
	return is_device(fd) ? device_read(fd, buffer, length) : next.read(fd, buffer, length);
}

EXPORT ssize_t __read_chk(int fd, void *buffer, size_t length, size_t room);
ssize_t __read_chk(int fd, void *buffer, size_t length, size_t room)
{
	ready();
	return is_device(fd) && length <= room ? device_read(fd, buffer, length) : also.read_chk(fd, buffer, length, room);
}

/* As the kernel does it for a file that knows nothing of pieces. */
EXPORT ssize_t readv(int fd, const struct iovec *pieces, int count)
{
	ssize_t total = 0, length;

	ready();
	if (!is_device(fd) || count < 0)
		return also.readv(fd, pieces, count);
	if (!device_can_read(pieces, (size_t)count * sizeof *pieces)) {
		errno = EFAULT;
		return -1;
	}
	for (int i = 0; i < count; i++) {
		length = device_read(fd, pieces[i].iov_base, pieces[i].iov_len);
		if (length < 0)
			return total ? total : length;
		total += length;
		if ((size_t)length < pieces[i].iov_len)
			break;
	}
	return total;
}

/* ---- The rest ---- */

EXPORT int ioctl(int fd, unsigned long request, ...)
{
	va_list arguments;
	void *argument;

	va_start(arguments, request);
	argument = va_arg(arguments, void *);
	va_end(arguments);
	ready();
	return is_device(fd) ? device_ioctl(fd, request, argument) : next.ioctl(fd, request, argument);
}

#define FCNTL(name)                                                                                                                \
	EXPORT int name(int fd, int command, ...)                                                                                  \
	{                                                                                                                          \
		va_list arguments;                                                                                                 \
		long argument;                                                                                                     \
                                                                                                                                   \
		va_start(arguments, command);                                                                                      \
		argument = va_arg(arguments, long);                                                                                \
		va_end(arguments);                                                                                                 \
		ready();                                                                                                           \
		return is_device(fd) ? device_fcntl(fd, command, argument) : next.fcntl(fd, command, argument);                    \
	}
FCNTL(fcntl)
FCNTL(fcntl64)

#define MMAP(name)                                                                                                                 \
	EXPORT void *name(void *address, size_t length, int protection, int flags, int fd, off_t offset)                           \
	{                                                                                                                          \
		ready();                                                                                                           \
		return is_device(fd) && !(flags & MAP_ANONYMOUS) ? device_mmap(address, length, protection, flags, fd, offset)     \
								 : next.mmap(address, length, protection, flags, fd, offset);      \
	}
MMAP(mmap)
MMAP(mmap64)

EXPORT int close(int fd)
{
	ready();
	return is_device(fd) ? device_close(fd) : next.close(fd);
}

EXPORT int close_range(unsigned int first, unsigned int last, int flags)
{
	ready();
	return device_close_range(first, last, flags);
}

EXPORT void closefrom(int first)
{
	if (close_range(first < 0 ? 0 : (unsigned int)first, ~0u, 0))
		for (int fd = first < 0 ? 0 : first; fd < DEVICE_FDS; fd++)
			close(fd);
}

EXPORT int dup(int fd)
{
	ready();
	return is_device(fd) ? device_dup(fd) : next.dup(fd);
}

EXPORT int dup2(int fd, int to)
{
	ready();
	return is_device(fd) || is_device(to) ? device_dup_to(fd, to, 0, false) : next.dup2(fd, to);
}

EXPORT int dup3(int fd, int to, int flags)
{
	ready();
	return is_device(fd) || is_device(to) ? device_dup_to(fd, to, flags, true) : next.dup3(fd, to, flags);
}
