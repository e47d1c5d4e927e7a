/* SPDX-License-Identifier: BSD-3-Clause */
/* The counter, and waiting for the descriptor. */
#include "device.h"

#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/time.h>

static void test_counter(void)
{
	enum { N = 64 };
	int fd = open_device();
	char *memory = get_pages(2 * N, NULL);
	volatile uint64_t *counter = map_counter(fd), *again = map_counter(fd);
	struct ummunotify_event events[4];
	uint64_t changes = 0;
	unsigned int seed = 1;

	check(*counter == 0 && counter != again);
	change(memory);
	check(*counter == 0); /* nothing is watched */
	for (int i = 0; i < N; i++) {
		watch(fd, memory + i * PAGE, PAGE, 2 * i);
		watch(fd, memory, N * PAGE, 2 * i + 1);
	}
	check(*counter == 0);
	for (int i = 0; i < 2000; i++) {
		int page = rand_r(&seed) % (2 * N);

		change(memory + page * PAGE);
		changes += page < N; /* once, however many regions it hits */
		/* With uffd, changes beside the regions in the same mapping may count too. */
		check((*counter == changes || (is_uffd() && *counter > changes)) && *again == *counter);
		changes = *counter;
		if (i % 100 == 0) /* reading does not count */
			get(fd, events, rand_r(&seed) % 4);
		check(*counter == changes);
	}
	for (int i = 0; i < 2 * N; i++)
		unwatch(fd, i);
	change(memory);
	check(is_uffd() || *counter == changes);
	munmap(memory, 2 * N * PAGE);
	munmap((void *)counter, PAGE);
	munmap((void *)again, PAGE);
	close(fd);
}

static void test_counter_page(void)
{
	int fd = open_device();
	char *memory = get_pages(1, NULL);
	volatile uint64_t *counter;

	check(mmap(NULL, 2 * PAGE, PROT_READ, MAP_SHARED, fd, 0) == MAP_FAILED && errno == EINVAL);
	check(mmap(NULL, 0, PROT_READ, MAP_SHARED, fd, 0) == MAP_FAILED && errno == EINVAL);
	check(mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, PAGE) == MAP_FAILED && errno == EINVAL);
	check(mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, fd, 0) == MAP_FAILED && errno == EINVAL);
	check(mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED && errno == EACCES);
	check(mmap(NULL, PAGE, PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED && errno == EACCES);
	counter = mmap64(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0);
	check(counter != MAP_FAILED);
	check(mprotect((void *)counter, PAGE, PROT_READ | PROT_WRITE) == -1 && errno == EACCES);
	check(mmap(memory, PAGE, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0) == memory);
	check(*counter == 0 && *(uint64_t *)memory == 0);
	close(fd);
	check(*counter == 0); /* the mapping stays */
	munmap((void *)counter, PAGE);
	munmap(memory, PAGE);
}

static void test_poll(void)
{
	int fd = open_device();
	char *memory = get_pages(1, NULL);
	struct ummunotify_event events[4];
	struct pollfd polled = {fd, POLLIN | POLLOUT | POLLRDNORM, 0};

	watch(fd, memory, PAGE, 1);
	for (int i = 0; i < 20; i++) {
		check(!readable(fd));
		change(memory);
		check(poll(&polled, 1, 0) == 1); /* at once */
		check(polled.revents == (POLLIN | POLLRDNORM));
		check(ppoll(&polled, 1, NULL, NULL) == 1);
		check(readable(fd)); /* still */
		check(get(fd, events, 4) == 2);
	}
	close(fd);
	munmap(memory, PAGE);
}

static void test_select(void)
{
	int fd = open_device();
	char *memory = get_pages(1, NULL);
	struct ummunotify_event events[4];
	struct timeval none = {0, 0};
	fd_set set;

	watch(fd, memory, PAGE, 1);
	for (int i = 0; i < 20; i++) {
		FD_ZERO(&set);
		FD_SET(fd, &set);
		check(select(fd + 1, &set, NULL, NULL, &none) == 0);
		change(memory);
		FD_SET(fd, &set);
		check(select(fd + 1, &set, NULL, NULL, NULL) == 1 && FD_ISSET(fd, &set));
		check(pselect(fd + 1, &set, NULL, NULL, NULL, NULL) == 1);
		check(get(fd, events, 4) == 2);
	}
	close(fd);
	munmap(memory, PAGE);
}

static void test_epoll(void)
{
	int fd = open_device(), epoll = epoll_create1(0);
	char *memory = get_pages(2, NULL);
	struct epoll_event event = {.events = EPOLLIN, .data.u64 = 42};
	struct ummunotify_event events[4];

	watch(fd, memory, PAGE, 1);
	watch(fd, memory + PAGE, PAGE, 2);
	check(!epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event));
	for (int i = 0; i < 20; i++) {
		check(epoll_wait(epoll, &event, 1, 0) == 0);
		change(memory);
		change(memory + PAGE);
		for (int j = 0; j < 3; j++) { /* as long as there is something */
			event.data.u64 = 0;
			check(epoll_wait(epoll, &event, 1, 30000) == 1 && event.data.u64 == 42 && event.events == EPOLLIN);
		}
		check(get(fd, events, 1) == 1);
		check(epoll_wait(epoll, &event, 1, 0) == 1);
		check(get(fd, events, 4) == 2);
	}
	close(fd);
	close(epoll);
	munmap(memory, 2 * PAGE);
}

static void test_epoll_edge(void)
{
	int fd = open_device(), epoll = epoll_create1(0), n;
	char *memory = get_pages(2, NULL);
	struct epoll_event event = {.events = EPOLLIN | EPOLLET};
	struct ummunotify_event events[4];

	watch(fd, memory, PAGE, 1);
	watch(fd, memory + PAGE, PAGE, 2);
	check(!epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event));
	check(epoll_wait(epoll, &event, 1, 0) == 0);
	for (int i = 0; i < 100; i++) {
		change(memory);
		check(epoll_wait(epoll, &event, 1, 30000) == 1);
		if (!is_uffd()) /* its thread may be about to say so once more */
			check(epoll_wait(epoll, &event, 1, 0) == 0);
		/* As is usual with edges: read until there is nothing. */
		while ((n = get(fd, events, 1 + i % 3)) > 0)
			continue;
		check(n == -EAGAIN);
	}
	/* A change while others are unread, and one after a part was read. */
	change(memory);
	check(epoll_wait(epoll, &event, 1, 30000) == 1);
	check(get(fd, events, 1) == 1);
	change(memory + PAGE);
	check(epoll_wait(epoll, &event, 1, 30000) == 1);
	check(get(fd, events, 4) == 2);
	close(fd);
	close(epoll);
	munmap(memory, 2 * PAGE);
}

const struct test waiting_tests[] = {
	{"counter", test_counter},
	{"counter_page", test_counter_page},
	{"poll", test_poll},
	{"select", test_select},
	{"epoll", test_epoll},
	{"epoll_edge", test_epoll_edge},
	{0},
};
