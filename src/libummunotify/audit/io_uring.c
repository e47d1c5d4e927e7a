/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * io_uring's registered buffers: by liburing's functions, and by the system calls made with syscall().
 *
 * Uses are found in the submission queue, before the kernel is told of it: liburing's struct io_uring, or what a program that makes the
 * system calls has mapped. A kernel thread that polls the queue (IORING_SETUP_SQPOLL) is not told: these uses are not seen.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/io_uring.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "abi/layout.h"
#include "audit/interpose.h"
#include "audit/pins.h"

#define RINGS 64
/* Newer than some distributions' headers. */
#define REGISTER_BUFFERS2 15
#define REGISTER_BUFFERS_UPDATE 16
#define REGISTER_USE_REGISTERED_RING (1u << 31)
#define OP_SEND_ZC 47
#define SEND_FIXED_BUFFER (1u << 2)
#define SETUP_SQE128 (1u << 10)
#define SETUP_NO_ARRAY (1u << 16)
#define BUFFERS_MAX (1u << 14)

/* What the program gives to the kernel may be wrong: that is the kernel's to say. */
static bool copy_in(void *to, const void *from, size_t length)
{
	const struct iovec here = {to, length}, there = {(void *)(uintptr_t)from, length};
	int kept = errno;
	ssize_t copied = process_vm_readv(getpid(), &here, 1, &there, 1, 0);
	bool fine = copied == (ssize_t)length;

	if (copied < 0 && errno != EFAULT) { /* a sandbox without this call */
		memcpy(to, from, length);
		fine = true;
	}
	errno = kept;
	return fine;
}

/* liburing's struct io_uring, as far as it is needed; the same in all versions of liburing.so.2. */
struct liburing {
	unsigned int *head, *tail, *mask, *entries, *flags, *dropped, *array;
	struct io_uring_sqe *sqes;
	unsigned int sqe_head, sqe_tail;
	char rest[120]; /* and the completion queue */
	unsigned int setup_flags;
	int fd;
};
UMN_STATIC_ASSERT(offsetof(struct liburing, fd) == 196, "as in liburing.h");

/* Rings that are made by the system call. */
static struct ring {
	int fd; /* -1: none */
	pid_t owner;
	struct io_uring_params parameters;
	char *rings;
	char *sqes;
} rings[RINGS];
static unsigned int ring_count; /* only grows */
static unsigned int slot_count; /* of the table with the most slots, ever */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static uint64_t slot_key(int fd, uint64_t slot)
{
	return pins_key("io_uring", (uint64_t)fd, slot);
}

/* ---- Registering ---- */

/* From `begin` to `end` signals are held back: a handler that jumps away would leave pins of which nobody knows whether they are. */
struct registering {
	sigset_t before;
	unsigned int count;
	struct pin **pins;
};

static void begin(struct registering *registering, const char *call, const struct iovec *buffers, unsigned int count)
{
	struct iovec *pieces;

	*registering = (struct registering){.before = pins_hold_signals()};
	if (pins_inside || !buffers || !count || count > BUFFERS_MAX)
		return;
	pieces = calloc(count, sizeof *pieces);
	registering->pins = calloc(count, sizeof(struct pin *));
	if (pieces && registering->pins && copy_in(pieces, buffers, count * sizeof *pieces))
		registering->count = count;
	for (unsigned int i = 0; i < registering->count; i++)
		if (pieces[i].iov_base)
			registering->pins[i] = pins_begin("io_uring", call, pieces[i].iov_base, pieces[i].iov_len);
	free(pieces);
}

/* `done` of them are registered. */
static void end(struct registering *registering, const char *call, int fd, unsigned int first, unsigned int done)
{
	for (unsigned int i = 0; i < registering->count; i++) {
		uint64_t keys[KEYS] = {[KEY_PIN] = slot_key(fd, first + i)};
		struct pin *old = i < done ? pins_take(keys[KEY_PIN], call) : NULL;

		pins_drop(old);
		if (i < done)
			pins_add(registering->pins[i], keys);
		else
			pins_drop(registering->pins[i]);
	}
	for (unsigned int most = __atomic_load_n(&slot_count, __ATOMIC_RELAXED); most < first + done;)
		if (__atomic_compare_exchange_n(&slot_count, &most, first + done, true, __ATOMIC_RELEASE, __ATOMIC_RELAXED))
			break;
	free(registering->pins);
	pins_let_signals(registering->before);
}

static void drop_all(int fd, const char *call)
{
	sigset_t before;

	if (pins_inside)
		return;
	before = pins_hold_signals();
	for (unsigned int slot = 0; slot < __atomic_load_n(&slot_count, __ATOMIC_ACQUIRE); slot++)
		pins_drop(pins_take(slot_key(fd, slot), call));
	pins_let_signals(before);
}

/* struct io_uring_rsrc_register */
struct register_many {
	uint32_t count, flags;
	uint64_t reserved, buffers, tags;
};

/* struct io_uring_rsrc_update2 */
struct register_update {
	uint32_t first, reserved;
	uint64_t buffers, tags;
	uint32_t count, reserved2;
};

static long register_call(const long a[6], long (*make)(long, ...))
{
	int fd = (int)a[0];
	unsigned int opcode = (unsigned int)a[1];
	const struct iovec *buffers = NULL;
	struct registering registering;
	unsigned int count = 0, first = 0;
	const void *argument = (const void *)a[2]; /* NOLINT(performance-no-int-to-ptr) */
	struct register_many many;
	struct register_update update;
	long result;

	if (opcode == IORING_REGISTER_BUFFERS)
		buffers = argument, count = (unsigned int)a[3];
	else if (opcode == REGISTER_BUFFERS2 && copy_in(&many, argument, sizeof many))
		buffers = (const void *)(uintptr_t)many.buffers, count = many.count; /* NOLINT(performance-no-int-to-ptr) */
	else if (opcode == REGISTER_BUFFERS_UPDATE && copy_in(&update, argument, sizeof update))
		buffers = (const void *)(uintptr_t)update.buffers, count = update.count, first = update.first; /* NOLINT */
	begin(&registering, "io_uring_register", buffers, count);
	result = make(SYS_io_uring_register, a[0], a[1], a[2], a[3], a[4], a[5]);
	if (opcode == IORING_UNREGISTER_BUFFERS && result >= 0)
		drop_all(fd, "io_uring_register");
	end(&registering, "io_uring_register", fd, first,
	    result < 0				? 0
	    : opcode == REGISTER_BUFFERS_UPDATE ? (unsigned int)result
						: count);
	return result;
}

/* ---- Using ---- */

static void look_at(int fd, const struct io_uring_sqe *sqe, const char *call)
{
	if (sqe->opcode == IORING_OP_READ_FIXED || sqe->opcode == IORING_OP_WRITE_FIXED ||
	    (sqe->opcode == OP_SEND_ZC && (sqe->ioprio & SEND_FIXED_BUFFER)))
		pins_use(KEY_PIN, slot_key(fd, sqe->buf_index), sqe->addr, sqe->len, call);
}

/* Acquire, as add_ring() releases: a ring that is found by its descriptor is complete. */
static struct ring *ring_of(int fd)
{
	for (unsigned int i = 0; i < __atomic_load_n(&ring_count, __ATOMIC_ACQUIRE); i++)
		if (__atomic_load_n(&rings[i].fd, __ATOMIC_ACQUIRE) == fd)
			return &rings[i];
	return NULL;
}

static void look_at_queue(const struct ring *ring, unsigned int count)
{
	const struct io_sqring_offsets *at = &ring->parameters.sq_off;
	unsigned int flags = ring->parameters.flags, size = flags & SETUP_SQE128 ? 128 : 64, mask, head;

	if (!ring->rings || !ring->sqes)
		return;
	mask = *(unsigned int *)(ring->rings + at->ring_mask);
	head = __atomic_load_n((unsigned int *)(ring->rings + at->head), __ATOMIC_ACQUIRE);
	for (unsigned int i = 0; i < count && i <= mask; i++) {
		unsigned int entry = (head + i) & mask;

		if (!(flags & SETUP_NO_ARRAY))
			entry = ((unsigned int *)(ring->rings + at->array))[entry] & mask;
		look_at(ring->fd, (const struct io_uring_sqe *)(ring->sqes + (size_t)entry * size), "io_uring_enter");
	}
}

static void add_ring(int fd, const struct io_uring_params *parameters)
{
	sigset_t before = pins_hold_signals();
	struct ring *ring;

	pthread_mutex_lock(&lock);
	ring = ring_of(fd); /* closed in a way that is not seen */
	if (!ring)
		ring = ring_of(-1);
	if (!ring && ring_count < RINGS) {
		rings[ring_count].fd = -1;
		ring = &rings[ring_count];
		__atomic_add_fetch(&ring_count, 1, __ATOMIC_RELEASE);
	}
	if (ring) {
		ring->parameters = *parameters;
		ring->rings = ring->sqes = NULL;
		ring->owner = getpid();
		__atomic_store_n(&ring->fd, fd, __ATOMIC_RELEASE);
	}
	pthread_mutex_unlock(&lock);
	pins_let_signals(before);
}

void io_uring_mapped(int fd, int64_t offset, void *address)
{
	struct ring *ring = __atomic_load_n(&ring_count, __ATOMIC_ACQUIRE) ? ring_of(fd) : NULL;

	if (ring && offset == (int64_t)IORING_OFF_SQ_RING)
		ring->rings = address;
	else if (ring && offset == (int64_t)IORING_OFF_SQES)
		ring->sqes = address;
}

void io_uring_closing(int fd)
{
	struct ring *ring = !pins_inside && __atomic_load_n(&ring_count, __ATOMIC_ACQUIRE) ? ring_of(fd) : NULL;

	/* A child of vfork, which shares this memory, has descriptors of its own. */
	if (!ring || ring->owner != getpid())
		return;
	__atomic_store_n(&ring->fd, -1, __ATOMIC_RELEASE);
	drop_all(fd, "close");
}

bool io_uring_call(long number, const long a[6], long (*make)(long number, ...), long *result)
{
	struct ring *ring;

	switch (number) {
	case SYS_io_uring_setup:
		*result = make(number, a[0], a[1]);
		if (*result >= 0)
			add_ring((int)*result, (const void *)a[1]); /* NOLINT(performance-no-int-to-ptr) */
		return true;
	case SYS_io_uring_register:
		*result = register_call(a, make);
		return true;
	case SYS_io_uring_enter:
		ring = ring_of((int)a[0]);
		if (ring)
			look_at_queue(ring, (unsigned int)a[1]);
		return false;
	case SYS_close:
		io_uring_closing((int)a[0]);
		return false;
	default:
		return false;
	}
}

/* ---- liburing ---- */

static void look_at_liburing(const struct liburing *ring, const char *call)
{
	if (!__atomic_load_n(&slot_count, __ATOMIC_ACQUIRE))
		return;
	for (unsigned int i = ring->sqe_head; i != ring->sqe_tail; i++)
		look_at(ring->fd, &ring->sqes[(i & *ring->mask) << !!(ring->setup_flags & SETUP_SQE128)], call);
}

#define SUBMITS(name, parameters, ...)                                                                                             \
	EXPORT int name parameters;                                                                                                \
	int name parameters                                                                                                        \
	{                                                                                                                          \
		int(*next) parameters = (int(*) parameters)NEXT(name);                                                             \
                                                                                                                                   \
		look_at_liburing(ring, #name);                                                                                     \
		return next ? next(__VA_ARGS__) : -ENOSYS;                                                                         \
	}
SUBMITS(io_uring_submit, (struct liburing * ring), ring)
SUBMITS(io_uring_submit_and_wait, (struct liburing * ring, unsigned int wait), ring, wait)
SUBMITS(io_uring_submit_and_wait_timeout, (struct liburing * ring, void **completion, unsigned int wait, void *time, void *signals),
	ring, completion, wait, time, signals)
SUBMITS(io_uring_submit_and_get_events, (struct liburing * ring), ring)

/* The functions return what was done or a negative errno. `first` and `all`: which slots, where it succeeds. */
#define REGISTERS(name, parameters, first, buffers, count, done, ...)                                                              \
	EXPORT int name parameters;                                                                                                \
	int name parameters                                                                                                        \
	{                                                                                                                          \
		int(*next) parameters = (int(*) parameters)NEXT(name);                                                             \
		struct registering registering;                                                                                    \
		int result;                                                                                                        \
                                                                                                                                   \
		begin(&registering, #name, buffers, count);                                                                        \
		result = next ? next(__VA_ARGS__) : -ENOSYS;                                                                       \
		end(&registering, #name, ring->fd, first, result < 0 ? 0 : (unsigned int)(done));                                  \
		return result;                                                                                                     \
	}
REGISTERS(io_uring_register_buffers, (struct liburing * ring, const struct iovec *buffers, unsigned int count), 0, buffers, count,
	  count, ring, buffers, count)
REGISTERS(io_uring_register_buffers_tags,
	  (struct liburing * ring, const struct iovec *buffers, const uint64_t *tags, unsigned int count), 0, buffers, count, count,
	  ring, buffers, tags, count)
REGISTERS(io_uring_register_buffers_update_tag,
	  (struct liburing * ring, unsigned int first, const struct iovec *buffers, const uint64_t *tags, unsigned int count),
	  first, buffers, count, result, ring, first, buffers, tags, count)

EXPORT int io_uring_unregister_buffers(struct liburing *ring);
int io_uring_unregister_buffers(struct liburing *ring)
{
	int (*next)(struct liburing *) = (int (*)(struct liburing *))NEXT(io_uring_unregister_buffers);
	int result = next ? next(ring) : -ENOSYS;

	if (result >= 0)
		drop_all(ring->fd, "io_uring_unregister_buffers");
	return result;
}

EXPORT void io_uring_queue_exit(struct liburing *ring);
void io_uring_queue_exit(struct liburing *ring)
{
	void (*next)(struct liburing *) = (void (*)(struct liburing *))NEXT(io_uring_queue_exit);

	drop_all(ring->fd, "io_uring_queue_exit");
	if (next)
		next(ring);
}
