/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */
/*
 * The watch table's layout in shared memory.
 *
 * One definition for the BPF program, the C library and the Python package. A table is a sequence of
 * segments; a segment is an array of 64 pages of 4096 bytes (a BPF array map, or plain memory). Page 0 of segment 0 is
 * the header; every other 512-byte chunk is a node of the index, or 16 slots, or free.
 *
 * A reference is the number of a 32-byte cell, counted through all segments. 0 is "none" (it would be the header).
 */
#ifndef UMN_LAYOUT_H
#define UMN_LAYOUT_H

#include <stdint.h>

#define UMN_PAGE 4096u
#define UMN_CELL 32u
#define UMN_CHUNK 512u
#define UMN_CELLS_PER_PAGE (UMN_PAGE / UMN_CELL)
#define UMN_CELLS_PER_CHUNK (UMN_CHUNK / UMN_CELL)
#define UMN_CHUNKS_PER_PAGE (UMN_PAGE / UMN_CHUNK)

#define UMN_SEGMENT_PAGES 64u
#define UMN_SEGMENTS 2048u /* at most: half a GiB, some six million regions */
#define UMN_CELLS_PER_SEGMENT (UMN_SEGMENT_PAGES * UMN_CELLS_PER_PAGE)

/* No region ends above, and changes are cut to it: addresses are compared by the sign of their difference. */
#define UMN_ADDRESS_MAX (UINT64_C(1) << 62)

#define UMN_FANOUT 25u
#define UMN_LEVELS 8u /* a power of two: the BPF program masks with it */

/* The writer of each field: `feeder`, any number of calls of umn_invalidate, on any CPUs; `owner`, the watching process, one
 * thread at a time. A line of 64 bytes has one kind of writer, except for `armed`. */
struct umn_header {
	/* feeder: one more per change that hits at least one watched region. First, so that page 0 can be mapped
	 * read-only as the counter page of the original interface. */
	uint64_t generation;
	uint64_t unused0[7];

	/* feeder */
	uint64_t readers[2]; /* feeders inside the index, per phase */
	uint32_t head;	     /* the list of slots that were hit since the owner last took it */
	uint32_t unused1;
	uint64_t unused2[5];

	/* owner */
	uint64_t low; /* no region begins below `low` or ends above `high` */
	uint64_t high;
	uint32_t root;	/* node, 0: nothing is watched */
	uint32_t phase; /* 0 or 1: which of readers[] new feeders count in */
	uint32_t zero;	/* always 0 */
	uint32_t unused3[9];

	/* rarely written, by both */
	uint32_t overflow; /* one more each time that a change may have been missed: every region is invalid */
	uint32_t armed;	   /* the owner sets it; the feeder that clears it sends the wake-up */
	uint32_t given_up; /* feeder: `overflow` when it was counted up by a feeder that has since counted `generation` up */
	uint32_t known;	   /* owner: the latest `overflow` that it has loaded to watch or renew a region, or to report all */
	uint64_t unused4[6];

	/* owner, at each watch: on a line that feeders do not read */
	uint32_t regions; /* how many are watched; for statistics only */
	uint32_t unused5[15];
};

/* An entry is in use while its ref is not 0. In a leaf (level 0) ref is a slot, and the entries are in any order. Above,
 * ref is a node, `start` a lower bound of the starts in it and `end` an upper bound of the ends, sorted by start; entries that are not
 * in use begin at UMN_ADDRESS_MAX. */
struct umn_node {
	uint8_t level;
	uint8_t used;	 /* entries at this index and above have never been used */
	uint8_t ordered; /* above leaves: starts and ends have both been sorted since the node was built; goes from 1 to 0 only */
	uint8_t unused0;
	uint32_t unused1;
	uint64_t start[UMN_FANOUT];
	uint64_t end[UMN_FANOUT];
	uint32_t ref[UMN_FANOUT];
	uint32_t unused2;
};

/* The bits of a slot's state. */
#define UMN_LIVE 1u	/* owner: a region is watched through this slot */
#define UMN_INVALID 2u	/* hit since the region was watched or renewed: the answer to umn_region_valid */
#define UMN_PENDING 4u	/* hit and not yet reported: on the list, or about to be pushed */
#define UMN_MULTIPLE 8u /* hit more than once since it became pending: the hint is not exact */

struct umn_slot {
	uint32_t state;
	uint32_t next;	     /* the next slot on the list; written by the feeder that set UMN_PENDING, as are ... */
	uint64_t hint_start; /* ... the first hit's range, ... */
	uint64_t hint_end;
	uint32_t thread; /* ... the thread that made it (0: not known), ... */
	int32_t syscall; /* ... and the system call it was in (-1: a page fault or not known) */
};

/* For the probes that the kernel may skip: see sources/probe_gap.h. The feeder writes it, for all its tables. */
struct umn_probe_gaps {
	uint32_t cpus;	/* on how many the kernel may be skipping the probe now */
	uint32_t times; /* how often that has begun; counted before `cpus`; wraps */
};

#ifdef __cplusplus
#define UMN_STATIC_ASSERT static_assert
#else
#define UMN_STATIC_ASSERT _Static_assert
#endif
UMN_STATIC_ASSERT(sizeof(struct umn_header) == 320, "header: five cache lines");
UMN_STATIC_ASSERT(sizeof(struct umn_node) <= UMN_CHUNK, "a node fits in a chunk");
UMN_STATIC_ASSERT(sizeof(struct umn_slot) == UMN_CELL, "a slot is a cell");
UMN_STATIC_ASSERT(UMN_SEGMENTS <= UINT32_MAX / UMN_CELLS_PER_SEGMENT, "a reference has 32 bits");

#endif
