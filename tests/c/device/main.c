/* SPDX-License-Identifier: BSD-3-Clause */
/* /dev/ummunotify, rule by rule. */
#include "device.h"

bool is_uffd(void)
{
	const char *source = getenv("UMMUNOTIFY_SOURCE");

	return source && !strcmp(source, "uffd");
}

int open_device(void)
{
	int fd = open(DEVICE, O_RDONLY | O_NONBLOCK);

	check(fd >= 0);
	return fd;
}

int try_register(int fd, const void *start, size_t length, uint64_t cookie)
{
	struct ummunotify_register_ioctl wanted = {
		.start = (uint64_t)start, .end = (uint64_t)start + length, .user_cookie = cookie};

	return ioctl(fd, UMMUNOTIFY_REGISTER_REGION, &wanted);
}

void watch(int fd, const void *start, size_t length, uint64_t cookie)
{
	check(!try_register(fd, start, length, cookie));
}

int try_unregister(int fd, uint64_t cookie)
{
	return ioctl(fd, UMMUNOTIFY_UNREGISTER_REGION, &cookie);
}

void unwatch(int fd, uint64_t cookie)
{
	check(!try_unregister(fd, cookie));
}

volatile uint64_t *map_counter(int fd)
{
	volatile uint64_t *counter = mmap(NULL, sizeof *counter, PROT_READ, MAP_SHARED, fd, 0);

	check(counter != MAP_FAILED);
	return counter;
}

/* One change of one page, which is in use again after it. */
void change(char *page)
{
	check(!madvise(page, PAGE, MADV_DONTNEED));
	page[0] = 1;
}

bool readable(int fd)
{
	struct pollfd polled = {fd, POLLIN, 0};
	int n = poll(&polled, 1, 0);

	check(n == 0 || (n == 1 && polled.revents == POLLIN));
	return n;
}

void wait_readable(int fd)
{
	struct pollfd polled = {fd, POLLIN, 0};

	check(poll(&polled, 1, 30000) == 1);
}

int get(int fd, struct ummunotify_event *events, int room)
{
	ssize_t length = read(fd, events, (size_t)room * sizeof *events);

	if (length < 0)
		return -errno;
	check(length % (ssize_t)sizeof *events == 0);
	return (int)(length / (ssize_t)sizeof *events);
}

void is_inval(const struct ummunotify_event *event, uint64_t cookie)
{
	check(event->type == UMMUNOTIFY_EVENT_TYPE_INVAL && event->user_cookie_counter == cookie);
}

void is_last(const struct ummunotify_event *event, uint64_t counter)
{
	check(event->type == UMMUNOTIFY_EVENT_TYPE_LAST && event->flags == 0 && event->user_cookie_counter == counter);
}

void hint_is(const struct ummunotify_event *event, const char *start, const char *end)
{
	check(event->flags == UMMUNOTIFY_EVENT_FLAG_HINT);
	check(event->hint_start == (uint64_t)start && event->hint_end == (uint64_t)end);
}

void no_hint(const struct ummunotify_event *event, const char *start, const char *end)
{
	check(event->flags == 0 && event->hint_start == (uint64_t)start && event->hint_end == (uint64_t)end);
}

_Atomic int signals;

static void count_signal(int number)
{
	(void)number;
	signals++;
}

void handle(int number, int flags)
{
	struct sigaction action = {.sa_handler = count_signal, .sa_flags = flags};

	check(!sigaction(number, &action, NULL));
}

int count_fds(void)
{
	int count = 0;

	for (int fd = 0; fd < 1024; fd++)
		count += fcntl(fd, F_GETFD) >= 0;
	return count;
}

int main(int argc, char **argv)
{
	static const struct test *const files[] = {opening_tests, region_tests,	    reading_tests, waiting_tests,
						   sigio_tests,	  descriptor_tests, fork_tests,	   thread_tests};
	struct test all[100];
	size_t count = 0;

	for (size_t i = 0; i < sizeof files / sizeof *files; i++)
		for (const struct test *test = files[i]; test->name; test++) {
			check(count < sizeof all / sizeof *all);
			all[count++] = *test;
		}
	return run_tests(all, count, argc > 1 ? argv[1] : NULL);
}
