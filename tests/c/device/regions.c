/* SPDX-License-Identifier: BSD-3-Clause */
/* What is watched. */
#include "device.h"

#include <sys/uio.h>

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

/* Pointers that the kernel would refuse: to what is not mapped, not readable, not writable, and partly so. */
static void test_bad_pointers(void)
{
	int fd = open_device();
	char *memory = get_pages(1, NULL), *hole = get_pages(2, NULL), *constant = get_pages(1, NULL);
	struct ummunotify_register_ioctl *half = (void *)(hole + PAGE - sizeof *half / 2);
	struct ummunotify_event *room = (void *)(hole + PAGE - sizeof *room), events[4];
	void *const bad[] = {NULL, (void *)8, hole + PAGE, (void *)(1ul << 63), (void *)-8ul, half};
	int *const answer = (int *)constant;

	check(!munmap(hole + PAGE, PAGE) && !mprotect(constant, PAGE, PROT_READ));
	watch(fd, memory, PAGE, 1);
	change(memory);
	for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
		check(ioctl(fd, UMMUNOTIFY_REGISTER_REGION, bad[i]) == -1 && errno == EFAULT);
		check(bad[i] == half || (ioctl(fd, UMMUNOTIFY_UNREGISTER_REGION, bad[i]) == -1 && errno == EFAULT));
		check(bad[i] == half || (ioctl(fd, FIOASYNC, bad[i]) == -1 && errno == EFAULT));
		check(read(fd, bad[i], sizeof events) == -1 && errno == EFAULT);
	}
	check(ioctl(fd, UMMUNOTIFY_EXCHANGE_FEATURES, answer) == -1 && errno == EFAULT);
	check(read(fd, constant, sizeof events) == -1 && errno == EFAULT);
	check(read(fd, room, 2 * sizeof *room) == -1 && errno == EFAULT);
	check(readv(fd, (struct iovec *)(hole + PAGE), 1) == -1 && errno == EFAULT);
	/* Nothing was lost. */
	check(get(fd, events, 4) == 2);
	is_inval(&events[0], 1);
	close(fd);
	munmap(memory, PAGE);
	munmap(hole, PAGE);
	munmap(constant, PAGE);
}

/* Once the region is unregistered there is nothing to read, and the descriptor does not say so. */
static void test_unregister_often(void)
{
	int fd = open_device();
	char *memory = get_pages(1, NULL);

	for (int i = 0; i < 500; i++) {
		watch(fd, memory, PAGE, 1);
		change(memory);
		unwatch(fd, 1);
		if (!is_uffd()) /* whose reader may send a wake-up after the read that makes it needless (docs/c.md) */
			check(!readable(fd));
		nothing(fd);
	}
	close(fd);
	munmap(memory, PAGE);
}

const struct test region_tests[] = {
	{"features", test_features},
	{"register_errors", test_register_errors},
	{"overlapping", test_overlapping},
	{"unregister", test_unregister},
	{"unregister_after_a_hit", test_unregister_after_a_hit},
	{"unregister_often", test_unregister_often},
	{"bad_pointers", test_bad_pointers},
	{"changes", test_changes},
	{"files", test_files},
	{"many", test_many},
	{0},
};
