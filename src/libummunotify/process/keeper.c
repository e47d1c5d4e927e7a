/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "process/keeper.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <linux/io_uring.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "process/descriptor.h"
#include "process/error.h"

#define KEPT_MAX 80
#define STACK ((size_t)64 << 10)

struct umn_keeper {
	void *ring; /* the io_uring's, mapped; or NULL, and the thread keeps the files */
	size_t ring_size;

	pthread_t thread;
	uint32_t state;
	int error;
	int fds[KEPT_MAX];
	size_t count;
};
enum { STARTING, KEEPING, FAILED, ENDING };

/* ---- An io_uring ---- */

/* 0 or an errno. */
static int keep_by_ring(struct umn_keeper *keeper, const int *fds, size_t count)
{
	struct io_uring_params parameters;
	size_t size;
	void *ring;
	int error, fd;

	memset(&parameters, 0, sizeof parameters);
	fd = (int)syscall(SYS_io_uring_setup, 1, &parameters);
	if (fd < 0)
		return errno;
	size = parameters.sq_off.array + parameters.sq_entries * sizeof(uint32_t);
	ring = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, IORING_OFF_SQ_RING);
	error = ring == MAP_FAILED ? errno : 0;
	/* A child must not keep them: its copy of the mapping would. */
	if (!error && (madvise(ring, size, MADV_DONTFORK) || syscall(SYS_io_uring_register, fd, IORING_REGISTER_FILES, fds, count)))
		error = errno;
	close(fd);
	if (error) {
		if (ring != MAP_FAILED)
			munmap(ring, size);
		return error;
	}
	keeper->ring = ring;
	keeper->ring_size = size;
	return 0;
}

/* ---- A thread ---- */

static void futex(uint32_t *word, int operation, uint32_t value)
{
	syscall(SYS_futex, word, operation | FUTEX_PRIVATE_FLAG, value, NULL, NULL, 0);
}

static void set_state(struct umn_keeper *keeper, uint32_t state)
{
	__atomic_store_n(&keeper->state, state, __ATOMIC_RELEASE);
	futex(&keeper->state, FUTEX_WAKE, 1);
}

static uint32_t wait_while(struct umn_keeper *keeper, uint32_t state)
{
	uint32_t now;

	while ((now = __atomic_load_n(&keeper->state, __ATOMIC_ACQUIRE)) == state)
		futex(&keeper->state, FUTEX_WAIT, state);
	return now;
}

static void *keep(void *argument)
{
	struct umn_keeper *keeper = argument;

	prctl(PR_SET_NAME, "ummunotify-keep");
	/* The program's pipes must end when the program closes them: so none of its descriptors stays here. */
	keeper->error = umn_descriptors_unshare(keeper->fds, keeper->count);
	set_state(keeper, keeper->error ? FAILED : KEEPING);
	if (!keeper->error)
		wait_while(keeper, KEEPING);
	return NULL; /* the table, and with it the files */
}

/* 0 or an errno. */
static int start_thread(struct umn_keeper *keeper)
{
	pthread_attr_t attributes;
	sigset_t all, before;
	int error;

	sigfillset(&all);
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, STACK);
	/* The thread inherits the mask: the program's signal handlers never run on it. */
	pthread_sigmask(SIG_BLOCK, &all, &before);
	error = pthread_create(&keeper->thread, &attributes, keep, keeper);
	/* The C library takes the program's static thread-local memory from the stack, so this one may be too small. */
	if (error == EINVAL)
		error = pthread_create(&keeper->thread, NULL, keep, keeper);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_attr_destroy(&attributes);
	return error;
}

/* 0 or an errno. */
static int keep_by_thread(struct umn_keeper *keeper, const int *fds, size_t count)
{
	int error;

	keeper->count = count;
	memcpy(keeper->fds, fds, count * sizeof *fds);
	error = start_thread(keeper);
	if (error)
		return error;
	if (wait_while(keeper, STARTING) == KEEPING)
		return 0;
	pthread_join(keeper->thread, NULL);
	return keeper->error;
}

/* ---- Either ---- */

struct umn_keeper *umn_keeper_new(const int *fds, size_t count)
{
	struct umn_keeper *keeper;
	int ring_error, error;

	if (!count || count > KEPT_MAX) {
		umn_fail(UMMUNOTIFY_UNAVAILABLE, EINVAL, "", "%zu files cannot be kept open, only 1 to %d", count, KEPT_MAX);
		return NULL;
	}
	keeper = calloc(1, sizeof *keeper);
	if (!keeper) {
		umn_fail_errno(UMMUNOTIFY_NO_MEMORY, ENOMEM, "no memory");
		return NULL;
	}
	ring_error = keep_by_ring(keeper, fds, count);
	error = ring_error ? keep_by_thread(keeper, fds, count) : 0;
	if (!error)
		return keeper;
	free(keeper);
	umn_fail(
		UMMUNOTIFY_UNAVAILABLE, ENODEV, "allow io_uring_setup or close_range in the seccomp profile, or raise `ulimit -u`",
		"the BPF link cannot be kept open safely: io_uring is refused (%s), and so is a thread with descriptors of its own (%s)",
		strerror(ring_error), strerror(error));
	return NULL;
}

void umn_keeper_release(struct umn_keeper *keeper)
{
	if (!keeper)
		return;
	if (keeper->ring) {
		munmap(keeper->ring, keeper->ring_size);
	} else {
		set_state(keeper, ENDING);
		pthread_join(keeper->thread, NULL);
	}
	free(keeper);
}

void umn_keeper_forget(struct umn_keeper *keeper)
{
	free(keeper);
}
