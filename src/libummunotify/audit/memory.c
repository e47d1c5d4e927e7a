/* SPDX-License-Identifier: BSD-3-Clause */
/* What changes memory: around each call it is looked whether it hit a pin. malloc's own calls of munmap and madvise pass by these functions, so
 * free and realloc are among them. */
#define _GNU_SOURCE
#undef _FORTIFY_SOURCE
#undef _FILE_OFFSET_BITS
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <unistd.h>

#include "audit/interpose.h"
#include "audit/pins.h"

#define BEFORE()                                                                                                                   \
	do {                                                                                                                       \
		if (__builtin_expect(!pins_quiet(), 0))                                                                            \
			pins_before(CALLER);                                                                                       \
	} while (0)
#define AFTER(call)                                                                                                                \
	do {                                                                                                                       \
		if (__builtin_expect(!pins_quiet(), 0))                                                                            \
			pins_after(call, CALLER);                                                                                  \
	} while (0)

#define AROUND(type, name, parameters, ...)                                                                                        \
	EXPORT type name parameters                                                                                                \
	{                                                                                                                          \
		type result;                                                                                                       \
                                                                                                                                   \
		BEFORE();                                                                                                          \
		result = LIBC(name)(__VA_ARGS__);                                                                                  \
		AFTER(#name);                                                                                                      \
		return result;                                                                                                     \
	}

AROUND(int, munmap, (void *address, size_t length), address, length)
AROUND(int, madvise, (void *address, size_t length, int advice), address, length, advice)
AROUND(int, posix_madvise, (void *address, size_t length, int advice), address, length, advice)
AROUND(int, mprotect, (void *address, size_t length, int protection), address, length, protection)
AROUND(int, shmdt, (const void *address), address)
AROUND(void *, shmat, (int id, const void *address, int flags), id, address, flags)
AROUND(int, ftruncate, (int fd, off_t length), fd, length)
AROUND(int, ftruncate64, (int fd, off64_t length), fd, length)
AROUND(int, truncate, (const char *path, off_t length), path, length)
AROUND(int, truncate64, (const char *path, off64_t length), path, length)
AROUND(int, fallocate, (int fd, int mode, off_t offset, off_t length), fd, mode, offset, length)
AROUND(int, fallocate64, (int fd, int mode, off64_t offset, off64_t length), fd, mode, offset, length)
AROUND(void *, realloc, (void *memory, size_t size), memory, size)

EXPORT void free(void *memory)
{
	BEFORE();
	LIBC(free)(memory);
	AFTER("free");
}

#define MMAP(name)                                                                                                                 \
	EXPORT void *name(void *address, size_t length, int protection, int flags, int fd, off64_t offset)                         \
	{                                                                                                                          \
		void *result;                                                                                                      \
                                                                                                                                   \
		BEFORE();                                                                                                          \
		result = LIBC(name)(address, length, protection, flags, fd, offset);                                               \
		AFTER("mmap");                                                                                                     \
		if (fd >= 0 && result != MAP_FAILED)                                                                               \
			io_uring_mapped(fd, offset, result);                                                                       \
		return result;                                                                                                     \
	}
MMAP(mmap)
MMAP(mmap64)

EXPORT void *mremap(void *old, size_t old_length, size_t length, int flags, ...)
{
	va_list arguments;
	void *to = NULL, *result;

	if (flags & MREMAP_FIXED) {
		va_start(arguments, flags);
		to = va_arg(arguments, void *);
		va_end(arguments);
	}
	BEFORE();
	result = LIBC(mremap)(old, old_length, length, flags, to);
	AFTER("mremap");
	return result;
}

EXPORT int close(int fd)
{
	io_uring_closing(fd);
	return LIBC(close)(fd);
}

/* Six numbers, whatever the call takes. */
EXPORT long syscall(long number, ...)
{
	long a[6], result;
	va_list arguments;

	va_start(arguments, number);
	for (unsigned int i = 0; i < 6; i++)
		a[i] = va_arg(arguments, long);
	va_end(arguments);
	if (pins_inside || stack_is_own(CALLER))
		return LIBC(syscall)(number, a[0], a[1], a[2], a[3], a[4], a[5]);
	BEFORE();
	if (!io_uring_call(number, a, LIBC(syscall), &result))
		result = LIBC(syscall)(number, a[0], a[1], a[2], a[3], a[4], a[5]);
	AFTER("syscall");
	return result;
}
