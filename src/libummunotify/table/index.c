/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The index: a B+tree over the regions' starts, with the greatest end below each entry. Feeders walk it on all CPUs at any
 * time, without a lock, while the owner changes it. The rules that keep each of their walks correct:
 *
 * - In place, by single stores, the owner makes only changes after each of which every watched region is still reachable: it
 *   fills in an unused leaf entry (the ref last), clears a leaf entry (the ref first), widens the bounds above before it adds a
 *   region below, narrows them after it has removed one, and replaces a child by one that holds the same regions.
 * - For everything else (split, merge, collapse) it builds new nodes, publishes them by one store of a ref, in the lowest node
 *   that stays or in the root, and retires the old nodes. It does not write to these. So a feeder inside still finds all that
 *   was watched when it entered. It need not find what is watched later: its change had begun before that watch returned.
 * - Retired nodes are reused after a grace period (grace.c).
 *
 * Each store is a release. A feeder loads what a ref leads to after the ref (acquire, or in BPF the address dependency). So a
 * feeder that finds a new node finds all of its entries. Without the release, Arm may publish the ref before the entries: the
 * feeder would walk what the memory held before, and miss regions that were watched long ago.
 */
#include <stdlib.h>
#include <string.h>

#include "table/internal.h"

#define UNDERFULL 6u   /* a node with fewer entries is merged with a neighbour ... */
#define MERGED_MAX 18u /* ... if both together have at most this many */
#define TIDY_CHUNKS 8u /* to look at in one call */

bool umn_index_reserve(struct umn_table *t)
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

/* ---- Nodes ---- */

struct entry umn_index_entry(struct umn_table *t, uint32_t ref)
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

/* Copies the entries in use; how many. */
static uint32_t entries_of(struct umn_table *t, uint32_t ref, struct entry *entries)
{
	struct umn_node *node = node_at(t, ref);
	uint32_t i, n = 0;

	for (i = 0; i < node->used; i++)
		if (node->ref[i])
			entries[n++] = (struct entry){node->start[i], node->end[i], node->ref[i]};
	return n;
}

/* Which entry of the parent leads to the child. */
static uint32_t position(struct umn_table *t, uint32_t parent, uint32_t ref)
{
	struct umn_node *node = node_at(t, parent);
	uint32_t i = 0;

	while (node->ref[i] != ref)
		i++;
	return i;
}

static uint32_t parent_of(struct umn_table *t, uint32_t ref, uint32_t *at)
{
	uint32_t parent = chunk_at(t, ref)->parent;

	*at = parent ? position(t, parent, ref) : 0;
	return parent;
}

/* The shared copies are written by atomic stores even before a feeder can reach them: ThreadSanitizer cannot tell. */

/* Are starts and ends still sorted if entry i gets these? */
static bool in_order(const struct umn_node *node, uint32_t i, uint64_t start, uint64_t end)
{
	return (!i || (node->start[i - 1] <= start && node->end[i - 1] <= end)) &&
	       (i + 1 == node->used || (start <= node->start[i + 1] && end <= node->end[i + 1]));
}

static void set_bounds(struct umn_table *t, uint32_t ref, uint32_t i, uint64_t start, uint64_t end)
{
	struct umn_node *own = node_at(t, ref), *shared = cell_at(t, ref);

	/* Before the bounds, and for good: a feeder that finds it set after it has loaded bounds knows that they were sorted then. */
	if (own->ordered && !in_order(own, i, start, end))
		store(&shared->ordered, own->ordered = 0);
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

/* A node that no feeder can reach before its ref is stored in another or in the root. */
static uint32_t new_node(struct umn_table *t, uint32_t level, const struct entry *entries, uint32_t n)
{
	uint32_t i, ref = take_chunk(t);
	struct chunk *chunk = chunk_at(t, ref);
	struct umn_node *shared = cell_at(t, ref), *own;
	bool ordered = level;

	chunk->node = t->spare_nodes;
	t->spare_nodes = chunk->node->next;
	t->spare_node_count--;
	own = &chunk->node->is;
	store(&shared->level, own->level = level);
	for (i = 0; i < n; i++) {
		store(&shared->start[i], own->start[i] = entries[i].start);
		store(&shared->end[i], own->end[i] = entries[i].end);
		store(&shared->ref[i], own->ref[i] = entries[i].ref);
		if (i && (entries[i].start < entries[i - 1].start || entries[i].end < entries[i - 1].end))
			ordered = false;
		if (level)
			chunk_at(t, entries[i].ref)->parent = ref;
		else
			region_at(t, entries[i].ref)->leaf = ref;
	}
	for (; i < UMN_FANOUT; i++) {
		store(&shared->start[i], own->start[i] = level ? UMN_ADDRESS_MAX : 0);
		store(&shared->end[i], own->end[i] = 0);
		store(&shared->ref[i], own->ref[i] = 0);
	}
	store(&shared->used, own->used = n);
	store(&shared->ordered, own->ordered = ordered);
	chunk->entries = n;
	chunk->parent = 0;
	return ref;
}

/* ---- The root and the hull ---- */

static void set_root(struct umn_table *t, uint32_t ref)
{
	if (ref)
		chunk_at(t, ref)->parent = 0;
	t->root = ref;
	t->levels = ref ? node_at(t, ref)->level + 1 : 0;
	store(&t->header->root, ref);
}

/* Feeders ask the hull before they enter the index, so it holds every region at any time: it is widened before a region is
 * published, and narrowed after one was removed. Both are releases, so the order holds on Arm too. */
static void set_hull(struct umn_table *t, uint64_t low, uint64_t high)
{
	if (t->low != low)
		store(&t->header->low, t->low = low);
	if (t->high != high)
		store(&t->header->high, t->high = high);
}

static void narrow_hull(struct umn_table *t)
{
	struct entry hull = {0};

	if (t->root)
		hull = umn_index_entry(t, t->root);
	set_hull(t, hull.start, hull.end);
}

/* ---- Replacing children ---- */

static void replace(struct umn_table *t, uint32_t parent, uint32_t at, uint32_t count, const uint32_t *children, uint32_t n);

static void replace_root(struct umn_table *t, const uint32_t *children, uint32_t n)
{
	struct entry entries[2];
	uint32_t i;

	for (i = 0; i < n; i++)
		entries[i] = umn_index_entry(t, children[i]);
	set_root(t, n == 0 ? 0 : n == 1 ? children[0] : new_node(t, node_at(t, children[0])->level + 1, entries, n));
}

/* In place: one store of a ref. */
static void replace_one(struct umn_table *t, uint32_t parent, uint32_t at, uint32_t child)
{
	struct entry entry = umn_index_entry(t, child);

	chunk_at(t, child)->parent = parent;
	set_ref(t, parent, at, child);
	/* Last: until the ref is stored, the old bounds hold the regions of both children. */
	set_bounds(t, parent, at, entry.start, entry.end);
}

/* Two new nodes with these entries replace child `at` of `parent`. The first gets `cut` of them. */
static void replace_by_two(struct umn_table *t, uint32_t parent, uint32_t at, uint32_t level, const struct entry *entries,
			   uint32_t n, uint32_t cut)
{
	uint32_t parts[2];

	parts[0] = new_node(t, level, entries, cut);
	parts[1] = new_node(t, level, entries + cut, n - cut);
	replace(t, parent, at, 1, parts, 2);
}

/* A neighbour of child `at`, which is to have `n` entries, that the child is to be merged with; 0: none. The one to the left if
 * there is one. */
static uint32_t neighbour_to_merge(struct umn_table *t, uint32_t parent, uint32_t at, uint32_t n)
{
	uint32_t neighbour;

	if (!parent || n >= UNDERFULL || chunk_at(t, parent)->entries <= 1)
		return 0;
	neighbour = node_at(t, parent)->ref[at ? at - 1 : 1];
	return n + chunk_at(t, neighbour)->entries <= MERGED_MAX ? neighbour : 0;
}

/* A new node with these entries, which has room for a neighbour's, replaces child `at` of `parent`, and a neighbour if it is
 * underfull. */
static void replace_or_merge(struct umn_table *t, uint32_t parent, uint32_t at, uint32_t level, struct entry *entries, uint32_t n)
{
	uint32_t neighbour = neighbour_to_merge(t, parent, at, n), count = 1, child;

	if (neighbour) {
		if (at) {
			memmove(entries + chunk_at(t, neighbour)->entries, entries, n * sizeof *entries);
			n += entries_of(t, neighbour, entries);
			at--;
		} else {
			n += entries_of(t, neighbour, entries + n);
		}
		umn_grace_retire_node(t, neighbour);
		count = 2;
	}
	child = new_node(t, level, entries, n);
	replace(t, parent, at, count, &child, 1);
}

/* Replaces the node by one or two with these entries, or by none. `appending`: the last of the entries is new. */
static void rebuild(struct umn_table *t, uint32_t ref, struct entry *entries, uint32_t n, bool appending)
{
	uint32_t level = node_at(t, ref)->level, at, parent = parent_of(t, ref, &at);

	umn_grace_retire_node(t, ref);
	if (n == 0)
		replace(t, parent, at, 1, NULL, 0);
	else if (n == 1 && !parent)
		set_root(t, entries[0].ref);
	else if (n > UMN_FANOUT)
		/* Almost full to the left if children are being appended: further ones will be. */
		replace_by_two(t, parent, at, level, entries, n, appending ? UMN_FANOUT - 1 : n / 2);
	else
		replace_or_merge(t, parent, at, level, entries, n);
}

/* Replaces `count` children of `parent`, from `at` on, by `n` others (at most two). These hold the same regions, and perhaps
 * one more for which the bounds above were widened before. The old children are not written to. `parent` 0: the root is
 * replaced. */
static void replace(struct umn_table *t, uint32_t parent, uint32_t at, uint32_t count, const uint32_t *children, uint32_t n)
{
	struct entry entries[UMN_FANOUT + 1], kept[UMN_FANOUT];
	uint32_t i, total, kept_count;

	if (!parent) {
		replace_root(t, children, n);
		return;
	}
	if (count == 1 && n == 1) {
		replace_one(t, parent, at, children[0]);
		return;
	}
	kept_count = entries_of(t, parent, kept);
	memcpy(entries, kept, at * sizeof *entries);
	total = at;
	for (i = 0; i < n; i++)
		entries[total++] = umn_index_entry(t, children[i]);
	for (i = at + count; i < kept_count; i++)
		entries[total++] = kept[i];
	rebuild(t, parent, entries, total, at + count >= kept_count);
}

/* ---- Insertion ---- */

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

/* The leaf for the region. Widens all bounds on the way: a feeder that comes after the region's ref was stored must find its
 * way to it. */
static uint32_t widen_to_leaf(struct umn_table *t, const struct umn_region *region)
{
	uint32_t ref = t->root, at;
	struct umn_node *node;

	set_hull(t, min(t->low, region->start), max(t->high, region->end));
	for (node = node_at(t, ref); node->level; ref = node->ref[at], node = node_at(t, ref)) {
		at = child_for(node, region->start);
		set_bounds(t, ref, at, min(node->start[at], region->start), max(node->end[at], region->end));
	}
	return ref;
}

/* In place: an unused entry of the leaf. The ref last, as it makes the entry a used one. A feeder may have loaded the bounds
 * that were there before, and then this ref: it passes the region by, or hits it without need. Its change began before this
 * watch returns, so both are allowed. */
static void fill_in(struct umn_table *t, uint32_t leaf, struct umn_region *region)
{
	struct umn_node *node = node_at(t, leaf);
	uint32_t i;

	for (i = 0; i < node->used && node->ref[i]; i++)
		;
	set_bounds(t, leaf, i, region->start, region->end);
	set_ref(t, leaf, i, region->ref);
	if (i == node->used)
		set_used(t, leaf, i + 1);
	chunk_at(t, leaf)->entries++;
	region->leaf = leaf;
}

/* Insertion sort: 25 entries, often nearly in order. */
static void sort(struct entry *entries, uint32_t n)
{
	for (uint32_t i = 1; i < n; i++) {
		struct entry e = entries[i];
		uint32_t j = i;

		for (; j && entries[j - 1].start > e.start; j--)
			entries[j] = entries[j - 1];
		entries[j] = e;
	}
}

static void split_leaf(struct umn_table *t, uint32_t leaf, const struct umn_region *region)
{
	uint32_t at, parent = parent_of(t, leaf, &at), n;
	struct entry entries[UMN_FANOUT + 1];

	n = entries_of(t, leaf, entries);
	entries[n++] = (struct entry){region->start, region->end, region->ref};
	sort(entries, n);
	umn_grace_retire_node(t, leaf);
	replace_by_two(t, parent, at, 0, entries, n, entries[n - 1].ref == region->ref ? n - 1 : n / 2);
}

void umn_index_insert(struct umn_table *t, struct umn_region *region)
{
	uint32_t leaf;

	if (!t->root) {
		set_hull(t, region->start, region->end);
		set_root(t, new_node(t, 0, &(struct entry){region->start, region->end, region->ref}, 1));
		return;
	}
	leaf = widen_to_leaf(t, region);
	if (chunk_at(t, leaf)->entries < UMN_FANOUT)
		fill_in(t, leaf, region);
	else
		split_leaf(t, leaf, region);
}

bool umn_index_has_room(struct umn_table *t, uint64_t start)
{
	uint32_t ref = t->root;

	if (!ref || !t->free_regions)
		return false;
	while (node_at(t, ref)->level)
		ref = node_at(t, ref)->ref[child_for(node_at(t, ref), start)];
	return chunk_at(t, ref)->entries < UMN_FANOUT;
}

/* ---- Removal ---- */

/* Narrows the bounds above a node from which something was removed. */
static void narrow(struct umn_table *t, uint32_t ref)
{
	struct umn_node *parent;
	uint32_t at, above;
	struct entry entry;

	for (; (above = chunk_at(t, ref)->parent); ref = above) {
		parent = node_at(t, above);
		at = position(t, above, ref);
		entry = umn_index_entry(t, ref);
		if (parent->end[at] == entry.end && parent->start[at] == entry.start)
			return;
		set_bounds(t, above, at, entry.start, entry.end);
	}
}

static void remove_leaf(struct umn_table *t, uint32_t leaf)
{
	uint32_t at, parent = parent_of(t, leaf, &at);

	umn_grace_retire_node(t, leaf);
	replace(t, parent, at, 1, NULL, 0);
}

/* The order of a leaf's entries does not matter, nor do bounds above that are too wide: a later removal narrows them. */
static void merge_leaves(struct umn_table *t, uint32_t parent, uint32_t at, uint32_t leaf, uint32_t neighbour)
{
	struct entry entries[UMN_FANOUT];
	uint32_t n, merged;

	n = entries_of(t, leaf, entries);
	n += entries_of(t, neighbour, entries + n);
	umn_grace_retire_node(t, leaf);
	umn_grace_retire_node(t, neighbour);
	merged = new_node(t, 0, entries, n);
	replace(t, parent, at ? at - 1 : 0, 2, &merged, 1);
}

static bool can_rebuild(struct umn_table *t)
{
	return t->free_chunk_count >= CHUNKS_NEEDED && umn_index_reserve(t);
}

/* Clears the region's entry in place. The store of the ref takes the region out; bounds of 0 only spare feeders a step. Returns
 * how many entries the leaf has left. */
static uint32_t clear(struct umn_table *t, uint32_t leaf, uint32_t region)
{
	uint32_t i = position(t, leaf, region);

	set_ref(t, leaf, i, 0);
	set_bounds(t, leaf, i, 0, 0);
	return --chunk_at(t, leaf)->entries;
}

static void remove_entry(struct umn_table *t, uint32_t leaf, uint32_t region)
{
	uint32_t n = clear(t, leaf, region), at, parent, neighbour;

	/* Without memory for a rebuild, since feeders have kept every retired chunk from being reused, the index stays as it
	 * is, with bounds too wide and perhaps an empty leaf. */
	if (!can_rebuild(t)) {
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
	parent = parent_of(t, leaf, &at);
	neighbour = neighbour_to_merge(t, parent, at, n);
	if (neighbour)
		merge_leaves(t, parent, at, leaf, neighbour);
	else
		narrow(t, leaf);
}

void umn_index_remove(struct umn_table *t, struct umn_region *region)
{
	remove_entry(t, region->leaf, region->ref);
	narrow_hull(t);
}

void umn_index_tidy(struct umn_table *t)
{
	uint32_t segment, c;
	struct chunk *chunk;

	for (uint32_t i = 0; t->untidy && i < TIDY_CHUNKS && can_rebuild(t); i++) {
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
