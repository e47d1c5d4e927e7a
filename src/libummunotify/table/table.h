/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The owner's side of a watch table: watch, unwatch, check, renew and drain.
 *
 * The functions may be called by any thread; all but the checks take the table's lock, which is never held for long (but see
 * umn_table_drain on overflow, and a source's own watch). Feeders never wait for it.
 */
#ifndef UMN_TABLE_H
#define UMN_TABLE_H

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "abi/layout.h"
#include "process/process.h"

#ifdef __cplusplus
extern "C" {
#endif

struct umn_table;
struct umn_region;

/* What the owner has to know of a source that must be told what is watched, and whose news of a change may come only after its
 * address was given to another mapping. A source that the kernel tells in time has none of this. */
struct umn_source {
	/* Sees to it that every change of [start, end) from here on is fed. `granule` is for the source's own use. 0, or an errno
	 * that says why it cannot; then nothing has changed. */
	int (*watch)(struct umn_source *source, uint64_t start, uint64_t end, uint8_t *granule);
	/* invalid: the region has been, so there may be other memory by now. */
	void (*unwatch)(struct umn_source *source, uint64_t start, uint64_t end, uint8_t granule, bool invalid);
	/* Has every change been fed that anybody can have known of before this call? Does not wait; one system call. */
	bool (*arrived)(struct umn_source *source);
	/* The same, but waits for it, for up to this long. */
	bool (*settle)(struct umn_source *source, unsigned int milliseconds);
	/* Sends a wake-up. NULL: the source does, each time that all has arrived again, if it finds the table armed. */
	void (*wake)(struct umn_source *source);
	void (*stop)(struct umn_source *source); /* once it has returned, the table is fed no more */
	/* umn_table_set_source sets the rest. */
	bool (*confirm)(const struct umn_region *region); /* an untouched region is valid */
	struct umn_table *table;
};
#define UMN_SETTLE_MILLISECONDS 10u

/* A watched region, in the owner's own memory. Valid from umn_table_watch until umn_table_unwatch. */
struct umn_region {
	const struct umn_slot *slot;
	const struct umn_header *header;
	struct umn_source *source; /* NULL: it needs nothing of what a source may need */
	uint32_t epoch;	   /* the process's, see process.h */
	uint32_t overflow; /* header->overflow when it was watched or renewed */
	uint32_t ref;
	uint32_t leaf;
	uint8_t place; /* enum place in internal.h */
	bool queued;
	bool leftover; /* for queue_all */
	uint8_t granule; /* the source's */
	uint64_t start, end; /* bytes, as the caller gave them */
	uint64_t cookie;     /* the caller's */
	void *user;	     /* the caller's */
	struct umn_region *next, *previous;
};

/* No feeder has hit the region since it was watched or last renewed, and this is the process that watches it. Three loads; no lock,
 * no system call.
 *
 * The epoch comes first: in a child, the memory behind the other two is not mapped, or something else is. The slot's state is
 * the answer. The last load says that no feeder had to give up (invalidate.h). These two need no order of their
 * own: a change that has happened before this call in any way that the caller can know of, its own return from munmap or
 * another thread's message, was published before that, and coherence does the rest. */
static inline bool umn_region_untouched(const struct umn_region *region)
{
	return umn_process_is(region->epoch) &&
	       (__atomic_load_n(&region->slot->state, __ATOMIC_ACQUIRE) & (UMN_LIVE | UMN_INVALID)) == UMN_LIVE &&
	       __atomic_load_n(&region->header->overflow, __ATOMIC_ACQUIRE) == __atomic_load_n(&region->overflow, __ATOMIC_RELAXED);
}

/* Nothing has changed [start, end) since the region was watched or last renewed. With most sources this is the same. For one whose
 * news comes late, "yes" costs a system call, and rarely a wait; once it was "no" it stays so until the region is renewed. */
static inline bool umn_region_valid(const struct umn_region *region)
{
	return umn_region_untouched(region) && (!region->source || region->source->confirm(region));
}

/* The counter of changes that hit at least one region; to be compared for inequality only. */
static inline uint64_t umn_generation(const struct umn_header *header)
{
	return __atomic_load_n(&header->generation, __ATOMIC_ACQUIRE);
}

struct umn_event {
	struct umn_region *region;
	uint64_t start, end; /* what was changed, clipped to the region; all of it unless exact */
	bool exact;	     /* just one change hit the region, and this was its range */
	uint32_t thread;     /* of the first change: the thread that made it, 0 if not known */
	int32_t syscall;     /* of the first change: the system call it was made by, -1 if by none or not known */
};

/* Makes a table with no memory: add a segment before use. NULL: out of memory. */
struct umn_table *umn_table_new(uint64_t max_regions);

/* Before the first region is watched. The source has to outlive the table's closing. */
void umn_table_set_source(struct umn_table *table, struct umn_source *source);

/* How many 4096-byte pages the next segment has to have; 0: no further segment can be added. */
uint32_t umn_table_next_pages(struct umn_table *table);

/* Adds a segment: zeroed, page-aligned memory that feeders see as the segment with the next number already. The table takes
 * the mapping over. 0, -ENOMEM, -EINVAL. */
int umn_table_add_segment(struct umn_table *table, void *memory, uint32_t pages);

/* The header, once there is a segment. It stays readable until umn_table_delete, after umn_table_close as zeros. */
const struct umn_header *umn_table_header(const struct umn_table *table);

/* Watches [start, end). 0; -ENOSPC: add a segment and try again; -EINVAL: not start < end <= 2^62; -EDQUOT: max_regions are
 * watched, or the index is as deep as it can be; -ENOMEM; -EBADF: closed; positive: the source's errno. On failure nothing has
 * changed. */
int umn_table_watch(struct umn_table *table, uint64_t start, uint64_t end, uint64_t cookie, void *user,
		    struct umn_region **region);

/* After it returns nothing is reported for the region, and the pointer is no longer valid. */
void umn_table_unwatch(struct umn_table *table, struct umn_region *region);

/* The region is valid again, until the next change after this call. A change not reported yet still will be. 0, or the source's
 * errno; then the region is invalid for good, or until it can be renewed. */
int umn_table_renew(struct umn_table *table, struct umn_region *region);

/* Takes up to `room` events, in the order in which the regions were first hit; returns how many. Each region is reported
 * once, however often it was hit since it was last reported. If something was hit and feeders are running, then this waits for
 * them to leave, which they do within one walk. After an overflow every region is reported. */
size_t umn_table_drain(struct umn_table *table, struct umn_event *events, size_t room);

/* Has something been invalidated since the last drain that emptied the list? No lock, no system call; but see umn_region_valid,
 * and drain only after the source has settled. */
bool umn_table_changed(const struct umn_table *table);

/* umn_generation, for a source whose news comes late too: counted up here if something may be on its way. */
uint64_t umn_table_generation(struct umn_table *table);

/* The generation up to which all was reported: while it is the generation, there is nothing to drain that has arrived. */
uint64_t umn_table_seen(const struct umn_table *table);

/* Sets the generation to 0: after a source's self-test, when nothing is watched and nobody has looked at it yet. */
void umn_table_restart(struct umn_table *table);

/* The next change that hits a region sends one wake-up (through whatever the feeder uses). Arm, then drain. */
void umn_table_arm(struct umn_table *table);

/* A change may have been missed: every region is invalid, and is reported. (A feeder that gives up does the same.) */
void umn_table_invalidate_all(struct umn_table *table);

/* How many regions are watched. No lock. */
uint64_t umn_table_regions(const struct umn_table *table);

struct umn_table_stats {
	uint64_t regions;	 /* watched now */
	uint64_t bytes;		 /* of shared memory in all segments */
	uint64_t free_bytes;	 /* of these not in use */
	uint32_t segments;
	uint32_t levels; /* of the index */
	uint32_t overflows;
};
void umn_table_stats(struct umn_table *table, struct umn_table_stats *stats);

/* Ends the feeding and gives up the shared memory. Other threads may still be checking regions, of which none is valid any more;
 * the other functions do nothing from then on. In a child of a fork they do nothing either. */
void umn_table_close(struct umn_table *table);

/* Unmaps and frees everything, regions too; in a child it only frees. */
void umn_table_delete(struct umn_table *table);

#ifdef __cplusplus
}
#endif
#endif
