/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */
/*
 * What a feeder does with a change: find the watched regions that it overlaps and invalidate them.
 *
 * One source for the BPF program and for user-space feeders. Whoever includes it defines
 *
 *	UMN_WALK_FIELDS			a field or more of struct umn_walk, for the two functions below
 *	struct umn_node *umn_node_at(struct umn_walk *w, uint32_t ref)	NULL if there is no such chunk
 *	struct umn_slot *umn_slot_at(struct umn_walk *w, uint32_t ref)
 *	UMN_LOAD(p), UMN_STORE(p, v)	single-copy atomic, no order
 *	UMN_OPAQUE(v)			hides from the compiler what it knows of v
 *	UMN_REPEAT(n, f, w)		calls f(i, w) for i = 0, 1, ... until it returns 1, at most n times
 *	UMN_INLINE, UMN_UNROLL		on functions that are to be inlined, loops that are to be unrolled
 *
 * with the declarations of the two functions before the include (struct umn_walk is incomplete there).
 *
 * Nothing here waits or allocates, and every loop is bounded: a feeder may hold any kernel lock, and the table may belong to
 * an untrusted process. Where a bound is hit or a reference leads nowhere, the walk gives up, and giving up means "everything
 * may be invalid" (header.overflow), never nothing.
 *
 * The __sync builtins are full barriers in C, and in BPF fully ordered atomic operations as long as their result is used.
 * Each place that needs the order says so.
 */
#ifndef UMN_FEEDER_H
#define UMN_FEEDER_H

#include "abi/layout.h"

#define UMN_PUSH_TRIES (1u << 16)

struct umn_walk {
	UMN_WALK_FIELDS
	struct umn_header *header;
	uint64_t start, end; /* the change: whole pages */
	uint32_t thread;
	int32_t syscall;
	uint32_t hit; /* something was */
	uint32_t first, last; /* the slots that this walk made pending, chained, the last one hit first */
	uint32_t done;	      /* of each UMN_REPEAT: it came to its end */
	uint32_t gave_up;
	uint32_t enter;		    /* the node to go on with; 0: the last of those entered */
	uint32_t depth;		    /* how many nodes were entered and not left */
	uint32_t zero;		    /* 0; but the BPF verifier does not know: see umn_invalidate */
	uint32_t node[UMN_LEVELS];  /* these */
	uint32_t left[UMN_LEVELS];  /* and their entries that overlap and are still to be followed, one bit each */
};

/* Invalidates one slot. Coalesces: only who sets UMN_PENDING chains the slot, so it is on the list at most once and the
 * list cannot overflow. */
static UMN_INLINE void umn_hit(struct umn_walk *w, struct umn_slot *slot, uint32_t ref)
{
	const uint32_t all = UMN_INVALID | UMN_PENDING | UMN_MULTIPLE;
	uint32_t state = UMN_LOAD(&slot->state);

	if (!(state & UMN_LIVE))
		return; /* unwatched meanwhile */
	w->hit = 1;
	/* Nothing to set. If the owner clears these bits right after this load, then it reports the region after this
	 * change has begun, which is all that this change asks for. */
	if ((state & all) == all)
		return;
	state = __sync_fetch_and_or(&slot->state, UMN_INVALID | UMN_PENDING);
	/* If the owner reports the first hit between these two operations, as an exact one, then this is again a first hit (and
	 * MULTIPLE, although needless then, stays until it is reported). */
	if ((state & (UMN_PENDING | UMN_MULTIPLE)) == UMN_PENDING)
		state = __sync_fetch_and_or(&slot->state, all);
	if (state & UMN_PENDING)
		return;
	/* From here to the push the rest of the slot is this walk's alone: a second feeder only sets UMN_MULTIPLE, so two
	 * hints cannot mix, and the owner reads it only once it finds the slot on the list. */
	UMN_STORE(&slot->hint_start, w->start);
	UMN_STORE(&slot->hint_end, w->end);
	UMN_STORE(&slot->thread, w->thread);
	UMN_STORE(&slot->syscall, w->syscall);
	UMN_STORE(&slot->next, w->first);
	if (!w->first)
		w->last = ref;
	w->first = ref;
}

/* Which of the node's entries overlap, one bit each. Without branches, for the BPF verifier's sake, which follows each way
 * through a program; addresses are far below 2^63, so the sign of a difference tells which is greater. Entries not in use may
 * be among them. */
static UMN_INLINE uint32_t umn_overlapping(struct umn_walk *w, struct umn_node *node)
{
	uint32_t overlapping = 0, i;

	UMN_UNROLL
	for (i = 0; i < UMN_FANOUT; i++)
		overlapping |= (uint32_t)(((UMN_LOAD(&node->start[i]) - w->end) & (w->start - UMN_LOAD(&node->end[i]))) >> 63) << i;
	return overlapping;
}

/* The number of the lowest bit that is set in a non-zero value: BPF has no instruction for it. */
static UMN_INLINE uint32_t umn_lowest(uint32_t bits)
{
	uint32_t below = (bits & -bits) - 1; /* count these */

	UMN_OPAQUE(below); /* or the compiler sees what this is, and then finds no instruction */
	below -= below >> 1 & 0x55555555;
	below = (below & 0x33333333) + (below >> 2 & 0x33333333);
	below = (below + (below >> 4)) & 0x0f0f0f0f;
	return below * 0x01010101 >> 24;
}

/* One step of the depth-first walk: enter a node, or follow one entry of the node that it is in, or go up. */
static long umn_step(uint32_t unused, struct umn_walk *w)
{
	uint32_t depth = w->depth & (UMN_LEVELS - 1), above = (depth - 1) & (UMN_LEVELS - 1), i, ref;
	struct umn_node *node;
	struct umn_slot *slot;

	(void)unused;
	if (w->enter) {
		node = umn_node_at(w, w->enter);
		if (!node || depth != w->depth)
			goto give_up;
		w->node[depth] = w->enter;
		w->left[depth] = umn_overlapping(w, node);
		w->depth = (depth + 1) | w->zero;
		w->enter = w->zero;
		return 0;
	}
	if (!w->left[above]) {
		w->depth = above | w->zero;
		w->done = !above;
		return !above;
	}
	i = umn_lowest(w->left[above]);
	w->left[above] &= w->left[above] - 1;
	node = umn_node_at(w, w->node[above]);
	if (!node || i >= UMN_FANOUT)
		goto give_up;
	/* The owner may have reused this entry, so ref may not belong to the bounds that were looked at. Then a watch that had
	 * not returned when this change began is missed, or hit without need. */
	ref = UMN_LOAD(&node->ref[i]);
	if (!ref)
		return 0;
	if (UMN_LOAD(&node->level)) {
		w->enter = ref;
		return 0;
	}
	slot = umn_slot_at(w, ref);
	if (!slot)
		goto give_up;
	umn_hit(w, slot, ref);
	return 0;
give_up:
	w->gave_up = 1;
	return 1;
}

/* Puts the walk's chain on the list: one try. */
static long umn_push(uint32_t unused, struct umn_walk *w)
{
	struct umn_slot *last = umn_slot_at(w, w->last);
	uint32_t head;

	(void)unused;
	if (!last)
		return 1;
	head = UMN_LOAD(&w->header->head);
	UMN_STORE(&last->next, head);
	/* Full barrier: the slots are written before they can be reached. No ABA: slots are pushed any number at a time but only
	 * ever taken all at once, so an equal head is an equally good successor. */
	if (__sync_val_compare_and_swap(&w->header->head, head, w->first) != head)
		return 0;
	w->done = 1;
	return 1;
}

/* Can [start, end) touch a watched region? A watch widens the hull before it publishes its entry, so this may be asked
 * before entering the index. */
static UMN_INLINE int umn_in_hull(struct umn_header *header, uint64_t start, uint64_t end)
{
	return UMN_LOAD(&header->root) && start < UMN_LOAD(&header->high) && end > UMN_LOAD(&header->low);
}

/* Invalidates what [w->start, w->end) overlaps, in at most `steps` steps. The caller has zeroed the rest of *w. Returns 1 if a
 * wake-up is to be sent.
 *
 * The order of the four parts is the heart of the matter:
 *
 * 1. Count in, then load the root (full barrier between). The owner unlinks, then (full barrier) reads the counts. If it does
 *    not find this feeder counted, then this feeder does not find what was unlinked, so the owner may reuse that. The phase
 *    may be stale by the time it is counted in; the owner allows for it (reclaim in table.c).
 * 2. Walk: every slot is invalid for its holder before anything else tells of it.
 * 3. Push the slots, then count the generation up (full barrier between), then look whether a wake-up is wanted (full
 *    barrier again). The owner reads the generation and then takes the list: it gets the slots, or will find the generation
 *    changed. It sets `armed` and then reads the generation: one of the two sees the other.
 * 4. Count out (full barrier before): when the owner finds this feeder gone, its slots are on the list.
 */
static UMN_INLINE int umn_invalidate(struct umn_walk *w, uint32_t steps)
{
	struct umn_header *header = w->header;
	uint32_t phase = UMN_LOAD(&header->phase) & 1;
	int wake = 0;

	if (w->end > UMN_ADDRESS_MAX)
		w->end = UMN_ADDRESS_MAX; /* "the whole address space" ends at ~0 */
	if (__sync_fetch_and_add(&header->readers[phase], 1) == UINT64_MAX)
		w->gave_up = 1; /* cannot be; but using the result makes it an ordered operation in BPF */
	/* Before Linux 6.7 the verifier follows one step only of a loop, from what it knows before it, takes the rest of the
	 * program for dead, and removes it. So it must know nothing of what steps change. Later ones would follow each depth by
	 * itself. */
	w->zero = UMN_LOAD(&header->zero);
	w->depth = w->hit = w->first = w->last = w->done = w->zero;
	w->gave_up |= w->zero;
	w->node[w->zero & (UMN_LEVELS - 1)] = w->left[w->zero & (UMN_LEVELS - 1)] = w->zero;
	w->enter = UMN_LOAD(&header->root);
	if (w->enter) {
		UMN_REPEAT(steps, umn_step, w);
		if (!w->done)
			w->gave_up = 1;
	}
	if (w->first) {
		w->done = w->zero;
		UMN_REPEAT(UMN_PUSH_TRIES, umn_push, w);
		if (!w->done)
			w->gave_up = 1; /* the chain is lost; the owner finds it again when it handles the overflow */
	}
	if (w->gave_up && __sync_fetch_and_add(&header->overflow, 1) != UINT32_MAX)
		w->hit = 1;
	if (w->hit && __sync_fetch_and_add(&header->generation, 1) != UINT64_MAX)
		wake = UMN_LOAD(&header->armed) && __sync_lock_test_and_set(&header->armed, 0);
	if (__sync_fetch_and_sub(&header->readers[phase], 1) == 0)
		wake = 1; /* cannot be, as above */
	return wake;
}

#endif
