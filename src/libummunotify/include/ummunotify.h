/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * libummunotify: learn that the mapping of memory which you watch was changed, by whomever.
 *
 *	struct ummunotify *umn;
 *	struct ummunotify_region *region;
 *
 *	if (ummunotify_open(&umn, NULL) || ummunotify_watch(umn, buffer, length, 0, &region))
 *		errx(1, "%s", ummunotify_error());
 *	lkey = ibv_reg_mr(...)				pin what was just watched
 *	...
 *	if (!ummunotify_valid(region)) {		two loads from memory
 *		ummunotify_renew(umn, region);		first this,
 *		ibv_dereg_mr(...); ibv_reg_mr(...);	then pin again
 *	}
 *
 * Functions return 0, or a negative errno; ummunotify_error() then says what went wrong, and what can be done about it. All but
 * ummunotify_close may be called by any thread at any time. What the guarantees are: docs/model.md. How to use this: docs/c.md.
 *
 * In the child of a fork a notifier is dead: nothing is valid, and functions fail with -EBADF; ummunotify_close frees its memory.
 * The parent does not notice.
 */
#ifndef UMMUNOTIFY_H
#define UMMUNOTIFY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

struct ummunotify;	  /* a notifier, for the memory of the process that opened it */
struct ummunotify_region; /* a range of addresses that is watched */

/* Opens a notifier, fed by `source`: "daemon" (`ummunotify daemon` runs here, or the program runs under `ummunotify run`) or "uffd"
 * (the kernel's userfaultfd, for private anonymous memory only). NULL: the first that works, or what the environment variable
 * UMMUNOTIFY_SOURCE says. -ENODEV: none works; -EINVAL: there is no such source. */
int ummunotify_open(struct ummunotify **umn, const char *source);

/* Stops watching and releases everything; regions are no longer to be used. No other thread may be using `umn`. NULL is fine. */
void ummunotify_close(struct ummunotify *umn);

/* What feeds it, and where the daemon's program is attached: "daemon:kvm", "uffd". */
const char *ummunotify_source(const struct ummunotify *umn);

/* Watches `length` bytes from `address` on, mapped or not, until ummunotify_unwatch. Regions may overlap, nest and repeat. `cookie`
 * is given back with each event. -EINVAL: not in user space, or empty; -ENOMEM: no memory, or more than the daemon allows. With the
 * source uffd also: -ENXIO: not all of it is mapped; -EOPNOTSUPP: memory of a kind that it cannot watch; -EBUSY: another
 * userfaultfd of this process's has it. */
int ummunotify_watch(struct ummunotify *umn, const void *address, size_t length, uint64_t cookie,
		     struct ummunotify_region **region);

/* Once this returns nothing is reported for the region, and the pointer is no longer to be used. */
int ummunotify_unwatch(struct ummunotify *umn, struct ummunotify_region *region);

/* The mapping has not changed since the region was watched or last renewed. Two loads from memory; with the source uffd a system
 * call as well, and rarely a wait of up to 10 ms. True may be relied on; false may be a false alarm. */
bool ummunotify_valid(const struct ummunotify_region *region);

/* The region is valid again, until the next change after this call: pin the memory anew after it, not before. An event that was not
 * read yet still will be. With the source uffd it can fail as ummunotify_watch does; then the region stays invalid. */
int ummunotify_renew(struct ummunotify *umn, struct ummunotify_region *region);

/* Has anything changed since ummunotify_read last returned all there was? Costs what ummunotify_valid costs. Never false when
 * something has; it may be true with nothing to read. */
bool ummunotify_changed(const struct ummunotify *umn);

/* The number of changes so far that hit a region. To be compared for inequality only. */
uint64_t ummunotify_generation(struct ummunotify *umn);

struct ummunotify_event {
	struct ummunotify_region *region;
	uint64_t cookie;
	uint64_t start, end; /* what was changed, clipped to the region; all of it unless `exact` */
	bool exact;	     /* one change only has hit the region since it was last reported, and this was its range */
	uint32_t thread;     /* the thread that made the first change, 0 if not known */
	int32_t syscall;     /* the system call that it was in, -1 if none or not known */
};

/* Takes up to `room` events: each region once, however often it was hit, in the order in which they were first hit. Returns how many;
 * 0: nothing has changed. Does not wait. Regions stay watched, and are reported again when they are hit again. */
ptrdiff_t ummunotify_read(struct ummunotify *umn, struct ummunotify_event *events, size_t room);

/* A descriptor for poll, select and epoll: readable while there may be something to read. Do not read from it or close it. */
int ummunotify_fd(struct ummunotify *umn);

/* Why the last call of this thread that failed did so: a line of text. */
const char *ummunotify_error(void);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
