/* SPDX-License-Identifier: BSD-3-Clause */
/* What is readable while there may be something to read (notifier/wakeup.h), with an eventfd as a source's wake-up. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "notifier/wakeup.h"
#include "process/error.h"

static int event; /* the source's */

static int add_wakeup(struct umn_connection *connection, int epoll)
{
	struct epoll_event events = {.events = EPOLLIN};

	(void)connection;
	if (epoll_ctl(epoll, EPOLL_CTL_ADD, event, &events))
		return umn_fail_errno(UMMUNOTIFY_UNAVAILABLE, errno, "the wake-up cannot be waited for");
	return 0;
}

static struct umn_connection connection = {.add_wakeup = add_wakeup, .wake_fd = -1};

static unsigned int open_descriptors(void)
{
	DIR *entries = opendir("/proc/self/fd");
	unsigned int n = 0;

	check(entries);
	while (readdir(entries))
		n++;
	closedir(entries);
	return n;
}

static bool is_open(int fd)
{
	return fcntl(fd, F_GETFD) >= 0;
}

static bool is_readable(int fd)
{
	struct pollfd polled = {.fd = fd, .events = POLLIN};

	return poll(&polled, 1, 0) == 1;
}

static void set_event(void)
{
	check(!eventfd_write(event, 1));
}

static void clear_event(void)
{
	eventfd_t value;

	check(!eventfd_read(event, &value));
}

static struct umn_wakeup open_wakeup(int epoll)
{
	struct umn_wakeup w;

	if (umn_wakeup_open(&w, &connection, epoll))
		fail("umn_wakeup_open: %s", ummunotify_error());
	check(umn_wakeup_intact(&w) && !is_readable(w.epoll));
	return w;
}

/* ---- As it is meant ---- */

static void check_readable(struct umn_wakeup *w)
{
	for (int i = 0; i < 3; i++) {
		umn_wakeup_set(w, true);
		umn_wakeup_set(w, true);
		check(is_readable(w->epoll));
		umn_wakeup_set(w, false);
		umn_wakeup_set(w, false);
		check(!is_readable(w->epoll));
		set_event();
		check(is_readable(w->epoll));
		umn_wakeup_set(w, true);
		clear_event();
		check(is_readable(w->epoll));
		umn_wakeup_set(w, false);
		check(!is_readable(w->epoll) && umn_wakeup_intact(w));
	}
}

static void test_own_epoll(void)
{
	struct umn_wakeup w = open_wakeup(-1);

	check_readable(&w);
	umn_wakeup_close(&w);
	umn_wakeup_close(&w);
}

static void test_callers_epoll(void)
{
	int epoll = epoll_create1(EPOLL_CLOEXEC);
	struct umn_wakeup w = open_wakeup(epoll);

	check(w.epoll == epoll);
	check_readable(&w);
	/* Without what the notifier adds. */
	umn_wakeup_set(&w, true);
	check(!is_readable(w.source));
	set_event();
	check(is_readable(w.source));
	clear_event();
	umn_wakeup_close(&w);
	check(is_open(epoll) && !is_readable(epoll));
	close(epoll);
}

/* ---- The program closes or replaces some of the descriptors ---- */

#define NUMBERS 5

static void numbers_of(const struct umn_wakeup *w, int *fds)
{
	memcpy(fds, (int[NUMBERS]){w->epoll, w->source, w->out.fd, w->in.fd, w->source_fd}, NUMBERS * sizeof *fds);
}

/* `replace`: by files of the program's, which must stay open and unchanged. */
static void take_away(unsigned int which, bool replace, bool is_callers)
{
	int epoll = is_callers ? epoll_create1(EPOLL_CLOEXEC) : -1, fds[NUMBERS], ends[2], kept = event;
	struct umn_wakeup w;
	char byte;

	connection.wake_fd = event = eventfd(0, EFD_CLOEXEC); /* a source whose descriptor stays open */
	w = open_wakeup(epoll);
	numbers_of(&w, fds);
	umn_wakeup_set(&w, which & 1);
	check(!pipe2(ends, O_NONBLOCK));
	for (int i = 0; i < NUMBERS; i++)
		if ((which & 1u << i) && fds[i] >= 0) {
			if (replace)
				check(dup2(ends[i & 1], fds[i]) == fds[i]);
			else
				close(fds[i]);
		}
	check(!umn_wakeup_intact(&w) && ummunotify_failure()->code == UMMUNOTIFY_DESCRIPTOR);
	for (int i = 0; i < 2; i++) {
		umn_wakeup_set(&w, true);
		umn_wakeup_set(&w, false);
	}
	umn_wakeup_close(&w);
	check(read(ends[0], &byte, 1) < 0 && errno == EAGAIN); /* nothing was written to the program's pipe */
	for (int i = 0; i < NUMBERS; i++)
		if ((which & 1u << i) && fds[i] >= 0 && replace) {
			check(is_open(fds[i]));
			close(fds[i]);
		}
	close(ends[0]);
	close(ends[1]);
	if (is_callers && !(which & 1))
		close(epoll);
	/* An epoll of which the pipe is gone cannot be told from others, so it stays open. */
	for (int i = 0; i < 2; i++)
		if (!(which & 1u << i) && fds[i] >= 0 && is_open(fds[i]) && (which & (i ? 8 : 4)))
			close(fds[i]);
	if (!(which & 1u << 4))
		close(event);
	connection.wake_fd = -1;
	event = kept;
}

static void test_taken_away(void)
{
	for (unsigned int which = 1; which < 1u << NUMBERS; which++)
		for (int replace = 0; replace < 2; replace++)
			for (int is_callers = 0; is_callers < 2; is_callers++)
				if (is_callers || which != 2) /* it has no `source` of its own */
					take_away(which, replace, is_callers);
}

/* ---- A child closes what it has inherited ---- */

static void test_child(void)
{
	struct umn_wakeup w = open_wakeup(-1);
	int status, fds[NUMBERS];
	pid_t pid;

	numbers_of(&w, fds);
	pid = fork();
	if (pid == 0) {
		umn_wakeup_close(&w);
		for (int i = 0; i < NUMBERS; i++)
			check(fds[i] < 0 || !is_open(fds[i]));
		_exit(0);
	}
	check(waitpid(pid, &status, 0) == pid && !status);
	check(umn_wakeup_intact(&w));
	check_readable(&w);
	umn_wakeup_close(&w);
}

/* ---- Failures ---- */

static int refuse(struct umn_connection *unused, int epoll)
{
	(void)unused, (void)epoll;
	return umn_fail_errno(UMMUNOTIFY_UNAVAILABLE, ENOTTY, "refused");
}

static void test_source_refuses(void)
{
	struct umn_connection refusing = {.add_wakeup = refuse, .wake_fd = -1};
	int epoll = epoll_create1(EPOLL_CLOEXEC);
	struct umn_wakeup w;

	for (int is_callers = 0; is_callers < 2; is_callers++) {
		check(umn_wakeup_open(&w, &refusing, is_callers ? epoll : -1) == -ENOTTY);
		umn_wakeup_close(&w);
	}
	close(epoll);
}

/* At each step. */
static void test_no_descriptors(void)
{
	int epoll = epoll_create1(EPOLL_CLOEXEC), lowest = dup(epoll), failures = 0;
	struct rlimit before, limit;
	struct umn_wakeup w;

	close(lowest);
	getrlimit(RLIMIT_NOFILE, &before);
	for (int is_callers = 0; is_callers < 2; is_callers++)
		for (int n = 0; n < 4; n++) {
			limit = before;
			limit.rlim_cur = lowest + n;
			check(!setrlimit(RLIMIT_NOFILE, &limit));
			if (umn_wakeup_open(&w, &connection, is_callers ? epoll : -1)) {
				check(ummunotify_failure()->code == UMMUNOTIFY_LIMIT && ummunotify_failure()->error == EMFILE);
				failures++;
			}
			umn_wakeup_close(&w);
			setrlimit(RLIMIT_NOFILE, &before);
			check(dup(epoll) == lowest && !close(lowest));
		}
	check(failures == 6);
	close(epoll);
}

/* The caller's epoll is none: the errno says so. */
static void test_no_epoll(void)
{
	struct umn_wakeup w;

	check(umn_wakeup_open(&w, &connection, event) == -EINVAL && ummunotify_failure()->error == EINVAL);
	umn_wakeup_close(&w);
}

int main(void)
{
	static void (*const tests[])(void) = {
		test_own_epoll,	     test_callers_epoll,  test_taken_away, test_child,
		test_source_refuses, test_no_descriptors, test_no_epoll,
	};
	unsigned int before;

	event = eventfd(0, EFD_CLOEXEC);
	before = open_descriptors();
	for (size_t i = 0; i < LENGTH(tests); i++) {
		tests[i]();
		if (open_descriptors() != before)
			fail("test %zu leaves descriptors open", i);
	}
	return 0;
}
