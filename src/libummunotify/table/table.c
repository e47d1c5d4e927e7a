/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The owner's side of a watch table.
 *
 * The index is a B+tree over the regions' starts, with the greatest end below each entry. Feeders walk it at any time, on all
 * CPUs, and nobody waits for anybody. How the owner may change it under them:
 *
 * - In place, by single stores, only what leaves every entry reachable at every moment: an unused leaf entry is filled in (its
 *   ref last), a leaf entry is cleared (its ref first), a bound above is widened before something is added below it and narrowed after
 *   something was removed, a child is replaced by one that holds the same regions.
 * - Everything else (split, merge, collapse) builds new nodes, publishes them with one store of a ref in the lowest node that
 *   can stay, or of the root, and retires the old ones. They stay as they are, so a feeder inside still finds all that was
 *   watched when it entered. What is watched later it need not find: its change had begun before the watch returned.
 * - Retired nodes, and the slots of unwatched regions, are reused after a grace period (reclaim).
 *
 * The owner has regions, nodes and what is known of chunks in its own memory too, and writes a node's shared copy without ever
 * reading it. All that it reads from shared memory is counts, slots and the list, and these it checks. So whatever a stray
 * write does to shared memory, the owner neither crashes nor hangs.
 */
#include "table/table.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define UNDERFULL 6u  /* a node with fewer entries is merged with a neighbour ... */
#define MERGED_MAX 18u /* ... if both together have at most this many */
#define WAIT_YIELDS 1000u
#define WAIT_SLEEPS 20000u /* of 100 us at least: 2 s */
#define TIDY_CHUNKS 8u	   /* to look at in one go */
/* The most chunks that a change of the index can need: two nodes a level, a new root, a chunk of slots. */
#define CHUNKS_NEEDED (2 * UMN_LEVELS + 2)

#define load(p) __atomic_load_n(p, __ATOMIC_ACQUIRE)
#define store(p, v) __atomic_store_n(p, v, __ATOMIC_RELEASE)
/* A load that is ordered after all earlier stores too (store, then look whether somebody was there: Dekker's pattern). An
 * atomic operation rather than a fence, since ThreadSanitizer does not understand fences. */
#define load_after_stores(p) __sync_fetch_and_add(p, 0)

/* Where a region's slot is in its life. */
enum place {
	FREE,
	WATCHED,
	LIMBO, /* unwatched; a feeder may still be about to write the slot */
};

struct chunk {
	struct umn_region *regions; /* of its 16 slots; NULL: not a chunk of slots */
	struct own_node *node;	    /* NULL: not a node of the index */
	uint32_t parent;	    /* of a node, 0: it is the root */
	uint32_t next;		    /* on the free list or in limbo */
	uint8_t entries;	    /* of a node, those in use */
};

/* A node, as it is to be. */
struct own_node {
	struct umn_node is;
	struct own_node *next; /* spare */
};

struct segment {
	uint8_t *memory;
	uint32_t pages;
	struct chunk *chunks;
};

/* What waits for the feeders of now to leave. */
struct limbo {
	uint32_t chunks;
	struct umn_region *regions;
};

struct umn_table {
	struct umn_header *header;
	uint64_t seen; /* the generation up to which everything was reported; one less: and something was not */
	struct umn_source *source;
	bool closed;
	uint32_t epoch;

	pthread_mutex_t lock;
	uint64_t max_regions, regions;
	uint32_t root, levels;
	uint64_t low, high;
	uint32_t phase;
	uint32_t overflow_seen;
	uint64_t settled; /* all that was hit up to this generation has been on the list */
	bool unsound;	  /* shared memory was not as sound feeders leave it */
	bool stuck;	  /* a feeder did not leave for so long that there may be none */

	uint32_t free_chunks, free_chunk_count;
	struct own_node *spare_nodes;
	uint32_t spare_node_count;
	bool untidy;	    /* there may be empty leaves ... */
	uint32_t tidy_from; /* ... in chunks from here on */
	struct umn_region *free_regions;

	struct limbo fresh;   /* unlinked since the grace period under way began */
	struct limbo waiting; /* what the grace period under way is for */
	int grace;	      /* 0: none under way, 1 and 2: see reclaim */

	struct umn_region queue; /* hit and taken off the shared list, not reported yet: a ring through next/previous */

	uint32_t segment_count;
	struct segment segments[UMN_SEGMENTS];
};

struct entry {
	uint64_t start, end;
	uint32_t ref;
};

/* ---- From references to memory ---- */

static struct chunk *chunk_at(struct umn_table *t, uint32_t ref)
{
	return &t->segments[ref / UMN_CELLS_PER_SEGMENT].chunks[ref % UMN_CELLS_PER_SEGMENT / UMN_CELLS_PER_CHUNK];
}

static void *cell_at(struct umn_table *t, uint32_t ref)
{
	return t->segments[ref / UMN_CELLS_PER_SEGMENT].memory + (size_t)(ref % UMN_CELLS_PER_SEGMENT) * UMN_CELL;
}

static struct umn_node *node_at(struct umn_table *t, uint32_t ref)
{
	return &chunk_at(t, ref)->node->is;
}

/* The slot's region, or NULL if a ref from shared memory is not that of a slot. */
static struct umn_region *region_at(struct umn_table *t, uint32_t ref)
{
	struct umn_region *regions;

	if (ref / UMN_CELLS_PER_SEGMENT >= t->segment_count)
		return NULL;
	regions = chunk_at(t, ref)->regions;
	return regions ? &regions[ref % UMN_CELLS_PER_CHUNK] : NULL;
}

static struct umn_slot *slot_of(struct umn_region *region)
{
	return (struct umn_slot *)region->slot;
}

/* ---- Memory ---- */

static uint32_t take_chunk(struct umn_table *t)
{
	uint32_t ref = t->free_chunks;

	t->free_chunks = chunk_at(t, ref)->next;
	t->free_chunk_count--;
	return ref;
}

static void free_chunk(struct umn_table *t, uint32_t ref)
{
	chunk_at(t, ref)->next = t->free_chunks;
	t->free_chunks = ref;
	t->free_chunk_count++;
}

/* Makes sure of the memory for any one change of the index. */
static bool reserve_nodes(struct umn_table *t)
{
	struct own_node *node;

	while (t->spare_node_count < CHUNKS_NEEDED) {
		node = malloc(sizeof *node);
		if (!node)
			return false;
		node->next = t->spare_nodes;
		t->spare_nodes = node;
		t->spare_node_count++;
	}
	return true;
}

static int add_slots(struct umn_table *t)
{
	struct umn_region *regions = calloc(UMN_CELLS_PER_CHUNK, sizeof *regions);
	uint32_t i, ref;

	if (!regions)
		return -ENOMEM;
	ref = take_chunk(t);
	memset(cell_at(t, ref), 0, UMN_CHUNK);
	chunk_at(t, ref)->regions = regions;
	for (i = UMN_CELLS_PER_CHUNK; i-- > 0;) {
		regions[i].ref = ref + i;
		regions[i].slot = cell_at(t, ref + i);
		regions[i].header = t->header;
		regions[i].source = t->source;
		regions[i].epoch = t->epoch;
		regions[i].next = t->free_regions;
		t->free_regions = &regions[i];
	}
	return 0;
}

/* ---- The list of slots that were hit ---- */

static void queue_insert(struct umn_region *after, struct umn_region *region)
{
	region->queued = true;
	region->previous = after;
	region->next = after->next;
	after->next->previous = region;
	after->next = region;
}

static void queue_remove(struct umn_region *region)
{
	region->queued = false;
	region->previous->next = region->next;
	region->next->previous = region->previous;
}

/* From now on everything may be invalid, so the next drain reports everything. */
static void distrust(struct umn_table *t)
{
	t->unsound = true;
	__atomic_store_n(&t->seen, load(&t->header->generation) - 1, __ATOMIC_RELEASE);
}

/* Moves the shared list to the queue. A slot stays pending, so that no feeder puts it on the list again, until it is reported.
 * A list that no sound feeder made counts as an overflow. */
static void take_list(struct umn_table *t)
{
	struct umn_region *region, *oldest = t->queue.previous;
	struct umn_slot *slot;
	uint32_t ref, next;

	if (!load(&t->header->head))
		return;
	/* Last hit first: so each goes before those that were taken before it. */
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

/* ---- Grace periods ---- */

/* A node that feeders may still be in. */
static void retire_node(struct umn_table *t, uint32_t ref)
{
	struct chunk *chunk = chunk_at(t, ref);

	chunk->node->next = t->spare_nodes;
	t->spare_nodes = chunk->node;
	t->spare_node_count++;
	chunk->node = NULL;
	chunk->next = t->fresh.chunks;
	t->fresh.chunks = ref;
}

static void free_limbo(struct umn_table *t, struct limbo *limbo)
{
	struct umn_region *region, *next_region;
	uint32_t ref, next;

	for (ref = limbo->chunks; ref; ref = next) {
		next = chunk_at(t, ref)->next;
		free_chunk(t, ref);
	}
	for (region = limbo->regions; region; region = next_region) {
		next_region = region->next;
		/* Hit just before it was unwatched. The feeder that did so has left, so the slot is on the list: off with it. */
		if (load(&region->slot->state) & UMN_PENDING)
			take_list(t);
		store(&slot_of(region)->state, 0);
		region->place = FREE;
		region->next = t->free_regions;
		t->free_regions = region;
	}
	*limbo = (struct limbo){0};
}

/*
 * One step of a grace period. What is in `waiting` was unlinked before the period began. A feeder that may still reach it
 * counted itself in before that, under one phase or the other:
 *
 * 1. Nobody is counted under the other phase (new feeders do not go there, but for those that read the phase long ago): then
 *    such a feeder can only be counted under the current one. Make the other phase the current one.
 * 2. Nobody is counted under what was the current phase: then there is no such feeder any more.
 *
 * A feeder that counts itself in after the look at the count finds the index without what was unlinked, since the look is
 * ordered after the unlinking, as its own load of the root is after its counting: one of the two must see the other.
 */
static void grace_step(struct umn_table *t)
{
	if (load_after_stores(&t->header->readers[!t->phase]))
		return;
	if (t->grace == 1) {
		t->phase = !t->phase;
		store(&t->header->phase, t->phase);
		t->grace = 2;
		if (load_after_stores(&t->header->readers[!t->phase]))
			return;
	}
	t->grace = 0;
	free_limbo(t, &t->waiting);
}

static void grace_begin(struct umn_table *t)
{
	t->waiting = t->fresh;
	t->fresh = (struct limbo){0};
	t->grace = 1;
}

/* Without waiting. */
static void reclaim(struct umn_table *t)
{
	if (t->grace == 0) {
		if (!t->fresh.chunks && !t->fresh.regions)
			return;
		grace_begin(t);
	}
	grace_step(t);
}

/* Waits until every feeder that is in the table now has left. False if that takes too long to be true: then the counts do not
 * come from sound feeders. */
static bool synchronize(struct umn_table *t)
{
	const struct timespec interval = {.tv_nsec = 100000};
	uint32_t tries = 0;

	/* Such a feeder is counted in one of the two all the time. */
	if (!load_after_stores(&t->header->readers[0]) && !load_after_stores(&t->header->readers[1])) {
		t->stuck = false;
		return true;
	}
	/* Others keep coming, so it takes a grace period; not one that began before. */
	for (int periods = t->grace ? 2 : 1; periods; periods--) {
		if (!t->grace)
			grace_begin(t);
		for (grace_step(t); t->grace; grace_step(t)) {
			if (t->stuck || tries == WAIT_YIELDS + WAIT_SLEEPS) {
				t->stuck = true;
				return false;
			}
			/* Yielding alone does not help a feeder of lower priority. */
			if (tries++ < WAIT_YIELDS)
				sched_yield();
			else
				nanosleep(&interval, NULL);
		}
	}
	t->stuck = false;
	return true;
}

/* ---- The index ---- */

static struct entry entry_for(struct umn_table *t, uint32_t ref)
{
	struct umn_node *node = node_at(t, ref);
	struct entry entry = {.start = UINT64_MAX, .ref = ref};
	uint32_t i;

	for (i = 0; i < node->used; i++)
		if (node->ref[i]) {
			if (node->start[i] < entry.start)
				entry.start = node->start[i];
			if (node->end[i] > entry.end)
				entry.end = node->end[i];
		}
	return entry;
}

static uint32_t entries_of(struct umn_table *t, uint32_t ref, struct entry *entries)
{
	struct umn_node *node = node_at(t, ref);
	uint32_t i, n = 0;

	for (i = 0; i < node->used; i++)
		if (node->ref[i])
			entries[n++] = (struct entry){node->start[i], node->end[i], node->ref[i]};
	return n;
}

static uint32_t position(struct umn_table *t, uint32_t parent, uint32_t ref)
{
	struct umn_node *node = node_at(t, parent);
	uint32_t i = 0;

	while (node->ref[i] != ref)
		i++;
	return i;
}

/* The shared copies are written with atomic stores, even while no feeder can be there yet: ThreadSanitizer cannot know. */

static void set_bounds(struct umn_table *t, uint32_t ref, uint32_t i, uint64_t start, uint64_t end)
{
	struct umn_node *own = node_at(t, ref), *shared = cell_at(t, ref);

	if (own->start[i] != start)
		store(&shared->start[i], own->start[i] = start);
	if (own->end[i] != end)
		store(&shared->end[i], own->end[i] = end);
}

static void set_ref(struct umn_table *t, uint32_t ref, uint32_t i, uint32_t to)
{
	struct umn_node *shared = cell_at(t, ref);

	store(&shared->ref[i], node_at(t, ref)->ref[i] = to);
}

static void set_used(struct umn_table *t, uint32_t ref, uint32_t used)
{
	struct umn_node *shared = cell_at(t, ref);

	store(&shared->used, node_at(t, ref)->used = used);
}

/* Not yet published. */
static uint32_t new_node(struct umn_table *t, uint32_t level, const struct entry *entries, uint32_t n)
{
	uint32_t i, ref = take_chunk(t);
	struct chunk *chunk = chunk_at(t, ref);
	struct umn_node *shared = cell_at(t, ref), *own;

	chunk->node = t->spare_nodes;
	t->spare_nodes = chunk->node->next;
	t->spare_node_count--;
	own = &chunk->node->is;
	store(&shared->level, own->level = level);
	for (i = 0; i < n; i++) {
		store(&shared->start[i], own->start[i] = entries[i].start);
		store(&shared->end[i], own->end[i] = entries[i].end);
		store(&shared->ref[i], own->ref[i] = entries[i].ref);
		if (level)
			chunk_at(t, entries[i].ref)->parent = ref;
		else
			region_at(t, entries[i].ref)->leaf = ref;
	}
	for (; i < UMN_FANOUT; i++) {
		store(&shared->start[i], own->start[i] = 0);
		store(&shared->end[i], own->end[i] = 0);
		store(&shared->ref[i], own->ref[i] = 0);
	}
	store(&shared->used, own->used = n);
	chunk->entries = n;
	chunk->parent = 0;
	return ref;
}

static void set_root(struct umn_table *t, uint32_t ref)
{
	if (ref)
		chunk_at(t, ref)->parent = 0;
	t->root = ref;
	t->levels = ref ? node_at(t, ref)->level + 1 : 0;
	store(&t->header->root, ref);
}

static void set_hull(struct umn_table *t, uint64_t low, uint64_t high)
{
	if (t->low != low)
		store(&t->header->low, t->low = low);
	if (t->high != high)
		store(&t->header->high, t->high = high);
}

/* Replaces `count` children of `parent`, from `at` on, by others (at most two) that hold the same regions and perhaps one more
 * for which the bounds above have been widened already. The old children are not touched. `parent` 0: the root is replaced. */
static void replace(struct umn_table *t, uint32_t parent, uint32_t at, uint32_t count, const uint32_t *children, uint32_t n)
{
	struct entry entries[2 * UMN_FANOUT + 2], kept[2 * UMN_FANOUT];
	uint32_t i, total = 0, old, level, above, where, neighbour, parts[2], cut;
	struct umn_node *node;

	if (!parent) {
		for (i = 0; i < n; i++)
			entries[i] = entry_for(t, children[i]);
		set_root(t, n == 0 ? 0 : n == 1 ? children[0] : new_node(t, node_at(t, children[0])->level + 1, entries, n));
		return;
	}
	node = node_at(t, parent);
	if (count == 1 && n == 1) {
		entries[0] = entry_for(t, children[0]);
		chunk_at(t, children[0])->parent = parent;
		set_ref(t, parent, at, children[0]);
		/* The old bounds hold both, so narrowing comes last. */
		set_bounds(t, parent, at, entries[0].start, entries[0].end);
		return;
	}
	old = entries_of(t, parent, kept);
	for (i = 0; i < at; i++)
		entries[total++] = kept[i];
	for (i = 0; i < n; i++)
		entries[total++] = entry_for(t, children[i]);
	for (i = at + count; i < old; i++)
		entries[total++] = kept[i];

	level = node->level;
	above = chunk_at(t, parent)->parent;
	where = above ? position(t, above, parent) : 0;
	retire_node(t, parent);
	if (total == 0) {
		replace(t, above, where, 1, NULL, 0);
	} else if (total == 1 && !above) {
		set_root(t, entries[0].ref);
	} else if (total > UMN_FANOUT) {
		/* Mostly full to the left where children are being appended: they will go on to be. */
		cut = at + count >= old ? UMN_FANOUT - 1 : total / 2;
		parts[0] = new_node(t, level, entries, cut);
		parts[1] = new_node(t, level, entries + cut, total - cut);
		replace(t, above, where, 1, parts, 2);
	} else {
		count = 1;
		if (above && total < UNDERFULL && chunk_at(t, above)->entries > 1) {
			neighbour = node_at(t, above)->ref[where ? where - 1 : 1];
			if (total + chunk_at(t, neighbour)->entries <= MERGED_MAX) {
				if (where) {
					memmove(entries + chunk_at(t, neighbour)->entries, entries, total * sizeof *entries);
					total += entries_of(t, neighbour, entries);
					where--;
				} else {
					total += entries_of(t, neighbour, entries + total);
				}
				retire_node(t, neighbour);
				count = 2;
			}
		}
		parts[0] = new_node(t, level, entries, total);
		replace(t, above, where, count, parts, 1);
	}
}

/* Narrows the bounds above a node from which something was removed. */
static void narrow(struct umn_table *t, uint32_t ref)
{
	struct umn_node *parent;
	uint32_t at, above;
	struct entry entry;

	for (; (above = chunk_at(t, ref)->parent); ref = above) {
		parent = node_at(t, above);
		at = position(t, above, ref);
		entry = entry_for(t, ref);
		if (parent->end[at] == entry.end && parent->start[at] == entry.start)
			return;
		set_bounds(t, above, at, entry.start, entry.end);
	}
}

/* ... and the hull. */
static void narrow_hull(struct umn_table *t)
{
	struct entry hull = {0};

	if (t->root)
		hull = entry_for(t, t->root);
	set_hull(t, hull.start, hull.end);
}

static uint64_t min(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

static uint64_t max(uint64_t a, uint64_t b)
{
	return a > b ? a : b;
}

/* Which child a region that begins at `start` belongs to. */
static uint32_t child_for(const struct umn_node *node, uint64_t start)
{
	uint32_t at = 0;

	while (at + 1 < node->used && node->start[at + 1] <= start)
		at++;
	return at;
}

static void insert(struct umn_table *t, struct umn_region *region)
{
	struct entry new = {region->start, region->end, region->ref}, entries[UMN_FANOUT + 1];
	uint32_t ref = t->root, i, at, n, cut, parts[2], parent;
	struct umn_node *node;

	if (!ref) {
		set_hull(t, new.start, new.end);
		set_root(t, new_node(t, 0, &new, 1));
		return;
	}
	set_hull(t, min(t->low, new.start), max(t->high, new.end));
	for (node = node_at(t, ref); node->level; ref = node->ref[at], node = node_at(t, ref)) {
		at = child_for(node, new.start);
		set_bounds(t, ref, at, min(node->start[at], new.start), max(node->end[at], new.end));
	}
	if (chunk_at(t, ref)->entries < UMN_FANOUT) {
		for (i = 0; i < node->used && node->ref[i]; i++)
			;
		set_bounds(t, ref, i, new.start, new.end);
		set_ref(t, ref, i, new.ref);
		if (i == node->used)
			set_used(t, ref, i + 1);
		chunk_at(t, ref)->entries++;
		region->leaf = ref;
		return;
	}

	parent = chunk_at(t, ref)->parent;
	at = parent ? position(t, parent, ref) : 0;
	n = entries_of(t, ref, entries);
	/* Sorted only now. Insertion sort: 25 entries, often nearly in order. */
	entries[n++] = new;
	for (i = 1; i < n; i++) {
		struct entry e = entries[i];
		uint32_t j = i;

		for (; j && entries[j - 1].start > e.start; j--)
			entries[j] = entries[j - 1];
		entries[j] = e;
	}
	cut = entries[n - 1].ref == new.ref ? n - 1 : n / 2;
	retire_node(t, ref);
	parts[0] = new_node(t, 0, entries, cut);
	parts[1] = new_node(t, 0, entries + cut, n - cut);
	replace(t, parent, at, 1, parts, 2);
}

/* Does a region that begins at `start` need no further chunk? */
static bool has_room(struct umn_table *t, uint64_t start)
{
	uint32_t ref = t->root;

	if (!ref || !t->free_regions)
		return false;
	while (node_at(t, ref)->level)
		ref = node_at(t, ref)->ref[child_for(node_at(t, ref), start)];
	return chunk_at(t, ref)->entries < UMN_FANOUT;
}

static void remove_leaf(struct umn_table *t, uint32_t leaf)
{
	uint32_t parent = chunk_at(t, leaf)->parent, at = parent ? position(t, parent, leaf) : 0;

	retire_node(t, leaf);
	replace(t, parent, at, 1, NULL, 0);
}

static bool can_change(struct umn_table *t)
{
	return t->free_chunk_count >= CHUNKS_NEEDED && reserve_nodes(t);
}

static void remove_entry(struct umn_table *t, struct umn_region *region)
{
	struct entry entries[UMN_FANOUT];
	uint32_t leaf = region->leaf, parent = chunk_at(t, leaf)->parent, i, n, at, neighbour, merged;

	i = position(t, leaf, region->ref);
	set_ref(t, leaf, i, 0);
	set_bounds(t, leaf, i, 0, 0); /* no feeder is to take a step for it */
	n = --chunk_at(t, leaf)->entries;
	/* Feeders have kept every retired chunk from being reused: leave the index as it is, with bounds too wide and perhaps an
	 * empty leaf. */
	if (!can_change(t)) {
		if (n == 0) {
			t->untidy = true;
			t->tidy_from = 0;
		}
		return;
	}
	if (n == 0) {
		remove_leaf(t, leaf);
		return;
	}
	if (parent && n < UNDERFULL && chunk_at(t, parent)->entries > 1) {
		at = position(t, parent, leaf);
		if (at)
			at--;
		neighbour = node_at(t, parent)->ref[at];
		if (neighbour == leaf)
			neighbour = node_at(t, parent)->ref[at + 1];
		if (n + chunk_at(t, neighbour)->entries <= MERGED_MAX) {
			n = entries_of(t, leaf, entries);
			n += entries_of(t, neighbour, entries + n);
			retire_node(t, leaf);
			retire_node(t, neighbour);
			merged = new_node(t, 0, entries, n);
			/* Bounds above may still be too wide; that is allowed, and the next removal narrows them. */
			replace(t, parent, at, 2, &merged, 1);
			return;
		}
	}
	narrow(t, leaf);
}

/* Removes the leaves that had to be left empty, a few at a time. */
static void tidy(struct umn_table *t)
{
	uint32_t segment, c;
	struct chunk *chunk;

	for (uint32_t i = 0; t->untidy && i < TIDY_CHUNKS && can_change(t); i++) {
		segment = t->tidy_from / UMN_CELLS_PER_SEGMENT;
		c = t->tidy_from % UMN_CELLS_PER_SEGMENT / UMN_CELLS_PER_CHUNK;
		if (c == t->segments[segment].pages * UMN_CHUNKS_PER_PAGE) {
			t->untidy = segment + 1 < t->segment_count;
			t->tidy_from = (segment + 1) * UMN_CELLS_PER_SEGMENT;
			continue;
		}
		chunk = &t->segments[segment].chunks[c];
		if (chunk->node && !chunk->node->is.level && !chunk->entries)
			remove_leaf(t, t->tidy_from);
		t->tidy_from += UMN_CELLS_PER_CHUNK;
	}
}

/* ---- The interface ---- */

/* After a fork the child must not even look at the lock: a thread that does not exist there may hold it. */
static bool lock(struct umn_table *t)
{
	/* In a child another thread may have held it, and never lets it go. */
	if (!umn_process_is(t->epoch))
		return false;
	pthread_mutex_lock(&t->lock);
	if (!t->closed)
		return true;
	pthread_mutex_unlock(&t->lock);
	return false;
}

static void unlock(struct umn_table *t)
{
	pthread_mutex_unlock(&t->lock);
}

struct umn_table *umn_table_new(uint64_t max_regions)
{
	struct umn_table *t = umn_process_start() ? NULL : calloc(1, sizeof *t);

	if (!t)
		return NULL;
	t->epoch = umn_process_current();
	pthread_mutex_init(&t->lock, NULL);
	t->max_regions = max_regions;
	t->queue.next = t->queue.previous = &t->queue;
	return t;
}

/* The region is invalid from now on, for all that its holder can know. */
static void hit(struct umn_table *t, struct umn_region *region)
{
	if (!lock(t))
		return;
	/* As in umn_invalidate, but that the slot goes to the queue, which is behind the lock already. Not if all has arrived
	 * meanwhile: a source that sends its wake-ups by itself does so after that, and nobody would be woken for this. */
	if (region->place == WATCHED && !t->source->arrived(t->source)) {
		if (!(__sync_fetch_and_or(&slot_of(region)->state, UMN_INVALID | UMN_PENDING | UMN_MULTIPLE) & UMN_PENDING)) {
			store(&slot_of(region)->thread, 0);
			store(&slot_of(region)->syscall, -1);
			queue_insert(t->queue.previous, region);
		}
		__sync_fetch_and_add(&t->header->generation, 1);
		/* With the lock held: so not while it is being closed. */
		if (t->source->wake && load(&t->header->armed) && __sync_lock_test_and_set(&t->header->armed, 0))
			t->source->wake(t->source);
	}
	unlock(t);
}

/* The slot was untouched a moment ago. That says nothing yet: the change may be complete, its event not even queued. Once all has
 * arrived, the slot is the answer. If something is on its way it need not be of this region, so wait a little; it mostly takes
 * microseconds. In the end the answer is no, and is made to stay so: whoever got it may go by it. */
static bool confirm(const struct umn_region *region)
{
	struct umn_source *source = region->source;

	if (!source->arrived(source) && !source->settle(source, UMN_SETTLE_MILLISECONDS))
		hit(source->table, (struct umn_region *)region);
	return umn_region_untouched(region);
}

void umn_table_set_source(struct umn_table *t, struct umn_source *source)
{
	t->source = source;
	source->confirm = confirm;
	source->table = t;
}

uint32_t umn_table_next_pages(struct umn_table *t)
{
	uint32_t pages;

	if (!lock(t))
		return 0;
	pages = t->segment_count < UMN_SEGMENTS ? UMN_SEGMENT_PAGES : 0;
	unlock(t);
	return pages;
}

int umn_table_add_segment(struct umn_table *t, void *memory, uint32_t pages)
{
	struct chunk *chunks;
	uint32_t segment, i;

	if (pages != UMN_SEGMENT_PAGES)
		return -EINVAL;
	chunks = calloc((size_t)pages * UMN_CHUNKS_PER_PAGE, sizeof *chunks);
	if (!chunks)
		return -ENOMEM;
	if (!lock(t)) {
		free(chunks);
		return -EBADF;
	}
	segment = t->segment_count;
	if (segment == UMN_SEGMENTS) {
		unlock(t);
		free(chunks);
		return -EINVAL;
	}
	t->segments[segment] = (struct segment){memory, pages, chunks};
	if (!segment)
		t->header = memory;
	/* Descending, so that the lowest is taken first. Page 0 of segment 0 is the header. */
	for (i = pages * UMN_CHUNKS_PER_PAGE; i-- > (segment ? 0 : UMN_CHUNKS_PER_PAGE);)
		free_chunk(t, segment * UMN_CELLS_PER_SEGMENT + i * UMN_CELLS_PER_CHUNK);
	t->segment_count++;
	unlock(t);
	return 0;
}

const struct umn_header *umn_table_header(const struct umn_table *t)
{
	return t->header;
}

/* Takes the region out of the index; feeders may still be about to hit it. */
static void forget(struct umn_table *t, struct umn_region *region)
{
	struct umn_slot *slot = slot_of(region);

	remove_entry(t, region);
	narrow_hull(t);
	store(&t->regions, t->regions - 1); /* read without the lock */
	store(&t->header->regions, (uint32_t)t->regions);
	__sync_fetch_and_and(&slot->state, ~UMN_LIVE);
	if (region->queued) {
		queue_remove(region);
		__sync_fetch_and_and(&slot->state, ~(UMN_PENDING | UMN_MULTIPLE));
	}
	region->place = LIMBO;
	region->next = t->fresh.regions;
	t->fresh.regions = region;
	reclaim(t);
	tidy(t);
}

int umn_table_watch(struct umn_table *t, uint64_t start, uint64_t end, uint64_t cookie, void *user, struct umn_region **result)
{
	struct umn_region *region;
	int error = 0;

	if (start >= end || end > UMN_ADDRESS_MAX)
		return -EINVAL;
	if (!lock(t))
		return -EBADF;
	if (t->regions >= t->max_regions || t->levels == UMN_LEVELS) {
		error = -EDQUOT;
		goto out;
	}
	if (t->free_chunk_count < CHUNKS_NEEDED || !t->free_regions) {
		reclaim(t);
		reclaim(t); /* the first call may only have finished a period for others */
	}
	if (t->free_chunk_count < CHUNKS_NEEDED && !has_room(t, start)) {
		error = -ENOSPC;
		goto out;
	}
	if (!reserve_nodes(t)) {
		error = -ENOMEM;
		goto out;
	}
	if (!t->free_regions && (error = add_slots(t)))
		goto out;
	region = t->free_regions;
	t->free_regions = region->next;
	region->start = start;
	region->end = end;
	region->cookie = cookie;
	region->user = user;
	region->place = WATCHED;
	region->overflow = load(&t->header->overflow);
	store(&slot_of(region)->state, UMN_LIVE);
	insert(t, region);
	store(&t->regions, t->regions + 1);
	store(&t->header->regions, (uint32_t)t->regions);
	/* After it can be hit: what changes as soon as the source feeds it is not missed. */
	if (t->source && (error = t->source->watch(t->source, start, end, &region->granule))) {
		forget(t, region);
		goto out;
	}
	reclaim(t);
	tidy(t);
	*result = region;
out:
	unlock(t);
	return error;
}

void umn_table_unwatch(struct umn_table *t, struct umn_region *region)
{
	bool invalid = !umn_region_untouched(region);

	if (!lock(t))
		return;
	forget(t, region);
	/* `region` is not in use, but not reused before the lock is released. */
	if (t->source)
		t->source->unwatch(t->source, region->start, region->end, region->granule, invalid);
	unlock(t);
}

int umn_table_renew(struct umn_table *t, struct umn_region *region)
{
	struct umn_source *source = t->source;
	uint32_t overflow;
	uint8_t granule;
	int error = 0;

	if (!lock(t))
		return 0;
	overflow = load(&t->header->overflow);
	/* The source may be feeding nothing of what is at these addresses now. So first the slot is made ready to be hit, then the
	 * source told, and only then is the region valid again: until then its overflow is one that never was. */
	store(&region->overflow, source ? overflow - 1 : overflow);
	__sync_fetch_and_and(&slot_of(region)->state, ~UMN_INVALID);
	if (source) {
		error = source->watch(source, region->start, region->end, &granule);
		if (error) {
			__sync_fetch_and_or(&slot_of(region)->state, UMN_INVALID);
		} else {
			source->unwatch(source, region->start, region->end, region->granule, false);
			region->granule = granule;
		}
		store(&region->overflow, overflow);
	}
	unlock(t);
	return error;
}

/* Queues every watched region. */
static void queue_all(struct umn_table *t)
{
	struct umn_region *region;
	uint32_t s, c, i, state;
	bool just_hit = false;

	/* A feeder that gave up may have lost its chain: slots that are pending but on no list. Such a slot is pending before
	 * and after the feeders of now have left and the list was taken. */
	for (int after = 0; after < 2; after++) {
		if (after) {
			/* If it fails, then a chain may yet turn up and mix with others: the next drain does all this again. */
			t->unsound = !synchronize(t);
			take_list(t);
		}
		for (s = 0; s < t->segment_count; s++)
			for (c = 0; c < t->segments[s].pages * UMN_CHUNKS_PER_PAGE; c++)
				for (i = 0; t->segments[s].chunks[c].regions && i < UMN_CELLS_PER_CHUNK; i++) {
					region = &t->segments[s].chunks[c].regions[i];
					if (region->place != WATCHED)
						continue;
					if (!after) {
						region->leftover = load(&region->slot->state) & UMN_PENDING;
						continue;
					}
					state = __sync_fetch_and_or(&slot_of(region)->state,
								    UMN_INVALID | UMN_PENDING | UMN_MULTIPLE);
					if (region->queued)
						continue;
					if ((state & UMN_PENDING) && !region->leftover) {
						just_hit = true; /* it comes by the list */
						continue;
					}
					store(&slot_of(region)->thread, 0);
					store(&slot_of(region)->syscall, -1);
					queue_insert(t->queue.previous, region);
				}
	}
	if (just_hit) {
		t->unsound |= !synchronize(t);
		take_list(t);
	}
}

size_t umn_table_drain(struct umn_table *t, struct umn_event *events, size_t room)
{
	struct umn_region *region;
	struct umn_event *event;
	struct umn_slot *slot;
	uint64_t generation;
	uint32_t overflow;
	size_t n = 0;

	if (!lock(t))
		return 0;
	/* First the generation, then the list: see umn_invalidate. */
	generation = load(&t->header->generation);
	/* Some of the changes up to this generation may have hit a region that another feeder had just made pending and has
	 * not put on the list yet. They have to be reported now: their feeders are done, and so perhaps are the changes. */
	if (generation != t->settled) {
		if (synchronize(t))
			t->settled = generation;
		else
			t->unsound = true;
	}
	overflow = load(&t->header->overflow); /* after those feeders are done */
	take_list(t);
	if (overflow != t->overflow_seen || t->unsound) {
		t->overflow_seen = overflow;
		t->unsound = false;
		queue_all(t);
	}
	for (; n < room && (region = t->queue.next) != &t->queue; n++) {
		queue_remove(region);
		slot = slot_of(region);
		event = &events[n];
		event->region = region;
		event->start = load(&slot->hint_start);
		event->end = load(&slot->hint_end);
		event->thread = load(&slot->thread);
		event->syscall = load(&slot->syscall);
		/* From here on a feeder may make it pending again, and write the hint. One that was in a leaf whose entry was being
		 * reused may have hit a region that its change does not overlap. */
		event->exact = !(__sync_fetch_and_and(&slot->state, ~(UMN_PENDING | UMN_MULTIPLE)) & UMN_MULTIPLE) &&
			       event->start < min(event->end, region->end) && event->end > region->start;
		if (!event->exact || event->start < region->start)
			event->start = region->start;
		if (!event->exact || event->end > region->end)
			event->end = region->end;
	}
	if (t->queue.next != &t->queue || t->unsound)
		generation--;
	__atomic_store_n(&t->seen, generation, __ATOMIC_RELEASE);
	unlock(t);
	return n;
}

bool umn_table_changed(const struct umn_table *t)
{
	if (!umn_process_is(t->epoch))
		return true; /* the memory is the parent's: its caller goes and finds out */
	/* In this order: a generation that was loaded earlier could equal what a drain after that leaves here for "not all". */
	uint64_t seen = load(&t->seen);

	return umn_generation(t->header) != seen ||
	       (t->source && (!t->source->arrived(t->source) || umn_generation(t->header) != seen));
}

uint64_t umn_table_generation(struct umn_table *t)
{
	if (!umn_process_is(t->epoch))
		return 0;
	if (t->source && !t->source->arrived(t->source) && lock(t)) {
		__sync_fetch_and_add(&t->header->generation, 1);
		unlock(t);
	}
	return umn_generation(t->header);
}

uint64_t umn_table_seen(const struct umn_table *t)
{
	return load(&t->seen);
}

void umn_table_restart(struct umn_table *t)
{
	if (!lock(t))
		return;
	synchronize(t); /* whoever hit what was watched */
	store(&t->header->generation, 0);
	store(&t->seen, 0);
	t->settled = 0;
	unlock(t);
}

void umn_table_arm(struct umn_table *t)
{
	/* Full barrier after: armed before the drain reads the generation. See umn_invalidate. */
	if (lock(t)) {
		__sync_fetch_and_or(&t->header->armed, 1);
		unlock(t);
	}
}

void umn_table_doubt(struct umn_table *t)
{
	if (!lock(t))
		return;
	__sync_fetch_and_add(&t->header->overflow, 1);
	__sync_fetch_and_add(&t->header->generation, 1);
	unlock(t);
}

uint64_t umn_table_regions(const struct umn_table *t)
{
	return __atomic_load_n(&t->regions, __ATOMIC_RELAXED);
}

void umn_table_stats(struct umn_table *t, struct umn_table_stats *stats)
{
	uint32_t i;

	*stats = (struct umn_table_stats){0};
	if (!lock(t))
		return;
	*stats = (struct umn_table_stats){.regions = t->regions,
					  .segments = t->segment_count,
					  .levels = t->levels,
					  .free_bytes = (uint64_t)t->free_chunk_count * UMN_CHUNK,
					  .overflows = t->overflow_seen};
	for (i = 0; i < t->segment_count; i++)
		stats->bytes += (uint64_t)t->segments[i].pages * UMN_PAGE;
	unlock(t);
}

/* Gives up the shared memory: in its place come pages of zeros, in which nothing is valid. MAP_FIXED: another thread that is
 * checking a region finds the old pages or the new ones, never a hole. */
static void let_go(struct umn_table *t)
{
	uint32_t i;

	t->closed = true;
	for (i = 0; i < t->segment_count; i++)
		mmap(t->segments[i].memory, (size_t)t->segments[i].pages * UMN_PAGE, PROT_READ,
		     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
	/* umn_table_changed says yes from now on, so its caller goes and finds out. */
	__atomic_store_n(&t->seen, UINT64_MAX, __ATOMIC_RELEASE);
}

/* Nothing feeds the table any more: nothing in it may be valid before, nor anything written to it after. */
static void stop_source(struct umn_table *t)
{
	struct umn_region *region;
	uint32_t s, c, i;

	__sync_fetch_and_add(&t->header->overflow, 1);
	t->source->stop(t->source);
	for (s = 0; s < t->segment_count; s++)
		for (c = 0; c < t->segments[s].pages * UMN_CHUNKS_PER_PAGE; c++)
			for (i = 0; t->segments[s].chunks[c].regions && i < UMN_CELLS_PER_CHUNK; i++) {
				region = &t->segments[s].chunks[c].regions[i];
				if (region->place == WATCHED)
					t->source->unwatch(t->source, region->start, region->end, region->granule,
							   load(&region->slot->state) & UMN_INVALID);
			}
}

void umn_table_close(struct umn_table *t)
{
	if (!lock(t))
		return;
	if (t->source && t->header)
		stop_source(t);
	let_go(t);
	unlock(t);
}

void umn_table_delete(struct umn_table *t)
{
	struct own_node *node;
	uint32_t s, c;

	while ((node = t->spare_nodes)) {
		t->spare_nodes = node->next;
		free(node);
	}
	for (s = 0; s < t->segment_count; s++) {
		for (c = 0; c < t->segments[s].pages * UMN_CHUNKS_PER_PAGE; c++) {
			free(t->segments[s].chunks[c].regions);
			free(t->segments[s].chunks[c].node);
		}
		free(t->segments[s].chunks);
		/* In a child something else may be at the addresses. */
		if (umn_process_is(t->epoch))
			munmap(t->segments[s].memory, (size_t)t->segments[s].pages * UMN_PAGE);
	}
	free(t);
}

/* ---- For tests ---- */

static const char *check_node(struct umn_table *t, uint32_t ref, uint32_t parent, uint64_t *regions, uint64_t *nodes)
{
	struct umn_node *node = node_at(t, ref), *shared = cell_at(t, ref);
	uint32_t i, n = 0, entries = chunk_at(t, ref)->entries;
	struct umn_region *region;
	const char *wrong;
	struct entry below;
	uint64_t last = 0;

	++*nodes;
	if (shared->level != node->level || shared->used != node->used ||
	    memcmp(shared->start, node->start, sizeof node->start) || memcmp(shared->end, node->end, sizeof node->end) ||
	    memcmp(shared->ref, node->ref, sizeof node->ref))
		return "a node's shared copy is not as it was written";
	if (chunk_at(t, ref)->parent != parent)
		return "a parent link is wrong";
	if (parent && node_at(t, parent)->level != node->level + 1)
		return "levels do not descend by one";
	for (i = 0; i < node->used; i++) {
		if (!node->ref[i])
			continue;
		n++;
		if (!node->level) {
			region = region_at(t, node->ref[i]);
			if (!region || region->place != WATCHED || region->leaf != ref || !(region->slot->state & UMN_LIVE))
				return "a leaf entry is not that of a watched region";
			if (region->start != node->start[i] || region->end != node->end[i])
				return "a leaf entry's bounds are not the region's";
			++*regions;
			continue;
		}
		below = entry_for(t, node->ref[i]);
		if (chunk_at(t, node->ref[i])->entries && (node->start[i] > below.start || node->end[i] < below.end))
			return "bounds do not hold what is below";
		if (node->start[i] < last)
			return "entries are not in order";
		last = node->start[i];
		wrong = check_node(t, node->ref[i], ref, regions, nodes);
		if (wrong)
			return wrong;
	}
	if (n != entries || (node->level && n != node->used) || (!n && !t->untidy && parent))
		return "a node's count is wrong";
	return NULL;
}

/* What must be somewhere: in the index, free, or in limbo. */
static const char *check_memory(struct umn_table *t, uint64_t regions, uint64_t nodes)
{
	uint64_t chunks = nodes, slots = regions, own_nodes = 0;
	struct umn_region *region;
	uint32_t s, c, ref;

	for (ref = t->free_chunks; ref; ref = chunk_at(t, ref)->next, chunks++)
		if (chunk_at(t, ref)->regions || chunk_at(t, ref)->node)
			return "a free chunk is in use";
	if (chunks - nodes != t->free_chunk_count)
		return "free chunks are miscounted";
	for (ref = t->fresh.chunks; ref; ref = chunk_at(t, ref)->next)
		chunks++;
	for (ref = t->waiting.chunks; ref; ref = chunk_at(t, ref)->next)
		chunks++;
	for (region = t->free_regions; region; region = region->next)
		slots++;
	for (region = t->fresh.regions; region; region = region->next)
		slots++;
	for (region = t->waiting.regions; region; region = region->next)
		slots++;
	for (s = 0; s < t->segment_count; s++)
		for (c = s ? 0 : UMN_CHUNKS_PER_PAGE; c < t->segments[s].pages * UMN_CHUNKS_PER_PAGE; c++) {
			chunks--;
			if (t->segments[s].chunks[c].regions) {
				chunks++;
				slots -= UMN_CELLS_PER_CHUNK;
			}
			own_nodes += !!t->segments[s].chunks[c].node;
		}
	return chunks ? "chunks are lost" : slots ? "slots are lost" : own_nodes != nodes ? "nodes are lost" : NULL;
}

const char *umn_table_check(struct umn_table *t)
{
	const char *wrong = NULL;
	uint64_t regions = 0, nodes = 0;
	struct entry hull;

	pthread_mutex_lock(&t->lock);
	if (t->root) {
		hull = entry_for(t, t->root);
		wrong = check_node(t, t->root, 0, &regions, &nodes);
		if (!wrong && regions && (hull.start < t->low || hull.end > t->high))
			wrong = "the hull does not hold everything";
	}
	if (!wrong && (t->header->root != t->root || t->header->low != t->low || t->header->high != t->high))
		wrong = "the header is not as it was written";
	if (!wrong && regions != t->regions)
		wrong = "regions are missing from the index";
	if (!wrong)
		wrong = check_memory(t, regions, nodes);
	pthread_mutex_unlock(&t->lock);
	return wrong;
}
