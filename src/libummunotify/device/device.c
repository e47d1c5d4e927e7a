/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The device's descriptor is an epoll instance over what wakes the notifier up, so poll, select and epoll are the kernel's. What
 * that cannot do is done here and beside this: ioctl and read (request.c), mmap, O_ASYNC (sigio.c), duplicates and forks.
 *
 * Locks. `account_lock` protects the account of descriptors, a device's own lock what is watched and read; the device's comes
 * first. A thread that holds one has all signals blocked and cannot be cancelled: so read() may be called in a signal handler, as
 * a system call may. No thread waits for a change with either lock held.
 *
 * Forks. In a child with memory of its own the descriptor still belongs to the parent's memory. The child cannot reach the
 * notifier, which is in the parent's own memory; but the counter's page and the epoll instance are shared, and read and ioctl are
 * requests to a thread of the parent (device_serve). Each fork with fork's handlers starts that thread, if there is none. A child
 * that is made without them (_Fork, clone) has the thread of an earlier fork, or no reply: then read and ioctl fail with EBADF.
 *
 * No lock is held over a fork: the child's first call finds that it is another process (process.h), and makes the account anew from
 * the table of descriptors, before it takes any lock.
 *
 * A child that shares the memory (vfork, CLONE_VM) has descriptors of its own: what it closes is not accounted for (is_ours).
 */
#define _GNU_SOURCE
#include "device/device.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "abi/layout.h"
#include "device/memory.h"
#include "device/state.h"
#include "process/process.h"

struct device *device_fds[DEVICE_FDS];
/* In the table for the library's own descriptors. A program that closes all numbers but those that it knows would make itself miss
 * changes: for close() and dup2() the library's are not open. */
static struct device hidden;

static pthread_mutex_t account_lock = PTHREAD_MUTEX_INITIALIZER;
static struct device *devices; /* changed by single stores, so a child finds a sound list whenever it was made */
static unsigned int top;       /* no descriptor above has ever been in the table */
static pid_t owner_pid;	       /* the process that all this belongs to */

/* ---- Masking ---- */

void device_mask_signals(struct masked *before)
{
	sigset_t all;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before->signals);
	pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &before->cancel_state);
}

void device_restore_signals(const struct masked *before)
{
	int kept = errno;

	pthread_setcancelstate(before->cancel_state, NULL);
	pthread_sigmask(SIG_SETMASK, &before->signals, NULL);
	errno = kept;
}

static int failed(int error)
{
	errno = error;
	return -1;
}

/* ---- The account of descriptors ---- */

/* Atomically, as free_device() withdraws entries without the account's lock. */
static struct device *entry(unsigned int fd)
{
	return __atomic_load_n(&device_fds[fd], __ATOMIC_RELAXED);
}

/* The bound first: a child must find every entry below it. */
static void set_entry(int fd, struct device *d)
{
	unsigned int bound = __atomic_load_n(&top, __ATOMIC_RELAXED);

	while ((unsigned int)fd > bound &&
	       !__atomic_compare_exchange_n(&top, &bound, (unsigned int)fd, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
		continue;
	__atomic_store_n(&device_fds[fd], d, __ATOMIC_RELEASE);
}

void device_hide(int fd)
{
	if ((unsigned int)fd < DEVICE_FDS)
		set_entry(fd, &hidden);
}

static void unhide(int fd)
{
	struct device *expected = &hidden;

	if ((unsigned int)fd < DEVICE_FDS)
		__atomic_compare_exchange_n(&device_fds[fd], &expected, NULL, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}

void device_close_hidden(struct umn_descriptor *descriptor)
{
	unhide(descriptor->fd);
	if (umn_descriptor_intact(descriptor) && !umn_process_shares_descriptors())
		next.close(descriptor->fd);
	descriptor->fd = -1;
}

static void hide_all(struct device *d)
{
	int fds[UMN_DEVICE_FDS];
	size_t count = umn_device_fds(d->umn, fds);

	while (count)
		device_hide(fds[--count]);
	device_hide(d->counter_fd);
}

/* The account's lock is held; true: the caller frees it. */
static bool is_unused(struct device *d)
{
	struct device **link = &devices;

	if (d->fds)
		return false;
	device_close_hidden(&d->client); /* the server ends when the last child has closed its copy */
	if (d->users)
		return false;
	while (*link != d)
		link = &(*link)->next;
	__atomic_store_n(link, d->next, __ATOMIC_RELEASE);
	return true;
}

static void free_device(struct device *d)
{
	int fds[UMN_DEVICE_FDS];
	size_t count;

	if (!device_stop_signals(d))
		return; /* a thread goes on with it */
	if (!d->remote) {
		/* So that the notifier can close them. */
		count = umn_device_fds(d->umn, fds);
		while (count)
			unhide(fds[--count]);
	}
	ummunotify_close(d->umn);
	unhide(d->counter_fd);
	if (d->counter_fd >= 0)
		next.close(d->counter_fd);
	device_close_hidden(&d->server);
	device_close_hidden(&d->client);
	free(d->cookies.at);
	free(d);
}

static bool is_ours(void)
{
	if (getpid() == owner_pid)
		return true;
	/* A child with memory of its own takes the account over, in its first call. One of vfork has the parent's epoch. */
	if (umn_process_is(0))
		umn_process_current();
	return getpid() == owner_pid;
}

/* The device of a descriptor, for a call. NULL: it has just been closed, or is not this process's account. Masks signals. */
static struct device *enter(int fd, struct masked *before)
{
	struct device *d;

	if (!is_ours())
		return NULL;
	device_mask_signals(before);
	pthread_mutex_lock(&account_lock);
	d = entry((unsigned int)fd);
	if (d == &hidden)
		d = NULL;
	if (d)
		d->users++;
	pthread_mutex_unlock(&account_lock);
	if (!d)
		device_restore_signals(before);
	return d;
}

static void leave(struct device *d, const struct masked *before)
{
	int kept = errno;
	bool unused;

	pthread_mutex_lock(&account_lock);
	d->users--;
	unused = is_unused(d);
	pthread_mutex_unlock(&account_lock);
	if (unused)
		free_device(d);
	errno = kept;
	device_restore_signals(before);
}

/* The account's lock is held for these two. */
static void attach(int fd, struct device *d)
{
	set_entry(fd, d);
	d->fds++;
}

/* Adds to a list of those that are to be freed. */
static void detach(int fd, struct device **unused)
{
	struct device *d = entry((unsigned int)fd);

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
	struct masked before;
	int result;

	if (!is_ours())
		return next.close(fd);
	device_mask_signals(&before);
	pthread_mutex_lock(&account_lock);
	/* Both under the lock: the next file that gets the number must not find it in the table. */
	detach(fd, &unused);
	result = entry((unsigned int)fd) == &hidden ? failed(EBADF) : next.close(fd);
	pthread_mutex_unlock(&account_lock);
	free_devices(unused);
	device_restore_signals(&before);
	return result;
}

int device_close_range(unsigned int first, unsigned int last, int flags)
{
	struct device *unused = NULL;
	struct masked before;
	int result = 0;

	if (!devices || flags || first > last || !is_ours())
		return next.close_range(first, last, flags);
	device_mask_signals(&before);
	pthread_mutex_lock(&account_lock);
	/* In pieces between those that are hidden. */
	for (unsigned int fd = first; !result && fd <= last && fd <= __atomic_load_n(&top, __ATOMIC_RELAXED); fd++)
		if (entry(fd) == &hidden) {
			if (fd > first)
				result = next.close_range(first, fd - 1, flags);
			first = fd + 1;
		} else {
			detach((int)fd, &unused);
		}
	if (!result && first <= last)
		result = next.close_range(first, last, flags);
	pthread_mutex_unlock(&account_lock);
	free_devices(unused);
	device_restore_signals(&before);
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
	struct masked before;
	struct device *d;
	int copy;

	if (!is_ours())
		return next.dup(fd);
	device_mask_signals(&before);
	pthread_mutex_lock(&account_lock);
	d = entry((unsigned int)fd);
	copy = d == &hidden ? failed(EBADF) : attach_copy(next.dup(fd), d);
	pthread_mutex_unlock(&account_lock);
	device_restore_signals(&before);
	return copy;
}

int device_dup_to(int fd, int to, int flags, bool dup3)
{
	struct device *unused = NULL, *d;
	struct masked before;
	int copy;

	if (!is_ours() || (fd == to && !dup3))
		return dup3 ? next.dup3(fd, to, flags) : next.dup2(fd, to);
	device_mask_signals(&before);
	pthread_mutex_lock(&account_lock);
	d = is_device(fd) ? entry((unsigned int)fd) : NULL;
	if (d == &hidden)
		copy = failed(EBADF);
	else if (is_device(to) && entry((unsigned int)to) == &hidden)
		copy = failed(EBUSY); /* dup2(2): it is being opened */
	else
		copy = dup3 ? next.dup3(fd, to, flags) : next.dup2(fd, to);
	if (copy >= 0 && copy < DEVICE_FDS)
		detach(copy, &unused);
	copy = attach_copy(copy, d);
	pthread_mutex_unlock(&account_lock);
	free_devices(unused);
	device_restore_signals(&before);
	return copy;
}

/* ---- Forks ---- */

static void *serve(void *argument)
{
	struct device *d = argument;
	struct masked before;

	device_mask_signals(&before);
	device_serve(d);
	leave(d, &before);
	return NULL;
}

/* If it fails, the child's requests do. The account's lock is held. */
static void start_server(struct device *d)
{
	pthread_t thread;
	int ends[2];

	if (d->remote || d->server.fd >= 0 || !d->fds || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends))
		return;
	umn_descriptor_set(&d->client, ends[0]);
	umn_descriptor_set(&d->server, ends[1]);
	device_hide(ends[0]);
	device_hide(ends[1]);
	d->users++;
	if (pthread_create(&thread, NULL, serve, d)) {
		d->users--;
		device_close_hidden(&d->client);
		device_close_hidden(&d->server);
		return;
	}
	pthread_detach(thread);
}

static void before_fork(void)
{
	struct masked before;

	if (!is_ours())
		return;
	device_mask_signals(&before);
	pthread_mutex_lock(&account_lock);
	for (struct device *d = devices; d; d = d->next)
		start_server(d);
	pthread_mutex_unlock(&account_lock);
	device_restore_signals(&before);
}

/* In a child, before the notifier's module closes its descriptors (its calls of close() lead here): the library's own are no longer
 * hidden, and the account is made anew, since another thread may have been changing it. Calls that other threads had under way
 * do not exist here. */
static void in_child(void)
{
	owner_pid = getpid();
	pthread_mutex_init(&account_lock, NULL);
	for (struct device *d = devices; d; d = d->next)
		d->fds = d->users = 0;
	for (unsigned int fd = 0; fd <= top; fd++)
		if (device_fds[fd] == &hidden)
			device_fds[fd] = NULL;
		else if (device_fds[fd])
			device_fds[fd]->fds++;
	for (struct device *d = devices; d; d = d->next) {
		pthread_mutex_init(&d->lock, NULL);
		if (!d->remote) {
			device_close_hidden(&d->server);
			device_close_hidden(&d->signaller.out);
			device_close_hidden(&d->signaller.in);
			device_close_hidden(&d->signaller.stop_out);
			device_close_hidden(&d->signaller.stop_in);
		}
		d->remote = true;
		device_hide(d->client.fd);
		device_hide(d->counter_fd);
	}
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

/* Another library's functions may come before these: then the program's calls go past the device, and its descriptor is an epoll
 * instance to them. */
static void warn_if_interposed(void)
{
	static const char *const names[] = {"mmap", "read", "ioctl", "fcntl", "dup", "dup2", "close"};
	static bool complained;
	Dl_info ours, first;

	if (secure_getenv("UMMUNOTIFY_QUIET") || !dladdr((void *)device_open, &ours))
		return;
	for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
		if (!dladdr(dlsym(RTLD_DEFAULT, names[i]), &first) || first.dli_fbase == ours.dli_fbase)
			continue;
		if (!__atomic_test_and_set(&complained, __ATOMIC_RELAXED))
			dprintf(2,
				"ummunotify: " DEVICE_PATH
				" will not work fully: %s of %s comes before that of %s (a call of it fails with "
				"ENODEV, EINVAL or ENOTTY); put the latter first in LD_PRELOAD\n",
				names[i], first.dli_fname, ours.dli_fname);
		return;
	}
}

static int start_error;

static void start(void)
{
	start_error = umn_process_start();
	if (start_error)
		return;
	/* Before the notifier's, which closes descriptors that are hidden. */
	umn_process_add_child(in_child);
	owner_pid = getpid();
	pthread_atfork(before_fork, NULL, NULL);
}

/* userfaultfd does not see all that the device is expected to: it has to be asked for. */
static const char *source(void)
{
	const char *named = secure_getenv("UMMUNOTIFY_SOURCE");

	return named && *named ? named : "daemon";
}

static struct device *new_device(void)
{
	const struct umn_descriptor none = UMN_NO_DESCRIPTOR;
	struct device *d = calloc(1, sizeof *d);

	if (!d)
		return NULL;
	d->counter_fd = -1;
	d->client = d->server = none;
	d->signaller.out = d->signaller.in = d->signaller.stop_out = d->signaller.stop_in = none;
	pthread_mutex_init(&d->lock, NULL);
	return d;
}

static int open_it(int flags)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	struct device *d;
	int fd, error;

	pthread_once(&once, start);
	if (start_error || !is_ours())
		return failed(ENOENT);
	d = new_device();
	if (!d)
		return failed(ENOMEM);
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
	pthread_mutex_lock(&account_lock);
	d->next = devices;
	__atomic_store_n(&devices, d, __ATOMIC_RELEASE);
	attach(fd, d);
	hide_all(d);
	pthread_mutex_unlock(&account_lock);
	warn_if_interposed();
	return fd;
}

int device_open(int flags)
{
	struct masked before;
	int fd;

	if ((flags & O_ACCMODE) != O_RDONLY)
		return failed(EINVAL);
	if (flags & O_DIRECTORY)
		return failed(ENOTDIR);
	device_mask_signals(&before);
	fd = open_it(flags);
	device_restore_signals(&before);
	return fd;
}

static int set_async(struct device *d, int fd, bool on)
{
	int error = 0;

	if (d->remote)
		return on == d->signaller.on ? 0 : EINVAL; /* the thread is the owner's, and only the owner can end or start it */
	pthread_mutex_lock(&d->lock);
	if (on && !d->signaller.on)
		error = device_start_signals(d, fd);
	else if (!on)
		device_stop_signals(d);
	pthread_mutex_unlock(&d->lock);
	return error;
}

static void carry_out(struct device *d, const struct request *request, struct reply *reply)
{
	(d->remote ? device_ask_owner : device_handle_request)(d, request, reply);
}

/* Does a system call that a signal interrupts go on after the handler? The kernel knows which handler ran; this does not, so all of
 * them have to restart it, but for those of signals that a thread causes itself, which one that waits does not. */
static bool restarts_after_signal(void)
{
	static const uint64_t caused =
		1ul << SIGSEGV | 1ul << SIGBUS | 1ul << SIGFPE | 1ul << SIGILL | 1ul << SIGTRAP | 1ul << SIGSYS | 1ul << SIGABRT;
	struct sigaction action;

	for (int number = 1; number < NSIG && number < 64; number++)
		if (!(caused >> number & 1) && !sigaction(number, NULL, &action) && action.sa_handler != SIG_DFL &&
		    action.sa_handler != SIG_IGN && !(action.sa_flags & SA_RESTART))
			return false;
	return true;
}

/* Until there may be something to read; it was tried, if there was room for it. Signals are not masked. 0, or read()'s errno. */
static int wait_readable(int fd, bool has_room)
{
	struct pollfd polled = {.fd = fd, .events = POLLIN};

	if (next.fcntl(fd, F_GETFL) & O_NONBLOCK)
		return !has_room && poll(&polled, 1, 0) == 1 ? 0 : EAGAIN;
	while (poll(&polled, 1, -1) < 0)
		if (errno != EINTR || !restarts_after_signal())
			return errno;
	return 0;
}

/* As many events as there are, up to `room`, into memory that is looked at first: an event that was taken must not be lost. */
static size_t read_pieces(struct device *d, struct ummunotify_device_event *events, size_t room, int *error)
{
	struct request request = {.kind = REQUEST_READ};
	struct reply reply;
	size_t count = 0;

	*error = 0;
	do {
		request.room = (uint32_t)(room - count < DEVICE_PIECE ? room - count : DEVICE_PIECE);
		if (!device_can_write(events + count, request.room * sizeof *events)) {
			*error = EFAULT;
			break;
		}
		carry_out(d, &request, &reply);
		*error = reply.error;
		if (reply.count)
			memcpy(events + count, reply.events, reply.count * sizeof *events);
		count += reply.count;
	} while (request.room && reply.count == request.room);
	return count;
}

/* As many events as fit, once there is one. */
ssize_t device_read(int fd, void *buffer, size_t length)
{
	const size_t room = length / sizeof(struct ummunotify_device_event);
	struct masked before;
	struct device *d;
	size_t count;
	int error;

	for (;;) {
		d = enter(fd, &before);
		if (!d)
			return next.read(fd, buffer, length);
		count = read_pieces(d, buffer, room, &error);
		leave(d, &before);
		if (count)
			return (ssize_t)(count * sizeof(struct ummunotify_device_event));
		if (error)
			return failed(error);
		error = wait_readable(fd, room);
		if (error)
			return failed(error);
		if (!room)
			return 0; /* something, but none fits */
	}
}

static bool kind_of(unsigned long number, enum request_kind *kind)
{
	switch (number) {
	case UMMUNOTIFY_EXCHANGE_FEATURES:
		*kind = REQUEST_EXCHANGE;
		return true;
	case UMMUNOTIFY_REGISTER_REGION:
		*kind = REQUEST_REGISTER;
		return true;
	case UMMUNOTIFY_UNREGISTER_REGION:
		*kind = REQUEST_UNREGISTER;
		return true;
	}
	return false;
}

int device_ioctl(int fd, unsigned long number, void *argument)
{
	const size_t size = number == FIOASYNC ? sizeof(int) : _IOC_SIZE(number);
	struct request request;
	struct reply reply = {0};
	struct masked before;
	struct device *d;

	if (number == FIONBIO || number == FIOCLEX || number == FIONCLEX) /* what is for all kinds of files */
		return next.ioctl(fd, number, argument);
	if (number != FIOASYNC && !kind_of(number, &request.kind))
		return failed(ENOTTY);
	d = enter(fd, &before);
	if (!d)
		return next.ioctl(fd, number, argument);
	if (!(number == UMMUNOTIFY_EXCHANGE_FEATURES ? device_can_write(argument, size) : device_can_read(argument, size))) {
		reply.error = EFAULT;
	} else if (number == FIOASYNC) {
		reply.error = set_async(d, fd, *(int *)argument);
	} else {
		memcpy(&request.region, argument, size);
		carry_out(d, &request, &reply);
		if (request.kind == REQUEST_EXCHANGE && !reply.error)
			memset(argument, 0, size); /* no feature is defined */
	}
	leave(d, &before);
	return reply.error ? failed(reply.error) : 0;
}

int device_fcntl(int fd, int command, long argument)
{
	struct masked before;
	struct device *d = enter(fd, &before);
	int result, error;

	if (!d)
		return next.fcntl(fd, command, argument);
	switch (command) {
	case F_DUPFD:
	case F_DUPFD_CLOEXEC:
		pthread_mutex_lock(&account_lock);
		result = attach_copy(next.fcntl(fd, command, argument), d);
		pthread_mutex_unlock(&account_lock);
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
		pthread_mutex_lock(&d->lock);
		if (!result && d->signaller.on && !d->remote)
			device_copy_owner(d, fd);
		pthread_mutex_unlock(&d->lock);
		break;
	default:
		result = next.fcntl(fd, command, argument);
	}
	leave(d, &before);
	return result;
}

void *device_mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset)
{
	struct masked before;
	struct device *d;
	void *page;

	d = enter(fd, &before);
	if (!d)
		return next.mmap(address, length, protection, flags, fd, offset);
	page = MAP_FAILED;
	if (protection & PROT_WRITE)
		errno = EACCES; /* the descriptor is for reading */
	else if ((flags & MAP_TYPE) == MAP_PRIVATE || !length || length > (size_t)sysconf(_SC_PAGESIZE) || offset)
		errno = EINVAL;
	else
		page = next.mmap(address, UMN_PAGE, protection, flags, d->counter_fd, 0);
	leave(d, &before);
	return page;
}
