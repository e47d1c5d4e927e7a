/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The owner's side of a watch table: watch, unwatch, check, renew and drain.
 *
 * Any thread may call these functions. All but the checks take the table's lock, which is held for microseconds, except by
 * umn_table_drain after an overflow and by a source's own watch. Feeders never wait for it.
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
	/* From its return on every change of [start, end) is fed. 0, or an errno that says why it cannot be; then nothing has changed. */
	int (*watch)(struct umn_source *source, uint64_t start, uint64_t end);
	void (*unwatch)(struct umn_source *source, uint64_t start, uint64_t end);
	/* Has every change been fed that any thread can have known of before this call? Does not wait; one system call. */
	bool (*delivered)(struct umn_source *source);
	/* The same, but waits for it, for up to this long. */
	bool (*wait_delivered)(struct umn_source *source, unsigned int milliseconds);
	/* Sends a wake-up. NULL: the source does, each time that all is delivered again, if it finds the table armed. */
	void (*wake)(struct umn_source *source);
	void (*stop)(struct umn_source *source); /* once it has returned, the table is fed no more */
	/* umn_table_set_source sets the rest. */
	bool (*confirm)(const struct umn_region *region); /* an untouched region is valid */
	struct umn_table *table;
};
#define UMN_DELIVERY_MILLISECONDS 10u /* umn_source.confirm waits no longer */

/* A watched region, in the owner's own memory. Valid from umn_table_watch until umn_table_unwatch. */
struct umn_region {
	const struct umn_slot *slot;
	const struct umn_header *header;
	struct umn_source *source; /* NULL: it needs nothing of what a source may need */
	uint32_t epoch;		   /* the process's, see process.h */
	uint32_t overflow;	   /* header->overflow when it was watched or renewed */
	uint32_t ref;
	uint32_t leaf;
	uint8_t place; /* enum place in internal.h */
	bool queued;
	bool leftover;	     /* for queue_all */
	uint64_t start, end; /* bytes, as the caller gave them */
	uint64_t cookie;     /* the caller's */
	void *user;	     /* the caller's */
	struct umn_region *next, *previous;
};

/* No feeder has hit the region since it was watched or last renewed, and this is the process that watches it. Three loads; no
 * lock, no system call.
 *
 * The epoch comes first: in a child, the memory behind the other two is not mapped, or something else is. The slot's state is
 * the answer. The last load says that no feeder had to give up (invalidate.h). The two need no order between them: if the caller
 * can know of a change (its own munmap returned, or a message of another thread says so), the feeder's stores happened before
 * this call, and a load of the same location then finds them or later ones, on Arm too. */
static inline bool umn_slot_untouched(const struct umn_slot *slot, const struct umn_header *header, uint32_t overflow)
{
	return (__atomic_load_n(&slot->state, __ATOMIC_ACQUIRE) & (UMN_LIVE | UMN_INVALID)) == UMN_LIVE &&
	       __atomic_load_n(&header->overflow, __ATOMIC_ACQUIRE) == overflow;
}

static inline bool umn_region_untouched(const struct umn_region *region)
{
	return umn_process_is(region->epoch) &&
	       umn_slot_untouched(region->slot, region->header, __atomic_load_n(&region->overflow, __ATOMIC_RELAXED));
}

/* No change of [start, end) since the region was watched or last renewed. With most sources this is umn_region_untouched. With
 * a source that delivers late, "yes" costs a system call, and rarely a wait; a "no" stays until the region is renewed. */
static inline bool umn_region_valid(const struct umn_region *region)
{
	return umn_region_untouched(region) && (!region->source || region->source->confirm(region));
}

/* Counts the changes that hit at least one region. Compare it for inequality only. */
static inline uint64_t umn_generation(const struct umn_header *header)
{
	return __atomic_load_n(&header->generation, __ATOMIC_ACQUIRE);
}

struct umn_event {
	struct umn_region *region;
	uint64_t start, end; /* what was changed, clipped to the region; all of it unless exact */
	bool exact;	     /* one change hit the region, and this was its range */
	uint32_t thread;     /* that made the first change; 0: not known */
	int32_t syscall;     /* that made the first change; -1: none, or not known */
};

/* Makes a table without shared memory: add a segment before use. NULL: out of memory. */
struct umn_table *umn_table_new(uint64_t max_regions);

/* Before the first region is watched. The source must live until umn_table_close has returned. */
void umn_table_set_source(struct umn_table *table, struct umn_source *source);

/* The number of 4096-byte pages of the next segment; 0: no further segment can be added. */
uint32_t umn_table_next_pages(struct umn_table *table);

/* Adds a segment: zeroed, page-aligned memory, which feeders already see as the segment with the next number. The table owns
 * the mapping from then on. 0, -ENOMEM, -EINVAL, -EBADF: closed. */
int umn_table_add_segment(struct umn_table *table, void *memory, uint32_t pages);

/* The header, once there is a segment. It stays readable until umn_table_delete, after umn_table_close as zeros. */
const struct umn_header *umn_table_header(const struct umn_table *table);

/* Watches [start, end). 0; -ENOSPC: add a segment and try again; -EINVAL: not start < end <= 2^62; -EDQUOT: max_regions are
 * watched, or the index is as deep as it can be; -ENOMEM; -EBADF: closed; positive: the source's errno. On failure nothing has
 * changed. */
int umn_table_watch(struct umn_table *table, uint64_t start, uint64_t end, uint64_t cookie, void *user, struct umn_region **region);

/* After it returns nothing is reported for the region, and the pointer is no longer valid. */
void umn_table_unwatch(struct umn_table *table, struct umn_region *region);

/* The region is valid again, until the next change after this call. A change not reported yet still will be. 0, or the source's
 * errno; then the region is invalid for good, or until it can be renewed. */
int umn_table_renew(struct umn_table *table, struct umn_region *region);

/* Takes up to `room` events, in the order in which the regions were first hit; returns how many. A region is reported once,
 * however often it was hit since it was last reported. If there was a hit and feeders are running, this waits until these have
 * left: for one walk at most. After an overflow every region is reported. */
size_t umn_table_drain(struct umn_table *table, struct umn_event *events, size_t room);

/* Has something been invalidated since the last drain that emptied the list? No lock, no system call; but see umn_region_valid,
 * and drain only after umn_source.wait_delivered. */
bool umn_table_changed(const struct umn_table *table);

/* umn_generation; with a source that delivers late, counted up here if a change may be under way. */
uint64_t umn_table_generation(struct umn_table *table);

/* The generation up to which all was reported: while the two are equal, there is nothing to drain. */
uint64_t umn_table_seen(const struct umn_table *table);

/* Sets the generation: after a source's self-test, when no region is watched and no client has read it yet. */
void umn_table_restart(struct umn_table *table, uint64_t generation);

/* The next change that hits a region sends one wake-up, by the feeder's own means. Arm, then drain. */
void umn_table_arm(struct umn_table *table);

/* A change may have been missed: every region is invalid, and is reported. (A feeder that gives up does the same.) */
void umn_table_invalidate_all(struct umn_table *table);

/* How many regions are watched. No lock. */
uint64_t umn_table_regions(const struct umn_table *table);

struct umn_table_stats {
	uint64_t regions;    /* watched now */
	uint64_t bytes;	     /* of shared memory in all segments */
	uint64_t free_bytes; /* of these, not in use */
	uint32_t segments;
	uint32_t levels; /* of the index */
	uint32_t overflows;
};
void umn_table_stats(struct umn_table *table, struct umn_table_stats *stats);

/* Ends the feeding and unmaps the shared memory. Other threads may still check regions, none of which is valid any more; the
 * other functions do nothing from then on. In a child of a fork they do nothing either. */
void umn_table_close(struct umn_table *table);

/* Unmaps and frees everything, regions too; in a child it only frees. */
void umn_table_delete(struct umn_table *table);

#ifdef __cplusplus
}
#endif
#endif
