/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "bpf/stack_ring.h"

#include <errno.h>
#include <linux/bpf.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define BYTES ((size_t)UMN_STACK_RING_BYTES)

static size_t page_size(void)
{
	return (size_t)sysconf(_SC_PAGESIZE);
}

int umn_stack_ring_map(struct umn_stack_ring *ring, int fd)
{
	const size_t page = page_size();
	void *consumed = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), *produced;
	int error;

	if (consumed == MAP_FAILED)
		return -errno;
	produced = mmap(NULL, page + 2 * BYTES, PROT_READ, MAP_SHARED, fd, (off_t)page);
	if (produced == MAP_FAILED) {
		error = -errno;
		munmap(consumed, page);
		return error;
	}
	/* A child must not consume the parent's, nor keep it. */
	madvise(consumed, page, MADV_DONTFORK);
	madvise(produced, page + 2 * BYTES, MADV_DONTFORK);
	ring->consumed = consumed;
	ring->produced = produced;
	return 0;
}

void umn_stack_ring_unmap(struct umn_stack_ring *ring)
{
	if (!ring->consumed)
		return;
	munmap(ring->consumed, page_size());
	munmap((void *)ring->produced, page_size() + 2 * BYTES);
	ring->consumed = NULL;
}

/* The kernel's layout (kernel/bpf/ringbuf.c): before each record 8 bytes, of which the first 4 are its length and two flags. The kernel
 * releases the producer's position after it has marked the record as busy, and the length without the mark after the record is
 * written. So both are acquired here; without that an Arm processor might read the record before it is there. What is consumed
 * is released after it was copied: then the kernel may write there again. */
int umn_stack_ring_take(struct umn_stack_ring *ring, struct umn_stack *stack)
{
	const uint64_t at = *ring->consumed; /* nobody else writes it */
	const char *data = (const char *)ring->produced + page_size() + (at & (BYTES - 1));
	uint32_t head, length;

	if (at == __atomic_load_n(ring->produced, __ATOMIC_ACQUIRE))
		return 0;
	head = __atomic_load_n((const uint32_t *)data, __ATOMIC_ACQUIRE);
	length = head & ~(BPF_RINGBUF_BUSY_BIT | BPF_RINGBUF_DISCARD_BIT);
	if ((head & BPF_RINGBUF_BUSY_BIT) || length != sizeof *stack)
		return 0; /* it is still being written, and so the later ones have to wait */
	memcpy(stack, data + BPF_RINGBUF_HDR_SZ, sizeof *stack);
	__atomic_store_n(ring->consumed, at + BPF_RINGBUF_HDR_SZ + sizeof *stack, __ATOMIC_RELEASE);
	return 1;
}
