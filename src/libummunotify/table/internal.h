/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * What the files of the owner's side share; table.h is their interface. All of it runs under the table's lock.
 *
 *	table.c		the interface, segments, the source
 *	index.c		the B+tree over the watched regions
 *	grace.c		when feeders have left what was taken out of the index
 *	pending.c	from the list of slots that were hit to events
 *
 * The owner keeps its regions, its copy of each node and the state of each chunk in private memory. It writes a node's shared
 * copy and never reads it. From shared memory it reads only the counts of feeders, slots and the list, and checks what it
 * reads. So a stray write to shared memory can neither crash the owner nor make it loop.
 */
#ifndef UMN_TABLE_INTERNAL_H
#define UMN_TABLE_INTERNAL_H

#include <pthread.h>

#include "table/table.h"

#define load(p) __atomic_load_n(p, __ATOMIC_ACQUIRE)
#define store(p, v) __atomic_store_n(p, v, __ATOMIC_RELEASE)

/* The __sync builtins are full barriers as well, but for __sync_lock_test_and_set, which only acquires. */
static inline void full_barrier(void)
{
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
}

/* The most chunks that one change of the index can take: two nodes a level, a new root, a chunk of slots. */
#define CHUNKS_NEEDED (2 * UMN_LEVELS + 2)

/* The life of a region and its slot. */
enum place {
	FREE,
	WATCHED,
	LIMBO, /* unwatched; a feeder may still write the slot */
};

/* The state of 512 bytes of shared memory. */
struct chunk {
	struct umn_region *regions; /* of its 16 slots; NULL: not a chunk of slots */
	struct own_node *node;	    /* the owner's copy; NULL: not a node of the index */
	uint32_t parent;	    /* of a node, 0: it is the root */
	uint32_t next;		    /* on the free list or in limbo */
	uint8_t entries;	    /* of a node: how many are in use */
};

/* The owner's copy of a node. */
struct own_node {
	struct umn_node is;
	struct own_node *next; /* spare */
};

struct segment {
	uint8_t *memory;
	uint32_t pages;
	struct chunk *chunks;
};

/* Taken out of the index, and not to be reused before a grace period has passed. */
struct limbo {
	uint32_t chunks;
	struct umn_region *regions;
};

struct umn_table {
	struct umn_header *header;
	uint64_t seen; /* all changes up to this generation were reported; one less than the last drain's: not all were */
	struct umn_source *source;
	bool closed;
	uint32_t epoch;

	pthread_mutex_t lock;
	uint64_t max_regions, regions;

	/* index.c */
	uint32_t root, levels;
	uint64_t low, high;
	struct own_node *spare_nodes;
	uint32_t spare_node_count;
	bool untidy;	    /* there may be empty leaves ... */
	uint32_t tidy_from; /* ... in chunks from this one on */

	/* table.c */
	uint32_t free_chunks, free_chunk_count;
	struct umn_region *free_regions;

	/* grace.c */
	uint32_t phase;
	struct limbo fresh;   /* taken out since the running grace period began */
	struct limbo waiting; /* what the running grace period is for */
	int grace;	      /* 0: none is running; 1, 2: its step */
	bool stuck;	      /* the last wait timed out; the counts may be made up */

	uint32_t overflow_known; /* header->known */

	/* pending.c */
	uint32_t overflow_seen;
	uint64_t settled;	 /* what was hit up to this generation has been on the list */
	bool unsound;		 /* the next drain reports every region */
	struct umn_region queue; /* taken off the shared list and not reported yet: a ring through next/previous */

	uint32_t segment_count;
	struct segment segments[UMN_SEGMENTS];
};

/*
 * Loads `overflow` for what is done next: a region is watched or renewed, or all are reported. Before that feeders are told, so that none
 * takes an overflow up to this one for a reason to do nothing (umn_all_invalid). A full barrier: without it, on x86 too, a change that
 * begins after the watch or the report may still find the old value, and be missed.
 */
static inline uint32_t load_overflow(struct umn_table *t)
{
	uint32_t overflow = load(&t->header->overflow);

	if (t->overflow_known != overflow) {
		store(&t->header->known, t->overflow_known = overflow);
		full_barrier();
	}
	return overflow;
}

/* ---- From references to memory ---- */

static inline struct chunk *chunk_at(struct umn_table *t, uint32_t ref)
{
	return &t->segments[ref / UMN_CELLS_PER_SEGMENT].chunks[ref % UMN_CELLS_PER_SEGMENT / UMN_CELLS_PER_CHUNK];
}

static inline void *cell_at(struct umn_table *t, uint32_t ref)
{
	return t->segments[ref / UMN_CELLS_PER_SEGMENT].memory + (size_t)(ref % UMN_CELLS_PER_SEGMENT) * UMN_CELL;
}

static inline struct umn_node *node_at(struct umn_table *t, uint32_t ref)
{
	return &chunk_at(t, ref)->node->is;
}

/* The slot's region; NULL if a ref from shared memory is not that of a slot. */
static inline struct umn_region *region_at(struct umn_table *t, uint32_t ref)
{
	struct umn_region *regions;

	if (ref / UMN_CELLS_PER_SEGMENT >= t->segment_count)
		return NULL;
	regions = chunk_at(t, ref)->regions;
	return regions ? &regions[ref % UMN_CELLS_PER_CHUNK] : NULL;
}

static inline struct umn_slot *slot_of(struct umn_region *region)
{
	return (struct umn_slot *)region->slot;
}

/* ---- Free chunks ---- */

static inline uint32_t take_chunk(struct umn_table *t)
{
	uint32_t ref = t->free_chunks;

	t->free_chunks = chunk_at(t, ref)->next;
	t->free_chunk_count--;
	return ref;
}

static inline void free_chunk(struct umn_table *t, uint32_t ref)
{
	chunk_at(t, ref)->next = t->free_chunks;
	t->free_chunks = ref;
	t->free_chunk_count++;
}

/* ---- The queue ---- */

static inline void queue_insert(struct umn_region *after, struct umn_region *region)
{
	region->queued = true;
	region->previous = after;
	region->next = after->next;
	after->next->previous = region;
	after->next = region;
}

static inline void queue_remove(struct umn_region *region)
{
	region->queued = false;
	region->previous->next = region->next;
	region->next->previous = region->previous;
}

/* ---- index.c ---- */

/* A watched region in a leaf, or a node and bounds of what is below it. */
struct entry {
	uint64_t start, end;
	uint32_t ref;
};

/* Allocates the owner's copies of the nodes that one change can need. False: out of memory. */
bool umn_index_reserve(struct umn_table *t);

/* Can a region that begins at `start` be inserted without a further chunk? */
bool umn_index_has_room(struct umn_table *t, uint64_t start);

/* After umn_index_reserve, with CHUNKS_NEEDED free chunks or with umn_index_has_room. */
void umn_index_insert(struct umn_table *t, struct umn_region *region);
void umn_index_remove(struct umn_table *t, struct umn_region *region);

/* Removes some of the leaves that had to be left empty. */
void umn_index_tidy(struct umn_table *t);

/* The node's bounds as its own entries give them. */
struct entry umn_index_entry(struct umn_table *t, uint32_t ref);

/* ---- grace.c ---- */

/* The node or the region is out of the index. Its memory is reused after a grace period. */
void umn_grace_retire_node(struct umn_table *t, uint32_t ref);
void umn_grace_retire_region(struct umn_table *t, struct umn_region *region);

/* Frees what no feeder can reach any more. Does not wait. */
void umn_grace_reclaim(struct umn_table *t);

/* Waits until every feeder that is in the table now has left it. False if that takes too long: then no sound feeder made the
 * counts. */
bool umn_grace_wait(struct umn_table *t);

/* ---- pending.c ---- */

/* Moves the shared list to the queue. A list that no sound feeder made counts as an overflow. */
void umn_pending_take(struct umn_table *t);

/* umn_table_drain. */
size_t umn_pending_report(struct umn_table *t, struct umn_event *events, size_t room);

#endif
