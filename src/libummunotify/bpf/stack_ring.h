/* SPDX-License-Identifier: BSD-3-Clause */
/* The reading side of the ring buffer that stacks.bpf.c writes. No locks: one thread at a time. */
#ifndef UMN_STACK_RING_H
#define UMN_STACK_RING_H

#include <stdint.h>

#include "abi/stacks.h"

struct umn_stack_ring {
	uint64_t *consumed;
	const uint64_t *produced; /* a page with the position, then the data, twice: no record is cut in two */
};

/* Of the map's descriptor, which may be closed then. Children have no mapping. 0 or -errno. */
int umn_stack_ring_map(struct umn_stack_ring *ring, int fd);
void umn_stack_ring_unmap(struct umn_stack_ring *ring);

/* Copies the next stack. False: there is none. */
int umn_stack_ring_take(struct umn_stack_ring *ring, struct umn_stack *stack);

#endif
