/* SPDX-License-Identifier: BSD-3-Clause */
/* libummunotify, through nothing but its header. Compiled as C and as C++. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stddef.h>
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

/* Was the change reported as the only one, with its range? */
static bool the_case(void)
{
	char *a = get_pages(1, NULL), *b;
	struct ummunotify_event events[4];
	struct ummunotify_region *region = watch(a, PAGE, 77);
	uint64_t before = ummunotify_generation(umn);
	bool exact;

	check(ummunotify_valid(region) && !ummunotify_changed(umn));
	check(ummunotify_read(umn, events, 4) == 0);
	munmap(a, PAGE);
	b = get_pages(1, a);
	check(a == b);
	check(!ummunotify_valid(region) && ummunotify_changed(umn) && ummunotify_generation(umn) != before);
	check(ummunotify_read(umn, events, 4) == 1);
	check(events[0].region == region && events[0].cookie == 77);
	exact = events[0].exact;
	check(events[0].start == (uint64_t)a && events[0].end == (uint64_t)a + PAGE);
	check(!ummunotify_changed(umn) && !ummunotify_valid(region));
	check(!ummunotify_renew(umn, region) && ummunotify_valid(region));
	madvise(b, PAGE, MADV_DONTNEED);
	check(!ummunotify_valid(region));
	check(!ummunotify_unwatch(umn, region));
	check(ummunotify_read(umn, events, 4) == 0); /* nothing is reported for it any more */
	munmap(b, PAGE);
	return exact;
}

static void test_the_case(void)
{
	int tries = 0;

	/* On a busy machine everything may be invalidated besides (uffd), or another process may change the same addresses (kvm). */
	while (!the_case())
		check(++tries < 100);
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
	char *kept = getenv("UMMUNOTIFY_SOCKET") ? strdup(getenv("UMMUNOTIFY_SOCKET")) : NULL;
	struct ummunotify_region *region;
	struct ummunotify *other;

	check(ummunotify_watch(umn, &region, 0, 0, &region) == -EINVAL && strstr(ummunotify_error(), "empty"));
	check(ummunotify_watch(umn, (void *)~15ul, 16, 0, &region) == -EINVAL);
	check(ummunotify_watch(umn, (void *)(1ul << 63), PAGE, 0, &region) == -EINVAL && strstr(ummunotify_error(), "user space"));
	check(ummunotify_open(&other, "bpf") == -ENODEV && strstr(ummunotify_error(), "ummunotify run"));
	check(!other && ummunotify_failure()->code == UMMUNOTIFY_UNAVAILABLE);
	check(ummunotify_open(&other, "magic") == -EINVAL && ummunotify_failure()->code == UMMUNOTIFY_UNKNOWN_SOURCE);
	if (is_uffd()) {
		char *shared = (char *)mmap(NULL, PAGE, PROT_READ, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

		check(ummunotify_watch(umn, shared, PAGE, 0, &region) == -EOPNOTSUPP);
		munmap(shared, PAGE);
		/* Not where `shared` was: a sanitizer's thread may have memory there by now. */
		check(ummunotify_watch(umn, (void *)(1ul << 20), PAGE, 0, &region) == -ENXIO);
	}
	setenv("UMMUNOTIFY_SOCKET", "/nowhere/socket", 1);
	check(ummunotify_open(&other, "daemon") == -ENODEV && strstr(ummunotify_error(), "/nowhere/socket"));
	check(!strcmp(ummunotify_tried(0)->source, "daemon") && strstr(ummunotify_tried(0)->why, "/nowhere/socket"));
	check(*ummunotify_tried(0)->remedy && !ummunotify_tried(1));
	if (kept)
		setenv("UMMUNOTIFY_SOCKET", kept, 1);
	else
		unsetenv("UMMUNOTIFY_SOCKET");
	free(kept);
	ummunotify_close(NULL);
}

/* "what: why; remedy", in parts and as a line. */
static void test_failure(void)
{
	const struct ummunotify_failure *failure;
	struct ummunotify_region *region;
	char line[2000];

	check(ummunotify_watch(umn, (void *)(1ul << 63), PAGE, 0, &region) == -EINVAL);
	failure = ummunotify_failure();
	check(failure->code == UMMUNOTIFY_RANGE && failure->error == EINVAL && strstr(failure->what, "cannot watch 4096 bytes"));
	check(*failure->why && !*failure->mapping);
	snprintf(line, sizeof line, "%s: %s%s%s", failure->what, failure->why, *failure->remedy ? "; " : "", failure->remedy);
	check(!strcmp(line, ummunotify_error()));
	if (is_uffd()) {
		char *shared = (char *)mmap(NULL, PAGE, PROT_READ, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

		check(ummunotify_watch(umn, shared, PAGE, 0, &region) == -EOPNOTSUPP);
		failure = ummunotify_failure();
		check(failure->code == UMMUNOTIFY_UNSUPPORTED && strstr(failure->why, "shared memory"));
		snprintf(line, sizeof line, "0x%lx-", (unsigned long)shared);
		check(!strncmp(failure->mapping, line, strlen(line)) && *failure->remedy);
		munmap(shared, PAGE);
	}
}

static void test_sources(void)
{
	const char *names[16];
	int count = ummunotify_sources("daemon", names, 16);

	check(count >= 1 && !strcmp(names[0], "daemon"));
	count = ummunotify_sources("daemon:zap", names, 16);
	check(count == 1 && !strcmp(names[0], "daemon:zap"));
	check(ummunotify_sources("uffd", NULL, 0) == 1);
	check(ummunotify_sources("magic", names, 16) == -EINVAL && ummunotify_failure()->code == UMMUNOTIFY_UNKNOWN_SOURCE);
	/* What it is called can be given back. */
	check(ummunotify_sources(ummunotify_source(umn), names, 16) == 1 && !strcmp(names[0], ummunotify_source(umn)));
	check(ummunotify_version()[0] >= '0' && ummunotify_version()[0] <= '9' && strchr(ummunotify_version(), '.'));
}

/* As a caller that was compiled with an older or a newer version has it. */
static void test_open_with(void)
{
	struct {
		struct ummunotify_options known;
		char later[64];
	} options;
	struct ummunotify *other;
	struct ummunotify_region *regions[3];
	char *memory = get_pages(1, NULL);

	memset(&options, 0, sizeof options);
	options.known.source = ummunotify_source(umn);
	options.known.max_regions = 2;
	memset(options.later, 0xff, sizeof options.later);
	options.known.size = sizeof options;
	check(!ummunotify_open_with(&other, &options.known));
	check(!strcmp(ummunotify_source(other), ummunotify_source(umn)));
	check(!ummunotify_watch(other, memory, 1, 0, &regions[0]) && !ummunotify_watch(other, memory, 1, 0, &regions[1]));
	check(ummunotify_watch(other, memory, 1, 0, &regions[2]) == -ENOSPC && ummunotify_failure()->code == UMMUNOTIFY_LIMIT);
	check(!ummunotify_unwatch(other, regions[0]) && !ummunotify_watch(other, memory, 1, 0, &regions[2]));
	ummunotify_close(other);
	/* It knows of the source, but of no limit. */
	options.known.size = offsetof(struct ummunotify_options, max_regions);
	check(!ummunotify_open_with(&other, &options.known));
	for (int i = 0; i < 3; i++)
		check(!ummunotify_watch(other, memory, 1, 0, &regions[i]));
	ummunotify_close(other);
	munmap(memory, PAGE);
}

/* ---- Waiting, dispatching, shutting down ---- */

static void *change_later(void *page)
{
	usleep(20000);
	madvise(page, PAGE, MADV_DONTNEED);
	return NULL;
}

static void test_wait(void)
{
	char *memory = get_pages(1, NULL);
	struct ummunotify_region *region = watch(memory, PAGE, 1);
	struct ummunotify_event event;
	pthread_t thread;

	check(ummunotify_read(umn, &event, 1) == 0); /* after this there is nothing */
	check(ummunotify_wait(umn, 0) == 0 && ummunotify_wait(umn, 1) == 0);
	check(!pthread_create(&thread, NULL, change_later, memory));
	check(ummunotify_wait(umn, -1) == 1 && ummunotify_wait(umn, 0) == 1); /* until it is read */
	pthread_join(thread, NULL);
	check(ummunotify_valid_now(region) != 1);
	check(ummunotify_read(umn, &event, 1) == 1 && event.region == region);
	check(!ummunotify_renew(umn, region));
	while (ummunotify_valid_now(region) == -EAGAIN)
		usleep(1000);
	check(ummunotify_valid_now(region) == 1);
	ummunotify_unwatch(umn, region);
	munmap(memory, PAGE);
}

static void test_stats(void)
{
	struct ummunotify_stats before, after;
	char *memory = get_pages(1, NULL);
	struct ummunotify_region *region;

	check(!ummunotify_stats(umn, &before));
	region = watch(memory, PAGE, 1);
	check(!ummunotify_stats(umn, &after) && !ummunotify_check(umn));
	check(after.regions == before.regions + 1 && after.segments >= 1 && after.levels >= 1);
	check(after.bytes > after.free_bytes && after.free_bytes > 0);
	ummunotify_unwatch(umn, region);
	check(!ummunotify_stats(umn, &after) && after.regions == before.regions);
	munmap(memory, PAGE);
}

struct dispatched {
	int calls, stop_at;
	uint64_t cookies[8];
	bool nested;
};

static int note_event(const struct ummunotify_event *event, void *context)
{
	struct dispatched *d = (struct dispatched *)context;

	check(ummunotify_changed(umn)); /* until it is done */
	if (d->nested)
		check(ummunotify_dispatch(umn, note_event, d) == 0); /* at once, and delivers nothing */
	check(!ummunotify_renew(umn, event->region));		     /* everything but closing is allowed */
	d->cookies[d->calls++] = event->cookie;
	return d->calls == d->stop_at;
}

static void test_dispatch(void)
{
	char *memory = get_pages(4, NULL);
	struct ummunotify_region *regions[4];
	struct dispatched d;
	ptrdiff_t n;

	for (int i = 0; i < 4; i++)
		regions[i] = watch(memory + i * PAGE, PAGE, 10 + i);
	memset(&d, 0, sizeof d);
	check(ummunotify_dispatch(umn, note_event, &d) == 0 && d.calls == 0);
	d.nested = true;
	for (int i = 0; i < 4; i++)
		madvise(memory + i * PAGE, PAGE, MADV_DONTNEED);
	check(ummunotify_dispatch(umn, note_event, &d) == 4 && !ummunotify_changed(umn));
	for (int i = 0; i < 4; i++)
		check(d.cookies[i] == 10u + (unsigned)i && ummunotify_valid(regions[i]));
	/* Stopped: the others stay for the next call. */
	for (int i = 0; i < 4; i++)
		madvise(memory + i * PAGE, PAGE, MADV_DONTNEED), memory[i * PAGE] = 1;
	memset(&d, 0, sizeof d);
	d.stop_at = 2;
	for (int i = 0; i < 4; i++)
		madvise(memory + i * PAGE, PAGE, MADV_DONTNEED);
	check(ummunotify_dispatch(umn, note_event, &d) == -ECANCELED && d.calls == 2 && ummunotify_changed(umn));
	n = ummunotify_dispatch(umn, note_event, &d);
	check(n == 3 && d.calls == 5 && d.cookies[1] == d.cookies[2]); /* the one that stopped it is delivered again */
	check(!ummunotify_changed(umn));
	for (int i = 0; i < 4; i++)
		ummunotify_unwatch(umn, regions[i]);
	munmap(memory, 4 * PAGE);
}

/* Threads that share a notifier: once `changed` is false, or a dispatch has returned, what was hit before was acted upon. */
enum { SHARERS = 3, SHARED = 8 };
static struct {
	char *memory;
	struct ummunotify_region *region;
	uint32_t changed, acted; /* how often its owner has changed it, and callbacks have seen it by */
} shared[SHARERS * SHARED];

static int act(const struct ummunotify_event *event, void *context)
{
	const uint64_t i = event->cookie;
	uint32_t changed = __atomic_load_n(&shared[i].changed, __ATOMIC_ACQUIRE);

	(void)context;
	check(!ummunotify_renew(umn, event->region));
	if (i % 3 == 0)
		sched_yield(); /* another thread looks now */
	__atomic_store_n(&shared[i].acted, changed, __ATOMIC_RELEASE);
	return 0;
}

static void *share(void *argument)
{
	const int first = (int)(intptr_t)argument * SHARED;
	unsigned int seed = (unsigned int)first + 1;

	for (int round = 0; round < 1000; round++) {
		int i = first + (int)(rand_r(&seed) % SHARED);

		/* Before the change: the callback acts upon it at the latest state that it can see. */
		__atomic_add_fetch(&shared[i].changed, 1, __ATOMIC_RELEASE);
		madvise(shared[i].memory, PAGE, MADV_DONTNEED);
		*(volatile char *)shared[i].memory = 1;
		if (round % 2 == 0)
			check(ummunotify_dispatch(umn, act, NULL) >= 0);
		else
			while (ummunotify_changed(umn))
				check(ummunotify_dispatch(umn, act, NULL) >= 0);
		check(__atomic_load_n(&shared[i].acted, __ATOMIC_ACQUIRE) == shared[i].changed);
	}
	return NULL;
}

static void test_dispatch_by_threads(void)
{
	pthread_t threads[SHARERS];

	for (int i = 0; i < SHARERS * SHARED; i++) {
		shared[i].memory = get_pages(1, NULL);
		shared[i].region = watch(shared[i].memory, PAGE, (uint64_t)i);
	}
	for (int i = 0; i < SHARERS; i++)
		check(!pthread_create(&threads[i], NULL, share, (void *)(intptr_t)i));
	for (int i = 0; i < SHARERS; i++)
		pthread_join(threads[i], NULL);
	for (int i = 0; i < SHARERS * SHARED; i++) {
		ummunotify_unwatch(umn, shared[i].region);
		munmap(shared[i].memory, PAGE);
	}
}

static struct ummunotify *short_lived;

static bool is_closed(ptrdiff_t result)
{
	check(result >= 0 || (result == -ESHUTDOWN && ummunotify_failure()->code == UMMUNOTIFY_CLOSED));
	return result < 0;
}

static int ignore_event(const struct ummunotify_event *event, void *context)
{
	(void)event, (void)context;
	return 0;
}

static void *use_until_shutdown(void *argument)
{
	struct ummunotify_region *region;
	struct ummunotify_event events[4];
	char *page = get_pages(1, NULL);

	for (;;) {
		if (argument && is_closed(ummunotify_wait(short_lived, -1)))
			break;
		if (!argument && is_closed(ummunotify_watch(short_lived, page, PAGE, 0, &region)))
			break;
		if (!argument && (madvise(page, PAGE, MADV_DONTNEED), false))
			break;
		if (is_closed(ummunotify_dispatch(short_lived, ignore_event, NULL)) ||
		    is_closed(ummunotify_read(short_lived, events, 4)))
			break;
		if (!argument && is_closed(ummunotify_unwatch(short_lived, region)))
			break;
	}
	munmap(page, PAGE);
	return NULL;
}

static void test_shutdown(void)
{
	struct ummunotify_region *region, *other;
	struct ummunotify_stats stats;
	pthread_t threads[4];
	char *memory = get_pages(1, NULL);

	for (int round = 0; round < 10; round++) {
		check(!ummunotify_open(&short_lived, ummunotify_source(umn)));
		check(!ummunotify_watch(short_lived, memory, PAGE, 0, &region));
		for (intptr_t i = 0; i < 4; i++)
			check(!pthread_create(&threads[i], NULL, use_until_shutdown, (void *)(i / 2)));
		usleep((useconds_t)(1000 * round));
		ummunotify_shutdown(short_lived);
		check(!ummunotify_valid(region) && ummunotify_changed(short_lived));
		for (int i = 0; i < 4; i++)
			pthread_join(threads[i], NULL);
		check(ummunotify_check(short_lived) == -ESHUTDOWN && ummunotify_stats(short_lived, &stats) == -ESHUTDOWN);
		check(ummunotify_watch(short_lived, memory, PAGE, 0, &other) == -ESHUTDOWN);
		check(ummunotify_renew(short_lived, region) == -ESHUTDOWN && ummunotify_fd(short_lived) == -ESHUTDOWN);
		ummunotify_shutdown(short_lived); /* more than once */
		ummunotify_close(short_lived);
	}
	munmap(memory, PAGE);
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
		/* Not the hole: the address sanitizer may have mapped memory there for another thread. */
		munmap(memory, 2 * PAGE);
		munmap(memory + 6 * PAGE, 2 * PAGE);
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
	ptrdiff_t count;

	for (int i = 0; i < N; i++)
		regions[i] = watch(memory + i % 16 * PAGE + i / 16 % 4000, 8, i);
	munmap(memory, PAGE);
	/* With uffd, false alarms where the news takes longer than 10 ms. */
	for (int i = 0; i < N; i++)
		check(ummunotify_valid(regions[i]) == (i % 16 != 0) || (is_uffd() && i % 16));
	count = ummunotify_read(umn, events, N);
	check(count == N / 16 || (is_uffd() && count > N / 16));
	for (int i = 0; i < N; i++)
		ummunotify_unwatch(umn, regions[i]);
	munmap(memory + PAGE, 15 * PAGE);
	free(events);
}

int main(int argc, char **argv)
{
	const struct test tests[] = {{"the_case", test_the_case},
				     {"order_and_room", test_order_and_room},
				     {"growing", test_growing},
				     {"threads", test_threads},
				     {"fork", test_fork},
				     {"errors", test_errors},
				     {"failure", test_failure},
				     {"sources", test_sources},
				     {"open_with", test_open_with},
				     {"wait", test_wait},
				     {"stats", test_stats},
				     {"dispatch", test_dispatch},
				     {"dispatch_by_threads", test_dispatch_by_threads},
				     {"shutdown", test_shutdown}};
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
