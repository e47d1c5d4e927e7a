/* SPDX-License-Identifier: BSD-3-Clause */
/* A program that closes or replaces descriptors that it does not know: changes go on being seen, or everything is invalid and calls say
 * why; and what the program has put in their place is neither used nor closed. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <ummunotify.h>

#include "check.h"

enum { FDS = 24, MANY = 40000 };

static struct ummunotify *umn;
static struct ummunotify_region *region;
static char *memory;
static bool theirs[FDS]; /* open before the library was used */

static void begin(bool with_fd)
{
	for (int fd = 0; fd < FDS; fd++)
		theirs[fd] = fcntl(fd, F_GETFD) >= 0;
	memory = get_pages(2, NULL);
	check(!ummunotify_open(&umn, NULL));
	check(!ummunotify_watch(umn, memory, PAGE, 1, &region));
	if (with_fd)
		check(ummunotify_fd(umn) >= 0);
}

/* Each change is seen, or nothing is valid. */
static void sees_changes(void)
{
	struct ummunotify_event event;
	ptrdiff_t count;

	for (int i = 0; i < 10; i++) {
		madvise(memory, PAGE, MADV_DONTNEED);
		memory[0] = 1;
		check(!ummunotify_valid(region) && ummunotify_changed(umn));
		count = ummunotify_read(umn, &event, 1);
		/* What cannot be known any more is reported once. */
		check((count == 1 && event.region == region) || (count < 0 && *ummunotify_failure()->why));
		/* Else this is what the next call that waits would find. */
		while (ummunotify_read(umn, &event, 1) > 0)
			;
		if (ummunotify_renew(umn, region)) { /* nothing is valid from now on, and it says why */
			check(!ummunotify_valid(region) && *ummunotify_failure()->why);
			return;
		}
		check(ummunotify_valid(region));
	}
}

/* Works, or says that a descriptor is gone. */
static void waits_or_says_why(void)
{
	int result;

	madvise(memory, PAGE, MADV_DONTNEED);
	memory[0] = 1;
	result = ummunotify_wait(umn, 30000);
	check(result == 1 ||
	      (result == -EBADF && ummunotify_failure()->code == UMMUNOTIFY_DESCRIPTOR && *ummunotify_failure()->remedy));
	result = ummunotify_fd(umn);
	check(result >= 0 || (result == -EBADF && ummunotify_failure()->code == UMMUNOTIFY_DESCRIPTOR));
	check(!ummunotify_valid(region));
	ummunotify_renew(umn, region);
}

static void grows_or_says_why(void)
{
	static struct ummunotify_region *regions[MANY];
	int n = 0, error = 0;

	for (; n < MANY; n++) {
		error = ummunotify_watch(umn, memory + PAGE + n % 4000, 8, 0, &regions[n]);
		if (error)
			break;
	}
	check(!error || ummunotify_failure()->code == UMMUNOTIFY_DESCRIPTOR || ummunotify_failure()->code == UMMUNOTIFY_LIMIT);
	madvise(memory + PAGE, PAGE, MADV_DONTNEED);
	for (int i = 0; i < n; i++) {
		check(!ummunotify_valid(regions[i]));
		check(!ummunotify_unwatch(umn, regions[i]));
	}
}

static void all(void)
{
	sees_changes();
	waits_or_says_why();
	sees_changes();
	grows_or_says_why();
	sees_changes();
}

/* In a process of its own, whose descriptors are its own too. */
static void in_process(void (*run)(bool with_fd))
{
	for (int with_fd = 0; with_fd < 2; with_fd++) {
		pid_t child = fork();
		int status;

		if (!child) {
			alarm(60);
			run(with_fd);
			_exit(0);
		}
		check(child > 0 && waitpid(child, &status, 0) == child);
		if (status)
			fprintf(stderr, "status %#x\n", status);
		check(status == 0);
	}
}

static void close_all(bool with_fd)
{
	begin(with_fd);
	check(!close_range(3, ~0u, 0));
	all();
	ummunotify_close(umn);
}

/* What the program opens then has the library's numbers. */
static void close_all_and_open(bool with_fd)
{
	int ends[10][2], file[10];
	struct stat before, after;
	char byte;

	begin(with_fd);
	check(!close_range(3, ~0u, 0));
	for (int i = 0; i < 10; i++) {
		check(!pipe2(ends[i], O_NONBLOCK));
		check((file[i] = memfd_create("own", 0)) >= 0);
	}
	check(!fstat(file[0], &before));
	all();
	ummunotify_close(umn);
	for (int i = 0; i < 10; i++) {
		/* Open, and nothing was written to them or read from them. */
		check(read(ends[i][0], &byte, 1) == -1 && errno == EAGAIN);
		check(write(ends[i][1], "x", 1) == 1 && read(ends[i][0], &byte, 1) == 1 && byte == 'x');
		check(!fstat(file[i], &after) && after.st_size == 0);
	}
	check(!fstat(file[0], &after) && after.st_ino == before.st_ino);
}

/* False: it is not the library's. */
static bool replace(int victim, bool with_fd)
{
	int ends[2];
	char bytes[8];

	begin(with_fd);
	if (theirs[victim] || fcntl(victim, F_GETFD) < 0)
		return false;
	check(!pipe2(ends, O_NONBLOCK) && write(ends[1], "own", 3) == 3);
	check(dup2(ends[0], victim) == victim);
	sees_changes();
	waits_or_says_why();
	sees_changes();
	ummunotify_close(umn);
	check(read(victim, bytes, sizeof bytes) == 3 && !memcmp(bytes, "own", 3));
	return true;
}

/* One in each process, so that each is replaced while the others are sound. */
static void replace_each(bool with_fd)
{
	int status, replaced = 0;

	for (int victim = 0; victim < FDS; victim++) {
		pid_t child = fork();

		if (!child)
			_exit(replace(victim, with_fd) ? 0 : 77);
		check(child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status));
		check(WEXITSTATUS(status) == 0 || WEXITSTATUS(status) == 77);
		replaced += !WEXITSTATUS(status);
	}
	check(replaced > 0);
}

static void test_close_range(void)
{
	in_process(close_all);
}

static void test_reused_numbers(void)
{
	in_process(close_all_and_open);
}

static void test_each_replaced(void)
{
	in_process(replace_each);
}

int main(int argc, char **argv)
{
	static const struct test tests[] = {
		{"close_range", test_close_range}, {"reused_numbers", test_reused_numbers}, {"each_replaced", test_each_replaced}};

	return run_tests(tests, sizeof tests / sizeof *tests, argc > 1 ? argv[1] : NULL);
}
