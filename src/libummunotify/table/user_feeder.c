/* SPDX-License-Identifier: BSD-3-Clause */
#include "table/user_feeder.h"

#include <stddef.h>

#define UMN_WALK_FIELDS struct umn_memory *memory;
#define UMN_INLINE inline
#define UMN_LOAD(p) __atomic_load_n(p, __ATOMIC_ACQUIRE)
#define UMN_STORE(p, v) __atomic_store_n(p, v, __ATOMIC_RELEASE)
#define UMN_AFTER(p, v) ((void)(v), (p)) /* all loads are acquires */
#define UMN_PREFETCH(p) __builtin_prefetch(p)
#define UMN_UNROLL
#define UMN_OPAQUE(v) ((void)(v))
#ifndef UMN_REPEAT /* a test has its own */
#define UMN_REPEAT(n, f, w)                                                                                                        \
	do {                                                                                                                       \
		for (uint32_t i_ = 0; i_ < (n) && !f(i_, w); i_++)                                                                 \
			;                                                                                                          \
	} while (0)
#endif
struct umn_walk;
static inline struct umn_node *umn_node_at(struct umn_walk *w, uint32_t ref);
static inline struct umn_slot *umn_slot_at(struct umn_walk *w, uint32_t ref);
static inline uint32_t umn_descend(struct umn_walk *w, uint32_t ref);
static inline uint32_t umn_thread_number(struct umn_walk *w);
#include "table/invalidate.h"

/* A reference that leads nowhere: the BPF program's maps answer with no page, here it is looked up. */
static inline void *cell_at(struct umn_walk *w, uint32_t ref, uint32_t cell)
{
	uint32_t segment = ref / UMN_CELLS_PER_SEGMENT;

	if (segment >= UMN_SEGMENTS || cell >= UMN_LOAD(&w->memory->pages[segment]) * UMN_CELLS_PER_PAGE)
		return NULL;
	return w->memory->segment[segment] + (size_t)cell * UMN_CELL;
}

static inline struct umn_node *umn_node_at(struct umn_walk *w, uint32_t ref)
{
	return cell_at(w, ref, ref % UMN_CELLS_PER_SEGMENT & ~(UMN_CELLS_PER_CHUNK - 1));
}

static inline struct umn_slot *umn_slot_at(struct umn_walk *w, uint32_t ref)
{
	return cell_at(w, ref, ref % UMN_CELLS_PER_SEGMENT);
}

static inline uint32_t umn_descend(struct umn_walk *w, uint32_t ref)
{
	return umn_descend_from(w, ref);
}

static inline uint32_t umn_thread_number(struct umn_walk *w)
{
	return w->thread; /* the caller knew it */
}

void umn_memory_add(struct umn_memory *memory, void *segment, uint32_t pages)
{
	uint32_t i = 0;

	while (memory->pages[i])
		i++;
	memory->segment[i] = segment;
	/* No walk of a sound index takes more steps than there are cells. One that has loaded the old number may give up: a false
	 * alarm. */
	UMN_STORE(&memory->cells, memory->cells + pages * UMN_CELLS_PER_PAGE);
	/* A release: it publishes the segment's address. Otherwise Arm may let a feeder find the pages and a NULL. */
	UMN_STORE(&memory->pages[i], pages);
}

bool umn_feed(struct umn_memory *memory, uint64_t start, uint64_t end, uint32_t thread, int32_t syscall)
{
	struct umn_walk w = {.memory = memory,
			     .header = (struct umn_header *)memory->segment[0],
			     .start = start,
			     .end = end,
			     .thread = thread,
			     .syscall = syscall};

	return umn_in_hull(w.header, start, end) && umn_invalidate(&w, UMN_LOAD(&memory->cells));
}
