/* SPDX-License-Identifier: BSD-3-Clause */
/* What calls cost, with the device preloaded or not: prints a name and nanoseconds of CPU time for each. The argument is how often to
 * call, the second one "device" to measure the device's own calls. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/ummunotify.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { MANY = 100000, PAGE = 4096 };

static int fd, zero, times;
static volatile uint64_t *counter;
static uint64_t sum;

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
	return time.tv_sec * 1e9 + time.tv_nsec;
}

static void do_read(void)
{
	char byte;

	sum += read(zero, &byte, 1);
}

static void do_fcntl(void)
{
	sum += fcntl(zero, F_GETFL);
}

static void do_open(void)
{
	close(open("/dev/null", O_RDONLY));
}

static void do_open_nothing(void)
{
	sum += open("/dev/nothing", O_RDONLY);
}

static void do_mmap(void)
{
	munmap(mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), PAGE);
}

static void add(uint64_t i)
{
	struct ummunotify_register_ioctl wanted = {
		.start = 0x100000000000 + i * 2 * PAGE, .end = 0x100000000000 + i * 2 * PAGE + PAGE, .user_cookie = i * 64};

	if (ioctl(fd, UMMUNOTIFY_REGISTER_REGION, &wanted))
		abort();
}

static void drop(uint64_t i)
{
	uint64_t cookie = i * 64;

	if (ioctl(fd, UMMUNOTIFY_UNREGISTER_REGION, &cookie))
		abort();
}

static uint64_t place;

static void do_register(void)
{
	place = (place + 70001) % MANY;
	add(MANY + place);
	drop(MANY + place);
}

static void do_counter(void)
{
	sum += *counter;
}

static void do_read_nothing(void)
{
	struct ummunotify_event events[16];

	sum += read(fd, events, sizeof events);
}

static void measure(const char *name, void (*call)(void))
{
	double best = 1e18, begin, end;

	for (int round = 0; round < 5; round++) {
		begin = now();
		for (int i = 0; i < times; i++)
			call();
		end = now();
		if ((end - begin) / times < best)
			best = (end - begin) / times;
	}
	printf("%s\t%.2f\n", name, best);
}

int main(int argc, char **argv)
{
	times = argc > 1 ? atoi(argv[1]) : 1000;
	zero = open("/dev/zero", O_RDONLY);
	if (argc > 2 && !strcmp(argv[2], "device")) {
		fd = open("/dev/ummunotify", O_RDONLY | O_NONBLOCK);
		if (fd < 0)
			return 1;
		counter = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0);
		measure("register + unregister, none registered", do_register);
		for (uint64_t i = 0; i < MANY; i++)
			add(i * 70001 % MANY);
		measure("register + unregister, 100,000 registered", do_register);
		measure("counter", do_counter);
		measure("read, nothing to report", do_read_nothing);
	}
	measure("read", do_read);
	measure("fcntl", do_fcntl);
	measure("open + close", do_open);
	measure("open of nothing", do_open_nothing);
	measure("mmap + munmap", do_mmap);
	return sum == 42;
}
