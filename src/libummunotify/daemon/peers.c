/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "daemon/peers.h"

#include <errno.h>
#include <linux/bpf.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

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
			close(gone.fd);
			continue;
		}
		peers[count++] = (struct umn_peer){.fd = gone.fd,
						   .pid = (uint32_t)credentials.pid,
						   .uid = credentials.uid,
						   .user = user_of(program, gone.fd, credentials.uid)};
	}
	return count;
}
