/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * libummunotify: learn that the mapping of memory that you watch was changed.
 *
 *	struct ummunotify *umn;
 *	struct ummunotify_region *region;
 *
 *	if (ummunotify_open(&umn, NULL) || ummunotify_watch(umn, buffer, length, 0, &region))
 *		errx(1, "%s", ummunotify_error());
 *	lkey = ibv_reg_mr(...)				pin what was just watched
 *	...
 *	if (!ummunotify_valid(region)) {		three loads from memory
 *		ummunotify_renew(umn, region);		first this,
 *		ibv_dereg_mr(...); ibv_reg_mr(...);	then pin again
 *	}
 *
 * A cache of registrations that does all this: ummunotify_cache.h. What is guaranteed: docs/model.md. How to use this: docs/c.md.
 *
 * Results: functions return 0 (or a count), or a negative errno; ummunotify_error() then says what went wrong, why, and what can be
 * done about it, and ummunotify_failure() says it to programs.
 *
 * Threads: any thread may call any function at any time, but for ummunotify_close. Signals: a handler must not call what takes a
 * lock; ummunotify_valid, ummunotify_changed and ummunotify_generation take none.
 *
 * Forks: in a child with memory of its own, however it was made (fork, _Fork, clone, daemon), a notifier is dead: nothing is valid,
 * functions fail with -EBADF (UMMUNOTIFY_FORKED), and ummunotify_close frees its memory. The parent does not notice. A child that
 * shares the memory (vfork, posix_spawn, CLONE_VM) counts as the parent.
 *
 * Descriptors: a program that closes or replaces descriptors that it does not know (close_range, daemonising) does not make
 * changes go unseen. What needs a descriptor that is gone fails with UMMUNOTIFY_DESCRIPTOR, and what it was is never closed here.
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

#undef ummunotify_event /* <linux/ummunotify.h> has another one, which keeps the name struct ummunotify_device_event */

struct ummunotify;	  /* a notifier, for the memory of the process that opened it */
struct ummunotify_region; /* a range of addresses that is watched */

/* ---- Sources ---- */

/*
 * A source delivers the changes. Everywhere (here, UMMUNOTIFY_SOURCE, Python, the command line) it is named `source` or
 * `source:probe`; what ummunotify_source() returns can be given back.
 *
 *	bpf	this process's own BPF program; probes mmu_notifier, kvm, zap. Loading it takes privileges and the Python package.
 *	daemon	`ummunotify daemon` runs here, or the program runs under `ummunotify run`; the same probes.
 *	uffd	the kernel's userfaultfd, without privileges; for private anonymous memory only.
 */
#define UMMUNOTIFY_SOURCE_ENVIRONMENT "UMMUNOTIFY_SOURCE"

/* The sources that `wanted` names, best first: up to `room` of their names into `names`. NULL or "": what the environment variable
 * UMMUNOTIFY_SOURCE says, or all. Returns how many there are. -EINVAL: there is no such source. */
int ummunotify_sources(const char *wanted, const char **names, size_t room);

/* Opens a notifier with the first source that `wanted` names and that works. What does not work is tried by itself, and the next
 * is taken; but where a source works and a limit of it is reached, this fails (UMMUNOTIFY_LIMIT), and no weaker source is taken.
 * -ENODEV: none works; -EINVAL: there is no such source. */
int ummunotify_open(struct ummunotify **umn, const char *wanted);

/* The same, with all there is to choose. */
struct ummunotify_options {
	size_t size;				/* of this struct, as the caller knows it */
	const char *source;			/* as `wanted` above */
	uint64_t max_regions;			/* watched at a time; 0: memory is the limit */
	const struct ummunotify_feeder *feeder; /* of the source bpf, see ummunotify_feeder.h; NULL: that source is not tried */
};
int ummunotify_open_with(struct ummunotify **umn, const struct ummunotify_options *options);

/* Stops watching and releases everything; regions are no longer to be used. No other thread may be using `umn`. NULL is fine. */
void ummunotify_close(struct ummunotify *umn);

/* Stops watching. Other threads may be using `umn` and its regions: nothing is valid any more, functions fail with -ESHUTDOWN
 * (UMMUNOTIFY_CLOSED), those that wait too. May be called more than once. ummunotify_close then frees the memory. */
void ummunotify_shutdown(struct ummunotify *umn);

/* Is it open, and this process's? 0, -ESHUTDOWN, -EBADF. */
int ummunotify_check(struct ummunotify *umn);

/* What feeds it, and where the BPF program is attached: "daemon:kvm", "uffd". */
const char *ummunotify_source(const struct ummunotify *umn);

/* ---- Watching ---- */

/* Watches `length` bytes from `address` on, mapped or not, until ummunotify_unwatch. Regions may overlap, nest and repeat. `cookie`
 * is given back with each event. -EINVAL: not in user space, or empty; -ENOSPC: max_regions are watched; -ENOMEM: no memory,
 * or more than the daemon allows. With the source uffd also: -ENXIO: not all of it is mapped; -EOPNOTSUPP: memory of a kind that it
 * cannot watch; -EBUSY: another userfaultfd of this process has it. */
int ummunotify_watch(struct ummunotify *umn, const void *address, size_t length, uint64_t cookie,
		     struct ummunotify_region **region);

/* Once this returns nothing is reported for the region, and the pointer is no longer to be used. */
int ummunotify_unwatch(struct ummunotify *umn, struct ummunotify_region *region);

/* The mapping has not changed since the region was watched or last renewed. Three loads from memory; with the source uffd a system
 * call as well, and rarely a wait of up to 10 ms. True may be relied on; false may be a false alarm. */
bool ummunotify_valid(const struct ummunotify_region *region);

/* The same without waiting: 1, 0, or -EAGAIN where ummunotify_valid would wait. */
int ummunotify_valid_now(const struct ummunotify_region *region);

/* The region is valid again, until the next change after this call: pin the memory anew after it, not before. An event that was not
 * read yet still will be. With the source uffd it can fail as ummunotify_watch does; then the region stays invalid. */
int ummunotify_renew(struct ummunotify *umn, struct ummunotify_region *region);

/* ---- Reading ---- */

/* Has anything changed that ummunotify_read or ummunotify_dispatch has not delivered? Costs what ummunotify_valid costs. Never false
 * when something has; it may be true with nothing to read. With ummunotify_read, an event counts as delivered once it was
 * returned, to whichever thread: another thread may then not have acted on it yet. With ummunotify_dispatch this stays true for all
 * threads until the callbacks are done. */
bool ummunotify_changed(const struct ummunotify *umn);

/* The number of changes so far that hit a region. To be compared for inequality only. */
uint64_t ummunotify_generation(struct ummunotify *umn);

struct ummunotify_event {
	struct ummunotify_region *region;
	uint64_t cookie;
	uint64_t start, end; /* what was changed, clipped to the region; all of it unless `exact` */
	bool exact;	     /* only one change has hit the region since it was last reported, and this was its range */
	uint32_t thread;     /* the thread that made the first change, as gettid numbers it there; 0: not known, or none here */
	int32_t syscall;     /* the system call that it was in, -1 if none or not known */
};

/* Takes up to `room` events: each region once, however often it was hit, in the order in which they were first hit. Returns how many;
 * 0: nothing has changed. Does not wait. Regions stay watched, and are reported again when they are hit again. With the source uffd, once
 * the program has closed its descriptors: all regions, once, and from then on an error (UMMUNOTIFY_DESCRIPTOR). */
ptrdiff_t ummunotify_read(struct ummunotify *umn, struct ummunotify_event *events, size_t room);

/* Calls back with each event, until there is none. Other threads that dispatch wait until the callbacks are done, so after this
 * returns every change from before the call has been acted on, by whichever thread. A callback may call everything but
 * ummunotify_close; a dispatch inside it returns at once. It returns 0, or anything else if it could not act on the event: then this
 * event and what comes after it stay for the next call, ummunotify_changed stays true, and the result is -ECANCELED. Otherwise the
 * result is how many were delivered. If another thread unwatches a region meanwhile, a callback may just have been given its event. */
ptrdiff_t ummunotify_dispatch(struct ummunotify *umn, int (*callback)(const struct ummunotify_event *event, void *context),
			      void *context);

/* Waits until there may be something to read, for up to this long; negative: for as long as it takes. 1: there may be; 0: time is
 * up; -EINTR: a signal handler has run; -EBADF (UMMUNOTIFY_DESCRIPTOR): the program has closed the descriptor. */
int ummunotify_wait(struct ummunotify *umn, int milliseconds);

/* A descriptor for poll, select and epoll: readable while there may be something to read. Do not read from it or close it. Before
 * this or ummunotify_wait is first called, changes send no wake-ups and cost less. */
int ummunotify_fd(struct ummunotify *umn);

/* ---- Looking on ---- */

struct ummunotify_stats {
	uint64_t regions;    /* watched now */
	uint64_t bytes;	     /* of shared memory in all segments */
	uint64_t free_bytes; /* of these not in use */
	uint32_t segments;
	uint32_t levels;    /* of the index */
	uint32_t overflows; /* how often everything had to be invalidated */
};
int ummunotify_stats(struct ummunotify *umn, struct ummunotify_stats *stats);

/* ---- Errors ---- */

enum ummunotify_code {
	UMMUNOTIFY_OK,
	UMMUNOTIFY_ARGUMENT,	/* an argument that is never right */
	UMMUNOTIFY_RANGE,	/* empty, or not in user space */
	UMMUNOTIFY_UNSUPPORTED, /* memory whose changes the source cannot see */
	UMMUNOTIFY_LIMIT,	/* a limit is reached: of regions, notifiers, memory, the daemon's */
	UMMUNOTIFY_NO_MEMORY,
	UMMUNOTIFY_UNKNOWN_SOURCE, /* there is no such source */
	UMMUNOTIFY_UNAVAILABLE,	   /* the source does not work here */
	UMMUNOTIFY_CLOSED,
	UMMUNOTIFY_FORKED,     /* it is the parent's */
	UMMUNOTIFY_DESCRIPTOR, /* the program has closed a descriptor that is needed for this */
	UMMUNOTIFY_REGISTRAR,  /* a registrar failed (ummunotify_cache.h) */
};

struct ummunotify_failure {
	enum ummunotify_code code;
	int error;	  /* the errno */
	const char *what; /* "cannot watch 4096 bytes at 0x7f..." */
	const char *why;
	const char *remedy;  /* what can be done about it; "" if that is not known */
	const char *mapping; /* the one to blame, as /proc/self/maps has it; "" */
};

/* Of this thread's last call that failed. Good until the thread's next call. */
const struct ummunotify_failure *ummunotify_failure(void);

/* The same in a line of text: "what: why; remedy". */
const char *ummunotify_error(void);

/* What this thread's last ummunotify_open tried in vain, in that order. NULL: no more. */
struct ummunotify_tried {
	const char *source;
	const char *why, *remedy;
};
const struct ummunotify_tried *ummunotify_tried(size_t i);

/* The library's version, "1.2.3". */
const char *ummunotify_version(void);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
