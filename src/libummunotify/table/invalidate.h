/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */
/*
 * What a feeder does with a change: find the watched regions that it overlaps and invalidate them.
 *
 * One source for the BPF program and for user-space feeders. The file that includes it defines
 *
 *	UMN_WALK_FIELDS			a field or more of struct umn_walk, for the functions below
 *	struct umn_node *umn_node_at(struct umn_walk *w, uint32_t ref)	NULL if there is no such chunk
 *	struct umn_slot *umn_slot_at(struct umn_walk *w, uint32_t ref)
 *	uint32_t umn_descend(struct umn_walk *w, uint32_t ref)	umn_descend_from, by a call or not
 *	uint32_t umn_thread_number(struct umn_walk *w)	the current thread's number; asked for at the first hit only
 *	UMN_LOAD(p), UMN_STORE(p, v)	single-copy atomic; in BPF without order
 *	UMN_AFTER(p, v)			p, from which nothing is loaded before v was
 *	UMN_PREFETCH(p)			has the cache line fetched
 *	UMN_OPAQUE(v)			hides from the compiler what it knows of v
 *	UMN_REPEAT(n, f, w)		calls f(i, w) for i = 0, 1, ... until it returns 1, at most n times
 *	UMN_INLINE, UMN_UNROLL		on functions that are to be inlined, loops that are to be unrolled
 *
 * with the declarations of the four functions before the include (struct umn_walk is incomplete there).
 *
 * Nothing here waits or allocates, and every loop is bounded: a feeder may hold any kernel lock, and the table may belong to an
 * untrusted process. At a bound, or where a reference leads nowhere, the walk gives up: header.overflow makes every region invalid.
 *
 * The __sync builtins are full barriers: on x86 locked instructions; on Arm an atomic instruction that acquires and releases, or a
 * barrier after the loop. In BPF they are that only if their result is used, and without order if not. In user space clang has no barrier
 * after the loop: what comes later may overtake it, but not a load that acquires, as UMN_LOAD does there; and
 * __sync_lock_test_and_set only acquires. Each place that needs the order says what breaks without it.
 */
#ifndef UMN_FEEDER_H
#define UMN_FEEDER_H

#include "abi/layout.h"

/* Each try that fails is another feeder's that succeeded, or the owner's; so only a hostile owner makes many fail. */
#define UMN_PUSH_TRIES 1024u
#define UMN_PUSH_TRIES_LEAST 64u

struct umn_walk {
	UMN_WALK_FIELDS
	struct umn_header *header;
	uint64_t start, end; /* the change: whole pages */
	uint32_t thread;
	int32_t syscall;
	uint32_t hit;	      /* at least one slot was */
	uint32_t first, last; /* the chain of slots that this walk made pending, the last hit first */
	uint32_t done;	      /* the last UMN_REPEAT finished, rather than reaching its bound */
	uint32_t gave_up;
	uint32_t enter;		   /* the node to enter next; 0: go on with the last one that waits */
	uint32_t depth;		   /* how many nodes wait: further entries of theirs are to be followed */
	uint32_t zero;		   /* 0, unknown to the BPF verifier: see umn_invalidate */
	uint32_t node[UMN_LEVELS]; /* the nodes that wait */
	uint32_t left[UMN_LEVELS]; /* of each: the entries that overlap and are still to be followed, one bit each, at least one */
	uint32_t taken;		   /* steps, and tries to push that failed */
	uint32_t tries;		   /* the latter */
};

/* Invalidates one slot. Coalesces hits: only the feeder whose operation sets UMN_PENDING chains the slot, so it is on the list at
 * most once, and the list cannot overflow. */
static UMN_INLINE void umn_hit(struct umn_walk *w, struct umn_slot *slot, uint32_t ref)
{
	const uint32_t all = UMN_INVALID | UMN_PENDING | UMN_MULTIPLE;
	uint32_t state = UMN_LOAD(&slot->state);

	if (!(state & UMN_LIVE))
		return; /* unwatched meanwhile */
	w->hit = 1;
	/* All bits are set already. If the owner clears them after this load, it reports the region after this change has begun: the
	 * report covers this change too. (One location: its modification order is enough, on Arm too.) */
	if ((state & all) == all)
		return;
	state = __sync_fetch_and_or(&slot->state, UMN_INVALID | UMN_PENDING);
	/* The owner may report the first hit between these two operations, as an exact one. The second operation then finds the slot
	 * not pending, and this is a first hit again; its range is reported as not exact, which is allowed. */
	if ((state & (UMN_PENDING | UMN_MULTIPLE)) == UMN_PENDING)
		state = __sync_fetch_and_or(&slot->state, all);
	if (state & UMN_PENDING)
		return;
	/* From here to the push the rest of the slot belongs to this walk: a second feeder only sets UMN_MULTIPLE, so two hints cannot
	 * mix. The owner reads it after it found the slot on the list; the push orders these stores before that. */
	UMN_STORE(&slot->hint_start, w->start);
	UMN_STORE(&slot->hint_end, w->end);
	/* Asked twice. With one `if` for both, the program that clang makes is too much for the BPF verifier. */
	if (!w->first)
		w->thread = umn_thread_number(w);
	UMN_STORE(&slot->thread, w->thread);
	UMN_STORE(&slot->syscall, w->syscall);
	UMN_STORE(&slot->next, w->first);
	if (!w->first)
		w->last = ref;
	w->first = ref;
}

/* Which of the node's entries overlap, one bit each. Without branches, since the BPF verifier follows each path through a
 * program: addresses are far below 2^63, so the sign of a difference tells which is greater. The result may include entries that
 * are not in use. */
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

	UMN_OPAQUE(below); /* otherwise the compiler recognizes a bit count, for which BPF has no instruction */
	below -= below >> 1 & 0x55555555;
	below = (below & 0x33333333) + (below >> 2 & 0x33333333);
	below = (below + (below >> 4)) & 0x0f0f0f0f;
	return below * 0x01010101 >> 24;
}

/* Has the node's cache lines fetched all at once. Otherwise those with the ends and refs, and a leaf's, wait for those with the starts. */
static UMN_INLINE void umn_fetch(struct umn_node *node)
{
	uint32_t i;

	UMN_UNROLL
	for (i = 0; i < UMN_CHUNK / 64; i++)
		UMN_PREFETCH((uint64_t *)node + 8 * i);
}

/*
 * In a node above leaves: the last entry that can overlap, which is as many as there are later starts before the end of the change. The
 * starts are sorted at any time, if the node is `ordered`. So of an entry with a region that overlaps, and of all before it, each load
 * finds a start before that end, whatever is stored meanwhile: the result is that entry or a later one. By fives: no load in either half
 * waits for another.
 */
static UMN_INLINE uint32_t umn_last(struct umn_walk *w, struct umn_node *node)
{
	uint64_t fives = 0, ones = 0;
	uint32_t i;

	UMN_UNROLL
	for (i = 5; i < UMN_FANOUT; i += 5)
		fives += (UMN_LOAD(&node->start[i]) - w->end) >> 63;
	fives = (fives & 7) * 5; /* at most 20, which the BPF verifier does not find */
	UMN_UNROLL
	for (i = 1; i < 5; i++)
		ones += (UMN_LOAD(&node->start[fives + i]) - w->end) >> 63;
	return (uint32_t)(fives + ones);
}

/*
 * The way down from the root, as long as just one entry overlaps and can be found without a look at all of them. Returns the node where
 * that ends, for umn_step; 0: nothing overlaps.
 */
static UMN_INLINE uint32_t umn_descend_from(struct umn_walk *w, uint32_t ref)
{
	uint64_t end, end_before;
	uint32_t levels, i, before, below;
	struct umn_node *node;

	for (levels = 1; levels < UMN_LEVELS; levels++) {
		node = umn_node_at(w, ref);
		if (!node)
			break;
		umn_fetch(node);
		if (!UMN_LOAD(&node->level))
			break;
		i = umn_last(w, node);
		UMN_OPAQUE(i); /* what is compared is what is used */
		if (i >= UMN_FANOUT)
			break;
		before = i - 1;
		UMN_OPAQUE(before); /* before Linux 6.8 the verifier learns nothing from i being other than 0 */
		end_before = before < UMN_FANOUT ? UMN_LOAD(&node->end[before]) : 0;
		if (end_before > w->start)
			break;
		end = UMN_LOAD(&node->end[i]);
		below = UMN_LOAD(&node->ref[i]);
		/* After the bounds (the starts are before the ends, whose addresses depend on them). It is set, so it was when they were
		 * loaded: the end before is the greatest there, and no entry before overlaps. The other way round the owner could clear it
		 * and then narrow that end, in between: a change would be missed. */
		if (!UMN_LOAD(UMN_AFTER(&node->ordered, end | end_before)))
			break;
		if (end <= w->start)
			return 0;
		ref = below;
	}
	return ref;
}

/*
 * One step of the depth-first walk: enters a node, or goes back to one that waits, and follows one entry of it. A node waits only if
 * more than one entry overlaps. So a walk on a single path takes one step for each level, and none for the way back.
 */
static long umn_step(uint32_t number, struct umn_walk *w)
{
	uint32_t depth = w->depth & (UMN_LEVELS - 1), i, ref;
	struct umn_node *node;
	struct umn_slot *slot;

	w->taken = number + 1;
	if (w->enter) {
		node = umn_node_at(w, w->enter);
		if (!node || depth != w->depth)
			goto give_up;
		w->node[depth] = w->enter;
		w->left[depth] = umn_overlapping(w, node);
		w->enter = w->zero;
	} else {
		depth = (depth - 1) & (UMN_LEVELS - 1);
		node = umn_node_at(w, w->node[depth]);
		if (!node)
			goto give_up;
	}
	if (w->left[depth]) {
		i = umn_lowest(w->left[depth]);
		UMN_OPAQUE(i); /* what is compared is what is used */
		w->left[depth] &= w->left[depth] - 1;
		if (i >= UMN_FANOUT)
			goto give_up;
		/* The owner may have reused this entry since its bounds were loaded, and Arm may load the two in either order. Then
		 * a watch that had not returned when this change began is missed, or hit without need; both are allowed. */
		ref = UMN_LOAD(&node->ref[i]);
		if (ref && UMN_LOAD(&node->level)) {
			w->enter = ref;
		} else if (ref) {
			slot = umn_slot_at(w, ref);
			if (!slot)
				goto give_up;
			umn_hit(w, slot, ref);
		}
	}
	w->depth = (depth + !!w->left[depth]) | w->zero;
	w->done = !w->depth && !w->enter;
	return w->done;
give_up:
	w->gave_up = 1;
	return 1;
}

/* Is the wake-up to be sent? Only the feeder that clears `armed` sends it. After a full barrier: see umn_invalidate. */
static UMN_INLINE int umn_disarm(struct umn_header *header)
{
	return UMN_LOAD(&header->armed) && __sync_lock_test_and_set(&header->armed, 0);
}

/* One attempt to push the walk's chain on the list. */
static long umn_push(uint32_t number, struct umn_walk *w)
{
	struct umn_slot *last = umn_slot_at(w, w->last);
	uint32_t head;

	w->tries = number;
	if (!last)
		return 1;
	head = UMN_LOAD(&w->header->head);
	UMN_STORE(&last->next, head);
	/* Full barrier (a release would do): the slots are written before they can be reached. Without it, Arm may let the owner find
	 * an old `next` or hint. No ABA: the owner takes all slots at once, so an equal head is as good a successor. */
	if (__sync_val_compare_and_swap(&w->header->head, head, w->first) != head)
		return 0;
	w->done = 1;
	return 1;
}

/*
 * Is everything invalid already, and will all be reported? Then a change need only count the generation up and send a wake-up. A feeder
 * has given up, and the owner has not acted on it when this change begins: see docs/architecture.md, "Growing, and giving up".
 */
static UMN_INLINE int umn_all_invalid(struct umn_header *header)
{
	return (int32_t)(UMN_LOAD(&header->given_up) - UMN_LOAD(&header->known)) > 0;
}

/* Can [start, end) overlap a watched region? Asked before the walk counts itself in: a watch widens the hull before it publishes
 * its entry, so a region outside the hull that is seen here was not watched before this change began. */
static UMN_INLINE int umn_in_hull(struct umn_header *header, uint64_t start, uint64_t end)
{
	if (!UMN_LOAD(&header->root) || start >= UMN_LOAD(&header->high) || end <= UMN_LOAD(&header->low))
		return 0;
	UMN_PREFETCH(&header->readers[0]); /* the next that is written */
	return 1;
}

/* Invalidates what [w->start, w->end) overlaps, in at most `steps` steps. The caller has zeroed the rest of *w. Returns 1 if a
 * wake-up is to be sent. All that the owner's side does without waiting for feeders rests on the order of these four parts:
 *
 * 1. Count in, then load the root (full barrier between). The owner unlinks, then reads the counts by a read-modify-write: it
 *    finds this feeder counted, or this feeder does not find what was unlinked. (grace.c also allows for a phase that is out of
 *    date by the time it is used.) If the root were loaded first, as Arm may without the barrier, the owner could reuse a node
 *    while this feeder is in it, and a change would be missed.
 * 2. Walk: each slot is invalid for the region's holder before anything else tells of the change.
 * 3. Push the slots, then count the generation up, then look whether a wake-up is wanted (full barriers between). The owner
 *    reads the generation, then takes the list: it gets the slots, or finds the generation changed next time. It arms, then
 *    reads the generation: one of the two sees the other's store. Without these orders `changed` could be false, or a client
 *    sleep, although a slot is on the list; the second on x86 too, which may do a load before an earlier store.
 * 4. Count out (full barrier before): when the owner finds this feeder gone, its slots are on the list, and its loads are done.
 */
static UMN_INLINE int umn_invalidate(struct umn_walk *w, uint32_t steps)
{
	struct umn_header *header = w->header;
	uint32_t phase = UMN_LOAD(&header->phase) & 1, overflow = 0;
	int wake = 0;

	if (w->end > UMN_ADDRESS_MAX)
		w->end = UMN_ADDRESS_MAX; /* "the whole address space" ends at ~0 */
	if (__sync_fetch_and_add(&header->readers[phase], 1) == UINT64_MAX)
		w->gave_up = 1; /* cannot be; but using the result makes it an ordered operation in BPF */
	/* Before Linux 6.7 the verifier follows one step only of a loop, from what it knows before it, takes the rest of the
	 * program for dead, and removes it. So it must know nothing of what steps change. Later ones would follow each depth by
	 * itself. */
	w->zero = UMN_LOAD(&header->zero);
	w->depth = w->hit = w->first = w->last = w->done = w->taken = w->tries = w->zero;
	w->gave_up |= w->zero;
	w->node[w->zero & (UMN_LEVELS - 1)] = w->left[w->zero & (UMN_LEVELS - 1)] = w->zero;
	w->enter = umn_descend(w, UMN_LOAD(&header->root));
	if (w->enter) {
		UMN_REPEAT(steps, umn_step, w);
		if (!w->done)
			w->gave_up = 1;
	}
	if (w->first) {
		w->done = w->zero;
		if (steps > UMN_PUSH_TRIES)
			steps = UMN_PUSH_TRIES;
		if (steps < UMN_PUSH_TRIES_LEAST)
			steps = UMN_PUSH_TRIES_LEAST;
		UMN_REPEAT(steps, umn_push, w);
		w->taken += w->tries;
		if (!w->done)
			w->gave_up = 1; /* the chain is lost; the owner finds it again when it handles the overflow */
	}
	if (w->gave_up) {
		overflow = __sync_fetch_and_add(&header->overflow, 1) + 1;
		w->hit = 1;
	}
	if (w->hit && __sync_fetch_and_add(&header->generation, 1) != UINT64_MAX)
		wake = umn_disarm(header);
	if (w->gave_up)
		UMN_STORE(&header->given_up, overflow); /* after the generation: umn_all_invalid */
	if (__sync_fetch_and_sub(&header->readers[phase], 1) == 0)
		wake = 1; /* cannot be, as above */
	return wake;
}

#endif
