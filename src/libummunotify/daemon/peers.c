/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "daemon/peers.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "process/keep_only.h"

#define HELD_MOST 64
#define CHILDREN_MOST 4

static int held[HELD_MOST + 1]; /* connections that are shut down, and to be closed by a child; one more there */
static unsigned int held_count;
static pid_t children[CHILDREN_MOST]; /* 0: none */

/* The user, or `uid` if the program cannot tell (a kernel that is locked down). */
static uint32_t user_of(int program, int fd, uint32_t uid)
{
	const uint64_t argument = (uint64_t)fd;
	union bpf_attr attr;

	if (program < 0)
		return uid;
	memset(&attr, 0, sizeof attr); /* padding too */
	attr.test.prog_fd = (uint32_t)program;
	attr.test.ctx_in = (uint64_t)(uintptr_t)&argument;
	attr.test.ctx_size_in = sizeof argument;
	if (syscall(SYS_bpf, BPF_PROG_TEST_RUN, &attr, sizeof attr) || attr.test.retval == UINT32_MAX)
		return uid;
	return attr.test.retval;
}

unsigned int umn_peers_accept(int listener, int program, struct umn_peer *peers, unsigned int most, unsigned int *accepted,
			      int *error)
{
	unsigned int count = 0;

	*error = 0;
	for (*accepted = 0; *accepted < most; ++*accepted) {
		struct pollfd gone = {.events = POLLRDHUP};
		struct ucred credentials;
		socklen_t length = sizeof credentials;

		gone.fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
		if (gone.fd < 0 && errno == ECONNABORTED)
			continue;
		if (gone.fd < 0) {
			*error = errno;
			break;
		}
		if (poll(&gone, 1, 0) || getsockopt(gone.fd, SOL_SOCKET, SO_PEERCRED, &credentials, &length)) {
			umn_peers_close(gone.fd);
			continue;
		}
		peers[count++] = (struct umn_peer){.fd = gone.fd,
						   .pid = (uint32_t)credentials.pid,
						   .uid = credentials.uid,
						   .user = user_of(program, gone.fd, credentials.uid)};
	}
	return count;
}

int umn_peers_receive(int fd, void *buffer, uint32_t size)
{
	struct iovec to = {buffer, size};
	struct msghdr message = {.msg_iov = &to, .msg_iovlen = 1};
	ssize_t length = recvmsg(fd, &message, MSG_PEEK | MSG_DONTWAIT);

	/* There is no room for descriptors, so it says that some were left out. */
	if (length >= 0 && (message.msg_flags & MSG_CTRUNC))
		return -EBADMSG;
	if (length > 0)
		length = recv(fd, buffer, size, MSG_DONTWAIT);
	return length < 0 ? -errno : (int)length;
}

/* In the child. All else is closed first, as it may have to wait for what is held. Not so for TCP, which does not linger in exit. */
static void close_and_exit(int end)
{
	char none;

	held[held_count++] = end;
	umn_keep_only(held, held_count, 0);
	/* Until the parent has closed its copies, or it would be the parent that waits. */
	while (read(end, &none, 1) < 0 && errno == EINTR)
		;
	syscall(SYS_exit_group, 0);
}

bool umn_peers_close_held(void)
{
	pid_t *child = NULL;
	unsigned int i;
	int ends[2];

	for (i = 0; i < CHILDREN_MOST; i++) {
		if (children[i] && waitpid(children[i], NULL, WNOHANG | __WALL))
			children[i] = 0;
		if (!children[i])
			child = &children[i];
	}
	if (!held_count)
		return false;
	if (!child || pipe2(ends, O_CLOEXEC))
		return true;
	/* No signal when it ends; no handlers of fork: it runs nothing but what is here. */
	*child = (pid_t)syscall(SYS_clone, 0, NULL, NULL, NULL, NULL);
	if (*child == 0)
		close_and_exit(ends[0]);
	if (*child > 0)
		while (held_count)
			close(held[--held_count]);
	else
		*child = 0;
	close(ends[0]);
	close(ends[1]);
	return held_count;
}

bool umn_peers_hold(void)
{
	return held_count;
}

void umn_peers_close(int fd)
{
	char some[4096];
	int length;

	/* From here on nothing more can be sent. */
	shutdown(fd, SHUT_RDWR);
	do
		length = umn_peers_receive(fd, some, sizeof some);
	while (length > 0);
	if (length != -EBADMSG) {
		close(fd);
		return;
	}
	if (held_count == HELD_MOST && umn_peers_close_held())
		return; /* no child can be made, or all wait: it stays open */
	held[held_count++] = fd;
}
