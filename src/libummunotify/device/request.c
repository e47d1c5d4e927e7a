/* SPDX-License-Identifier: BSD-3-Clause */
/* What the device does, and how a child has it done. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "device/state.h"
#include "process/process.h"
#include "table/table.h"

_Static_assert(sizeof(struct ummunotify_device_event) == 32 && sizeof(struct ummunotify_register_ioctl) == 32,
	       "as programs know them");

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
	/* `flags` is not looked at: the best-known client, Open MPI, leaves it uninitialised. */
	if (wanted->start >= wanted->end || wanted->reserved || device_find_cookie(&d->cookies, wanted->user_cookie))
		return EINVAL;
	if (!device_reserve_cookie(&d->cookies))
		return ENOMEM;
	error = ummunotify_watch(d->umn, (void *)wanted->start, wanted->end - wanted->start, wanted->user_cookie, &region);
	if (!error)
		device_add_cookie(&d->cookies, (struct umn_region *)region);
	return -error;
}

static int unregister_region(struct device *d, uint64_t cookie)
{
	struct umn_region *region = device_find_cookie(&d->cookies, cookie);

	if (!region)
		return EINVAL;
	device_remove_cookie(&d->cookies, cookie);
	ummunotify_unwatch(d->umn, (struct ummunotify_region *)region);
	/* If it was the only one that was hit, there is nothing left to read. */
	if (ummunotify_changed(d->umn))
		umn_read(d->umn, NULL, 0, &d->reading);
	return 0;
}

/* Up to `room` events. Fewer: that was all. */
static uint32_t read_events(struct device *d, struct ummunotify_device_event *events, uint32_t room)
{
	struct ummunotify_event piece[DEVICE_PIECE];
	ptrdiff_t n = umn_read(d->umn, piece, room, &d->reading);
	uint32_t count = 0;

	for (; count < n; count++) {
		/* Before the event is returned: what the program pins after it must be watched. Fails if nothing is mapped now. */
		if (umn_must_renew(d->umn))
			ummunotify_renew(d->umn, piece[count].region);
		events[count] = (struct ummunotify_device_event){.type = UMMUNOTIFY_EVENT_TYPE_INVAL,
								 .flags = piece[count].exact ? UMMUNOTIFY_EVENT_FLAG_HINT : 0,
								 .hint_start = piece[count].start,
								 .hint_end = piece[count].end,
								 .user_cookie_counter = piece[count].cookie};
	}
	if (d->reading.finished && count < room) {
		d->reading.finished = false;
		events[count++] = (struct ummunotify_device_event){.type = UMMUNOTIFY_EVENT_TYPE_LAST,
								   .user_cookie_counter = d->reading.seen};
	}
	return count;
}

void device_handle_request(struct device *d, const struct request *request, struct reply *reply)
{
	pthread_mutex_lock(&d->lock);
	reply->error = 0;
	reply->count = 0;
	switch (request->kind) {
	case REQUEST_EXCHANGE:
		reply->error = exchange(d);
		break;
	case REQUEST_REGISTER:
		reply->error = register_region(d, &request->region);
		break;
	case REQUEST_UNREGISTER:
		reply->error = unregister_region(d, request->cookie);
		break;
	case REQUEST_READ:
		reply->count = read_events(d, reply->events, request->room < DEVICE_PIECE ? request->room : DEVICE_PIECE);
		break;
	default:
		reply->error = EINVAL;
	}
	pthread_mutex_unlock(&d->lock);
}

/* ---- In a child ---- */

/* A request carries the descriptor that its reply is sent to: each reply is for one thread of one child. */
union control {
	struct cmsghdr header;
	char space[CMSG_SPACE(sizeof(int))];
};

/* What a request fails with that was not carried out. The owner has ended: its memory is gone, so nothing in it changes any more. */
static int undone(const struct request *request, int error)
{
	if (error != EPIPE && error != ECONNRESET && error != ECONNREFUSED)
		return error;
	return request->kind == REQUEST_READ ? 0 : ESRCH;
}

void device_ask_owner(struct device *d, const struct request *request, struct reply *reply)
{
	union control control = {.header = {.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof(int))}};
	struct iovec data = {.iov_base = (void *)request, .iov_len = sizeof *request};
	struct msghdr message = {
		.msg_iov = &data, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = CMSG_LEN(sizeof(int))};
	int ends[2], error = EPIPE;
	ssize_t length;

	reply->count = 0;
	/* No server: the child was made without fork's handlers, or the program has closed the socket. */
	if (!umn_descriptor_intact(&d->client)) {
		reply->error = EBADF;
		return;
	}
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends)) {
		reply->error = errno;
		return;
	}
	memcpy(CMSG_DATA(&control.header), &ends[1], sizeof(int));
	length = sendmsg(d->client.fd, &message, MSG_NOSIGNAL);
	if (length < 0)
		error = errno;
	/* The other end is now the server's alone: if it ends without a reply, this ends too. */
	next.close(ends[1]);
	if (length >= 0)
		length = recv(ends[0], reply, sizeof *reply, 0);
	next.close(ends[0]);
	if (length != sizeof *reply) {
		reply->count = 0;
		reply->error = undone(request, error);
	}
}

void device_serve(struct device *d)
{
	union control control;
	struct request request;
	struct reply reply;
	struct iovec data = {.iov_base = &request, .iov_len = sizeof request};
	struct msghdr message;
	ssize_t length;
	int fd;

	/* If the program has put another file in the socket's place, that one's data is not taken. */
	while (umn_descriptor_intact(&d->server)) {
		message = (struct msghdr){
			.msg_iov = &data, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
		length = recvmsg(d->server.fd, &message, MSG_CMSG_CLOEXEC);
		if (length <= 0 && errno != EMFILE)
			break;
		if (!CMSG_FIRSTHDR(&message) || CMSG_FIRSTHDR(&message)->cmsg_type != SCM_RIGHTS)
			continue;
		memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
		if (length == sizeof request) {
			memset(&reply, 0, sizeof reply);
			device_handle_request(d, &request, &reply);
			send(fd, &reply, sizeof reply, MSG_NOSIGNAL | MSG_DONTWAIT);
		}
		next.close(fd);
	}
}
