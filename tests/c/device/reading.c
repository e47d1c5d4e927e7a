/* SPDX-License-Identifier: BSD-3-Clause */
/* What read() returns. */
#include "device.h"

#include <sys/uio.h>

static void test_event_layout(void)
{
	check(sizeof(struct ummunotify_event) == 32 && offsetof(struct ummunotify_event, flags) == 4 &&
	      offsetof(struct ummunotify_event, hint_start) == 8 && offsetof(struct ummunotify_event, hint_end) == 16 &&
	      offsetof(struct ummunotify_event, user_cookie_counter) == 24);

	int fd = open_device();
	char *memory = get_pages(1, NULL);
	unsigned char bytes[96];
	uint64_t word;

	memset(bytes, 0xaa, sizeof bytes);
	watch(fd, memory, PAGE, 0x1122334455667788);
	change(memory);
	check(read(fd, bytes, sizeof bytes) == 64);
	check(!memcmp(bytes, "\0\0\0\0\1\0\0\0", 8)); /* INVAL, HINT */
	memcpy(&word, bytes + 8, 8);
	check(word == (uint64_t)memory);
	memcpy(&word, bytes + 16, 8);
	check(word == (uint64_t)memory + PAGE);
	check(!memcmp(bytes + 24, "\x88\x77\x66\x55\x44\x33\x22\x11", 8));
	check(!memcmp(bytes + 32, "\1\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\1\0\0\0\0\0\0\0", 32)); /* LAST, counter 1 */
	check(bytes[64] == 0xaa && bytes[95] == 0xaa);
	close(fd);
	munmap(memory, PAGE);
}

static void test_hint(void)
{
	int fd = open_device();
	char *memory = get_pages(8, NULL);
	struct ummunotify_event events[4];

	/* Clipped to the region, which is of bytes, not of pages. */
	watch(fd, memory + 10, 3 * PAGE, 1);
	madvise(memory, 8 * PAGE, MADV_DONTNEED);
	check(get(fd, events, 4) == 2);
	hint_is(&events[0], memory + 10, memory + 10 + 3 * PAGE);
	change(memory + 3 * PAGE); /* its last 10 bytes */
	check(get(fd, events, 4) == 2);
	hint_is(&events[0], memory + 3 * PAGE, memory + 3 * PAGE + 10);
	change(memory + PAGE);
	check(get(fd, events, 4) == 2);
	hint_is(&events[0], memory + PAGE, memory + 2 * PAGE);
	munmap(memory + 2 * PAGE, 4 * PAGE);
	check(get(fd, events, 4) == 2);
	hint_is(&events[0], memory + 2 * PAGE, memory + 10 + 3 * PAGE);
	close(fd);
	munmap(memory, 8 * PAGE);
}

static void test_no_hint(void)
{
	int fd = open_device();
	char *memory = get_pages(4, NULL);
	struct ummunotify_event events[4];

	watch(fd, memory, 4 * PAGE, 1);
	change(memory);
	change(memory + PAGE);
	check(get(fd, events, 4) == 2); /* once */
	is_inval(&events[0], 1);
	no_hint(&events[0], memory, memory + 4 * PAGE);
	change(memory);
	change(memory); /* the same twice is two changes as well */
	check(get(fd, events, 4) == 2);
	no_hint(&events[0], memory, memory + 4 * PAGE);
	for (int i = 0; i < 1000; i++)
		change(memory + i % 4 * PAGE);
	check(get(fd, events, 4) == 2);
	no_hint(&events[0], memory, memory + 4 * PAGE);
	change(memory); /* exact again */
	check(get(fd, events, 4) == 2);
	hint_is(&events[0], memory, memory + PAGE);
	close(fd);
	munmap(memory, 4 * PAGE);
}

static void test_order(void)
{
	enum { N = 100, STEP = 7 }; /* coprime */
	int fd = open_device();
	char *memory = get_pages(N, NULL);
	struct ummunotify_event events[N + 1];

	for (int i = 0; i < N; i++)
		watch(fd, memory + i * PAGE, PAGE, i);
	for (int i = 0; i < N; i++)
		change(memory + i * STEP % N * PAGE);
	for (int i = N - 1; i >= 0; i -= 3) /* later hits change nothing */
		change(memory + i * PAGE);
	check(get(fd, events, N + 1) == N + 1);
	for (int i = 0; i < N; i++)
		is_inval(&events[i], i * STEP % N);
	close(fd);
	munmap(memory, N * PAGE);
}

static void test_last(void)
{
	int fd = open_device();
	char *memory = get_pages(2, NULL);
	volatile uint64_t *counter = map_counter(fd);
	struct ummunotify_event events[4];

	watch(fd, memory, PAGE, 1);
	watch(fd, memory + PAGE, PAGE, 2);
	nothing(fd); /* none without an INVAL */
	change(memory);
	check(get(fd, events, 4) == 2);
	is_inval(&events[0], 1);
	is_last(&events[1], *counter);
	nothing(fd);

	/* It needs room. */
	change(memory);
	change(memory + PAGE);
	check(get(fd, events, 1) == 1);
	is_inval(&events[0], 1);
	check(readable(fd));
	check(get(fd, events, 1) == 1);
	is_inval(&events[0], 2);
	check(readable(fd));
	check(get(fd, events, 1) == 1);
	is_last(&events[0], *counter);
	check(!readable(fd));
	nothing(fd);

	/* What comes in between is reported before it. */
	change(memory);
	check(get(fd, events, 1) == 1);
	change(memory + PAGE);
	check(get(fd, events, 4) == 2);
	is_inval(&events[0], 2);
	is_last(&events[1], *counter);
	nothing(fd);

	/* The list becomes empty by unregistering, too. */
	change(memory);
	change(memory + PAGE);
	check(get(fd, events, 1) == 1);
	unwatch(fd, 2);
	check(readable(fd));
	check(get(fd, events, 4) == 1);
	is_last(&events[0], *counter);
	nothing(fd);
	check(*counter == 7);
	close(fd);
	munmap(memory, 2 * PAGE);
	munmap((void *)counter, PAGE);
}

static void test_partial_reads(void)
{
	static const int sizes[] = {1, 2, 3, 31, 63, 64, 65, 127, 128, 129, 192, 300};
	enum { N = 192 };
	int fd = open_device();
	char *memory = get_pages(N, NULL);
	struct ummunotify_event events[310];
	int got, n;

	for (int i = 0; i < N; i++)
		watch(fd, memory + i * PAGE, PAGE, 1000 + i);
	for (size_t size = 0; size < sizeof sizes / sizeof *sizes; size++) {
		for (int i = 0; i < N; i++)
			change(memory + i * PAGE);
		for (got = 0; got <= N; got += n) {
			wait_readable(fd);
			n = get(fd, events, sizes[size]);
			check(n == (sizes[size] < N + 1 - got ? sizes[size] : N + 1 - got)); /* as many as fit */
			for (int i = 0; i < n && got + i < N; i++)
				is_inval(&events[i], 1000 + got + i);
		}
		check(events[n - 1].type == UMMUNOTIFY_EVENT_TYPE_LAST);
		nothing(fd);
	}
	close(fd);
	munmap(memory, N * PAGE);
}

static void test_buffers_that_do_not_fit(void)
{
	int fd = open_device();
	char *memory = get_pages(2, NULL), bytes[100];

	watch(fd, memory, PAGE, 1);
	watch(fd, memory + PAGE, PAGE, 2);
	check(read(fd, bytes, 0) == -1 && errno == EAGAIN);
	check(read(fd, bytes, 31) == -1 && errno == EAGAIN);
	change(memory);
	change(memory + PAGE);
	wait_readable(fd);
	check(read(fd, bytes, 0) == 0 && read(fd, bytes, 31) == 0);
	check(read(fd, bytes, 95) == 64); /* whole events only */
	check(read(fd, bytes, 95) == 32);
	nothing(fd);
	close(fd);
	munmap(memory, 2 * PAGE);
}

static void test_readv(void)
{
	int fd = open_device();
	char *memory = get_pages(3, NULL);
	struct ummunotify_event events[4];
	struct iovec pieces[] = {{&events[0], 64}, {&events[2], 64}};

	for (int i = 0; i < 3; i++)
		watch(fd, memory + i * PAGE, PAGE, i);
	check(readv(fd, pieces, 2) == -1 && errno == EAGAIN);
	for (int i = 0; i < 3; i++)
		change(memory + i * PAGE);
	check(readv(fd, pieces, 2) == 128);
	for (int i = 0; i < 3; i++)
		is_inval(&events[i], i);
	is_last(&events[3], 3);
	change(memory);
	check(__read_chk(fd, events, sizeof events, sizeof events) == 64);
	close(fd);
	munmap(memory, 3 * PAGE);
}

static void test_stays_registered(void)
{
	int fd = open_device();
	char *memory = get_pages(1, NULL);
	struct ummunotify_event events[4];

	watch(fd, memory, PAGE, 1);
	for (int i = 0; i < 100; i++) {
		change(memory);
		check(get(fd, events, 4) == 2);
		hint_is(&events[0], memory, memory + PAGE);
		is_last(&events[1], i + 1);
	}
	/* Other memory at the same place is watched too, with uffd from the reading on. */
	munmap(memory, PAGE);
	check(get_pages(1, memory) == memory);
	check(get(fd, events, 4) == 2);
	change(memory);
	check(get(fd, events, 4) == 2);
	munmap(memory, PAGE);
	check(get(fd, events, 4) == 2);
	if (!is_uffd()) { /* which forgets it, as nothing is mapped */
		get_pages(1, memory);
		change(memory);
		wait_readable(fd);
		check(get(fd, events, 4) == 2);
		munmap(memory, PAGE);
	}
	close(fd);
}

static void *change_later(void *page)
{
	usleep(20000);
	change(page);
	return NULL;
}

static void test_blocking(void)
{
	int fd = open(DEVICE, O_RDONLY);
	char *memory = get_pages(1, NULL);
	struct ummunotify_event events[4];
	pthread_t thread;

	watch(fd, memory, PAGE, 1);
	for (int i = 0; i < 10; i++) {
		pthread_create(&thread, NULL, change_later, memory);
		check(get(fd, events, 4) == 2);
		is_inval(&events[0], 1);
		pthread_join(thread, NULL);
	}
	change(memory);
	check(get(fd, events, 1) == 1 && get(fd, events, 1) == 1); /* LAST does not block */
	is_last(&events[0], 11);
	close(fd);
	munmap(memory, PAGE);
}

static pthread_t interrupted;

static void *interrupt_and_change(void *page)
{
	for (int i = 0; i < 5; i++) {
		usleep(10000);
		pthread_kill(interrupted, SIGUSR1);
	}
	while (signals < 1)
		usleep(1000);
	usleep(10000);
	change(page);
	return NULL;
}

static void test_interrupted(void)
{
	int fd = open(DEVICE, O_RDONLY);
	char *memory = get_pages(1, NULL);
	struct ummunotify_event events[4];
	pthread_t thread;

	watch(fd, memory, PAGE, 1);
	interrupted = pthread_self();
	handle(SIGUSR1, SA_RESTART); /* what signal() does */
	signals = 0;
	pthread_create(&thread, NULL, interrupt_and_change, memory);
	check(get(fd, events, 4) == 2);
	check(signals > 0);
	pthread_join(thread, NULL);

	handle(SIGUSR1, 0);
	signals = 0;
	pthread_create(&thread, NULL, interrupt_and_change, memory);
	check(get(fd, events, 4) == -EINTR);
	pthread_join(thread, NULL);
	while (get(fd, events, 4) != 2) /* there may have been more signals */
		check(errno == EINTR);
	signal(SIGUSR1, SIG_DFL);
	close(fd);
	munmap(memory, PAGE);
}

const struct test reading_tests[] = {
	{"event_layout", test_event_layout},
	{"hint", test_hint},
	{"no_hint", test_no_hint},
	{"order", test_order},
	{"last", test_last},
	{"partial_reads", test_partial_reads},
	{"buffers_that_do_not_fit", test_buffers_that_do_not_fit},
	{"readv", test_readv},
	{"stays_registered", test_stays_registered},
	{"blocking", test_blocking},
	{"interrupted", test_interrupted},
	{0},
};
