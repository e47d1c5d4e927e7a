/* SPDX-License-Identifier: BSD-3-Clause */
/* What the device and the cache need beyond ummunotify.h. */
#ifndef UMN_NOTIFIER_H
#define UMN_NOTIFIER_H

#include <stdbool.h>
#include <stdint.h>

#include "include/ummunotify.h"

/* As ummunotify_open, but with a descriptor (ummunotify_fd) from the start, which gets the lowest free number, and with one for the
 * counter's page. Both are the caller's to close. */
int umn_open_device(struct ummunotify **umn, const char *source, bool cloexec, int *fd, int *counter_fd);

/* Reading until the list is empty, piece by piece. */
struct umn_reading {
	bool unfinished; /* events were read, and `finished` has not been since */
	bool finished;	 /* the last piece came to the end, with room left */
	uint64_t seen;	 /* what the counter was then: all changes up to it were reported */
};
/* ummunotify_read; the descriptor stays readable while it is unfinished. With no room it only sees to it that the descriptor is
 * readable if, and only if, there is something to read. */
ptrdiff_t umn_read(struct ummunotify *umn, struct ummunotify_event *events, size_t room, struct umn_reading *reading);

/* Counts the changes; 0 once the notifier is closed. */
const uint64_t *umn_generation_of(const struct ummunotify *umn);

/* Lets it begin at 1, so that it is 0 only then. Right after opening, for a notifier whose generation no client reads. */
void umn_begin_at_one(struct ummunotify *umn);

/* A generation up to which every change has been delivered, and acted on if all is read by ummunotify_dispatch; 0: not known now. */
uint64_t umn_dispatched(const struct ummunotify *umn);

/* The generation alone says whether anything has changed. False: the source's news may come late. */
bool umn_counts_in_time(const struct ummunotify *umn);

/* Once it has been reported, a region must be renewed for its changes to be reported again. */
bool umn_must_renew(const struct ummunotify *umn);

/* Descriptors of a device that the program must not close by mistake; how many, at most UMN_DEVICE_FDS. */
#define UMN_DEVICE_FDS 4
size_t umn_device_fds(struct ummunotify *umn, int *fds);

/* For a thread that passes on each wake-up of a device: it waits until this descriptor is readable, then clears it, after which
 * the next change makes it readable again. The device's own descriptor stays readable. The thread needs umn_device_fds. */
int umn_device_wake(struct ummunotify *umn);
void umn_device_next_wakeup(struct ummunotify *umn);

#endif
