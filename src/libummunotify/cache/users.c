/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "cache/users.h"

#include <errno.h>
#include <linux/membarrier.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

struct umn_thread umn_no_thread;
__thread struct umn_thread *umn_thread __attribute__((tls_model("initial-exec"))) = &umn_no_thread;

/* Only grows, at its head, so no lock is needed; a child that copies it at any moment has a sound one. */
static struct umn_thread *threads;
static pthread_key_t ended;
static bool by_thread;

static int membarrier(int command)
{
	return (int)syscall(SYS_membarrier, command, 0, 0);
}

/* A thread-local destructor that is called later and uses a cache makes the thread take memory once more. */
static void end_thread(void *thread)
{
	umn_thread = &umn_no_thread;
	/* Release: the next owner goes on with these counts. */
	__atomic_store_n(&((struct umn_thread *)thread)->taken, 0, __ATOMIC_RELEASE);
}

static void start(void)
{
	int error = errno;

	by_thread = !pthread_key_create(&ended, end_thread) && !membarrier(MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED);
	errno = error;
}

void umn_users_start(void)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	pthread_once(&once, start);
}

/* Zeros. mmap, as the caller may hold any of malloc's locks. NULL: there is no memory. */
static void *allocate(size_t size)
{
	int error = errno;
	void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	errno = error;
	return memory == MAP_FAILED ? NULL : memory;
}

/* A signal handler may come here in between. Then the thread has taken memory twice, and uses one of the two. */
static struct umn_thread *take_thread(void)
{
	struct umn_thread *thread;
	uint32_t taken;

	for (thread = __atomic_load_n(&threads, __ATOMIC_ACQUIRE); thread; thread = thread->next) {
		taken = 0;
		if (__atomic_compare_exchange_n(&thread->taken, &taken, 1, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
			break;
	}
	if (!thread) {
		thread = allocate(sizeof *thread);
		if (!thread)
			return NULL;
		thread->taken = 1;
		thread->next = __atomic_load_n(&threads, __ATOMIC_RELAXED);
		/* Release: what is found there is initialised. A walk of the list after a barrier finds it: it comes before
		 * anything that the thread counts. */
		while (!__atomic_compare_exchange_n(&threads, &thread->next, thread, true, __ATOMIC_RELEASE, __ATOMIC_RELAXED))
			;
	}
	pthread_setspecific(ended, thread); /* failing that, the memory is not used again */
	umn_thread = thread;
	return thread;
}

static int32_t **chunk_at(struct umn_thread *thread, struct umn_tally tally)
{
	return (int32_t **)((char *)thread->chunk + tally.chunk);
}

static int32_t *make_count(struct umn_tally tally)
{
	struct umn_thread *mine = umn_thread != &umn_no_thread ? umn_thread : take_thread();
	int32_t **chunk, *none = NULL, *made;

	if (!mine)
		return NULL;
	chunk = chunk_at(mine, tally);
	if (!__atomic_load_n(chunk, __ATOMIC_RELAXED)) {
		made = allocate(UMN_COUNTS_PER_CHUNK * sizeof *made);
		if (!made)
			return NULL;
		/* A signal handler may have been faster. */
		if (!__atomic_compare_exchange_n(chunk, &none, made, false, __ATOMIC_RELEASE, __ATOMIC_RELAXED))
			munmap(made, UMN_COUNTS_PER_CHUNK * sizeof *made);
	}
	return umn_users_count(tally);
}

void umn_users_add(struct umn_tally tally, int32_t *others, int change)
{
	int32_t *count = by_thread ? make_count(tally) : NULL;

	if (!count) {
		__atomic_fetch_add(others, change, __ATOMIC_SEQ_CST);
#ifndef UMN_TSAN
		__atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
	} else if (change > 0) {
		umn_count_up(count);
	} else {
		umn_count_down(count);
	}
}

void umn_users_barrier(void)
{
	const struct timespec nap = {.tv_nsec = 10000000};
	int error = errno;

#ifndef UMN_TSAN
	/* For the users that are not counted by thread. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (!by_thread || !membarrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED))
		return;
	if (errno != EPERM || membarrier(MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED) || membarrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED))
		/* The program has forbidden it since it was registered. No CPU keeps a store to itself for as long as this. */
		nanosleep(&nap, NULL);
#else
	(void)nap;
#endif
	errno = error;
}

int32_t umn_users_sum(struct umn_tally tally, const int32_t *others)
{
	/* Counts may wrap where one thread acquires and another releases, for ever; the sum is right all the same. */
	uint32_t sum = (uint32_t)__atomic_load_n(others, UMN_OPEN_ORDER);
	const char *chunk;

	for (struct umn_thread *thread = __atomic_load_n(&threads, __ATOMIC_ACQUIRE); thread; thread = thread->next) {
		chunk = (const char *)__atomic_load_n(chunk_at(thread, tally), __ATOMIC_ACQUIRE);
		if (chunk)
			sum += (uint32_t)__atomic_load_n((const int32_t *)(chunk + tally.offset), UMN_OPEN_ORDER);
	}
	return (int32_t)sum;
}

uint64_t umn_users_sum64(struct umn_tally tally)
{
	const char *chunk;
	uint64_t sum = 0;

	for (struct umn_thread *thread = __atomic_load_n(&threads, __ATOMIC_ACQUIRE); thread; thread = thread->next) {
		chunk = (const char *)__atomic_load_n(chunk_at(thread, tally), __ATOMIC_ACQUIRE);
		if (chunk)
			sum += __atomic_load_n((const uint64_t *)(chunk + tally.offset), __ATOMIC_RELAXED);
	}
	return sum;
}
