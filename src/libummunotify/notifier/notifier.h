/* SPDX-License-Identifier: BSD-3-Clause */
/* What the device needs beyond ummunotify.h. */
#ifndef UMN_LIB_NOTIFIER_H
#define UMN_LIB_NOTIFIER_H

#include <stdbool.h>
#include <stdint.h>

#include "include/ummunotify.h"

/* As ummunotify_open, but with a descriptor (ummunotify_fd) from the start, which gets the lowest free number, and with one for the
 * counter's page. Both are the caller's to close. */
int notifier_open_device(struct ummunotify **umn, const char *source, bool cloexec, int *fd, int *counter_fd);

/* Reading until the list is empty, piece by piece. */
struct drain {
	bool unfinished; /* events were read, and `finished` has not been since */
	bool finished;	 /* the last piece came to the end, with room left */
	uint64_t seen;	 /* what the counter was then: all changes up to it were reported */
};
/* ummunotify_read; the descriptor stays readable while it is unfinished. With no room it only sees to it that the descriptor is
 * readable if, and only if, there is something to read. */
ptrdiff_t notifier_read(struct ummunotify *umn, struct ummunotify_event *events, size_t room, struct drain *drain);

/* Once it has been reported, a region must be renewed for its changes to be reported again. */
bool notifier_must_renew(const struct ummunotify *umn);

/* Descriptors that must not be closed behind its back; how many, at most NOTIFIER_FDS. */
#define NOTIFIER_FDS 68
int notifier_fds(struct ummunotify *umn, int *fds);

/* For a thread that passes on each wake-up: it waits for `wake`, then clears it, after which the next change wakes it again. The
 * device's descriptor stays readable, for which it needs `more`. */
void notifier_wakeups(struct ummunotify *umn, int *wake, int *more);
void notifier_next_wakeup(struct ummunotify *umn);

#endif
