/* SPDX-License-Identifier: BSD-3-Clause */
/* A feeder in user space: for sources that learn of changes in this process, and for tests. */
#ifndef UMN_USER_FEEDER_H
#define UMN_USER_FEEDER_H

#include <stdbool.h>
#include <stdint.h>

#include "abi/layout.h"

/* The table's segments, for feeders. A segment is added here before the table gets it, and so before a ref leads there. */
struct umn_memory {
	uint8_t *segment[UMN_SEGMENTS];
	uint32_t pages[UMN_SEGMENTS]; /* 0: there is none */
	uint32_t cells;		      /* in all of them */
};

/* Adds a segment at the end, while any number of feeders run. One thread at a time. */
void umn_memory_add(struct umn_memory *memory, void *segment, uint32_t pages);

/* Invalidates every region that [start, end) overlaps. Returns whether a wake-up is to be sent. Any number of threads at a time;
 * takes no lock and does not allocate. */
bool umn_feed(struct umn_memory *memory, uint64_t start, uint64_t end, uint32_t thread, int32_t syscall);

#endif
