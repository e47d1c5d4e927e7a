/* SPDX-License-Identifier: BSD-3-Clause */
/* The source `daemon`, as sources/daemon.py: the protocol is daemon/protocol.py's. */
#define _GNU_SOURCE
#include "sources/connection.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "sources/probe_gap.h"
#include "sources/platform.h"

#define VERSION 2
#define SOCKET "/run/ummunotify/socket"
#define GROW_MOST 64
#define TIMEOUT 30 /* seconds without an answer */

enum op { HELLO = 1, SETTLE, GROW };

struct request {
	uint16_t op, version;
	uint32_t argument;
};

enum status { OK, END, WRONG_VERSION, CLIENTS, USER_CLIENTS, USER_MEMORY, PROCESS_CLIENTS, FAILED, UNSEEN, MEMORY };

enum gives { GIVES_KVM = 1, GIVES_DOUBTS = 2 };
enum probe { KVM, MMU_NOTIFIER, ZAP, PROBES };
static const char *const names[PROBES] = {"daemon:kvm", "daemon:mmu_notifier", "daemon:zap"};

struct reply {
	uint16_t status, fds, gives, probe;
	uint64_t value;
};

struct daemon_feed {
	struct feed feed;
	struct umn_doubt doubt;
	int socket, ring_fd;
	int links[GROW_MOST]; /* what keeps the program attached, and the map for `doubt` */
	uint32_t link_count;
	struct umn_ring ring;
	int segments[GROW_MOST]; /* not mapped yet, the last one first */
	uint32_t segment_count;
	bool in_machine;
	uint64_t secret;
};

/* The process's empty virtual machine subscribes it to the kernel's MMU notifications. Changed only while no fork can happen. */
static struct {
	int fd;
	uint32_t users;
} machine = {.fd = -1};

static int refused(const struct reply *reply)
{
	const unsigned long long value = reply->value;

	switch (reply->status) {
	case WRONG_VERSION:
		return fail(ENODEV, "the daemon speaks version %llu of the protocol, this library version %d; install the same version "
				    "of ummunotify on both sides", value, VERSION);
	case CLIENTS:
		return fail(ENODEV, "the daemon serves %llu notifiers, as many as it may; raise its --clients", value);
	case USER_CLIENTS:
		return fail(ENODEV, "this user has %llu notifiers open, as many as the daemon allows; close some, or raise the daemon's "
				    "--clients-per-user", value);
	case USER_MEMORY:
		return fail(ENOMEM, "this user's tables would take more than the %llu MiB that the daemon allows; watch fewer regions, "
				    "or raise the daemon's --memory-per-user", value >> 20);
	case MEMORY:
		return fail(ENOMEM, "the tables of all users take the %llu MiB that the daemon allows; raise its --memory", value >> 20);
	case PROCESS_CLIENTS:
		return fail(ENODEV, "this process has too many notifiers; close some of them");
	case UNSEEN:
		return fail(ENODEV, "the daemon's program did not see a change made for it to see; please report this with the kernel's "
				    "version");
	}
	return fail(ENODEV, "the daemon failed (%s); look at its log", strerror((int)value));
}

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

/* The answer, with up to GROW_MOST descriptors. 0, or a negative errno that has been explained. */
static int ask(struct daemon_feed *feed, enum op op, struct reply *reply, int *fds)
{
	const struct request request = {.op = (uint16_t)op, .version = VERSION};
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(GROW_MOST * sizeof(int))];
	} control;
	struct iovec data = {.iov_base = reply, .iov_len = sizeof *reply};
	struct msghdr message = {
		.msg_iov = &data, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
	struct cmsghdr *header;
	uint32_t got = 0;
	ssize_t length;

	do
		length = send(feed->socket, &request, sizeof request, MSG_NOSIGNAL);
	while (length < 0 && errno == EINTR);
	while (length >= 0 && (length = recvmsg(feed->socket, &message, MSG_CMSG_CLOEXEC)) < 0 && errno == EINTR)
		length = 0;
	if (length < 0 && errno == EAGAIN)
		return fail(ENODEV, "the daemon does not answer; look at its log");
	if (length < 0 && errno != ECONNRESET && errno != EPIPE)
		return fail(ENODEV, "the daemon's help came to nothing (%s)", strerror(errno));
	if (length > 0)
		for (header = CMSG_FIRSTHDR(&message); header; header = CMSG_NXTHDR(&message, header))
			if (header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS) {
				got = (uint32_t)((header->cmsg_len - CMSG_LEN(0)) / sizeof(int));
				memcpy(fds, CMSG_DATA(header), got * sizeof(int));
			}
	if (length == sizeof *reply && got == reply->fds)
		return 0;
	while (got)
		close(fds[--got]);
	if (length == sizeof *reply)
		return fail(EMFILE, "this process may not open more descriptors; raise `ulimit -n`");
	return fail(op == GROW ? ENOMEM : ENODEV, op == GROW ? "the daemon that this notifier was opened with has ended; open a new one"
							     : "the daemon ended the connection: it was stopped, or this user has too "
							       "many of them");
}

static int connect_to_daemon(void)
{
	const char *path = secure_getenv("UMMUNOTIFY_SOCKET");
	const struct timeval timeout = {.tv_sec = TIMEOUT};
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd, result, error;

	path = path && *path ? path : SOCKET;
	if (strlen(path) >= sizeof address.sun_path)
		return fail(ENODEV, "the daemon's socket cannot be at %s: this is too long", path);
	strcpy(address.sun_path, path);
	fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return fail(ENODEV, "cannot make a socket (%s)", strerror(errno));
	/* Blocking, as without it connect() fails at once where others wait in line. */
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof timeout);
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
	do
		result = connect(fd, (struct sockaddr *)&address, sizeof address);
	while (result && errno == EINTR);
	if (!result)
		return fd;
	error = errno;
	close(fd);
	switch (error) {
	case ENOENT:
		return fail(ENODEV, "no daemon runs here: there is no %s; have an administrator run `ummunotify daemon`", path);
	case ECONNREFUSED:
		return fail(ENODEV, "nobody listens at %s: the daemon has ended; have an administrator start it again", path);
	case EACCES:
		return fail(ENODEV, "the daemon's socket %s is not for this user; become a member of its group", path);
	case EAGAIN:
		return fail(ENODEV, "the daemon at %s does not answer; look at its log", path);
	}
	return fail(ENODEV, "cannot connect to the daemon at %s (%s)", path, strerror(error));
}

/* Takes `kvm` over, a descriptor of /dev/kvm; -1: the daemon does not give one. */
static int enter_machine(int kvm)
{
	int error = 0;

	if (!machine.users) {
		if (kvm < 0)
			kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
		if (kvm < 0)
			return fail(ENODEV, "/dev/kvm cannot be opened (%s); load the module kvm-intel or kvm-amd, and become a member "
					    "of the group kvm", strerror(errno));
		machine.fd = ioctl(kvm, KVM_CREATE_VM, 0);
		error = machine.fd < 0 ? fail(ENODEV, "KVM cannot create a virtual machine (%s)", strerror(errno)) : 0;
	}
	close_fd(&kvm);
	machine.users += !error;
	return error;
}

static void *add_segment(struct feed *feed, uint32_t pages)
{
	struct daemon_feed *f = (struct daemon_feed *)feed;
	int fds[GROW_MOST], fd;
	struct reply reply;
	void *memory;

	if (!f->segment_count) {
		if (ask(f, GROW, &reply, fds))
			return NULL;
		if (reply.status != OK || !reply.fds) {
			refused(&reply);
			return NULL;
		}
		while (reply.fds)
			f->segments[f->segment_count++] = fds[--reply.fds];
	}
	fd = f->segments[--f->segment_count];
	memory = mmap(NULL, (size_t)pages * UMN_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (memory == MAP_FAILED)
		fail(errno, "the table's memory cannot be mapped (%s)", strerror(errno));
	close(fd); /* the mapping keeps the map */
	return memory == MAP_FAILED ? NULL : memory;
}

static int bind_feed(struct feed *feed)
{
	struct daemon_feed *f = (struct daemon_feed *)feed;
	struct reply reply;
	int fds[GROW_MOST], error;

	error = f->doubt.shared ? umn_doubt_show_secret(&f->doubt, f->secret) : umn_show_secret(f->secret);
	if (error)
		return fail(ENODEV, "a page of memory cannot be changed (%s)", strerror(-error));
	error = ask(f, SETTLE, &reply, fds);
	if (error)
		return error;
	return reply.status == OK ? 0 : refused(&reply);
}

static int wake_fd(struct feed *feed)
{
	struct daemon_feed *f = (struct daemon_feed *)feed;
	int error = f->ring.consumed ? 0 : umn_ring_map(&f->ring, f->ring_fd);

	return error ? fail(-error, "the wake-up cannot be mapped (%s)", strerror(-error)) : f->ring_fd;
}

static int all_fds(struct feed *feed, int *fds)
{
	struct daemon_feed *f = (struct daemon_feed *)feed;
	int count = 0;

	fds[count++] = f->socket;
	fds[count++] = f->ring_fd;
	fds[count++] = machine.fd;
	for (uint32_t i = 0; i < f->link_count; i++)
		fds[count++] = f->links[i];
	return count;
}

_Static_assert(FEED_FDS == 3 + GROW_MOST, "all_fds");

static void acknowledge(struct feed *feed)
{
	umn_ring_clear(&((struct daemon_feed *)feed)->ring);
}

static bool doubtful(struct feed *feed)
{
	(void)feed;
	return false; /* the daemon looks */
}

static void release(struct feed *feed)
{
	struct daemon_feed *f = (struct daemon_feed *)feed;

	umn_ring_unmap(&f->ring);
	/* No farewell: the daemon notices when the last copy of the socket is closed. In the child of a fork it is not. */
	close_fd(&f->socket);
	umn_doubt_abandon(&f->doubt);
	while (f->link_count)
		close(f->links[--f->link_count]);
	close_fd(&f->ring_fd);
	close_fd(&f->feed.counter_fd);
	while (f->segment_count)
		close(f->segments[--f->segment_count]);
	if (f->in_machine && !--machine.users)
		close_fd(&machine.fd);
	f->in_machine = false;
}

static void free_feed(struct feed *feed)
{
	umn_doubt_close(&((struct daemon_feed *)feed)->doubt);
	free(feed);
}

/* Takes over what came with the answer to HELLO. */
static int take(struct daemon_feed *f, const struct reply *reply, const int *fds)
{
	uint32_t next = 0;
	int kvm, error = 0;

	f->feed.name = names[reply->probe];
	f->ring_fd = fds[next++];
	f->segments[f->segment_count++] = fds[next++];
	kvm = reply->gives & GIVES_KVM ? fds[next++] : -1;
	while (next < reply->fds)
		f->links[f->link_count++] = fds[next++];
	if (reply->gives & GIVES_DOUBTS) {
		error = umn_doubt_open(&f->doubt, f->links[0]);
		if (error)
			fail(ENODEV, "the daemon's map cannot be mapped (%s)", strerror(-error));
		else
			f->feed.source = &f->doubt.source;
	}
	/* Without a probe at the notifier no machine is needed. */
	if (!error && reply->probe != ZAP) {
		error = enter_machine(kvm);
		f->in_machine = !error;
	} else {
		close_fd(&kvm);
	}
	return error;
}

struct feed *feed_open_daemon(bool counter)
{
	struct daemon_feed *f = calloc(1, sizeof *f);
	int fds[GROW_MOST] = {0};
	struct reply reply;

	if (!f) {
		fail(ENOMEM, "%s", strerror(ENOMEM));
		return NULL;
	}
	f->feed = (struct feed){.counter_fd = -1,
				.add_segment = add_segment,
				.bind = bind_feed,
				.wake_fd = wake_fd,
				.fds = all_fds,
				.acknowledge = acknowledge,
				.doubtful = doubtful,
				.release = release,
				.free = free_feed};
	f->socket = f->ring_fd = -1;
	f->socket = connect_to_daemon();
	if (f->socket < 0 || ask(f, HELLO, &reply, fds))
		goto failed;
	if (reply.status != OK || reply.fds < 3 || reply.probe >= PROBES) {
		while (reply.fds)
			close(fds[--reply.fds]);
		refused(&reply);
		goto failed;
	}
	f->secret = reply.value;
	if (take(f, &reply, fds))
		goto failed;
	if (counter && (f->feed.counter_fd = fcntl(fds[1], F_DUPFD_CLOEXEC, 0)) < 0) {
		fail(errno, "%s", strerror(errno));
		goto failed;
	}
	return &f->feed;
failed:
	release(&f->feed);
	free_feed(&f->feed);
	return NULL;
}
