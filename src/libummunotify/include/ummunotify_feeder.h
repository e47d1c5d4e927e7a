/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * For programs that load the BPF program themselves: what feeds a notifier of the source bpf. The Python package does so; others
 * will want the source daemon.
 *
 * The feeder answers as the daemon does, in the same messages (libummunotify's abi/protocol.h): so all that is
 * done with what it hands over, descriptors, tables, links, the handshake, is done once.
 */
#ifndef UMMUNOTIFY_FEEDER_H
#define UMMUNOTIFY_FEEDER_H

#include <stddef.h>
#include <stdint.h>

struct umn_request;
struct umn_reply;

struct ummunotify_feeder {
	/* Becomes a client's partner: for one notifier, with this probe (enum umn_probe). A connection, or NULL with ummunotify_failed. */
	void *(*connect)(void *context, int probe);
	/* Answers one request of this connection, with up to UMN_FDS_MAX descriptors, which the caller closes. 0, or -errno with
	 * ummunotify_failed. One thread at a time for each connection. */
	int (*exchange)(void *connection, const struct umn_request *request, struct umn_reply *reply, int *fds);
	/* Has the kernel skipped runs of the program since this was last asked? 0, 1, or -errno with ummunotify_failed: that cannot be
	 * known any more. NULL: it cannot skip any. */
	int (*may_have_missed)(void *connection);
	/* The end of the connection, in the process that made it. */
	void (*disconnect)(void *connection);
	void *context;
};

#pragma GCC visibility push(default)
/* For these functions: why the source does not work here. Returns -ENODEV. */
int ummunotify_failed(const char *why, const char *remedy);

/* A descriptor that is connected to the daemon, for its status; or -errno. */
int ummunotify_daemon_socket(void);

/* A descriptor of /dev/kvm, for a feeder that hands it over; or -errno. */
int ummunotify_open_kvm(void);

/* What has subscribed this process's address space to the kernel's notifications, as far as a notifier has needed that; or NULL. */
const char *ummunotify_subscribed_by(void);
#pragma GCC visibility pop

#endif
