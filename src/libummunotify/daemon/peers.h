/* SPDX-License-Identifier: BSD-3-Clause */
/* The daemon's new connections, and to whom they count. */
#ifndef UMN_PEERS_H
#define UMN_PEERS_H

#include <stdint.h>

struct umn_peer {
	int fd;		   /* close-on-exec, not blocking */
	uint32_t pid, uid; /* as whom it connected, as this process sees it */
	uint32_t user;	   /* to whom it counts: peers.bpf.c */
};

/*
 * Accepts up to `most` connections. Those that have been closed by their clients already are closed here. This is what a flood of
 * connections costs the daemon, so it is a few system calls for each.
 *
 * `program`: that of peers.bpf.c; -1: there is none, and each uid is a user. `*accepted`: how many there were, with those closed
 * here. The number of `peers`; they come first, also if this fails: then `*error` is an errno (EAGAIN: there are no more).
 */
unsigned int umn_peers_accept(int listener, int program, struct umn_peer *peers, unsigned int most, unsigned int *accepted,
			      int *error);

#endif
