/* SPDX-License-Identifier: BSD-3-Clause */
/* What the device needs beyond ummunotify.h. */
#ifndef UMN_LIB_NOTIFIER_H
#define UMN_LIB_NOTIFIER_H

#include <stdbool.h>
#include <stdint.h>

#include "include/ummunotify.h"

/* As ummunotify_open(umn, NULL), but with a descriptor (ummunotify_fd) from the start, which gets the lowest free number, and with
 * one for the counter's page. Both are the caller's to close. */
int notifier_open_device(struct ummunotify **umn, bool cloexec, int *fd, int *counter_fd);

/* Reading until the list is empty, piece by piece. */
struct drain {
	bool unfinished; /* events were read, and `finished` has not been since */
	bool finished;	 /* the last piece came to the end, with room left */
	uint64_t seen;	 /* the generation up to which everything was reported then */
};
/* ummunotify_read; the descriptor stays readable while it is unfinished. */
ptrdiff_t notifier_read(struct ummunotify *umn, struct ummunotify_event *events, size_t room, struct drain *drain);

/* News of a change may come only after the call that made it has returned. `notifier_settle` waits for them. */
bool notifier_is_late(const struct ummunotify *umn);
void notifier_settle(struct ummunotify *umn);

#endif
