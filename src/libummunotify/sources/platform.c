/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "sources/platform.h"

#include <assert.h>
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

uint64_t umn_user_limit(void)
{
#ifdef __x86_64__
	/* With five-level page tables there is room above 47 bits, for those who ask. The last page is never used. */
	const uint64_t four = UINT64_C(1) << 47, five = UINT64_C(1) << 56;
	const size_t page = 4096;
	/* Not mmap(): ThreadSanitizer's moves what it does not expect. */
	long p = syscall(SYS_mmap, four, page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);

	if (p == -1)
		return (errno == EEXIST ? five : four) - page;
	munmap((void *)p, page);
	return ((uint64_t)p == four ? five : four) - page;
#else
	return UINT64_C(1) << 52;
#endif
}

void *umn_test_page(void)
{
	volatile char *page = mmap(NULL, (size_t)sysconf(_SC_PAGESIZE), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (page == MAP_FAILED)
		return NULL;
	/* After mlockall(MCL_FUTURE) it is locked, and MADV_DONTNEED refuses locked memory. */
	munlock((void *)page, (size_t)sysconf(_SC_PAGESIZE));
	*page = 1;
	return (void *)page;
}

int umn_show_secret(uint64_t secret)
{
	size_t length = (size_t)sysconf(_SC_PAGESIZE);
	void *page = umn_test_page();
	long result;

	if (!page)
		return -errno;
#ifdef __x86_64__
	register long dontneed __asm__("rdx") = MADV_DONTNEED;
	register uint64_t shown __asm__("r8") = secret;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(SYS_madvise), "D"(page), "S"(length), "r"(dontneed), "r"(shown)
			 : "rcx", "r11", "memory");
#else
	result = syscall(SYS_madvise, page, length, MADV_DONTNEED, 0, secret) ? -errno : 0;
#endif
	munmap(page, length);
	return (int)result;
}

/*
 * The beginnings of the kernel's `union bpf_attr` and `struct bpf_prog_info`, which it takes in any size, if what it does not know
 * is zero. Not those of <linux/bpf.h>: their sizes and padding depend on the headers, and an initialiser need not clear what
 * it does not name (GCC 15 no longer clears the rest of a union).
 */
struct bpf_query {
	uint32_t program_fd;
	uint32_t size; /* of what the kernel is to fill in; then what it did */
	uint64_t result;
};
struct program_counts {
	uint64_t other[26];
	uint64_t skipped; /* recursion_misses */
};
static_assert(sizeof(struct bpf_query) == 16 && sizeof(struct program_counts) == 216, "the kernel's layout");
#define QUERY_OBJECT 15 /* BPF_OBJ_GET_INFO_BY_FD */

int64_t umn_skipped_runs(int program_fd)
{
	struct program_counts counts;
	struct bpf_query query;

	memset(&counts, 0, sizeof counts);
	memset(&query, 0, sizeof query);
	query.program_fd = (uint32_t)program_fd;
	query.size = sizeof counts;
	query.result = (uint64_t)&counts;
	if (syscall(SYS_bpf, QUERY_OBJECT, &query, sizeof query))
		return -errno;
	/* Kernels before 5.12 do not count: that must not be taken for none skipped. */
	return query.size == sizeof counts ? (int64_t)counts.skipped : -EOPNOTSUPP;
}

/* The kernel's layout (kernel/bpf/ringbuf.c): a page with the consumer's position, a page with the producer's, the data. */
int umn_ring_map(struct umn_ring *ring, int fd)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE);
	void *consumed, *produced;

	consumed = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (consumed == MAP_FAILED)
		return -errno;
	produced = mmap(NULL, page, PROT_READ, MAP_SHARED, fd, (off_t)page);
	if (produced == MAP_FAILED) {
		int error = -errno;

		munmap(consumed, page);
		return error;
	}
	/* A child must not touch the parent's, nor keep them. */
	madvise(consumed, page, MADV_DONTFORK);
	madvise(produced, page, MADV_DONTFORK);
	ring->consumed = consumed;
	ring->produced = produced;
	return 0;
}

void umn_ring_clear(struct umn_ring *ring)
{
	if (ring->consumed)
		__atomic_store_n(ring->consumed, __atomic_load_n(ring->produced, __ATOMIC_ACQUIRE), __ATOMIC_RELEASE);
}

void umn_ring_unmap(struct umn_ring *ring)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE);

	if (!ring->consumed)
		return;
	munmap(ring->consumed, page);
	munmap((void *)ring->produced, page);
	ring->consumed = NULL;
}
