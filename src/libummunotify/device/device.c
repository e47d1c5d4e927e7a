/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The device's descriptor is an epoll instance over what wakes the notifier up: so poll, select and epoll are the kernel's affair.
 * What it cannot do is here: ioctl, read, mmap, O_ASYNC; and keeping account of duplicates and forks.
 *
 * Locks
 *
 * `lock` is held for the account of descriptors, and a device's own for what is watched and read. Whoever holds one has all
 * signals blocked and is not cancelled: so read() may be called in a signal handler, as a system call may. Nothing waits for a
 * change with either lock held.
 *
 * Forks
 *
 * The descriptor still belongs to the parent's memory then. The child cannot reach the notifier, which is in the parent's own
 * memory; but the counter's page and the epoll instance are shared, and for read and ioctl it asks a thread of the parent's
 * (`serve`). That thread is started by the first fork with the device open, and keeps it open until the last child has closed it.
 *
 * A child of vfork shares the memory, so what it closes before it executes another program must not be accounted for (is_ours).
 */
#define _GNU_SOURCE
#include "device/device.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "abi/layout.h"
#include "table/table.h"
#include "notifier/notifier.h"

/* The other interface's event has the same name. */
#define ummunotify_event device_event
#include "include/linux/ummunotify.h"
#undef ummunotify_event

_Static_assert(sizeof(struct device_event) == 32 && sizeof(struct ummunotify_register_ioctl) == 32, "as programs know them");

#define PIECE 64 /* events read at a time */

struct device *device_fds[DEVICE_FDS];
/* The library's own descriptors. A program that closes all numbers but those it knows would make it miss changes, silently: for
 * close() and dup2() they are not there. */
static struct device hidden;

/* The regions by their cookies: a hash table with linear probing, at most half full. */
struct cookies {
	struct umn_region **at;
	size_t mask; /* its size - 1 */
	size_t count;
};

/* What sends SIGIO. */
struct signaller {
	bool on;
	pthread_t thread;
	int pipe[2]; /* the kernel sends the signal for this one's reading end, whenever something is written */
	int stop;    /* an eventfd */
	int fd;	     /* the device's, as it shows in the signal */
	int ready;   /* the thread has done what setting up is its own */
};

struct device {
	struct ummunotify *umn;
	int counter_fd;
	/* `lock` is for these. */
	unsigned int fds;   /* this process's */
	unsigned int users; /* calls under way, and the thread that serves children */
	struct device *next;
	int client, server; /* both ends of what children ask through; -1: no fork yet */
	bool remote;	    /* this is a child; only `client` and counter_fd are of use */
	int hidden[UMN_DEVICE_FDS + 1], hidden_count;

	pthread_mutex_t own;
	bool used;
	struct cookies cookies;
	struct umn_reading drain;
	struct signaller signaller;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct device *devices;
static unsigned int top; /* no descriptor above has ever been a device's */
static pid_t us;	 /* the process that all this belongs to */

/* ---- Not to be disturbed ---- */

struct calm {
	sigset_t signals;
	int cancelled;
};

static void calm(struct calm *before)
{
	sigset_t all;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before->signals);
	pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &before->cancelled);
}

static void uncalm(const struct calm *before)
{
	int kept = errno;

	pthread_setcancelstate(before->cancelled, NULL);
	pthread_sigmask(SIG_SETMASK, &before->signals, NULL);
	errno = kept;
}

static int failed(int error)
{
	errno = error;
	return -1;
}

static void close_fd(int *fd)
{
	if (*fd >= 0)
		next.close(*fd);
	*fd = -1;
}

/* ---- Cookies ---- */

static size_t place_of(const struct cookies *c, uint64_t cookie)
{
	size_t i = (cookie * UINT64_C(0x9e3779b97f4a7c15)) >> 20 & c->mask;

	while (c->at[i] && c->at[i]->cookie != cookie)
		i = (i + 1) & c->mask;
	return i;
}

static struct umn_region *find_cookie(const struct cookies *c, uint64_t cookie)
{
	return c->at ? c->at[place_of(c, cookie)] : NULL;
}

/* Makes room for one more. */
static bool reserve_cookie(struct cookies *c)
{
	struct cookies larger = {.mask = c->at ? 2 * c->mask + 1 : 63, .count = c->count};

	if (c->at && 2 * (c->count + 1) <= c->mask + 1)
		return true;
	larger.at = calloc(larger.mask + 1, sizeof *larger.at);
	if (!larger.at)
		return false;
	for (size_t i = 0; c->at && i <= c->mask; i++)
		if (c->at[i])
			larger.at[place_of(&larger, c->at[i]->cookie)] = c->at[i];
	free(c->at);
	*c = larger;
	return true;
}

static void add_cookie(struct cookies *c, struct umn_region *region)
{
	c->at[place_of(c, region->cookie)] = region;
	c->count++;
}

static void remove_cookie(struct cookies *c, uint64_t cookie)
{
	size_t hole = place_of(c, cookie), i = hole, home;

	c->at[hole] = NULL;
	c->count--;
	/* Whatever was pushed past the hole from a place before it moves there. */
	while (c->at[i = (i + 1) & c->mask]) {
		home = (c->at[i]->cookie * UINT64_C(0x9e3779b97f4a7c15)) >> 20 & c->mask;
		if (((i - home) & c->mask) < ((i - hole) & c->mask))
			continue;
		c->at[hole] = c->at[i];
		c->at[i] = NULL;
		hole = i;
	}
}

/* ---- What the device does ---- */

enum op { EXCHANGE, REGISTER, UNREGISTER, READ };

struct order {
	enum op op;
	union {
		uint32_t features;
		struct ummunotify_register_ioctl region;
		uint64_t cookie;
		uint32_t room; /* of events, at most PIECE */
	};
};

struct answer {
	int error;
	uint32_t count;
	struct device_event events[PIECE];
};

static int exchange(struct device *d)
{
	if (d->used)
		return EINVAL;
	d->used = true;
	return 0;
}

static int register_region(struct device *d, const struct ummunotify_register_ioctl *wanted)
{
	struct ummunotify_region *region;
	int error;

	d->used = true;
	/* `flags` is not looked at: the best-known client, Open MPI, leaves whatever is on its stack there. */
	if (wanted->start >= wanted->end || wanted->reserved || find_cookie(&d->cookies, wanted->user_cookie))
		return EINVAL;
	if (!reserve_cookie(&d->cookies))
		return ENOMEM;
	error = ummunotify_watch(d->umn, (void *)wanted->start, wanted->end - wanted->start, wanted->user_cookie, &region);
	if (!error)
		add_cookie(&d->cookies, (struct umn_region *)region);
	return -error;
}

static int unregister_region(struct device *d, uint64_t cookie)
{
	struct umn_region *region = find_cookie(&d->cookies, cookie);

	if (!region)
		return EINVAL;
	remove_cookie(&d->cookies, cookie);
	ummunotify_unwatch(d->umn, (struct ummunotify_region *)region);
	/* If it was the only one that was hit, there is nothing to read any more. */
	if (ummunotify_changed(d->umn))
		umn_read(d->umn, NULL, 0, &d->drain);
	return 0;
}

/* Up to `room` events. Fewer: that was all. */
static uint32_t read_events(struct device *d, struct device_event *events, uint32_t room)
{
	struct ummunotify_event piece[PIECE];
	ptrdiff_t n = umn_read(d->umn, piece, room, &d->drain);
	uint32_t count = 0;

	for (; count < n; count++) {
		/* First, so that what its holder pins after reading this is watched. It fails if there is nothing mapped now. */
		if (umn_must_renew(d->umn))
			ummunotify_renew(d->umn, piece[count].region);
		events[count] = (struct device_event){.type = UMMUNOTIFY_EVENT_TYPE_INVAL,
						      .flags = piece[count].exact ? UMMUNOTIFY_EVENT_FLAG_HINT : 0,
						      .hint_start = piece[count].start,
						      .hint_end = piece[count].end,
						      .user_cookie_counter = piece[count].cookie};
	}
	if (d->drain.finished && count < room) {
		d->drain.finished = false;
		events[count++] =
			(struct device_event){.type = UMMUNOTIFY_EVENT_TYPE_LAST, .user_cookie_counter = d->drain.seen};
	}
	return count;
}

/* In the process that the device belongs to. */
static void obey(struct device *d, struct order *order, struct answer *answer)
{
	pthread_mutex_lock(&d->own);
	answer->error = 0;
	answer->count = 0;
	switch (order->op) {
	case EXCHANGE:
		answer->error = exchange(d);
		break;
	case REGISTER:
		answer->error = register_region(d, &order->region);
		break;
	case UNREGISTER:
		answer->error = unregister_region(d, order->cookie);
		break;
	case READ:
		answer->count = read_events(d, answer->events, order->room < PIECE ? order->room : PIECE);
		break;
	default:
		answer->error = EINVAL;
	}
	pthread_mutex_unlock(&d->own);
}

/* In a child. Once the parent has ended nothing can change there, so there is nothing to read. */
static void ask(struct device *d, struct order *order, struct answer *answer)
{
	int ends[2];
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(sizeof(int))];
	} control = {.header = {.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof(int))}};
	struct iovec data = {.iov_base = order, .iov_len = sizeof *order};
	struct msghdr message = {
		.msg_iov = &data, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = CMSG_LEN(sizeof(int))};
	ssize_t length = -1;

	answer->count = 0;
	answer->error = 0;
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends)) {
		answer->error = errno;
		return;
	}
	memcpy(CMSG_DATA(&control.header), &ends[1], sizeof(int));
	if (sendmsg(d->client, &message, MSG_NOSIGNAL) >= 0) {
		next.close(ends[1]); /* if it is not answered, there is nobody at the other end */
		ends[1] = -1;
		length = recv(ends[0], answer, sizeof *answer, 0);
	}
	close_fd(&ends[0]);
	close_fd(&ends[1]);
	if (length != sizeof *answer) {
		answer->count = 0;
		answer->error = order->op == READ ? 0 : ESRCH;
	}
}

static void carry_out(struct device *d, struct order *order, struct answer *answer)
{
	(d->remote ? ask : obey)(d, order, answer);
}

/* ---- SIGIO ----
 *
 * An epoll instance sends no signals, but a pipe does. So a thread waits for the notifier's wake-ups and writes to a pipe, whose
 * owner and signal are what the program has set for the device. The signal names the descriptor that O_ASYNC was set for: that has
 * to have the device's number, so the thread has a table of descriptors of its own, in which it has. */

/* Closes all but these in a table of this thread's own. False: the kernel does not let us have one (Linux 5.9; a seccomp filter). */
static bool unshare_fds(int *kept, int count)
{
	unsigned int from = 0;
	int flags = CLOSE_RANGE_UNSHARE;

	for (int i = 1; i < count; i++) /* sort */
		for (int j = i; j && kept[j - 1] > kept[j]; j--) {
			int other = kept[j];

			kept[j] = kept[j - 1];
			kept[j - 1] = other;
		}
	for (int i = 0; i <= count; i++) {
		unsigned int to = i < count ? (unsigned int)kept[i] : ~0u;

		if (to > from || i == count) {
			if (syscall(SYS_close_range, from, i < count ? to - 1 : to, flags))
				return false;
			flags = 0;
		}
		from = to + 1;
	}
	return true;
}

static void *send_signals(void *argument)
{
	struct device *d = argument;
	struct signaller *s = &d->signaller;
	struct pollfd polled[2] = {{.events = POLLIN}, {.fd = s->stop, .events = POLLIN}};
	int ends[2], kept[6], fd = s->pipe[0];
	char byte = 0;

	umn_device_wakeups(d->umn, &polled[0].fd, ends);
	memcpy(kept, (int[]){polled[0].fd, ends[0], ends[1], s->stop, s->pipe[0], s->pipe[1]}, sizeof kept);
	if (unshare_fds(kept, 6))
		fd = (int)syscall(SYS_dup2, s->pipe[0], s->fd);
	next.fcntl(fd, F_SETFL, O_NONBLOCK | O_ASYNC);
	__atomic_store_n(&s->ready, 1, __ATOMIC_RELEASE);
	syscall(SYS_futex, &s->ready, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
	while (poll(polled, 2, -1) < 0 || !polled[1].revents) {
		if (!polled[0].revents)
			continue;
		/* First, so that what comes after the signal sends another. */
		umn_device_next_wakeup(d->umn);
		/* The system calls themselves: no descriptor here is one in the table of devices. */
		if (syscall(SYS_write, s->pipe[1], &byte, 1) < 0 || syscall(SYS_read, s->pipe[0], &byte, 1) < 0)
			break; /* cannot be */
	}
	return NULL;
}

static void copy_owner(int fd, int to)
{
	struct f_owner_ex owner;

	if (!next.fcntl(fd, F_GETOWN_EX, &owner))
		next.fcntl(to, F_SETOWN_EX, &owner);
	next.fcntl(to, F_SETSIG, next.fcntl(fd, F_GETSIG));
}

static void stop_signals(struct device *d)
{
	struct signaller *s = &d->signaller;
	const uint64_t one = 1;

	if (!s->on)
		return;
	s->on = false;
	if (!d->remote && write(s->stop, &one, sizeof one) > 0)
		pthread_join(s->thread, NULL);
	/* Else, as the thread's own copy of the reading end may be closed after the writing end, that would send one more. */
	if (!d->remote)
		next.fcntl(s->pipe[0], F_SETFL, O_NONBLOCK);
	close_fd(&s->pipe[0]);
	close_fd(&s->pipe[1]);
	close_fd(&s->stop);
}

/* d->own is held, and signals are blocked: so they are in the thread. */
static int start_signals(struct device *d, int fd)
{
	struct signaller *s = &d->signaller;
	int error = 0;

	*s = (struct signaller){.pipe = {-1, -1}, .stop = -1, .fd = fd};
	if (pipe2(s->pipe, O_CLOEXEC | O_NONBLOCK) || (s->stop = eventfd(0, EFD_CLOEXEC)) < 0)
		error = errno;
	if (!error) {
		copy_owner(fd, s->pipe[0]);
		umn_read(d->umn, NULL, 0, &d->drain); /* what has been before this sends no signal */
		error = pthread_create(&s->thread, NULL, send_signals, d);
	}
	if (error) {
		close_fd(&s->pipe[0]);
		close_fd(&s->pipe[1]);
		close_fd(&s->stop);
		return error;
	}
	while (!__atomic_load_n(&s->ready, __ATOMIC_ACQUIRE))
		syscall(SYS_futex, &s->ready, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0);
	s->on = true;
	return 0;
}

static int set_async(struct device *d, int fd, bool on)
{
	int error = 0;

	if (d->remote)
		return on == d->signaller.on ? 0 : EINVAL; /* the parent's, and only it can change that */
	pthread_mutex_lock(&d->own);
	if (on && !d->signaller.on)
		error = start_signals(d, fd);
	else if (!on)
		stop_signals(d);
	pthread_mutex_unlock(&d->own);
	return error;
}

/* ---- The account of descriptors ---- */

/* `lock` is held for these. */
static void mark_hidden(struct device *d)
{
	for (int i = 0; i < d->hidden_count; i++)
		if ((unsigned int)d->hidden[i] < DEVICE_FDS) {
			__atomic_store_n(&device_fds[d->hidden[i]], &hidden, __ATOMIC_RELAXED);
			if ((unsigned int)d->hidden[i] > top)
				top = (unsigned int)d->hidden[i];
		}
}

static void hide(struct device *d)
{
	d->hidden_count = umn_device_fds(d->umn, d->hidden);
	d->hidden[d->hidden_count++] = d->counter_fd;
	mark_hidden(d);
}

/* After it was taken off the list. */
static void unhide(struct device *d)
{
	for (int i = 0; i < d->hidden_count; i++)
		if ((unsigned int)d->hidden[i] < DEVICE_FDS)
			__atomic_store_n(&device_fds[d->hidden[i]], NULL, __ATOMIC_RELAXED);
	d->hidden_count = 0;
	for (struct device *other = devices; other; other = other->next) /* some are several devices' */
		mark_hidden(other);
}

/* `lock` is held; true: it is for the caller to free. */
static bool is_unused(struct device *d)
{
	struct device **link = &devices;

	if (d->fds)
		return false;
	close_fd(&d->client); /* the last child's end of it decides */
	if (d->users)
		return false;
	while (*link != d)
		link = &(*link)->next;
	*link = d->next;
	unhide(d);
	return true;
}

static void free_device(struct device *d)
{
	stop_signals(d);
	ummunotify_close(d->umn);
	close_fd(&d->counter_fd);
	close_fd(&d->server);
	free(d->cookies.at);
	free(d);
}

/* Not in a child of vfork, which shares our memory but not our descriptors; nor in one that the handlers of fork know nothing of. */
static bool is_ours(void)
{
	return getpid() == us;
}

/* The device of a descriptor, for a call. NULL: it has just been closed, or is not for us to look after. Calms down. */
static struct device *enter(int fd, struct calm *before)
{
	struct device *d;

	if (!is_ours())
		return NULL;
	calm(before);
	pthread_mutex_lock(&lock);
	d = device_fds[fd];
	if (d == &hidden)
		d = NULL;
	if (d)
		d->users++;
	pthread_mutex_unlock(&lock);
	if (!d)
		uncalm(before);
	return d;
}

static void leave(struct device *d, const struct calm *before)
{
	int kept = errno;
	bool unused;

	pthread_mutex_lock(&lock);
	d->users--;
	unused = is_unused(d);
	pthread_mutex_unlock(&lock);
	if (unused)
		free_device(d);
	errno = kept;
	uncalm(before);
}

/* `lock` is held for these two. */
static void attach(int fd, struct device *d)
{
	__atomic_store_n(&device_fds[fd], d, __ATOMIC_RELAXED);
	d->fds++;
	if ((unsigned int)fd > top)
		top = (unsigned int)fd;
}

/* Those that are to be freed, in a list. */
static void detach(int fd, struct device **unused)
{
	struct device *d = device_fds[fd];

	if (!d || d == &hidden)
		return;
	__atomic_store_n(&device_fds[fd], NULL, __ATOMIC_RELAXED);
	d->fds--;
	if (is_unused(d)) {
		d->next = *unused;
		*unused = d;
	}
}

static void free_devices(struct device *unused)
{
	int kept = errno;
	struct device *following;

	for (; unused; unused = following) {
		following = unused->next;
		free_device(unused);
	}
	errno = kept;
}

int device_close(int fd)
{
	struct device *unused = NULL;
	struct calm before;
	int result;

	if (!is_ours())
		return next.close(fd);
	calm(&before);
	pthread_mutex_lock(&lock);
	/* Together: whoever is given the number next must not find it in the table. */
	detach(fd, &unused);
	result = device_fds[fd] == &hidden ? failed(EBADF) : next.close(fd);
	pthread_mutex_unlock(&lock);
	free_devices(unused);
	uncalm(&before);
	return result;
}

int device_close_range(unsigned int first, unsigned int last, int flags)
{
	struct device *unused = NULL;
	struct calm before;
	int result = 0;

	if (!devices || flags || first > last || !is_ours())
		return next.close_range(first, last, flags);
	calm(&before);
	pthread_mutex_lock(&lock);
	/* In pieces between those that are hidden. */
	for (unsigned int fd = first; !result && fd <= last && fd <= top; fd++)
		if (device_fds[fd] == &hidden) {
			if (fd > first)
				result = next.close_range(first, fd - 1, flags);
			first = fd + 1;
		} else {
			detach((int)fd, &unused);
		}
	if (!result && first <= last)
		result = next.close_range(first, last, flags);
	pthread_mutex_unlock(&lock);
	free_devices(unused);
	uncalm(&before);
	return result;
}

static int attach_copy(int fd, struct device *d)
{
	if (fd >= DEVICE_FDS) {
		next.close(fd);
		return failed(EMFILE);
	}
	if (fd >= 0 && d)
		attach(fd, d);
	return fd;
}

int device_dup(int fd)
{
	struct calm before;
	int copy;

	if (!is_ours())
		return next.dup(fd);
	calm(&before);
	pthread_mutex_lock(&lock);
	copy = device_fds[fd] == &hidden ? failed(EBADF) : attach_copy(next.dup(fd), device_fds[fd]);
	pthread_mutex_unlock(&lock);
	uncalm(&before);
	return copy;
}

int device_dup_to(int fd, int to, int flags, bool dup3)
{
	struct device *unused = NULL, *d;
	struct calm before;
	int copy;

	if (!is_ours() || (fd == to && !dup3))
		return dup3 ? next.dup3(fd, to, flags) : next.dup2(fd, to);
	calm(&before);
	pthread_mutex_lock(&lock);
	d = is_device(fd) ? device_fds[fd] : NULL;
	if (d == &hidden)
		copy = failed(EBADF);
	else if (is_device(to) && device_fds[to] == &hidden)
		copy = failed(EBUSY); /* dup2(2): it is being opened */
	else
		copy = dup3 ? next.dup3(fd, to, flags) : next.dup2(fd, to);
	if (copy >= 0 && copy < DEVICE_FDS)
		detach(copy, &unused);
	copy = attach_copy(copy, d);
	pthread_mutex_unlock(&lock);
	free_devices(unused);
	uncalm(&before);
	return copy;
}

/* ---- Forks ---- */

/* Answers the children until the last of them has closed the device. */
static void *serve(void *argument)
{
	struct device *d = argument;
	struct order order;
	struct answer answer;
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(sizeof(int))];
	} control;
	struct iovec data = {.iov_base = &order, .iov_len = sizeof order};
	struct msghdr message;
	struct calm before;
	ssize_t length;
	int fd;

	calm(&before);
	for (;;) {
		message = (struct msghdr){
			.msg_iov = &data, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
		length = recvmsg(d->server, &message, MSG_CMSG_CLOEXEC);
		if (length <= 0 && errno != EMFILE)
			break;
		if (!CMSG_FIRSTHDR(&message) || CMSG_FIRSTHDR(&message)->cmsg_type != SCM_RIGHTS)
			continue;
		memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
		if (length == sizeof order) {
			memset(&answer, 0, sizeof answer);
			obey(d, &order, &answer);
			send(fd, &answer, sizeof answer, MSG_NOSIGNAL | MSG_DONTWAIT);
		}
		next.close(fd);
	}
	leave(d, &before);
	return NULL;
}

static struct calm at_fork;

static void start_server(struct device *d)
{
	pthread_t thread;
	int ends[2];

	/* If it fails the child's calls do. */
	if (d->remote || d->server >= 0 || !d->fds || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends))
		return;
	d->client = ends[0];
	d->server = ends[1];
	d->users++;
	if (pthread_create(&thread, NULL, serve, d)) {
		d->users--;
		close_fd(&d->client);
		close_fd(&d->server);
		return;
	}
	pthread_detach(thread);
}

static void before_fork(void)
{
	struct calm before;

	calm(&before);
	pthread_mutex_lock(&lock);
	at_fork = before;
	for (struct device *d = devices; d; d = d->next)
		start_server(d);
}

static void in_parent(void)
{
	struct calm before = at_fork;

	pthread_mutex_unlock(&lock);
	uncalm(&before);
}

/* After the notifier's own. Calls of other threads that were under way never end here, so neither do their devices; they have
 * nothing open then. */
static void in_child(void)
{
	us = getpid();
	pthread_mutex_init(&lock, NULL);
	for (struct device *d = devices; d; d = d->next) {
		pthread_mutex_init(&d->own, NULL);
		if (!d->remote)
			unhide(d); /* the notifier has closed them; and others' will be, too */
		d->remote = true;
		close_fd(&d->server);
	}
	uncalm(&at_fork);
}

/* ---- Calls ---- */

static void complain(void)
{
	static bool complained;
	const char *source = secure_getenv("UMMUNOTIFY_SOURCE");

	if (secure_getenv("UMMUNOTIFY_QUIET") || __atomic_test_and_set(&complained, __ATOMIC_RELAXED))
		return;
	dprintf(2, "ummunotify: no " DEVICE_PATH ": %s%s; `ummunotify doctor` says more\n", ummunotify_error(),
		source && *source ? "" : ", or see what UMMUNOTIFY_SOURCE=uffd can do");
}

static void once(void)
{
	us = getpid();
	pthread_atfork(before_fork, in_parent, in_child);
}

/* userfaultfd does not see all that the device is expected to: only who asks for it gets it. */
static const char *source(void)
{
	const char *named = secure_getenv("UMMUNOTIFY_SOURCE");

	return named && *named ? named : "daemon";
}

static int open_it(int flags)
{
	static pthread_once_t first = PTHREAD_ONCE_INIT;
	struct device *d = calloc(1, sizeof *d);
	int fd, error;

	if (!d)
		return failed(ENOMEM);
	d->client = d->server = d->counter_fd = -1;
	pthread_mutex_init(&d->own, NULL);
	error = -umn_open_device(&d->umn, source(), flags & O_CLOEXEC, &fd, &d->counter_fd);
	if (error) {
		free(d);
		if (error == EMFILE || error == ENFILE || error == ENOMEM)
			return failed(error);
		complain();
		return failed(ENOENT);
	}
	if (fd >= DEVICE_FDS) {
		next.close(fd);
		free_device(d);
		return failed(EMFILE);
	}
	if (flags & O_NONBLOCK)
		next.fcntl(fd, F_SETFL, O_NONBLOCK);
	/* After the notifier's handlers, so that in the child it comes after them. */
	pthread_once(&first, once);
	pthread_mutex_lock(&lock);
	d->next = devices;
	devices = d;
	attach(fd, d);
	hide(d);
	pthread_mutex_unlock(&lock);
	return fd;
}

int device_open(int flags)
{
	struct calm before;
	int fd;

	if ((flags & O_ACCMODE) != O_RDONLY)
		return failed(EINVAL);
	if (flags & O_DIRECTORY)
		return failed(ENOTDIR);
	calm(&before);
	fd = open_it(flags);
	uncalm(&before);
	return fd;
}

/* Whether a system call that a signal interrupts goes on after the handler. The kernel knows which handler it was; we do not, so all
 * have to agree, but for those of signals that a thread brings upon itself, which does not happen to one that waits. */
static bool goes_on(void)
{
	static const uint64_t own = 1ul << SIGSEGV | 1ul << SIGBUS | 1ul << SIGFPE | 1ul << SIGILL | 1ul << SIGTRAP |
				    1ul << SIGSYS | 1ul << SIGABRT;
	struct sigaction action;

	for (int number = 1; number < NSIG && number < 64; number++)
		if (!(own >> number & 1) && !sigaction(number, NULL, &action) && action.sa_handler != SIG_DFL && action.sa_handler != SIG_IGN &&
		    !(action.sa_flags & SA_RESTART))
			return false;
	return true;
}

/* Until there may be something to read. It was tried, if there was room for it. Not calm. 0, or what read() fails with. */
static int wait_for_news(int fd, bool has_room)
{
	struct pollfd polled = {.fd = fd, .events = POLLIN};

	if (next.fcntl(fd, F_GETFL) & O_NONBLOCK)
		return !has_room && poll(&polled, 1, 0) == 1 ? 0 : EAGAIN;
	while (poll(&polled, 1, -1) < 0)
		if (errno != EINTR || !goes_on())
			return errno;
	return 0;
}

/* As many events as fit, once there is one. */
ssize_t device_read(int fd, void *buffer, size_t length)
{
	struct order order = {.op = READ};
	struct answer answer;
	size_t room = length / sizeof *answer.events, count = 0;
	struct calm before;
	struct device *d;
	int error;

	for (;;) {
		d = enter(fd, &before);
		if (!d)
			return next.read(fd, buffer, length);
		do {
			order.room = (uint32_t)(room - count < PIECE ? room - count : PIECE);
			carry_out(d, &order, &answer);
			if (answer.count)
				memcpy((struct device_event *)buffer + count, answer.events,
				       answer.count * sizeof *answer.events);
			count += answer.count;
		} while (order.room && answer.count == order.room);
		leave(d, &before);
		if (count)
			return (ssize_t)(count * sizeof *answer.events);
		if (answer.error)
			return failed(answer.error);
		error = wait_for_news(fd, room);
		if (error)
			return failed(error);
		if (!room)
			return 0; /* something, but none fits */
	}
}

int device_ioctl(int fd, unsigned long request, void *argument)
{
	struct order order;
	struct answer answer = {0};
	struct calm before;
	struct device *d;

	switch (request) {
	case UMMUNOTIFY_EXCHANGE_FEATURES:
		order.op = EXCHANGE;
		break;
	case UMMUNOTIFY_REGISTER_REGION:
		order.op = REGISTER;
		break;
	case UMMUNOTIFY_UNREGISTER_REGION:
		order.op = UNREGISTER;
		break;
	case FIOASYNC:
		break;
	case FIONBIO: /* what is for all kinds of files */
	case FIOCLEX:
	case FIONCLEX:
		return next.ioctl(fd, request, argument);
	default:
		return failed(ENOTTY);
	}
	if (!argument)
		return failed(EFAULT);
	d = enter(fd, &before);
	if (!d)
		return next.ioctl(fd, request, argument);
	if (request == FIOASYNC) {
		answer.error = set_async(d, fd, *(int *)argument);
	} else {
		memcpy(&order.region, argument, _IOC_SIZE(request));
		carry_out(d, &order, &answer);
		if (order.op == EXCHANGE && !answer.error)
			*(uint32_t *)argument = 0; /* no feature is defined */
	}
	leave(d, &before);
	return answer.error ? failed(answer.error) : 0;
}

int device_fcntl(int fd, int command, long argument)
{
	struct calm before;
	struct device *d = enter(fd, &before);
	int result, error;

	if (!d)
		return next.fcntl(fd, command, argument);
	switch (command) {
	case F_DUPFD:
	case F_DUPFD_CLOEXEC:
		pthread_mutex_lock(&lock);
		result = attach_copy(next.fcntl(fd, command, argument), d);
		pthread_mutex_unlock(&lock);
		break;
	case F_GETFL:
		result = next.fcntl(fd, F_GETFL);
		if (result >= 0)
			result = (result & ~O_ACCMODE) | O_RDONLY | (d->signaller.on ? O_ASYNC : 0);
		break;
	case F_SETFL:
		error = set_async(d, fd, argument & O_ASYNC);
		result = error ? failed(error) : next.fcntl(fd, F_SETFL, argument & ~O_ASYNC);
		break;
	case F_SETOWN:
	case F_SETOWN_EX:
	case F_SETSIG:
		result = next.fcntl(fd, command, argument);
		pthread_mutex_lock(&d->own);
		if (!result && d->signaller.on)
			copy_owner(fd, d->signaller.pipe[0]);
		pthread_mutex_unlock(&d->own);
		break;
	default:
		result = next.fcntl(fd, command, argument);
	}
	leave(d, &before);
	return result;
}

void *device_mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset)
{
	struct calm before;
	struct device *d;
	void *page;

	d = enter(fd, &before);
	if (!d)
		return next.mmap(address, length, protection, flags, fd, offset);
	page = MAP_FAILED;
	if (protection & PROT_WRITE)
		errno = EACCES; /* the descriptor is for reading */
	else if ((flags & MAP_TYPE) == MAP_PRIVATE || !length || length > UMN_PAGE || offset)
		errno = EINVAL;
	else
		page = next.mmap(address, UMN_PAGE, protection, flags, d->counter_fd, 0);
	leave(d, &before);
	return page;
}
