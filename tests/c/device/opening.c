/* SPDX-License-Identifier: BSD-3-Clause */
/* Opening. */
#include "device.h"

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

const struct test opening_tests[] = {
	{"open", test_open},
	{"open_for_writing", test_open_for_writing},
	{"all_open_functions", test_all_open_functions},
	{"two_devices", test_two_devices},
	{0},
};
