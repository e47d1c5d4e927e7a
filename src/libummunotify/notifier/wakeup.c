/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "notifier/wakeup.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "process/error.h"
#include "process/process.h"

static bool add(int epoll, int fd, uint32_t events)
{
	struct epoll_event event = {.events = events};

	return !epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
}

/* Is it an epoll to which this file was added under this number? */
static bool has_number(int epoll, int fd, uint32_t events)
{
	struct epoll_event event = {.events = events};
	int kept = errno;
	bool result = !epoll_ctl(epoll, EPOLL_CTL_MOD, fd, &event);

	errno = kept;
	return result;
}

/* Is it an epoll that has this end of our pipe? */
static bool has(int epoll, const struct umn_descriptor *end, uint32_t events)
{
	return epoll >= 0 && umn_descriptor_intact(end) && has_number(epoll, end->fd, events);
}

/* An epoll forgets a file that is closed. */
static bool has_source(const struct umn_wakeup *w)
{
	if (w->source >= 0 && !(has(w->source, &w->in, 0) && has_number(w->epoll, w->source, EPOLLIN)))
		return false;
	return w->source_fd < 0 || has_number(w->source >= 0 ? w->source : w->epoll, w->source_fd, EPOLLIN);
}

static int add_source(struct umn_wakeup *w, struct umn_connection *connection)
{
	int error = connection->add_wakeup(connection, w->source >= 0 ? w->source : w->epoll);

	w->source_fd = connection->wake_fd;
	return error;
}

int umn_wakeup_open(struct umn_wakeup *w, struct umn_connection *connection, int epoll)
{
	int ends[2], error;

	*w = (struct umn_wakeup)UMN_NO_WAKEUP;
	if (pipe2(ends, O_CLOEXEC | O_NONBLOCK))
		return umn_fail_errno(UMMUNOTIFY_LIMIT, errno, "a descriptor cannot be made");
	umn_descriptor_set(&w->out, ends[0]);
	umn_descriptor_set(&w->in, ends[1]);
	w->is_own = epoll < 0;
	w->epoll = w->is_own ? epoll_create1(EPOLL_CLOEXEC) : epoll;
	if (w->epoll < 0 || !add(w->epoll, w->out.fd, EPOLLIN))
		goto failed;
	if (w->is_own)
		return add_source(w, connection);
	w->source = epoll_create1(EPOLL_CLOEXEC);
	if (w->source < 0 || !add(w->source, w->in.fd, 0) || !add(w->epoll, w->source, EPOLLIN))
		goto failed;
	return add_source(w, connection);
failed:
	error = umn_fail_errno(UMMUNOTIFY_LIMIT, errno, "a descriptor cannot be made");
	umn_wakeup_close(w);
	return error;
}

bool umn_wakeup_intact(const struct umn_wakeup *w)
{
	if (has(w->epoll, &w->out, EPOLLIN) && umn_descriptor_intact(&w->in) && has_source(w))
		return true;
	umn_fail(UMMUNOTIFY_DESCRIPTOR, EBADF, "look at it without waiting (changes are still seen), or open a new notifier",
		 "the program has closed or replaced the descriptor that it would wait for");
	return false;
}

void umn_wakeup_set(struct umn_wakeup *w, bool is_set)
{
	char byte = 0;

	/* Both ends: to write to a pipe without a reader raises SIGPIPE. */
	if (w->is_set == is_set || w->epoll < 0 || !umn_descriptor_intact(&w->in) || !umn_descriptor_intact(&w->out))
		return;
	/* Neither can fail: the pipe holds one byte at most, and nothing else uses it. */
	if ((is_set ? write(w->in.fd, &byte, 1) : read(w->out.fd, &byte, 1)) == 1)
		w->is_set = is_set;
}

void umn_wakeup_close(struct umn_wakeup *w)
{
	bool closes = !umn_process_shares_descriptors();

	if (closes && w->is_own && has(w->epoll, &w->out, EPOLLIN))
		close(w->epoll);
	if (closes && has(w->source, &w->in, 0))
		close(w->source);
	w->epoll = w->source = w->source_fd = -1;
	umn_descriptor_close(&w->out);
	umn_descriptor_close(&w->in);
}
