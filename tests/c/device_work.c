/* SPDX-License-Identifier: BSD-3-Clause */
/* How much work the device does with few regions and with many: in basic blocks of its code, which it is compiled to count. Linked
 * with it. Prints the average of the first ones, and of the last ones of 100,000. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/ummunotify.h>
#include <sys/ioctl.h>

#include "check.h"

enum { N = 100000, FEW = 100, PAGES = 1000 };

/* Of this thread only. */
static __thread uint64_t blocks;

__attribute__((no_sanitize_coverage)) void __sanitizer_cov_trace_pc(void);
void __sanitizer_cov_trace_pc(void)
{
	blocks++;
}

static int fd;
static char *memory;

/* In an order that is neither the addresses' nor the cookies'. */
static uint64_t nth(uint64_t i)
{
	return i * 70001 % N;
}

static void add(uint64_t i)
{
	struct ummunotify_register_ioctl wanted = {.start = (uint64_t)memory + nth(i) % PAGES * PAGE + nth(i) / PAGES * 16,
						   .user_cookie = nth(i) * 4096};

	wanted.end = wanted.start + 16;
	check(!ioctl(fd, UMMUNOTIFY_REGISTER_REGION, &wanted));
}

static void drop(uint64_t i)
{
	uint64_t cookie = nth(i) * 4096;

	check(!ioctl(fd, UMMUNOTIFY_UNREGISTER_REGION, &cookie));
}

static uint64_t average(void (*what)(uint64_t), uint64_t first)
{
	uint64_t before = blocks;

	for (uint64_t i = 0; i < FEW; i++)
		what(first + i);
	return (blocks - before) / FEW;
}

/* Hits one region, the last one, and reads its event. */
static uint64_t change_and_read(void)
{
	struct ummunotify_event events[4];
	char *page = get_pages(1, NULL);
	struct ummunotify_register_ioctl wanted = {.start = (uint64_t)page, .end = (uint64_t)page + PAGE, .user_cookie = 1};
	uint64_t before, after;

	check(!ioctl(fd, UMMUNOTIFY_REGISTER_REGION, &wanted));
	before = blocks;
	munmap(page, PAGE);
	check(read(fd, events, sizeof events) >= 64);
	after = blocks;
	check(!ioctl(fd, UMMUNOTIFY_UNREGISTER_REGION, &wanted.user_cookie));
	while (read(fd, events, sizeof events) > 0) /* false alarms */
		continue;
	return after - before;
}

/* Without the turns of a loop that waits for another thread: there may be any number of them. */
static uint64_t least(uint64_t (*what)(void))
{
	uint64_t smallest = UINT64_MAX;

	for (int i = 0; i < 20; i++) {
		uint64_t counted = what();

		smallest = counted < smallest ? counted : smallest;
	}
	return smallest;
}

int main(void)
{
	uint64_t first, last, few, many;

	fd = open("/dev/ummunotify", O_RDONLY | O_NONBLOCK);
	check(fd >= 0);
	memory = get_pages(PAGES, NULL);
	first = average(add, 0);
	few = least(change_and_read);
	for (uint64_t i = FEW; i < N - FEW; i++)
		add(i);
	last = average(add, N - FEW);
	many = least(change_and_read);
	printf("register: %lu %lu\n", (unsigned long)first, (unsigned long)last);
	printf("change and read: %lu %lu\n", (unsigned long)few, (unsigned long)many);
	last = average(drop, N - FEW);
	for (uint64_t i = FEW; i < N - FEW; i++)
		drop(i);
	first = average(drop, 0);
	printf("unregister: %lu %lu\n", (unsigned long)first, (unsigned long)last);
	return 0;
}
