/* SPDX-License-Identifier: BSD-3-Clause */
/* libummunotify, through nothing but its header. Compiled as C and as C++. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sys/wait.h>
#include <ummunotify.h>

#include "check.h"

static struct ummunotify *umn;

static bool is_uffd(void)
{
	return !strcmp(ummunotify_source(umn), "uffd");
}

static bool readable(void)
{
	/* With uffd the news may come after the change: then this waits for them. */
	struct pollfd polled = {ummunotify_fd(umn), POLLIN, 0};

	check(polled.fd >= 0);
	return poll(&polled, 1, 0) == 1;
}

static struct ummunotify_region *watch(void *address, size_t length, uint64_t cookie)
{
	struct ummunotify_region *region;

	if (ummunotify_watch(umn, address, length, cookie, &region)) {
		fprintf(stderr, "%s\n", ummunotify_error());
		abort();
	}
	return region;
}

static void test_the_case(void)
{
	char *a = get_pages(1, NULL), *b;
	struct ummunotify_event events[4];
	struct ummunotify_region *region = watch(a, PAGE, 77);
	uint64_t before = ummunotify_generation(umn);

	check(ummunotify_valid(region) && !ummunotify_changed(umn));
	check(ummunotify_read(umn, events, 4) == 0);
	munmap(a, PAGE);
	b = get_pages(1, a);
	check(a == b);
	check(!ummunotify_valid(region) && ummunotify_changed(umn) && ummunotify_generation(umn) != before);
	check(ummunotify_read(umn, events, 4) == 1);
	check(events[0].region == region && events[0].cookie == 77 && events[0].exact);
	check(events[0].start == (uint64_t)a && events[0].end == (uint64_t)a + PAGE);
	check(!ummunotify_changed(umn) && !ummunotify_valid(region));
	check(!ummunotify_renew(umn, region) && ummunotify_valid(region));
	madvise(b, PAGE, MADV_DONTNEED);
	check(!ummunotify_valid(region));
	check(!ummunotify_unwatch(umn, region));
	check(ummunotify_read(umn, events, 4) == 0); /* nothing is reported for it any more */
	munmap(b, PAGE);
}

static void test_order_and_room(void)
{
	enum { N = 300 };
	char *memory = get_pages(N, NULL);
	struct ummunotify_region *regions[N];
	struct ummunotify_event events[N];
	const int step = 7; /* coprime to N */
	int i, got = 0;
	ptrdiff_t n;

	for (i = 0; i < N; i++)
		regions[i] = watch(memory + i * PAGE, PAGE, i);
	check(!readable());
	for (i = 0; i < N; i++) {
		madvise(memory + i * step % N * PAGE, PAGE, MADV_DONTNEED);
		if (is_uffd())
			ummunotify_valid(regions[i * step % N]);
	}
	while (got < N) {
		check(readable());
		n = ummunotify_read(umn, events, 64);
		check(n > 0);
		for (i = 0; i < n; i++, got++)
			check(events[i].cookie == (uint64_t)(got * step % N));
	}
	check(ummunotify_read(umn, events, 1) == 0 && !readable());
	for (i = 0; i < N; i++)
		ummunotify_unwatch(umn, regions[i]);
	munmap(memory, N * PAGE);
}

static void test_errors(void)
{
	struct ummunotify_region *region;
	struct ummunotify *other;

	check(ummunotify_watch(umn, &region, 0, 0, &region) == -EINVAL && strstr(ummunotify_error(), "empty"));
	check(ummunotify_watch(umn, (void *)~15ul, 16, 0, &region) == -EINVAL);
	check(ummunotify_watch(umn, (void *)(1ul << 63), PAGE, 0, &region) == -EINVAL && strstr(ummunotify_error(), "user space"));
	check(ummunotify_open(&other, "bpf") == -EINVAL && strstr(ummunotify_error(), "ummunotify run"));
	if (is_uffd()) {
		char *shared = (char *)mmap(NULL, PAGE, PROT_READ, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

		check(ummunotify_watch(umn, shared, PAGE, 0, &region) == -EOPNOTSUPP);
		munmap(shared, PAGE);
		check(ummunotify_watch(umn, shared, PAGE, 0, &region) == -ENXIO);
	}
	setenv("UMMUNOTIFY_SOCKET", "/nowhere/socket", 1);
	check(ummunotify_open(&other, "daemon") == -ENODEV && strstr(ummunotify_error(), "/nowhere/socket"));
	unsetenv("UMMUNOTIFY_SOCKET");
	ummunotify_close(NULL);
}

/* Descriptors with this one's number and above. */
static int count_fds(void)
{
	int count = 0;

	for (int fd = 0; fd < 256; fd++)
		count += fcntl(fd, F_GETFD) >= 0;
	return count;
}

static void test_fork(void)
{
	char *memory = get_pages(2, NULL);
	struct ummunotify_region *region = watch(memory, PAGE, 1), *none;
	struct ummunotify_event event;
	struct ummunotify *own;
	int status, before = count_fds();
	pid_t child;

	check(!readable()); /* it has a descriptor now */
	child = fork();
	check(child >= 0);
	if (!child) {
		check(count_fds() < before);
		check(!ummunotify_valid(region) && ummunotify_changed(umn));
		check(ummunotify_read(umn, &event, 1) == -EBADF && strstr(ummunotify_error(), "fork"));
		check(ummunotify_watch(umn, memory, PAGE, 1, &none) == -EBADF);
		check(ummunotify_renew(umn, region) == -EBADF && ummunotify_unwatch(umn, region) == -EBADF);
		check(ummunotify_fd(umn) == -EBADF);
		ummunotify_close(umn);
		check(!ummunotify_open(&own, NULL));
		check(!ummunotify_watch(own, memory, PAGE, 1, &region));
		munmap(memory, PAGE);
		check(!ummunotify_valid(region));
		ummunotify_close(own);
		_exit(0);
	}
	check(waitpid(child, &status, 0) == child && status == 0);
	madvise(memory + PAGE, PAGE, MADV_DONTNEED);
	check(ummunotify_valid(region));
	madvise(memory, PAGE, MADV_DONTNEED);
	check(!ummunotify_valid(region) && ummunotify_read(umn, &event, 1) == 1);
	ummunotify_unwatch(umn, region);
	munmap(memory, 2 * PAGE);
}

static void *change_and_check(void *unused)
{
	char *memory = get_pages(8, NULL);
	struct ummunotify_event events[16];
	struct ummunotify_region *regions[8];
	ptrdiff_t n;
	int i;

	for (int round = 0; round < 500; round++) {
		for (i = 0; i < 8; i++)
			regions[i] = watch(memory + i * PAGE, PAGE, i);
		munmap(memory + 2 * PAGE, 4 * PAGE);
		for (i = 0; i < 8; i++)
			/* The others may have been invalidated by whoever gave up, which nobody does here. */
			check(ummunotify_valid(regions[i]) == (i < 2 || i >= 6) || is_uffd());
		for (i = 2; i < 6; i++)
			check(!ummunotify_valid(regions[i]));
		check((n = ummunotify_read(umn, events, 16)) >= 0);
		for (i = 0; i < 8; i++)
			ummunotify_unwatch(umn, regions[i]);
		/* Nobody else maps anything where there is a hole but these threads, and they take what they are given. */
		munmap(memory, 8 * PAGE);
		memory = get_pages(8, NULL);
	}
	munmap(memory, 8 * PAGE);
	return unused;
}

static void test_threads(void)
{
	pthread_t threads[4];

	for (int i = 0; i < 4; i++)
		check(!pthread_create(&threads[i], NULL, change_and_check, NULL));
	for (int i = 0; i < 4; i++)
		pthread_join(threads[i], NULL);
}

/* More than one segment holds. */
static void test_growing(void)
{
	enum { N = 30000 };
	static struct ummunotify_region *regions[N];
	char *memory = get_pages(16, NULL);
	struct ummunotify_event *events = (struct ummunotify_event *)calloc(N, sizeof *events);

	for (int i = 0; i < N; i++)
		regions[i] = watch(memory + i % 16 * PAGE + i / 16 % 4000, 8, i);
	munmap(memory, PAGE);
	for (int i = 0; i < N; i++)
		check(ummunotify_valid(regions[i]) == (i % 16 != 0));
	check(ummunotify_read(umn, events, N) == N / 16);
	for (int i = 0; i < N; i++)
		ummunotify_unwatch(umn, regions[i]);
	munmap(memory + PAGE, 15 * PAGE);
	free(events);
}

int main(int argc, char **argv)
{
	const struct test tests[] = {{"the_case", test_the_case}, {"order_and_room", test_order_and_room}, {"growing", test_growing},
				     {"threads", test_threads},	  {"fork", test_fork},			   {"errors", test_errors}};
	int before = count_fds(), result;

	if (ummunotify_open(&umn, NULL)) {
		fprintf(stderr, "%s\n", ummunotify_error());
		return 77;
	}
	fprintf(stderr, "source: %s\n", ummunotify_source(umn));
	result = run_tests(tests, sizeof tests / sizeof *tests, argc > 1 ? argv[1] : NULL);
	ummunotify_close(umn);
	check(count_fds() == before);
	return result;
}
