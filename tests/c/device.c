/* SPDX-License-Identifier: BSD-3-Clause */
/* /dev/ummunotify, rule by rule, through nothing but system calls' wrappers and the interface's header. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/ummunotify.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/select.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/wait.h>

#include "check.h"

#define DEVICE "/dev/ummunotify"

/* What programs compiled with _FORTIFY_SOURCE call. */
int __open_2(const char *path, int flags);
int __open64_2(const char *path, int flags);
int __openat_2(int directory, const char *path, int flags);
ssize_t __read_chk(int fd, void *buffer, size_t length, size_t room);

static bool is_uffd(void)
{
	const char *source = getenv("UMMUNOTIFY_SOURCE");

	return source && !strcmp(source, "uffd");
}

static int open_device(void)
{
	int fd = open(DEVICE, O_RDONLY | O_NONBLOCK);

	check(fd >= 0);
	return fd;
}

static int try_register(int fd, const void *start, size_t length, uint64_t cookie)
{
	struct ummunotify_register_ioctl wanted = {
		.start = (uint64_t)start, .end = (uint64_t)start + length, .user_cookie = cookie};

	return ioctl(fd, UMMUNOTIFY_REGISTER_REGION, &wanted);
}

static void watch(int fd, const void *start, size_t length, uint64_t cookie)
{
	check(!try_register(fd, start, length, cookie));
}

static int try_unregister(int fd, uint64_t cookie)
{
	return ioctl(fd, UMMUNOTIFY_UNREGISTER_REGION, &cookie);
}

static void unwatch(int fd, uint64_t cookie)
{
	check(!try_unregister(fd, cookie));
}

static volatile uint64_t *map_counter(int fd)
{
	volatile uint64_t *counter = mmap(NULL, sizeof *counter, PROT_READ, MAP_SHARED, fd, 0);

	check(counter != MAP_FAILED);
	return counter;
}

/* One change of one page, which is in use again after it. */
static void change(char *page)
{
	check(!madvise(page, PAGE, MADV_DONTNEED));
	page[0] = 1;
}

static bool readable(int fd)
{
	struct pollfd polled = {fd, POLLIN, 0};
	int n = poll(&polled, 1, 0);

	check(n == 0 || (n == 1 && polled.revents == POLLIN));
	return n;
}

static void wait_readable(int fd)
{
	struct pollfd polled = {fd, POLLIN, 0};

	check(poll(&polled, 1, 30000) == 1);
}

static int get(int fd, struct ummunotify_event *events, int room)
{
	ssize_t length = read(fd, events, (size_t)room * sizeof *events);

	if (length < 0)
		return -errno;
	check(length % (ssize_t)sizeof *events == 0);
	return (int)(length / (ssize_t)sizeof *events);
}

#define nothing(fd) check(read(fd, (char[320]){0}, 320) == -1 && errno == EAGAIN)

static void is_inval(const struct ummunotify_event *event, uint64_t cookie)
{
	check(event->type == UMMUNOTIFY_EVENT_TYPE_INVAL && event->user_cookie_counter == cookie);
}

static void is_last(const struct ummunotify_event *event, uint64_t counter)
{
	check(event->type == UMMUNOTIFY_EVENT_TYPE_LAST && event->flags == 0 && event->user_cookie_counter == counter);
}

static void hint_is(const struct ummunotify_event *event, const char *start, const char *end)
{
	check(event->flags == UMMUNOTIFY_EVENT_FLAG_HINT);
	check(event->hint_start == (uint64_t)start && event->hint_end == (uint64_t)end);
}

static void no_hint(const struct ummunotify_event *event, const char *start, const char *end)
{
	check(event->flags == 0 && event->hint_start == (uint64_t)start && event->hint_end == (uint64_t)end);
}

/* ---- Opening ---- */

static void test_open(void)
{
	const int lowest = dup(0);
	int fd;

	close(lowest);
	fd = open(DEVICE, O_RDONLY);
	check(fd == lowest && !(fcntl(fd, F_GETFL) & (O_NONBLOCK | O_ACCMODE)) && fcntl(fd, F_GETFD) == 0);
	close(fd);
	fd = open(DEVICE, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	check(fd == lowest && (fcntl(fd, F_GETFL) & O_NONBLOCK) && fcntl(fd, F_GETFD) == FD_CLOEXEC);
	nothing(fd);
	close(fd);
}

static void test_open_for_writing(void)
{
	check(open(DEVICE, O_RDWR) == -1 && errno == EINVAL);
	check(open(DEVICE, O_WRONLY) == -1 && errno == EINVAL);
}

static void test_all_open_functions(void)
{
	const int flags = O_RDONLY | O_NONBLOCK;
	int fds[] = {open(DEVICE, flags),
		     open64(DEVICE, flags),
		     openat(AT_FDCWD, DEVICE, flags),
		     openat64(AT_FDCWD, DEVICE, flags),
		     openat(-1, DEVICE, flags), /* an absolute name needs no directory */
		     __open_2(DEVICE, flags),
		     __open64_2(DEVICE, flags),
		     __openat_2(AT_FDCWD, DEVICE, flags)};

	for (size_t i = 0; i < sizeof fds / sizeof *fds; i++) {
		check(fds[i] >= 0);
		nothing(fds[i]);
		close(fds[i]);
	}
	check(open(DEVICE "x", O_RDONLY) == -1 && errno == ENOENT);
	check(open("/dev/ummunotif", O_RDONLY) == -1 && errno == ENOENT);
}

static void test_two_devices(void)
{
	int one = open_device(), two = open_device();
	char *memory = get_pages(2, NULL);
	struct ummunotify_event events[4];
	volatile uint64_t *counter = map_counter(two);

	watch(one, memory, PAGE, 1);
	watch(two, memory + PAGE, PAGE, 1); /* cookies are each descriptor's own */
	change(memory);
	wait_readable(one);
	check(get(one, events, 4) == 2);
	if (!is_uffd()) /* there other changes may be counted too */
		check(!readable(two) && *counter == 0);
	nothing(two);
	change(memory + PAGE);
	check(get(two, events, 4) == 2);
	hint_is(&events[0], memory + PAGE, memory + 2 * PAGE);
	close(one);
	change(memory + PAGE);
	check(get(two, events, 4) == 2);
	close(two);
	munmap(memory, 2 * PAGE);
	munmap((void *)counter, PAGE);
}

/* ---- ioctl ---- */

static void test_features(void)
{
	int fd = open_device();
	char *memory = get_pages(1, NULL);
	uint32_t mask = ~0u;

	check(UMMUNOTIFY_EXCHANGE_FEATURES == 0xc0045501);
	check(!ioctl(fd, UMMUNOTIFY_EXCHANGE_FEATURES, &mask) && mask == 0);
	check(ioctl(fd, UMMUNOTIFY_EXCHANGE_FEATURES, &mask) == -1 && errno == EINVAL);
	close(fd);
	fd = open_device();
	watch(fd, memory, PAGE, 1);
	check(ioctl(fd, UMMUNOTIFY_EXCHANGE_FEATURES, &mask) == -1 && errno == EINVAL);
	close(fd);
	munmap(memory, PAGE);
}

static void test_register_errors(void)
{
	int fd = open_device();
	char *memory = get_pages(1, NULL);
	struct ummunotify_register_ioctl wanted = {
		.start = (uint64_t)memory, .end = (uint64_t)memory + PAGE, .user_cookie = 5, .reserved = 1};

	check(UMMUNOTIFY_REGISTER_REGION == 0x40205502);
	check(try_register(fd, memory, 0, 5) == -1 && errno == EINVAL);
	check(try_register(fd, memory, -PAGE, 5) == -1 && errno == EINVAL);
	check(try_register(fd, (void *)(1ul << 63), PAGE, 5) == -1 && errno == EINVAL);
	check(ioctl(fd, UMMUNOTIFY_REGISTER_REGION, &wanted) == -1 && errno == EINVAL);
	check(ioctl(fd, UMMUNOTIFY_REGISTER_REGION, NULL) == -1 && errno == EFAULT);
	/* None of them has taken the cookie. One client leaves `flags` as they happen to be. */
	wanted.reserved = 0;
	wanted.flags = 0xdeadbeef;
	check(!ioctl(fd, UMMUNOTIFY_REGISTER_REGION, &wanted));
	check(ioctl(fd, UMMUNOTIFY_REGISTER_REGION, &wanted) == -1 && errno == EINVAL);
	check(try_register(fd, memory, 1, 5) == -1 && errno == EINVAL);
	/* Any 64 bits are a cookie. */
	watch(fd, memory, PAGE, 0);
	watch(fd, memory, PAGE, ~0ul);
	check(ioctl(fd, _IO(UMMUNOTIFY_MAGIC, 4)) == -1 && errno == ENOTTY);
	check(ioctl(fd, _IOW(UMMUNOTIFY_MAGIC, 3, uint32_t), &wanted) == -1 && errno == ENOTTY);
	close(fd);
	munmap(memory, PAGE);
}

static void test_overlapping(void)
{
	int fd = open_device();
	char *memory = get_pages(4, NULL);
	struct ummunotify_event events[8];

	watch(fd, memory, 4 * PAGE, 1);
	watch(fd, memory, 4 * PAGE, 2);
	watch(fd, memory + PAGE, PAGE, 3);
	watch(fd, memory + 2 * PAGE, PAGE, 4);
	change(memory + PAGE);
	check(get(fd, events, 8) == 4); /* 1, 2 and 3 in any order, for one change hit them */
	for (int i = 0; i < 3; i++)
		hint_is(&events[i], memory + PAGE, memory + 2 * PAGE);
	check(events[0].user_cookie_counter + events[1].user_cookie_counter + events[2].user_cookie_counter == 6);
	is_last(&events[3], 1);
	close(fd);
	munmap(memory, 4 * PAGE);
}

static void test_unregister(void)
{
	int fd = open_device();
	char *memory = get_pages(2, NULL);
	struct ummunotify_event events[4];

	check(UMMUNOTIFY_UNREGISTER_REGION == 0x40085503);
	check(try_unregister(fd, 1) == -1 && errno == EINVAL);
	watch(fd, memory, PAGE, 1);
	unwatch(fd, 1);
	check(try_unregister(fd, 1) == -1 && errno == EINVAL);
	change(memory);
	nothing(fd);
	watch(fd, memory + PAGE, PAGE, 1); /* the cookie is free again */
	change(memory);
	nothing(fd);
	change(memory + PAGE);
	check(get(fd, events, 4) == 2);
	close(fd);
	munmap(memory, 2 * PAGE);
}

static void test_unregister_after_a_hit(void)
{
	int fd = open_device();
	char *memory = get_pages(2, NULL);
	struct ummunotify_event events[4];

	watch(fd, memory, PAGE, 1);
	watch(fd, memory + PAGE, PAGE, 2);
	change(memory);
	wait_readable(fd);
	unwatch(fd, 1);
	check(!readable(fd)); /* else a read that blocks would never return */
	nothing(fd);
	change(memory);
	nothing(fd);
	watch(fd, memory, PAGE, 1);
	change(memory);
	change(memory + PAGE);
	wait_readable(fd);
	unwatch(fd, 1);
	check(readable(fd));
	check(get(fd, events, 4) == 2);
	is_inval(&events[0], 2);
	close(fd);
	munmap(memory, 2 * PAGE);
}

/* ---- read ---- */

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

static _Atomic int signals;

static void count_signal(int number)
{
	(void)number;
	signals++;
}

static void handle(int number, int flags)
{
	struct sigaction action = {.sa_handler = count_signal, .sa_flags = flags};

	check(!sigaction(number, &action, NULL));
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

/* ---- The counter ---- */

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
		if (is_uffd()) /* it counts changes of the other pages of the mapping, too */
			check(*counter >= changes && (changes = *counter) == *again);
		check(*counter == changes && *again == changes);
		if (i % 100 == 0) /* reading does not count */
			get(fd, events, rand_r(&seed) % 4);
		check(*counter == changes);
	}
	for (int i = 0; i < 2 * N; i++)
		unwatch(fd, i);
	change(memory);
	check(*counter == changes);
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

/* ---- Waiting ---- */

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

/* ---- SIGIO ---- */

static volatile int signal_fd, signal_code;

static void note_signal(int number, siginfo_t *info, void *context)
{
	(void)number, (void)context;
	signal_fd = info->si_fd;
	signal_code = info->si_code;
	signals++;
}

static void wait_signals(int count)
{
	for (int i = 0; signals < count && i < 30000; i++)
		usleep(1000);
	check(signals >= count);
}

static void test_sigio(void)
{
	int fd = open_device();
	char *memory = get_pages(1, NULL);
	struct ummunotify_event events[4];

	signals = 0;
	handle(SIGIO, SA_RESTART);
	watch(fd, memory, PAGE, 1);
	change(memory);
	check(!fcntl(fd, F_SETOWN, getpid()));
	check(!fcntl(fd, F_SETFL, O_ASYNC | O_NONBLOCK));
	check((fcntl(fd, F_GETFL) & (O_ASYNC | O_NONBLOCK | O_ACCMODE)) == (O_ASYNC | O_NONBLOCK));
	check(fcntl(fd, F_GETOWN) == getpid());
	check(get(fd, events, 4) == 2);
	check(signals == 0); /* it was before */
	for (int i = 1; i <= 50; i++) {
		change(memory);
		wait_signals(i);
		check(readable(fd));
		if (i % 2) /* each change sends one, whether or not the last was read */
			check(get(fd, events, 4) == 2);
	}
	check(!fcntl(fd, F_SETFL, O_NONBLOCK));
	check(!(fcntl(fd, F_GETFL) & O_ASYNC));
	signals = 0;
	change(memory);
	wait_readable(fd);
	usleep(20000);
	check(signals == 0);
	close(fd);
	signal(SIGIO, SIG_DFL);
	munmap(memory, PAGE);
}

static void test_sigio_with_another_signal(void)
{
	struct sigaction action = {.sa_sigaction = note_signal, .sa_flags = SA_RESTART | SA_SIGINFO};
	int fd = open_device(), number = SIGRTMIN + 3, on = 1;
	char *memory = get_pages(1, NULL);
	struct ummunotify_event events[4];
	struct f_owner_ex owner = {F_OWNER_TID, gettid()};

	check(!sigaction(number, &action, NULL));
	watch(fd, memory, PAGE, 1);
	check(!ioctl(fd, FIOASYNC, &on));
	check(fcntl(fd, F_GETFL) & O_ASYNC);
	change(memory); /* nobody owns it yet */
	usleep(5000);
	check(get(fd, events, 4) == 2);
	/* With the owner and the signal set after O_ASYNC. */
	check(!fcntl(fd, F_SETSIG, number) && !fcntl(fd, F_SETOWN_EX, &owner));
	check(fcntl(fd, F_GETSIG) == number);
	signals = 0;
	signal_fd = -1;
	change(memory);
	wait_signals(1);
	check(signal_fd == fd && signal_code == POLL_IN);
	check(get(fd, events, 4) == 2);
	on = 0;
	check(!ioctl(fd, FIOASYNC, &on));
	on = 1;
	check(!ioctl(fd, FIOASYNC, &on)); /* and once more */
	change(memory);
	wait_signals(2);
	close(fd); /* while it is on */
	signal(number, SIG_DFL);
	munmap(memory, PAGE);
}

static int handler_fd;
static volatile int handler_events;

static void read_in_handler(int number)
{
	struct ummunotify_event events[4];
	int n, kept = errno;

	(void)number;
	while ((n = get(handler_fd, events, 4)) > 0)
		for (int i = 0; i < n; i++)
			handler_events += events[i].type == UMMUNOTIFY_EVENT_TYPE_INVAL;
	check(n == -EAGAIN);
	errno = kept;
	signals++;
}

/* As after a system call: the handler may read whatever the program was doing. */
static void test_reading_in_a_handler(void)
{
	struct sigaction action = {.sa_handler = read_in_handler, .sa_flags = SA_RESTART};
	int fd = open_device();
	char *memory = get_pages(2, NULL);
	int changes = 0;

	handler_fd = fd;
	handler_events = 0;
	signals = 0;
	check(!sigaction(SIGIO, &action, NULL));
	fcntl(fd, F_SETOWN, getpid());
	fcntl(fd, F_SETFL, O_ASYNC | O_NONBLOCK);
	watch(fd, memory, PAGE, 0);
	for (int i = 0; signals < 300; i++) {
		change(memory);
		changes++;
		watch(fd, memory + PAGE, PAGE, 1 + i % 7);
		unwatch(fd, 1 + i % 7);
	}
	for (int i = 0; readable(fd) && i < 30000; i++)
		usleep(1000);
	check(handler_events > 0 && handler_events <= changes);
	fcntl(fd, F_SETFL, O_NONBLOCK); /* no more signals */
	close(fd);
	signal(SIGIO, SIG_DFL);
	munmap(memory, 2 * PAGE);
}

/* ---- Descriptors ---- */

static void test_flags(void)
{
	int fd = open(DEVICE, O_RDONLY), on = 1, off = 0;
	char *memory = get_pages(1, NULL);

	watch(fd, memory, PAGE, 1);
	check(!(fcntl(fd, F_GETFL) & O_NONBLOCK));
	check(!fcntl(fd, F_SETFL, O_NONBLOCK));
	nothing(fd);
	check(!ioctl(fd, FIONBIO, &off) && !(fcntl(fd, F_GETFL) & O_NONBLOCK));
	check(!ioctl(fd, FIONBIO, &on) && (fcntl(fd, F_GETFL) & O_NONBLOCK));
	nothing(fd);
	check(!fcntl(fd, F_SETFD, FD_CLOEXEC) && fcntl(fd, F_GETFD) == FD_CLOEXEC);
	check(!ioctl(fd, FIONCLEX) && fcntl(fd, F_GETFD) == 0);
	close(fd);
	munmap(memory, PAGE);
}

static void test_duplicates(void)
{
	int fd = open_device(), plain = open("/dev/zero", O_RDONLY);
	char *memory = get_pages(1, NULL), byte;
	struct ummunotify_event events[4];
	int copies[] = {dup(fd), dup2(fd, 50), dup3(fd, 51, O_CLOEXEC), fcntl(fd, F_DUPFD, 60), fcntl(fd, F_DUPFD_CLOEXEC, 60)};
	const int n = sizeof copies / sizeof *copies;
	volatile uint64_t *counter = map_counter(copies[1]);

	check(copies[1] == 50 && copies[2] == 51 && copies[3] == 60 && copies[4] == 61);
	check(fcntl(51, F_GETFD) == FD_CLOEXEC && fcntl(61, F_GETFD) == FD_CLOEXEC && fcntl(60, F_GETFD) == 0);
	check(dup2(fd, fd) == fd && dup3(fd, fd, 0) == -1 && errno == EINVAL);
	check(dup2(99, fd) == -1 && errno == EBADF);
	watch(fd, memory, PAGE, 1);
	check(try_register(copies[0], memory, PAGE, 1) == -1 && errno == EINVAL); /* the same regions */
	fcntl(copies[0], F_SETFL, 0);
	check(!(fcntl(fd, F_GETFL) & O_NONBLOCK)); /* the same flags */
	fcntl(copies[0], F_SETFL, O_NONBLOCK);
	for (int i = 0; i < n; i++) {
		change(memory);
		check(readable(fd) && readable(copies[i]));
		check(get(copies[i], events, 4) == 2);
		nothing(fd);
	}
	check(!close(fd));
	change(memory);
	check(*counter == (uint64_t)n + 1 && get(copies[0], events, 4) == 2);
	/* Another file takes a number. */
	check(dup2(plain, 50) == 50 && read(50, &byte, 1) == 1 && byte == 0);
	check(dup2(copies[0], plain) == plain);
	change(memory);
	check(get(plain, events, 4) == 2);
	for (int i = 0; i < n; i++)
		check(!close(copies[i]));
	change(memory);
	check(get(plain, events, 4) == 2);
	close(plain);
	munmap((void *)counter, PAGE);
	munmap(memory, PAGE);
}

static int count_fds(void)
{
	int count = 0;

	for (int fd = 0; fd < 1024; fd++)
		count += fcntl(fd, F_GETFD) >= 0;
	return count;
}

static void test_close(void)
{
	int before = count_fds(), fd = open_device(), plain;
	char *memory = get_pages(1, NULL), bytes[64];

	watch(fd, memory, PAGE, 1);
	check(!close(fd));
	check(close(fd) == -1 && errno == EBADF);
	check(read(fd, bytes, 64) == -1 && errno == EBADF);
	check(try_register(fd, memory, PAGE, 1) == -1 && errno == EBADF);
	check(count_fds() == before);
	/* The number is an ordinary one again. */
	plain = open("/dev/zero", O_RDONLY);
	check(plain == fd);
	check(read(plain, bytes, 64) == 64 && try_register(plain, memory, PAGE, 1) == -1 && errno == ENOTTY);
	close(plain);
	/* Many at once. */
	fd = open_device();
	check(dup2(fd, 500) == 500);
	check(!close_range(400, 600, 0));
	check(read(500, bytes, 64) == -1 && errno == EBADF);
	nothing(fd);
	check(dup2(fd, 500) == 500);
	closefrom(400);
	check(read(500, bytes, 64) == -1 && errno == EBADF);
	nothing(fd);
	close(fd);
	check(count_fds() == before);
	munmap(memory, PAGE);
}

/* A program that closes what it has not opened, but for a few numbers that it knows, must not miss anything. */
static void test_closing_all_others(void)
{
	int another = open_device(), fd = open_device(), kept = dup2(fd, 300);
	char *memory = get_pages(1, NULL);
	struct ummunotify_event events[4];
	volatile uint64_t *counter = map_counter(fd);

	watch(fd, memory, PAGE, 1);
	check(kept == 300 && !close(another)); /* what they share is not the other's alone */
	if (!is_uffd()) { /* whose descriptors come and go */
		for (int other = 3; other < 1024; other++)
			if (other != fd && other != kept)
				close(other);
		for (int other = 3; other < 20; other++)
			if (other != fd && dup2(0, other) == other)
				close(other);
		check(!close_range(fd + 1, ~0u, 0));
	}
	for (int i = 1; i < 100; i++) {
		change(memory);
		check(*counter == (uint64_t)i && readable(fd));
		check(get(fd, events, 4) == 2);
	}
	change(memory);
	check(!close(fd));
	fd = open_device(); /* all is as before */
	watch(fd, memory, PAGE, 1);
	change(memory);
	check(get(fd, events, 4) == 2);
	close(fd);
	munmap((void *)counter, PAGE);
	munmap(memory, PAGE);
}

static void test_other_files(void)
{
	char name[] = "/tmp/umnXXXXXX", bytes[64];
	int device = open_device(), fd = mkstemp(name), pipe_fds[2];
	struct stat status;
	mode_t mask = umask(0);

	check(fd >= 0 && !close(fd) && !unlink(name));
	fd = open(name, O_CREAT | O_EXCL | O_RDWR, 0640);
	check(fd >= 0 && !fstat(fd, &status) && (status.st_mode & 07777) == 0640);
	check(write(fd, "hello", 5) == 5 && lseek(fd, 0, SEEK_SET) == 0 && read(fd, bytes, 64) == 5 && !memcmp(bytes, "hello", 5));
	close(fd);
	unlink(name);
	fd = openat(AT_FDCWD, "/dev/shm", O_TMPFILE | O_RDWR, 0604); /* not all file systems can do that */
	check(fd >= 0 && !fstat(fd, &status) && (status.st_mode & 07777) == 0604);
	check(!ftruncate(fd, PAGE));
	char *mapped = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	check(mapped != MAP_FAILED);
	munmap(mapped, PAGE);
	close(fd);
	umask(mask);
	check(open((char *)1, O_RDONLY) == -1 && errno == EFAULT);
	check(read(-1, bytes, 1) == -1 && errno == EBADF);
	check(read(1 << 20, bytes, 1) == -1 && errno == EBADF);
	check(fcntl(-1, F_GETFL) == -1 && errno == EBADF);
	check(!pipe(pipe_fds) && fcntl(pipe_fds[0], F_SETFL, O_NONBLOCK) == 0);
	check(read(pipe_fds[0], bytes, 1) == -1 && errno == EAGAIN);
	close(pipe_fds[0]);
	close(pipe_fds[1]);
	close(device);
}

/* ---- Kinds of change, forks, threads, many ---- */

static void test_changes(void)
{
	int fd = open_device();
	char *memory = get_pages(16, NULL), *target = get_pages(1, NULL), *moved;
	struct ummunotify_event events[4];

	for (int i = 0; i < 16; i++)
		watch(fd, memory + i * PAGE, PAGE, i);
	/* No change at all: these do not count, but for the second, which may be a copy. */
	mprotect(memory, PAGE, PROT_READ);
	mprotect(memory, PAGE, PROT_READ | PROT_WRITE);
	nothing(fd);
	munmap(memory + PAGE, PAGE);
	check(get(fd, events, 4) == 2);
	is_inval(&events[0], 1);
	get_pages(1, memory + 2 * PAGE); /* MAP_FIXED */
	check(get(fd, events, 4) == 2);
	is_inval(&events[0], 2);
	moved = mremap(memory + 3 * PAGE, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, target);
	check(moved == target);
	check(get(fd, events, 4) == 2);
	is_inval(&events[0], 3);
	change(memory + 4 * PAGE);
	check(get(fd, events, 4) == 2);
	check(mremap(memory + 5 * PAGE, 2 * PAGE, PAGE, 0) == memory + 5 * PAGE); /* shrinks */
	check(get(fd, events, 4) == 2);
	is_inval(&events[0], 6);
	close(fd);
	munmap(memory, 16 * PAGE);
	munmap(moved, PAGE);
}

static void test_files(void)
{
	int fd = open_device(), file;
	struct ummunotify_event events[4];
	char *memory;

	file = memfd_create("test", 0);
	check(file >= 0 && !ftruncate(file, 2 * PAGE));
	memory = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, file, 0);
	check(memory != MAP_FAILED);
	if (is_uffd()) { /* it says so, rather than miss something */
		check(try_register(fd, memory, PAGE, 1) == -1 && errno == EOPNOTSUPP);
		check(try_unregister(fd, 1) == -1 && errno == EINVAL);
	} else {
		memory[0] = memory[PAGE] = 1;
		watch(fd, memory, PAGE, 1);
		watch(fd, memory + PAGE, PAGE, 2);
		check(!ftruncate(file, PAGE));
		check(get(fd, events, 4) == 2);
		is_inval(&events[0], 2);
		check(!fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, PAGE));
		check(get(fd, events, 4) == 2);
		is_inval(&events[0], 1);
	}
	close(file);
	close(fd);
	munmap(memory, 2 * PAGE);
}

static void expect_exit(pid_t child)
{
	int status;

	check(child > 0 && waitpid(child, &status, 0) == child && status == 0);
}

/* Lets the other process go on, and waits until it does the same. */
static void meet(int *to, int *from)
{
	char byte = 0;

	check(write(to[1], &byte, 1) == 1 && read(from[0], &byte, 1) == 1);
}

static void test_fork(void)
{
	int fd = open_device(), up[2], down[2];
	char *memory = get_pages(4, NULL);
	volatile uint64_t *counter = map_counter(fd), *own;
	struct ummunotify_event events[4];
	pid_t child;

	check(!pipe(up) && !pipe(down));
	watch(fd, memory, PAGE, 1);
	watch(fd, memory + PAGE, PAGE, 2);
	child = fork();
	if (!child) {
		/* What the child does to its own copy is nobody's affair. */
		munmap(memory, PAGE);
		check(!readable(fd) && *counter == 0);
		nothing(fd);
		meet(up, down); /* the parent changes page 1 */
		own = map_counter(fd);
		check(*counter == 1 && *own == 1);
		wait_readable(fd);
		check(get(fd, events, 4) == 2);
		is_inval(&events[0], 2);
		hint_is(&events[0], memory + PAGE, memory + 2 * PAGE);
		is_last(&events[1], 1);
		nothing(fd);
		check(try_register(fd, memory, PAGE, 1) == -1 && errno == EINVAL);
		check(try_unregister(fd, 9) == -1 && errno == EINVAL);
		watch(fd, memory + 2 * PAGE, PAGE, 3); /* of the parent's memory */
		unwatch(fd, 1);
		if (!fork()) { /* and so it goes on */
			meet(up, down); /* the parent changes page 2 */
			check(get(fd, events, 4) == 2);
			is_inval(&events[0], 3);
			_exit(0);
		}
		check(wait(NULL) > 0);
		/* A descriptor of its own for its own memory. */
		int mine = open_device();

		watch(mine, memory + 3 * PAGE, PAGE, 1);
		change(memory + 3 * PAGE);
		check(get(mine, events, 4) == 2);
		nothing(fd);
		close(mine);
		close(fd);
		_exit(0);
	}
	check(read(up[0], events, 1) == 1);
	change(memory + PAGE);
	check(write(down[1], events, 1) == 1);
	check(read(up[0], events, 1) == 1);
	change(memory); /* not watched any more, thanks to the child */
	change(memory + 2 * PAGE);
	check(write(down[1], events, 1) == 1);
	expect_exit(child);
	nothing(fd); /* the child has read it */
	change(memory + 2 * PAGE);
	check(get(fd, events, 4) == 2);
	is_inval(&events[0], 3);
	close(fd);
	for (int i = 0; i < 2; i++) {
		close(up[i]);
		close(down[i]);
	}
	munmap((void *)counter, PAGE);
	munmap(memory, 4 * PAGE);
}

/* It is open until all have closed it. */
static void test_fork_and_close(void)
{
	int before = count_fds(), fd = open_device(), up[2], down[2];
	char *memory = get_pages(1, NULL);
	struct ummunotify_event events[4];
	pid_t child;

	check(!pipe(up) && !pipe(down));
	watch(fd, memory, PAGE, 1);
	child = fork();
	if (!child) {
		meet(up, down);
		check(get(fd, events, 4) == 2);
		is_inval(&events[0], 1);
		unwatch(fd, 1);
		nothing(fd);
		_exit(0);
	}
	check(!close(fd));
	check(read(up[0], events, 1) == 1);
	change(memory);
	check(write(down[1], events, 1) == 1);
	expect_exit(child);
	for (int i = 0; i < 2; i++) {
		close(up[i]);
		close(down[i]);
	}
	/* A thread lets go of what is left once it hears that the child is gone. */
	for (int i = 0; count_fds() > before && i < 30000; i++)
		usleep(1000);
	check(count_fds() <= before); /* what another test had left may be gone, too */
	munmap(memory, PAGE);
}

static void test_parent_ends(void)
{
	int fd, up[2];
	struct ummunotify_event events[4];
	char *memory = get_pages(1, NULL), byte = 0;
	pid_t parent;

	check(!pipe(up));
	parent = fork();
	if (!parent) {
		fd = open_device();
		watch(fd, memory, PAGE, 1);
		pid_t self = getpid();

		if (!fork()) {
			for (int i = 0; getppid() == self && i < 30000; i++)
				usleep(1000);
			/* There is nothing left that could change. */
			check(get(fd, events, 4) == -EAGAIN);
			check(try_register(fd, memory, PAGE, 2) == -1 && errno == ESRCH);
			check(!close(fd));
			check(write(up[1], &byte, 1) == 1);
			_exit(0);
		}
		_exit(0);
	}
	expect_exit(parent);
	close(up[1]);
	check(read(up[0], &byte, 1) == 1);
	close(up[0]);
	munmap(memory, PAGE);
}

static void test_vfork(void)
{
	int fd = open_device();
	char *memory = get_pages(1, NULL);
	struct ummunotify_event events[4];
	pid_t child;

	watch(fd, memory, PAGE, 1);
	child = vfork();
	if (!child) {
		/* What programs do before they execute another. */
		dup2(0, fd);
		close(fd);
		close_range(3, ~0u, 0);
		_exit(0);
	}
	expect_exit(child);
	change(memory);
	check(get(fd, events, 4) == 2);
	close(fd);
	munmap(memory, PAGE);
}

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

static void test_many(void)
{
	enum { N = 100000, PAGES = 500 };
	int fd = open_device(), n;
	char *memory = get_pages(PAGES, NULL);
	struct ummunotify_event *events = calloc(1000, sizeof *events);
	char *times = calloc(N, 1);

	for (uint64_t i = 0; i < N; i++) /* 200 on each page, of 16 bytes */
		watch(fd, memory + i % PAGES * PAGE + i / PAGES * 16, 16, i * UINT64_C(1000003));
	check(try_register(fd, memory, PAGE, UINT64_C(99999) * 1000003) == -1 && errno == EINVAL);
	for (int all = 0; all < 2; all++) {
		memset(times, 0, N);
		if (all)
			madvise(memory, PAGES * PAGE, MADV_DONTNEED);
		else
			change(memory + 7 * PAGE);
		while ((n = get(fd, events, 1000)) > 0)
			for (int i = 0; i < n; i++)
				if (events[i].type == UMMUNOTIFY_EVENT_TYPE_INVAL)
					times[events[i].user_cookie_counter / 1000003]++;
		check(n == -EAGAIN);
		/* Others may be reported too: what another process does at so many addresses may be taken for ours. */
		for (int i = 0; i < N; i++)
			check(times[i] || (!all && i % PAGES != 7));
	}
	for (uint64_t i = 0; i < N; i++)
		unwatch(fd, i * UINT64_C(1000003));
	check(try_unregister(fd, 0) == -1 && errno == EINVAL);
	munmap(memory, PAGES * PAGE);
	nothing(fd);
	close(fd);
	free(events);
	free(times);
}

int main(int argc, char **argv)
{
	const struct test tests[] = {
		{"open", test_open},
		{"open_for_writing", test_open_for_writing},
		{"all_open_functions", test_all_open_functions},
		{"two_devices", test_two_devices},
		{"features", test_features},
		{"register_errors", test_register_errors},
		{"overlapping", test_overlapping},
		{"unregister", test_unregister},
		{"unregister_after_a_hit", test_unregister_after_a_hit},
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
		{"counter", test_counter},
		{"counter_page", test_counter_page},
		{"poll", test_poll},
		{"select", test_select},
		{"epoll", test_epoll},
		{"epoll_edge", test_epoll_edge},
		{"sigio", test_sigio},
		{"sigio_with_another_signal", test_sigio_with_another_signal},
		{"reading_in_a_handler", test_reading_in_a_handler},
		{"flags", test_flags},
		{"duplicates", test_duplicates},
		{"close", test_close},
		{"closing_all_others", test_closing_all_others},
		{"other_files", test_other_files},
		{"changes", test_changes},
		{"files", test_files},
		{"fork", test_fork},
		{"fork_and_close", test_fork_and_close},
		{"parent_ends", test_parent_ends},
		{"vfork", test_vfork},
		{"threads", test_threads},
		{"many", test_many},
	};

	return run_tests(tests, sizeof tests / sizeof *tests, argc > 1 ? argv[1] : NULL);
}
