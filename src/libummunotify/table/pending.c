/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * From slots that were hit to events.
 *
 * A feeder makes a slot pending and pushes it on the shared list. The owner moves the whole list to its queue. A slot stays
 * pending, so that no feeder pushes it again, until its region is reported.
 */
#include "table/internal.h"

/* No sound feeder made the list. Every region may have been changed: `changed` is true until a drain has reported all of them. */
static void distrust(struct umn_table *t)
{
	t->unsound = true;
	__atomic_store_n(&t->seen, load(&t->header->generation) - 1, __ATOMIC_RELEASE);
}

void umn_pending_take(struct umn_table *t)
{
	struct umn_region *region, *oldest = t->queue.previous;
	struct umn_slot *slot;
	uint32_t ref, next;

	if (!load(&t->header->head))
		return;
	/* Acquire: the exchange reads a push (a release), so the loads below find what that feeder and all before it wrote to
	 * their slots. Without it Arm may load a stale `next`, and slots would be lost.
	 *
	 * The list begins with the last hit. Each region goes before those taken before it, so the queue is in the order of
	 * hits. */
	for (ref = __sync_lock_test_and_set(&t->header->head, 0); ref; ref = next) {
		region = region_at(t, ref);
		slot = region ? slot_of(region) : NULL;
		if (!region || region->place == FREE || region->queued || !(load(&slot->state) & UMN_PENDING)) {
			distrust(t); /* and perhaps a loop */
			return;
		}
		next = load(&slot->next);
		if (region->place == LIMBO)
			__sync_fetch_and_and(&slot->state, ~(UMN_PENDING | UMN_MULTIPLE));
		else
			queue_insert(oldest, region);
	}
}

/* ---- After an overflow ---- */

/* The next watched region from cell *ref on; NULL: none. */
static struct umn_region *next_watched(struct umn_table *t, uint32_t *ref)
{
	struct umn_region *regions;
	uint32_t i;

	while (*ref < t->segment_count * UMN_CELLS_PER_SEGMENT) {
		regions = chunk_at(t, *ref)->regions;
		if (!regions) {
			*ref += UMN_CELLS_PER_CHUNK;
			continue;
		}
		i = (*ref)++ % UMN_CELLS_PER_CHUNK;
		if (regions[i].place == WATCHED)
			return &regions[i];
	}
	return NULL;
}

/* Notes which slots are pending now. */
static void note_pending(struct umn_table *t)
{
	struct umn_region *region;

	for (uint32_t ref = 0; (region = next_watched(t, &ref));)
		region->leftover = load(&region->slot->state) & UMN_PENDING;
}

/* Makes the region invalid and queues it. False: a feeder that is in the table now made it pending, and will push it. */
static bool queue_one(struct umn_table *t, struct umn_region *region)
{
	uint32_t state = __sync_fetch_and_or(&slot_of(region)->state, UMN_INVALID | UMN_PENDING | UMN_MULTIPLE);

	if (region->queued)
		return true;
	if ((state & UMN_PENDING) && !region->leftover)
		return false;
	store(&slot_of(region)->thread, 0);
	store(&slot_of(region)->syscall, -1);
	queue_insert(t->queue.previous, region);
	return true;
}

/*
 * Queues every watched region, after an overflow or when the list was not sound.
 *
 * A feeder that gave up may have lost its chain: slots that are pending but on no list, which no feeder will ever push. Such a
 * slot is pending before the feeders of now have left and still after the list was taken; it is queued here. A slot that became
 * pending in between is its feeder's, which still pushes it: were it queued here as well, it would be on the list and in the
 * queue at the same time, under one `next`.
 */
static void queue_all(struct umn_table *t)
{
	struct umn_region *region;
	bool is_coming = false;

	note_pending(t);
	/* If the wait times out, a chain may yet be pushed that shares slots with the queue: the next drain does all this again. */
	t->unsound = !umn_grace_wait(t);
	umn_pending_take(t);
	for (uint32_t ref = 0; (region = next_watched(t, &ref));)
		is_coming |= !queue_one(t, region);
	if (is_coming) {
		t->unsound |= !umn_grace_wait(t);
		umn_pending_take(t);
	}
}

/* ---- Draining ---- */

/* Queues all that was hit up to the generation, which was loaded before. */
static void gather(struct umn_table *t, uint64_t generation)
{
	uint32_t overflow;

	/* Some of these changes may have hit a slot that another feeder had made pending and has not pushed yet. They must be
	 * reported now: their own feeders are done, and so may be the changes. A feeder pushes before it counts itself out. */
	if (generation != t->settled) {
		if (umn_grace_wait(t))
			t->settled = generation;
		else
			t->unsound = true;
	}
	/* After those feeders have left: one that gave up counts the overflow before it counts itself out. */
	overflow = load_overflow(t);
	umn_pending_take(t);
	if (overflow != t->overflow_seen || t->unsound) {
		t->overflow_seen = overflow;
		t->unsound = false;
		queue_all(t);
	}
}

static uint64_t min(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

/* Reports the region. A change from here on is a new event. */
static void report(struct umn_region *region, struct umn_event *event)
{
	struct umn_slot *slot = slot_of(region);
	uint32_t state;

	event->region = region;
	event->start = load(&slot->hint_start);
	event->end = load(&slot->hint_end);
	event->thread = load(&slot->thread);
	event->syscall = load(&slot->syscall);
	/* The next feeder that finds the slot not pending writes the hint anew. So the loads above come first (the operation is
	 * a release: otherwise Arm may do them later, and mix two hints), and MULTIPLE is read by the same operation that clears
	 * PENDING: a hit between two operations would be in neither this event nor the next. */
	state = __sync_fetch_and_and(&slot->state, ~(UMN_PENDING | UMN_MULTIPLE));
	/* The range is compared too: a feeder in a leaf whose entry was being reused may have hit a region that its change does
	 * not overlap. */
	event->exact = !(state & UMN_MULTIPLE) && event->start < min(event->end, region->end) && event->end > region->start;
	if (!event->exact || event->start < region->start)
		event->start = region->start;
	if (!event->exact || event->end > region->end)
		event->end = region->end;
}

size_t umn_pending_report(struct umn_table *t, struct umn_event *events, size_t room)
{
	/* First the generation, then the list. A feeder pushes its slots before it counts the generation up, so what is not on the
	 * list yet makes the generation another one later, and `changed` true. The acquire keeps the order on Arm; with the list
	 * first, a change in between would count as reported. */
	uint64_t generation = load(&t->header->generation);
	struct umn_region *region;
	size_t n = 0;

	gather(t, generation);
	for (; n < room && (region = t->queue.next) != &t->queue; n++) {
		queue_remove(region);
		report(region, &events[n]);
	}
	if (t->queue.next != &t->queue || t->unsound)
		generation--; /* not all of it: `changed` stays true */
	__atomic_store_n(&t->seen, generation, __ATOMIC_RELEASE);
	return n;
}
