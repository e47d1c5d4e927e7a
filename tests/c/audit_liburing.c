/* SPDX-License-Identifier: BSD-3-Clause */
/* liburing's functions, declared here as its headers may be missing. Two buffers are right, and one is stale when it is used. */
#define _GNU_SOURCE
#include <assert.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#define PAGE ((size_t)sysconf(_SC_PAGESIZE))

struct io_uring {
	unsigned int *head, *tail, *mask, *entries, *flags, *dropped, *array;
	struct io_uring_sqe *sqes;
	unsigned int sqe_head, sqe_tail;
	char rest[144];
};

int io_uring_queue_init(unsigned int entries, struct io_uring *ring, unsigned int flags);
void io_uring_queue_exit(struct io_uring *ring);
int io_uring_register_buffers(struct io_uring *ring, const struct iovec *buffers, unsigned int count);
int io_uring_unregister_buffers(struct io_uring *ring);
int io_uring_submit(struct io_uring *ring);

static void use(struct io_uring *ring, int zero, void *buffer, uint16_t index)
{
	struct io_uring_sqe *entry = &ring->sqes[ring->sqe_tail++ & *ring->mask];

	memset(entry, 0, sizeof *entry);
	entry->opcode = IORING_OP_READ_FIXED;
	entry->fd = zero;
	entry->addr = (uint64_t)(uintptr_t)buffer;
	entry->len = (uint32_t)PAGE;
	entry->buf_index = index;
}

int main(void)
{
	struct io_uring ring;
	struct iovec buffers[2];
	int zero = open("/dev/zero", O_RDONLY);

	assert(!io_uring_queue_init(4, &ring, 0));
	for (unsigned int i = 0; i < 2; i++)
		buffers[i] = (struct iovec){mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), PAGE};
	assert(!io_uring_register_buffers(&ring, buffers, 1));
	assert(!io_uring_unregister_buffers(&ring));
	assert(!io_uring_register_buffers(&ring, buffers, 2));
	use(&ring, zero, buffers[0].iov_base, 0);
	assert(io_uring_submit(&ring) == 1);
	munmap(buffers[1].iov_base, PAGE);
	use(&ring, zero, buffers[0].iov_base, 0);
	use(&ring, zero, buffers[1].iov_base, 1);
	assert(io_uring_submit(&ring) == 2);
	io_uring_queue_exit(&ring);
	munmap(buffers[0].iov_base, PAGE); /* it is pinned no longer */
	return 0;
}
