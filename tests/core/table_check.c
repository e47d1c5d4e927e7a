/* SPDX-License-Identifier: BSD-3-Clause */
#include "table_check.h"

#include <string.h>

#include "table/internal.h"

static const char *check_node(struct umn_table *t, uint32_t ref, uint32_t parent, uint64_t *regions, uint64_t *nodes)
{
	struct umn_node *node = node_at(t, ref), *shared = cell_at(t, ref);
	uint32_t i, n = 0, entries = chunk_at(t, ref)->entries;
	struct umn_region *region;
	const char *wrong;
	struct entry below;
	uint64_t last = 0, last_end = 0;

	++*nodes;
	if (shared->level != node->level || shared->used != node->used || shared->ordered != node->ordered ||
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
		below = umn_index_entry(t, node->ref[i]);
		if (chunk_at(t, node->ref[i])->entries && (node->start[i] > below.start || node->end[i] < below.end))
			return "bounds do not hold what is below";
		if (node->start[i] < last)
			return "entries are not in order";
		last = node->start[i];
		if (node->ordered && node->end[i] < last_end)
			return "the ends are not in order";
		last_end = node->end[i];
		wrong = check_node(t, node->ref[i], ref, regions, nodes);
		if (wrong)
			return wrong;
	}
	for (; node->level && i < UMN_FANOUT; i++)
		if (node->start[i] != UMN_ADDRESS_MAX)
			return "an entry that is not used looks like a used one";
	if (n != entries || (node->level && n != node->used) || (!n && !t->untidy && parent))
		return "a node's count is wrong";
	return NULL;
}

/* Every chunk, slot and node is in the index, free, or in limbo. */
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
		hull = umn_index_entry(t, t->root);
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
