/* SPDX-License-Identifier: BSD-3-Clause */
/* Functions that change memory, in a library: compiled with frame pointers, and by their names in the stacks of changes. */
#define _GNU_SOURCE
#include <stddef.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define OWN __attribute__((noinline, noclone))

/* Keeps a call before it from becoming a jump, and makes a frame where the compiler would do without. */
static inline __attribute__((always_inline)) void here(void)
{
	__asm__ volatile("" : : "r"(__builtin_frame_address(0)));
}

OWN void unmap_buffer(void *address, size_t length)
{
	munmap(address, length);
	here();
}

OWN void outer(void *address, size_t length)
{
	unmap_buffer(address, length);
	here();
}

OWN void drop_pages(void *address, size_t length)
{
	madvise(address, length, MADV_DONTNEED);
	here();
}

/* By no function of the C library's. */
OWN void unmap_bare(void *address, size_t length)
{
#ifdef __x86_64__
	long result = SYS_munmap;

	__asm__ volatile("syscall" : "+a"(result) : "D"(address), "S"(length) : "rcx", "r11", "memory");
#else
	register long call __asm__("x8") = SYS_munmap;
	register void *result __asm__("x0") = address;
	register size_t size __asm__("x1") = length;

	__asm__ volatile("svc #0" : "+r"(result) : "r"(call), "r"(size) : "memory");
#endif
	here();
}

OWN void outer_bare(void *address, size_t length)
{
	unmap_bare(address, length);
	here();
}
