/* SPDX-License-Identifier: BSD-3-Clause */
/* Flags, duplicates and closing. */
#include "device.h"

#include <sys/stat.h>

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
	if (!is_uffd()) {		       /* whose descriptors come and go */
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
		/* uffd is not exact: see announce in uffd.c. */
		if (is_uffd())
			wait_readable(fd);
		check(is_uffd() ? *counter >= (uint64_t)i : *counter == (uint64_t)i && readable(fd));
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

const struct test descriptor_tests[] = {
	{"flags", test_flags},
	{"duplicates", test_duplicates},
	{"close", test_close},
	{"closing_all_others", test_closing_all_others},
	{"other_files", test_other_files},
	{0},
};
