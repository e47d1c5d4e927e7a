/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The daemon's connections: to whom they count, and descriptors that clients send.
 *
 * These are never received. But the kernel closes them where it discards the message, in the process that does that: here, in a call
 * that receives it without them, or closes the connection. And to close a file may take as long as the client wishes: a TCP socket
 * with SO_LINGER, a file of a file system that the client serves. Since Linux 6.16 a socket can refuse them (listening.py). For older
 * kernels, and for what was sent before, no message is discarded here that has descriptors with it: a child does that.
 */
#ifndef UMN_PEERS_H
#define UMN_PEERS_H

#include <stdbool.h>
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

/* The next message, or what there is of a stream, up to `size` bytes; 0: the end. -errno; -EBADMSG: it has descriptors with it, and is
 * still there. */
int umn_peers_receive(int fd, void *buffer, uint32_t size);

/* Shuts the connection down, and closes it at once if nothing in it has descriptors with it; else umn_peers_close_held does. */
void umn_peers_close(int fd);

/* Has a child close what is left. True: something still is. */
bool umn_peers_close_held(void);

/* Is something left for it? */
bool umn_peers_hold(void);

#endif
