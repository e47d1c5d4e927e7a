/* SPDX-License-Identifier: BSD-3-Clause */
/* Descriptors that the program may close and reuse (process/descriptor.h). */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "process/descriptor.h"

enum { PIPE, SOCKET, FILE_ON_DISK, KINDS };

static int make(int kind)
{
	int ends[2];

	switch (kind) {
	case PIPE:
		check(!pipe2(ends, O_CLOEXEC));
		break;
	case SOCKET:
		check(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends));
		break;
	default:
		return open("/proc/self/exe", O_RDONLY);
	}
	close(ends[1]);
	return ends[0];
}

static bool is_open(int fd)
{
	return fcntl(fd, F_GETFD) >= 0;
}

static void test_own(int kind)
{
	struct umn_descriptor d = UMN_NO_DESCRIPTOR;
	int fd = make(kind);

	umn_descriptor_set(&d, fd);
	check(d.fd == fd && umn_descriptor_intact(&d));
	umn_descriptor_close(&d);
	check(d.fd == -1 && !is_open(fd) && !umn_descriptor_intact(&d));
	umn_descriptor_close(&d);
}

/* The program closes it, and then uses the number for a file of each kind. */
static void test_replaced(int kind, int by)
{
	struct umn_descriptor d = UMN_NO_DESCRIPTOR;
	int fd = make(kind), other;

	umn_descriptor_set(&d, fd);
	close(fd);
	errno = ENOTTY;
	check(!umn_descriptor_intact(&d) && errno == ENOTTY);
	other = make(by);
	if (other != fd) {
		check(dup2(other, fd) == fd);
		close(other);
	}
	if (kind == FILE_ON_DISK && by == FILE_ON_DISK) {
		check(umn_descriptor_intact(&d)); /* the same file */
		close(fd);
		return;
	}
	check(!umn_descriptor_intact(&d));
	umn_descriptor_close(&d);
	check(d.fd == -1 && is_open(fd));
	close(fd);
}

/* The program moves it away and back. */
static void test_moved(int kind)
{
	struct umn_descriptor d = UMN_NO_DESCRIPTOR;
	int fd = make(kind), copy;

	umn_descriptor_set(&d, fd);
	copy = dup(fd);
	close(fd);
	check(!umn_descriptor_intact(&d));
	check(dup2(copy, fd) == fd && umn_descriptor_intact(&d));
	umn_descriptor_close(&d);
	check(!is_open(fd) && is_open(copy));
	close(copy);
}

/* What is closed in a child stays open in the parent. */
static void test_child(int kind)
{
	struct umn_descriptor d = UMN_NO_DESCRIPTOR;
	int fd = make(kind), status;
	pid_t pid;

	umn_descriptor_set(&d, fd);
	pid = fork();
	if (pid == 0) {
		check(umn_descriptor_intact(&d));
		umn_descriptor_close(&d);
		check(!is_open(fd));
		_exit(0);
	}
	check(waitpid(pid, &status, 0) == pid && !status);
	check(umn_descriptor_intact(&d));
	umn_descriptor_close(&d);
}

/* A number that led to no file when it was noted down never leads to ours. */
static void test_none(void)
{
	struct umn_descriptor d = {.fd = 7, .device = 1, .inode = 2};
	int fd;

	umn_descriptor_set(&d, -1);
	check(d.fd == -1 && !umn_descriptor_intact(&d));
	umn_descriptor_close(&d);

	fd = make(PIPE);
	umn_descriptor_set(&d, fd);
	umn_descriptor_close(&d);
	umn_descriptor_set(&d, fd); /* closed */
	check(make(PIPE) == fd);
	check(!umn_descriptor_intact(&d));
	umn_descriptor_close(&d);
	check(is_open(fd));
	close(fd);
}

static void test_close(void)
{
	int fd = make(PIPE), number = fd;

	umn_close(&fd);
	check(fd == -1 && !is_open(number));
	umn_close(&fd);
	check(fd == -1);
}

int main(void)
{
	int lowest = make(PIPE), fd;

	close(lowest);
	for (int kind = 0; kind < KINDS; kind++) {
		test_own(kind);
		test_moved(kind);
		test_child(kind);
		for (int by = 0; by < KINDS; by++)
			test_replaced(kind, by);
	}
	test_none();
	test_close();
	fd = make(PIPE);
	check(fd == lowest); /* nothing was left open */
	close(fd);
	return 0;
}
