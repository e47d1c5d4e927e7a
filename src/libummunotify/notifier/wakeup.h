/* SPDX-License-Identifier: BSD-3-Clause */
/* What is readable while there may be something to read: an epoll of the source's wake-up and of a pipe of the notifier's own. */
#ifndef UMN_WAKEUP_H
#define UMN_WAKEUP_H

#include <stdbool.h>

#include "process/descriptor.h"
#include "sources/connection.h"

struct umn_wakeup {
	int epoll;		       /* the notifier's user's; -1: none */
	bool is_own;		       /* to be closed here */
	int source;		       /* an epoll of the source's wake-up alone, for a caller's epoll; -1: that is in `epoll` */
	int source_fd;		       /* what was added for that, if it stays open; -1 */
	struct umn_descriptor out, in; /* the pipe; `out` is in `epoll`, `in` in `source`, where it is never ready */
	bool is_set;		       /* there is a byte in the pipe */
};
#define UMN_NO_WAKEUP {.epoll = -1, .source = -1, .source_fd = -1, .out = UMN_NO_DESCRIPTOR, .in = UMN_NO_DESCRIPTOR}

/* With an epoll of the caller's, or -1. 0, or it has been said why. */
int umn_wakeup_open(struct umn_wakeup *wakeup, struct umn_connection *connection, int epoll);

/* Do the numbers still lead to our files? The pipe is known by its inode, the rest by what the epoll has. Notes why not. */
bool umn_wakeup_intact(const struct umn_wakeup *wakeup);

/* Makes it readable, or leaves it to the source. Under the notifier's lock. */
void umn_wakeup_set(struct umn_wakeup *wakeup, bool readable);

/* Closes what is still ours. In a child too. */
void umn_wakeup_close(struct umn_wakeup *wakeup);

#endif
