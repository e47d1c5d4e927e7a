/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The sources `daemon` and `bpf`: the BPF program in the kernel feeds the table. What the process needs for that is handed over in
 * messages (abi/protocol.h): by the daemon through its socket, or by the process's own feeder through a function call.
 *
 * Once the table is bound, neither is on any path but growing. Nothing depends on a descriptor that the program could close: the
 * links and a copy of the socket are kept (keeper.h), tables and the wake-up are mapped. All of that stays out of children
 * (MADV_DONTFORK), so a child neither sees nor holds anything of it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "abi/protocol.h"
#include "include/ummunotify_feeder.h"
#include "process/descriptor.h"
#include "process/error.h"
#include "process/keeper.h"
#include "sources/connection.h"
#include "sources/platform.h"
#include "sources/probe_gap.h"
#include "sources/subscription.h"

#define TIMEOUT 30 /* seconds without an answer: longer than any other client can delay one */
#define SEGMENT_BYTES ((size_t)UMN_SEGMENT_PAGES * UMN_PAGE)

struct kernel_connection {
	struct umn_connection connection; /* first: one is cast to the other */
	/* One of the two: */
	struct umn_descriptor socket;
	const struct ummunotify_feeder *feeder;
	void *fed; /* its connection */

	struct umn_probe_gap probe_gap;
	struct umn_ring ring;
	int ring_fd; /* until add_wakeup */
	int kvm;     /* the daemon's, until bind_table; -1: it gives none */
	uint16_t probe;
	int counter_fd;		     /* of segment 0's map, until it is handed out; -1: not wanted */
	void *segments[UMN_FDS_MAX]; /* mapped already, the last one first */
	uint32_t segment_count;
	struct umn_keeper *kept;
	bool released;
	uint64_t secret;
};

static const char *const names[2][UMN_PROBES] = {
	{[UMN_PROBE_KVM] = "bpf:kvm", [UMN_PROBE_MMU_NOTIFIER] = "bpf:mmu_notifier", [UMN_PROBE_ZAP] = "bpf:zap"},
	{[UMN_PROBE_KVM] = "daemon:kvm", [UMN_PROBE_MMU_NOTIFIER] = "daemon:mmu_notifier", [UMN_PROBE_ZAP] = "daemon:zap"},
};

/* ---- Asking ---- */

#define LOOK_AT_LOG "ask the administrator to look at `ummunotify status` and the daemon's log"

/* What a status other than OK means. */
static int refused(const struct kernel_connection *c, const struct umn_reply *reply)
{
	const unsigned long long value = reply->value;

	switch (reply->status) {
	case UMN_STATUS_VERSION:
		return umn_fail(UMMUNOTIFY_UNAVAILABLE, ENODEV, "install the same version of ummunotify on both sides",
				"the daemon speaks version %llu of the protocol, this library version %d", value,
				UMN_PROTOCOL_VERSION);
	case UMN_STATUS_CLIENTS:
		return umn_fail(UMMUNOTIFY_LIMIT, ENODEV, "close some, or raise the daemon's --clients",
				"the daemon serves %llu notifiers, of which this user has its share", value);
	case UMN_STATUS_USER_CLIENTS:
		return umn_fail(UMMUNOTIFY_LIMIT, ENODEV, "close some, or raise the daemon's --clients-per-user",
				"this user has %llu notifiers open, as many as the daemon allows", value);
	case UMN_STATUS_USER_MEMORY:
		return umn_fail(UMMUNOTIFY_LIMIT, ENOMEM, "watch fewer regions, or raise the daemon's --memory-per-user",
				"this user's tables would take more than the %llu MiB that the daemon allows", value >> 20);
	case UMN_STATUS_MEMORY:
		return umn_fail(UMMUNOTIFY_LIMIT, ENOMEM, "watch fewer regions, or raise the daemon's --memory",
				"the daemon allows the tables of all users %llu MiB, of which this user has its share",
				value >> 20);
	case UMN_STATUS_PROCESS_CLIENTS:
		return umn_fail(UMMUNOTIFY_LIMIT, ENODEV, "close notifiers that are no longer needed",
				"this process has %llu notifiers, as many as it can have", value);
	case UMN_STATUS_UNSEEN:
		return umn_fail(UMMUNOTIFY_UNAVAILABLE, ENODEV, "please report this with the kernel's version",
				"the probe did not see a change made for it to see");
	}
	if (!c->feeder)
		return umn_fail(UMMUNOTIFY_UNAVAILABLE, ENODEV, LOOK_AT_LOG, "the daemon failed (%s)", strerror((int)value));
	return umn_fail(UMMUNOTIFY_UNAVAILABLE, ENODEV, value == EPERM ? "keep CAP_BPF and CAP_PERFMON, or use the daemon" : "",
			"the feeder failed (%s)", strerror((int)value));
}

static int lost(int error, bool growing)
{
	if (error == EAGAIN)
		return umn_fail(UMMUNOTIFY_UNAVAILABLE, ENODEV, LOOK_AT_LOG, "the daemon does not answer");
	if (error != ECONNRESET && error != EPIPE)
		return umn_fail(UMMUNOTIFY_UNAVAILABLE, ENODEV, "", "the connection to the daemon failed (%s)", strerror(error));
	if (growing)
		return umn_fail(UMMUNOTIFY_LIMIT, ENOMEM, "open a new one",
				"the daemon that this notifier was opened with has ended");
	return umn_fail(UMMUNOTIFY_UNAVAILABLE, ENODEV, LOOK_AT_LOG,
			"the daemon ended the connection: it was stopped, or this user has too many of them");
}

static int ask_daemon(struct kernel_connection *c, const struct umn_request *request, struct umn_reply *reply, int *fds)
{
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(UMN_FDS_MAX * sizeof(int))];
	} control;
	struct iovec data = {.iov_base = reply, .iov_len = sizeof *reply};
	struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
	struct cmsghdr *header;
	uint32_t got = 0;
	ssize_t length;

	if (!umn_descriptor_intact(&c->socket))
		return umn_fail(UMMUNOTIFY_DESCRIPTOR, EBADF, "open a new notifier, and leave its descriptors alone",
				"the program has closed the connection to the daemon");
	do
		length = send(c->socket.fd, request, sizeof *request, MSG_NOSIGNAL);
	while (length < 0 && errno == EINTR);
	while (length >= 0 && (length = recvmsg(c->socket.fd, &message, MSG_CMSG_CLOEXEC)) < 0 && errno == EINTR)
		length = 0;
	if (length < 0)
		return lost(errno, request->op == UMN_OP_GROW);
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
		return umn_fail(UMMUNOTIFY_LIMIT, EMFILE, "raise `ulimit -n`", "this process may not open more descriptors");
	return lost(ECONNRESET, request->op == UMN_OP_GROW);
}

/* The answer, with up to UMN_FDS_MAX descriptors. Fails too if the status is not OK. */
static int ask(struct kernel_connection *c, enum umn_op op, struct umn_reply *reply, int *fds)
{
	const struct umn_request request = {.op = (uint16_t)op, .version = UMN_PROTOCOL_VERSION};
	int error;

	memset(reply, 0, sizeof *reply);
	error = c->feeder ? c->feeder->exchange(c->fed, &request, reply, fds) : ask_daemon(c, &request, reply, fds);
	if (error || reply->status == UMN_STATUS_OK)
		return error;
	while (reply->fds)
		close(fds[--reply->fds]);
	return refused(c, reply);
}

int ummunotify_failed(const char *why, const char *remedy)
{
	return umn_fail(UMMUNOTIFY_UNAVAILABLE, ENODEV, remedy, "%s", why);
}

#define NAME_SOCKET "set " UMN_SOCKET_ENVIRONMENT " to the daemon's socket"

static int why_not_connected(const char *path, bool named, int error)
{
	const enum ummunotify_code code = UMMUNOTIFY_UNAVAILABLE;
	const char *origin = named ? " (from " UMN_SOCKET_ENVIRONMENT ")" : "";
	struct stat status;

	switch (error) {
	case ENOENT:
		return umn_fail(code, ENODEV, named ? NAME_SOCKET ", or unset it" : "have an administrator run `ummunotify daemon`",
				"no daemon runs here: there is no %s%s", path, origin);
	case ENOTDIR:
	case ELOOP:
		return umn_fail(code, ENODEV, NAME_SOCKET, "no socket can be at %s%s: %s", path, origin, strerror(error));
	case EPROTOTYPE:
		return umn_fail(code, ENODEV, NAME_SOCKET, "%s%s is the socket of another program", path, origin);
	case ECONNREFUSED: /* also of what is no socket */
		if (!stat(path, &status) && !S_ISSOCK(status.st_mode))
			return umn_fail(code, ENODEV, NAME_SOCKET, "%s%s is no socket", path, origin);
		return umn_fail(code, ENODEV, "have an administrator start it again", "no daemon listens at %s: it has ended",
				path);
	case EACCES:
		if (stat(path, &status) && errno == EACCES)
			return umn_fail(code, ENODEV, NAME_SOCKET, "this user may not enter a directory on the way to %s%s", path,
					origin);
		return umn_fail(code, ENODEV, "become a member of its group", "the daemon's socket %s is not for this user", path);
	case EAGAIN:
		return umn_fail(code, ENODEV, LOOK_AT_LOG, "the daemon at %s does not answer", path);
	}
	return umn_fail(code, ENODEV, LOOK_AT_LOG, "cannot connect to the daemon at %s (%s)", path, strerror(error));
}

static int connect_to_daemon(struct umn_descriptor *result)
{
	const char *path = secure_getenv(UMN_SOCKET_ENVIRONMENT);
	const struct timeval timeout = {.tv_sec = TIMEOUT};
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	const bool named = path && *path;
	int fd, failed, error;

	if (!named)
		path = UMN_SOCKET_PATH;
	if (strlen(path) >= sizeof address.sun_path)
		return umn_fail(UMMUNOTIFY_UNAVAILABLE, ENODEV, "set " UMN_SOCKET_ENVIRONMENT " to a shorter one",
				"the daemon's socket cannot be at %s: this is too long", path);
	strcpy(address.sun_path, path);
	fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return umn_fail_errno(UMMUNOTIFY_UNAVAILABLE, errno, "a socket cannot be made");
	/* Blocking: without it connect() fails at once where other clients wait in line. */
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof timeout);
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
	do
		failed = connect(fd, (struct sockaddr *)&address, sizeof address);
	while (failed && errno == EINTR);
	if (!failed) {
		umn_descriptor_set(result, fd);
		return 0;
	}
	error = errno;
	close(fd);
	return why_not_connected(path, named, error);
}

int ummunotify_daemon_socket(void)
{
	struct umn_descriptor socket = UMN_NO_DESCRIPTOR;
	int error = connect_to_daemon(&socket);

	return error ? error : socket.fd;
}

/* ---- The connection ---- */

/* Maps segments at once, and closes their descriptors: the mappings keep the maps. They are added from the end of the array, so
 * the first to come is the first to be used. 0, or it has been said why; the descriptors are closed either way. */
static int map_segments(struct kernel_connection *c, const int *fds, uint32_t count)
{
	int error = 0;

	for (uint32_t i = count; i-- > 0;) {
		void *memory = error ? MAP_FAILED : mmap(NULL, SEGMENT_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fds[i], 0);

		if (memory != MAP_FAILED) {
			madvise(memory, SEGMENT_BYTES, MADV_DONTFORK);
			c->segments[c->segment_count++] = memory;
		} else if (!error) {
			error = umn_fail_errno(UMMUNOTIFY_NO_MEMORY, errno, "the table's memory cannot be mapped");
		}
		close(fds[i]);
	}
	return error;
}

static int add_segment(struct umn_connection *connection, uint32_t pages, void **memory)
{
	struct kernel_connection *c = (struct kernel_connection *)connection;
	int fds[UMN_FDS_MAX], error;
	struct umn_reply reply;

	if (pages != UMN_SEGMENT_PAGES)
		return umn_fail(UMMUNOTIFY_ARGUMENT, EINVAL, "", "a segment has %u pages", UMN_SEGMENT_PAGES);
	if (!c->segment_count && ((error = ask(c, UMN_OP_GROW, &reply, fds)) || (error = map_segments(c, fds, reply.fds))))
		return error;
	if (!c->segment_count)
		return umn_fail(UMMUNOTIFY_LIMIT, ENOMEM, "", "the feeder gave no memory");
	*memory = c->segments[--c->segment_count];
	return 0;
}

/* *unseen: the kernel did not notify of the change that shows the secret. */
static int shake_hands(struct kernel_connection *c, bool *unseen)
{
	struct umn_reply reply;
	int fds[UMN_FDS_MAX];
	int error = c->probe_gap.shared ? umn_probe_gap_show_secret(&c->probe_gap, c->secret) : umn_show_secret(c->secret);

	*unseen = false;
	if (error)
		return umn_fail_errno(UMMUNOTIFY_UNAVAILABLE, -error, "a page of memory cannot be changed");
	error = ask(c, UMN_OP_SETTLE, &reply, fds);
	*unseen = error && reply.status == UMN_STATUS_UNSEEN;
	return error;
}

static int bind_table(struct umn_connection *connection)
{
	struct kernel_connection *c = (struct kernel_connection *)connection;
	/* What hits the tracepoint is the machine. zap is at functions that every process passes. */
	int error = c->probe == UMN_PROBE_KVM ? umn_need_machine(c->kvm) : 0;
	bool unseen = false;

	if (!error)
		error = shake_hands(c, &unseen);
	if (error && unseen && c->probe == UMN_PROBE_MMU_NOTIFIER && !(error = umn_subscribe(c->kvm)))
		error = shake_hands(c, &unseen);
	if (!error && c->probe == UMN_PROBE_MMU_NOTIFIER)
		umn_note_subscribed();
	umn_close(&c->kvm);
	return error;
}

static int add_wakeup(struct umn_connection *connection, int epoll)
{
	struct kernel_connection *c = (struct kernel_connection *)connection;
	struct epoll_event event = {.events = EPOLLIN};
	int error = epoll_ctl(epoll, EPOLL_CTL_ADD, c->ring_fd, &event) ? errno : 0;

	/* The epoll watches the file for as long as it is open, and the mapping keeps it open. */
	umn_close(&c->ring_fd);
	return error ? umn_fail_errno(UMMUNOTIFY_UNAVAILABLE, error, "the wake-up cannot be waited for") : 0;
}

static void acknowledge(struct umn_connection *connection)
{
	umn_ring_clear(&((struct kernel_connection *)connection)->ring);
}

/* A daemon looks by itself. Where a probe has gaps, they are known already. */
static int may_have_missed(struct umn_connection *connection)
{
	struct kernel_connection *c = (struct kernel_connection *)connection;

	return c->feeder && c->feeder->may_have_missed && !c->probe_gap.shared ? c->feeder->may_have_missed(c->fed) : 0;
}

static int open_counter(struct umn_connection *connection)
{
	struct kernel_connection *c = (struct kernel_connection *)connection;
	int fd = c->counter_fd;

	c->counter_fd = -1;
	return fd;
}

static void release(struct umn_connection *connection)
{
	struct kernel_connection *c = (struct kernel_connection *)connection;

	umn_ring_unmap(&c->ring);
	umn_close(&c->ring_fd);
	umn_close(&c->counter_fd);
	umn_close(&c->kvm);
	/* So that the daemon notices at once: the kept copy is closed some time later, and children may have others. */
	if (umn_descriptor_intact(&c->socket))
		shutdown(c->socket.fd, SHUT_RDWR);
	umn_descriptor_close(&c->socket);
	if (c->fed)
		c->feeder->disconnect(c->fed);
	c->fed = NULL;
	umn_probe_gap_abandon(&c->probe_gap);
	umn_keeper_release(c->kept);
	c->kept = NULL;
	while (c->segment_count)
		munmap(c->segments[--c->segment_count], SEGMENT_BYTES);
	c->released = true;
}

/* Of all that it has a child inherits only the socket. */
static void in_child(struct umn_connection *connection)
{
	umn_descriptor_close(&((struct kernel_connection *)connection)->socket);
}

static void free_connection(struct umn_connection *connection)
{
	struct kernel_connection *c = (struct kernel_connection *)connection;

	/* In a child nothing is mapped at these addresses, or something else. */
	if (c->released)
		umn_probe_gap_close(&c->probe_gap);
	else
		umn_keeper_forget(c->kept);
	free(c);
}

/* The links, and the socket: the daemon ends the feeding when the last copy of that is closed. */
static int keep(struct kernel_connection *c, const int *links, uint32_t count)
{
	int kept[UMN_FDS_MAX + 1];

	memcpy(kept, links, count * sizeof *links);
	if (c->socket.fd >= 0)
		kept[count++] = c->socket.fd;
	if (count)
		c->kept = umn_keeper_new(kept, count);
	return !count || c->kept ? 0 : -ENODEV;
}

/* Takes over what came with the answer to HELLO. The descriptors are closed, whatever comes of it. */
static int take(struct kernel_connection *c, const struct umn_reply *reply, int *fds)
{
	uint32_t next = 2 + !!(reply->gives & UMN_GIVES_KVM), gaps = next, links = reply->fds - next;
	int error;

	c->connection.name = names[!c->feeder][reply->probe];
	c->probe = reply->probe;
	c->kvm = reply->gives & UMN_GIVES_KVM ? fds[2] : -1;
	c->secret = reply->value;
	c->ring_fd = fds[0];
	/* For the device, whose users map it: a descriptor of the segment with the header. */
	if (c->counter_fd == -2)
		c->counter_fd = fcntl(fds[1], F_DUPFD_CLOEXEC, 0);
	error = map_segments(c, &fds[1], 1);
	if (!error && (error = umn_ring_map(&c->ring, c->ring_fd)))
		error = umn_fail_errno(UMMUNOTIFY_NO_MEMORY, -error, "the wake-up cannot be mapped");
	if (!error && (reply->gives & UMN_GIVES_PROBE_GAPS)) {
		error = umn_probe_gap_open(&c->probe_gap, fds[gaps]);
		if (error)
			umn_fail_errno(UMMUNOTIFY_NO_MEMORY, -error, "the map of the probe's gaps cannot be mapped");
		else
			c->connection.source = &c->probe_gap.source;
	}
	if (!error)
		error = keep(c, &fds[next], links);
	while (links)
		close(fds[next + --links]);
	return error;
}

static int hello(struct kernel_connection *c, int probe)
{
	struct umn_reply reply;
	int fds[UMN_FDS_MAX], error = ask(c, UMN_OP_HELLO, &reply, fds);

	if (error)
		return error;
	if (reply.fds >= 3 + !!(reply.gives & UMN_GIVES_KVM) + !!(reply.gives & UMN_GIVES_PROBE_GAPS) && reply.probe < UMN_PROBES &&
	    (probe < 0 || probe == reply.probe))
		return take(c, &reply, fds);
	while (reply.fds)
		close(fds[--reply.fds]);
	if (reply.probe < UMN_PROBES && probe >= 0 && probe != reply.probe)
		return umn_fail(UMMUNOTIFY_UNAVAILABLE, ENODEV, "ask for the source daemon without a probe",
				"the daemon's probe is %s", strchr(names[1][reply.probe], ':') + 1);
	return umn_fail(UMMUNOTIFY_UNAVAILABLE, ENODEV, LOOK_AT_LOG, "the daemon's answer is not one");
}

/* The connection, or NULL after what went wrong was said. */
static struct umn_connection *open_connection(struct kernel_connection *c, int probe)
{
	if (!hello(c, probe))
		return &c->connection;
	release(&c->connection);
	free_connection(&c->connection);
	return NULL;
}

static struct kernel_connection *new_connection(bool counter)
{
	struct kernel_connection *c = calloc(1, sizeof *c);

	if (!c) {
		umn_fail_errno(UMMUNOTIFY_NO_MEMORY, ENOMEM, "no memory");
		return NULL;
	}
	c->connection = (struct umn_connection){.wake_fd = -1,
						.add_segment = add_segment,
						.bind = bind_table,
						.add_wakeup = add_wakeup,
						.acknowledge = acknowledge,
						.may_have_missed = may_have_missed,
						.open_counter = open_counter,
						.release = release,
						.in_child = in_child,
						.free = free_connection};
	c->socket.fd = c->ring_fd = c->kvm = -1;
	c->counter_fd = counter ? -2 : -1;
	return c;
}

struct umn_connection *umn_connect_daemon(int probe, bool counter)
{
	struct kernel_connection *c = new_connection(counter);

	if (!c)
		return NULL;
	if (!connect_to_daemon(&c->socket))
		return open_connection(c, probe);
	free(c);
	return NULL;
}

struct umn_connection *umn_connect_feeder(int probe, const struct ummunotify_feeder *feeder, bool counter)
{
	struct kernel_connection *c;

	if (!feeder) {
		umn_fail(UMMUNOTIFY_UNAVAILABLE, ENODEV, "run the program under `ummunotify run`, or use the daemon",
			 "C programs do not load BPF programs by themselves");
		return NULL;
	}
	c = new_connection(counter);
	if (!c)
		return NULL;
	c->feeder = feeder;
	c->fed = feeder->connect(feeder->context, probe);
	if (c->fed)
		return open_connection(c, probe);
	free(c);
	return NULL;
}
