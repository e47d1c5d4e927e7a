/* SPDX-License-Identifier: BSD-3-Clause */
/* Threads. */
#include "device.h"

#include <sched.h>

#define THREADS 8
#define EACH 300

static int shared_fd;
static volatile uint64_t *shared_counter;
static uint32_t seen[THREADS * EACH];
static int done;

static void *register_and_change(void *argument)
{
	const uint64_t base = (uint64_t)argument * EACH;

	for (int i = 0; i < EACH; i++) {
		char *memory = get_pages(1, NULL);
		uint64_t before;

		watch(shared_fd, memory, PAGE, base + i);
		before = *shared_counter;
		munmap(memory, PAGE);
		/* userfaultfd may be telling of another thread's change just then: it takes some microseconds (docs/c.md). */
		while (is_uffd() && *shared_counter == before)
			sched_yield();
		check(*shared_counter != before);
		/* Until somebody has read it. */
		while (!__atomic_load_n(&seen[base + i], __ATOMIC_ACQUIRE))
			sched_yield();
		unwatch(shared_fd, base + i);
	}
	__sync_fetch_and_add(&done, 1);
	return NULL;
}

static void *read_them(void *unused)
{
	struct ummunotify_event events[3];
	struct pollfd polled = {shared_fd, POLLIN, 0};
	int n;

	while (__sync_fetch_and_add(&done, 0) < THREADS) {
		poll(&polled, 1, 10);
		while ((n = get(shared_fd, events, 3)) > 0)
			for (int i = 0; i < n; i++)
				if (events[i].type == UMMUNOTIFY_EVENT_TYPE_INVAL)
					__sync_fetch_and_add(&seen[events[i].user_cookie_counter], 1);
		check(n == -EAGAIN);
	}
	return unused;
}

static void test_threads(void)
{
	pthread_t threads[THREADS + 2];

	shared_fd = open_device();
	shared_counter = map_counter(shared_fd);
	for (uint64_t i = 0; i < THREADS; i++)
		check(!pthread_create(&threads[i], NULL, register_and_change, (void *)i));
	for (int i = THREADS; i < THREADS + 2; i++)
		check(!pthread_create(&threads[i], NULL, read_them, NULL));
	for (int i = 0; i < THREADS + 2; i++)
		pthread_join(threads[i], NULL);
	nothing(shared_fd);
	munmap((void *)shared_counter, PAGE);
	close(shared_fd);
}

const struct test thread_tests[] = {
	{"threads", test_threads},
	{0},
};
