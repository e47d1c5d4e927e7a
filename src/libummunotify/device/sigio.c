/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * O_ASYNC. An epoll instance sends no signals, but a pipe does. So a thread waits for the notifier's wake-ups and writes to a pipe,
 * whose owner and signal are those that the program has set for the device. The signal names the descriptor that O_ASYNC was set
 * for, which must be the device's number: so O_ASYNC is set in a descriptor table in which the pipe has that number. That is the
 * table of another thread, which ends then; the kernel keeps the number until the pipe itself is closed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "device/state.h"

static void *set_async(void *argument)
{
	const struct signaller *s = argument;
	int kept[] = {s->out.fd}, fd = s->out.fd;

	/* Fails where close_range is missing (before Linux 5.9) or refused: then the signal names the pipe. */
	if (!umn_descriptors_unshare(kept, 1))
		fd = (int)syscall(SYS_dup3, s->out.fd, s->fd, 0);
	syscall(SYS_fcntl, fd, F_SETFL, O_NONBLOCK | O_ASYNC);
	return NULL;
}

static void *send_signals(void *argument)
{
	struct device *d = argument;
	struct signaller *s = &d->signaller;
	struct pollfd polled[2] = {{.fd = umn_device_wake(d->umn), .events = POLLIN}, {.fd = s->stop_out.fd, .events = POLLIN}};
	char byte = 0;

	while (poll(polled, 2, -1) < 0 || !polled[1].revents) {
		if (!polled[0].revents)
			continue;
		if ((polled[0].revents & POLLNVAL) || !umn_descriptor_intact(&s->in) || !umn_descriptor_intact(&s->out))
			break; /* the program has closed them by system calls */
		/* First: what comes after the signal must send another. */
		umn_device_next_wakeup(d->umn);
		if (syscall(SYS_write, s->in.fd, &byte, 1) < 0 || syscall(SYS_read, s->out.fd, &byte, 1) < 0)
			break; /* cannot be */
	}
	return NULL;
}

void device_copy_owner(struct device *d, int fd)
{
	struct f_owner_ex owner;
	int to = d->signaller.out.fd;

	if (!umn_descriptor_intact(&d->signaller.out))
		return;
	if (!next.fcntl(fd, F_GETOWN_EX, &owner))
		next.fcntl(to, F_SETOWN_EX, &owner);
	next.fcntl(to, F_SETSIG, next.fcntl(fd, F_GETSIG));
}

static void close_pipes(struct signaller *s)
{
	device_close_hidden(&s->out);
	device_close_hidden(&s->in);
	device_close_hidden(&s->stop_out);
	device_close_hidden(&s->stop_in);
}

bool device_stop_signals(struct device *d)
{
	struct signaller *s = &d->signaller;
	const char byte = 0;

	if (!s->on)
		return true;
	s->on = false;
	if (d->remote)
		return true; /* the thread is the owner's */
	if (!umn_descriptor_intact(&s->stop_in) || write(s->stop_in.fd, &byte, 1) < 0)
		return false;
	pthread_join(s->thread, NULL);
	/* A child's copy of the reading end may be closed after the writing end, which would send one more signal. */
	if (umn_descriptor_intact(&s->out))
		next.fcntl(s->out.fd, F_SETFL, O_NONBLOCK);
	close_pipes(s);
	return true;
}

static int make_pipe(struct umn_descriptor *out, struct umn_descriptor *in)
{
	int ends[2];

	if (pipe2(ends, O_CLOEXEC | O_NONBLOCK))
		return errno;
	umn_descriptor_set(out, ends[0]);
	umn_descriptor_set(in, ends[1]);
	device_hide(ends[0]);
	device_hide(ends[1]);
	return 0;
}

int device_start_signals(struct device *d, int fd)
{
	struct signaller *s = &d->signaller;
	int error;

	*s = (struct signaller){.out = UMN_NO_DESCRIPTOR,
				.in = UMN_NO_DESCRIPTOR,
				.stop_out = UMN_NO_DESCRIPTOR,
				.stop_in = UMN_NO_DESCRIPTOR,
				.fd = fd};
	error = make_pipe(&s->out, &s->in);
	if (!error)
		error = make_pipe(&s->stop_out, &s->stop_in);
	if (!error) {
		device_copy_owner(d, fd);
		umn_read(d->umn, NULL, 0, &d->reading); /* what was before this sends no signal */
		error = pthread_create(&s->thread, NULL, set_async, s);
		if (!error)
			error = pthread_join(s->thread, NULL);
		if (!error)
			error = pthread_create(&s->thread, NULL, send_signals, d);
	}
	if (error) {
		close_pipes(s);
		return error;
	}
	s->on = true;
	return 0;
}
