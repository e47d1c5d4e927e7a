/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The native part of a registration cache, behind the lock.
 *
 * A hit (cache.h) takes no lock, so all that is done here is done under its feet. It may meet any entry in any state, but it
 * keeps one only if it has counted itself in and found the entry open in that same atomic operation. Three rules follow:
 *
 * - What an open entry says is written before it is opened, and changes only after it has left.
 * - An entry leaves by one atomic operation that finds no user and makes sure that there will be none: either it takes away
 *   "open", or, if that is gone already, "retired". So it leaves once, whoever tries, and then is its owner's alone.
 * - Entries and indices are memory of their kind until the cache is deleted: a link leads to an entry, be it the wrong one.
 *
 * Which of these happened to an entry is said by its place, for those who hold the lock.
 */
#include "cache/cache.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define FIRST_SHIFT 56 /* 256 buckets */
#define ENTRIES_PER_SLAB 31
#define SLAB 4096

#define load(p) __atomic_load_n(p, __ATOMIC_ACQUIRE)
#define store(p, v) __atomic_store_n(p, v, __ATOMIC_RELEASE)

enum place {
	FREE,
	RESERVED,
	OPEN,	 /* in the index and in the heap */
	RETIRED, /* in use, or about to leave */
	LEAVING,
	KEPT,
};

struct slab {
	struct slab *next;
	struct umn_entry entries[ENTRIES_PER_SLAB]; /* aligned, so there is room for `next` */
};
UMN_STATIC_ASSERT(sizeof(struct slab) == SLAB, "31 entries and the link");
UMN_STATIC_ASSERT(sizeof(struct umn_entry) == 128, "umn_entry_of relies on it");
UMN_STATIC_ASSERT(offsetof(struct umn_entry, link) == 64, "a hit needs one cache line of the entry");

struct cache {
	struct umn_cache shared;
	int64_t hits; /* of entries before they were freed, and UMN_MANY_HITS */

	pthread_mutex_t lock __attribute__((aligned(128))); /* not on the line that hits read */
	uint32_t life;					    /* one more in the child of a fork */
	struct slab *slabs;
	struct umn_entry *free;
	struct umn_entry *leaving, **leaving_end; /* first come, first deregistered */
	struct umn_entry *kept;
	struct umn_cache_load load; /* leaving: with those that were taken */
	uint64_t stale, closed;
	size_t count;		 /* open entries */
	struct umn_entry **heap; /* of these; on top is that with the oldest key */
	size_t heap_room, entries;
	size_t of_order[64];
};

static struct cache *own(struct umn_cache *cache)
{
	return (struct cache *)cache;
}

static uint32_t users(uint64_t state)
{
	return (uint32_t)state;
}

/* ---- The order of use ---- */

/*
 * A heap by `key`, which is what the entry's stamp was when it was last looked at. Stamps only grow, so the entry on top is the
 * least recently used one if its key is still its stamp, and else it has to go where it belongs now.
 */
static bool older(const struct umn_entry *a, const struct umn_entry *b)
{
	return (int32_t)(a->key - b->key) < 0;
}

static void heap_set(struct cache *c, size_t i, struct umn_entry *entry)
{
	c->heap[i] = entry;
	entry->position = i;
}

static void heap_settle(struct cache *c, size_t i)
{
	struct umn_entry *entry = c->heap[i];
	size_t child;

	for (; i && older(entry, c->heap[(i - 1) / 2]); i = (i - 1) / 2)
		heap_set(c, i, c->heap[(i - 1) / 2]);
	for (; (child = 2 * i + 1) < c->count; i = child) {
		if (child + 1 < c->count && older(c->heap[child + 1], c->heap[child]))
			child++;
		if (!older(c->heap[child], entry))
			break;
		heap_set(c, i, c->heap[child]);
	}
	heap_set(c, i, entry);
}

static void heap_add(struct cache *c, struct umn_entry *entry, uint32_t key)
{
	entry->key = key;
	heap_set(c, c->count++, entry);
	heap_settle(c, entry->position);
}

static void heap_remove(struct cache *c, struct umn_entry *entry)
{
	struct umn_entry *last = c->heap[--c->count];

	if (last == entry)
		return;
	heap_set(c, entry->position, last);
	heap_settle(c, entry->position);
}

/* ---- The index ---- */

static struct umn_index *new_index(uint32_t shift, struct umn_index *older)
{
	struct umn_index *index = calloc(1, sizeof *index + (sizeof *index->bucket << (64 - shift)));

	if (index) {
		index->shift = shift;
		index->older = older;
	}
	return index;
}

static uint64_t block_of(const struct umn_entry *entry, int i)
{
	return (i ? entry->end - 1 : entry->start) >> entry->order;
}

/* How many blocks it touches. */
static int links_of(const struct umn_entry *entry)
{
	return block_of(entry, 0) == block_of(entry, 1) ? 1 : 2;
}

static void link_entry(struct umn_index *index, struct umn_entry *entry)
{
	struct umn_link **bucket;

	for (int i = 0; i < links_of(entry); i++) {
		bucket = (struct umn_link **)umn_bucket(index, block_of(entry, i), entry->order);
		store(&entry->link[i].next, *bucket);
		store(bucket, &entry->link[i]);
	}
}

static void unlink_entry(struct umn_index *index, struct umn_entry *entry)
{
	struct umn_link **at;

	for (int i = 0; i < links_of(entry); i++) {
		at = (struct umn_link **)umn_bucket(index, block_of(entry, i), entry->order);
		while (*at != &entry->link[i])
			at = &(*at)->next;
		store(at, entry->link[i].next);
	}
}

/* Failing that, chains get longer. The old index stays, as hits may be in it. */
static void grow_index(struct cache *c)
{
	struct umn_index *index = new_index(c->shared.index->shift - 1, c->shared.index);

	if (!index)
		return;
	for (size_t i = 0; i < c->count; i++)
		link_entry(index, c->heap[i]);
	store(&c->shared.index, index);
}

static void index_add(struct cache *c, struct umn_entry *entry)
{
	entry->place = OPEN;
	heap_add(c, entry, entry->stamp);
	if (c->count > UINT64_C(1) << (63 - c->shared.index->shift))
		grow_index(c); /* links this entry too */
	else
		link_entry(c->shared.index, entry);
	if (!c->of_order[entry->order]++)
		store(&c->shared.orders, c->shared.orders | UINT64_C(1) << entry->order);
}

static void index_remove(struct cache *c, struct umn_entry *entry)
{
	heap_remove(c, entry);
	unlink_entry(c->shared.index, entry);
	if (!--c->of_order[entry->order])
		store(&c->shared.orders, c->shared.orders & ~(UINT64_C(1) << entry->order));
}

/* ---- Leaving ---- */

static void push_leaving(struct cache *c, struct umn_entry *entry)
{
	entry->place = LEAVING;
	c->load.leaving++;
	entry->next = NULL;
	*c->leaving_end = entry;
	c->leaving_end = &entry->next;
}

/* Takes `bit` away if there is no user. Acquire: all that users did is done; see umn_cache_release. */
static bool claim(struct umn_entry *entry, uint64_t bit)
{
	uint64_t state = load(&entry->state);

	while ((state & bit) && !users(state))
		if (__atomic_compare_exchange_n(&entry->state, &state, state & ~bit, true, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
			return true;
	return false;
}

/* An open entry leaves if nobody uses it. */
static bool leave_if_idle(struct cache *c, struct umn_entry *entry)
{
	if (!claim(entry, UMN_OPEN))
		return false;
	index_remove(c, entry);
	push_leaving(c, entry);
	return true;
}

static void retire(struct cache *c, struct umn_entry *entry)
{
	c->stale += !umn_entry_untouched(entry);
	index_remove(c, entry);
	entry->place = RETIRED;
	/* Whoever takes the last user away after this sees that it is retired; if that was before, it leaves here. */
	__atomic_fetch_xor(&entry->state, UMN_OPEN | UMN_RETIRED, __ATOMIC_ACQ_REL);
	if (claim(entry, UMN_RETIRED))
		push_leaving(c, entry);
}

void umn_cache_retire(struct umn_cache *cache, struct umn_entry *entry)
{
	struct cache *c = own(cache);

	if (!(load(&entry->state) & UMN_OPEN) || entry->life != c->life)
		return;
	pthread_mutex_lock(&c->lock);
	if (entry->place == OPEN)
		retire(c, entry);
	pthread_mutex_unlock(&c->lock);
}

/* The count went down from that in `state`. */
static bool left(struct umn_cache *cache, struct umn_entry *entry, uint64_t state)
{
	struct cache *c = own(cache);
	uint64_t now = load(&entry->state);

	while ((int64_t)now >= (int64_t)UMN_MANY_HITS)
		if (__atomic_compare_exchange_n(&entry->state, &now, now - UMN_MANY_HITS, true, __ATOMIC_RELAXED,
						__ATOMIC_RELAXED)) {
			__atomic_fetch_add(&c->hits, UMN_MANY_HITS / UMN_HIT, __ATOMIC_RELAXED);
			break;
		}
	/* By now it may be another entry. If that has to leave, this is as good a time as any. */
	if (!(state & UMN_RETIRED) || entry->life != c->life || !claim(entry, UMN_RETIRED))
		return false;
	pthread_mutex_lock(&c->lock);
	push_leaving(c, entry);
	pthread_mutex_unlock(&c->lock);
	return true;
}

size_t umn_cache_evict(struct umn_cache *cache, size_t count)
{
	struct cache *c = own(cache);
	struct umn_entry *entry, *busy = NULL;
	uint32_t stamp;
	size_t n = 0;

	pthread_mutex_lock(&c->lock);
	while (n < count && c->count) {
		entry = c->heap[0];
		if (users(load(&entry->state))) {
			heap_remove(c, entry);
			entry->next = busy;
			busy = entry;
			continue;
		}
		stamp = __atomic_load_n(&entry->stamp, __ATOMIC_RELAXED);
		if (stamp != entry->key) {
			entry->key = stamp;
			heap_settle(c, 0);
			continue;
		}
		n += leave_if_idle(c, entry);
	}
	for (; (entry = busy); heap_add(c, entry, c->shared.clock))
		busy = entry->next;
	pthread_mutex_unlock(&c->lock);
	return n;
}

struct umn_entry *umn_cache_take(struct umn_cache *cache)
{
	struct cache *c = own(cache);
	struct umn_entry *entry;

	pthread_mutex_lock(&c->lock);
	entry = c->leaving;
	if (entry) {
		c->leaving = entry->next;
		if (!c->leaving)
			c->leaving_end = &c->leaving;
	}
	pthread_mutex_unlock(&c->lock);
	return entry;
}

void umn_cache_keep(struct umn_cache *cache, struct umn_entry *entry)
{
	struct cache *c = own(cache);

	pthread_mutex_lock(&c->lock);
	c->load.leaving--;
	c->load.kept++;
	entry->place = KEPT;
	entry->next = c->kept;
	c->kept = entry;
	pthread_mutex_unlock(&c->lock);
}

void umn_cache_retry(struct umn_cache *cache)
{
	struct cache *c = own(cache);
	struct umn_entry *entry;

	pthread_mutex_lock(&c->lock);
	while ((entry = c->kept)) {
		c->kept = entry->next;
		c->load.kept--;
		push_leaving(c, entry);
	}
	pthread_mutex_unlock(&c->lock);
}

/* ---- Coming ---- */

static bool add_slab(struct cache *c)
{
	struct umn_entry **heap;
	struct slab *slab;

	if (c->heap_room < c->entries + ENTRIES_PER_SLAB) {
		heap = realloc(c->heap, (2 * c->entries + ENTRIES_PER_SLAB) * sizeof *heap);
		if (!heap)
			return false;
		c->heap = heap;
		c->heap_room = 2 * c->entries + ENTRIES_PER_SLAB;
	}
	slab = aligned_alloc(SLAB, sizeof *slab);
	if (!slab)
		return false;
	memset(slab, 0, sizeof *slab);
	slab->next = c->slabs;
	c->slabs = slab;
	c->entries += ENTRIES_PER_SLAB;
	for (int i = ENTRIES_PER_SLAB; i-- > 0;) {
		slab->entries[i].life = c->life;
		slab->entries[i].next = c->free;
		c->free = &slab->entries[i];
	}
	return true;
}

struct umn_entry *umn_cache_reserve(struct umn_cache *cache, uint64_t start, uint64_t end)
{
	struct cache *c = own(cache);
	struct umn_entry *entry = NULL;

	pthread_mutex_lock(&c->lock);
	if (c->free || add_slab(c)) {
		entry = c->free;
		c->free = entry->next;
		entry->place = RESERVED;
		entry->order = umn_order(end - start);
		__atomic_store_n(&entry->start, start, __ATOMIC_RELAXED);
		__atomic_store_n(&entry->end, end, __ATOMIC_RELAXED);
		c->load.registrations++;
		c->load.bytes += end - start;
	}
	pthread_mutex_unlock(&c->lock);
	return entry;
}

void umn_cache_free(struct umn_cache *cache, struct umn_entry *entry)
{
	struct cache *c = own(cache);
	int64_t hits;

	pthread_mutex_lock(&c->lock);
	c->load.leaving -= entry->place == LEAVING;
	c->load.registrations--;
	c->load.bytes -= entry->end - entry->start;
	/* Taken out rather than set to 0: a hit that found the wrong entry may be about to take itself back. */
	hits = (int64_t)load(&entry->state) / (int64_t)UMN_HIT;
	__atomic_fetch_sub(&entry->state, (uint64_t)hits * UMN_HIT, __ATOMIC_RELAXED);
	__atomic_fetch_add(&c->hits, hits, __ATOMIC_RELAXED);
	entry->place = FREE;
	entry->next = c->free;
	c->free = entry;
	pthread_mutex_unlock(&c->lock);
}

void umn_cache_publish(struct umn_cache *cache, struct umn_entry *entry, const struct umn_region *region, void *handle,
		       void *watch, bool open)
{
	struct cache *c = own(cache);

	pthread_mutex_lock(&c->lock);
	entry->region = region;
	__atomic_store_n(&entry->slot, region->slot, __ATOMIC_RELAXED);
	entry->header = region->header;
	entry->late = region->source ? region : NULL;
	entry->overflow = __atomic_load_n(&region->overflow, __ATOMIC_RELAXED);
	entry->handle = handle;
	entry->watch = watch;
	__atomic_store_n(&entry->stamp, c->shared.clock + 1, __ATOMIC_RELAXED);
	/* What is used from now on is used later than this. */
	__atomic_store_n(&c->shared.clock, c->shared.clock + 2, __ATOMIC_RELAXED);
	if (open) {
		index_add(c, entry);
	} else {
		entry->place = RETIRED;
		c->closed++;
	}
	/* Release: whoever finds it open finds the rest. An addition, as a hit that found the wrong entry may be counted in. */
	__atomic_fetch_add(&entry->state, UMN_USER + (open ? UMN_OPEN : UMN_RETIRED), __ATOMIC_RELEASE);
	pthread_mutex_unlock(&c->lock);
}

/* The link after this one, and after the same entry's other link if both are on this chain: they are neighbours then. */
static struct umn_link *next_link(const struct umn_link *link)
{
	struct umn_link *next = link->next;

	return next && umn_entry_of(next) == umn_entry_of(link) ? next->next : next;
}

struct umn_entry *umn_cache_find(struct umn_cache *cache, uint64_t start, uint64_t end)
{
	struct cache *c = own(cache);
	uint32_t order = umn_order(end - start);
	struct umn_entry *entry, *found = NULL;
	struct umn_link *link, *next;
	uint64_t orders;

	pthread_mutex_lock(&c->lock);
	for (orders = c->shared.orders >> order << order; orders && !found; orders &= orders - 1) {
		order = (uint32_t)__builtin_ctzll(orders);
		for (link = *umn_bucket(c->shared.index, start >> order, order); link && !found; link = next) {
			next = next_link(link);
			entry = umn_entry_of(link);
			if (entry->start > start || entry->end < end)
				continue;
			if (umn_entry_valid(entry))
				found = entry;
			else
				retire(c, entry);
		}
	}
	if (found) /* under the lock it stays open */
		__atomic_fetch_add(&found->state, UMN_USER + UMN_HIT, __ATOMIC_ACQUIRE);
	pthread_mutex_unlock(&c->lock);
	return found;
}

/* ---- Ranges ---- */

static bool overlaps(const struct umn_entry *entry, uint64_t start, uint64_t end)
{
	return entry->start < end && entry->end > start;
}

#define for_each_entry(c, e)                                                                                                   \
	for (struct slab *slab = (c)->slabs; slab; slab = slab->next)                                                          \
		for (struct umn_entry *e = slab->entries; e < slab->entries + ENTRIES_PER_SLAB; e++)

void umn_cache_retire_range(struct umn_cache *cache, uint64_t start, uint64_t end)
{
	struct cache *c = own(cache);

	pthread_mutex_lock(&c->lock);
	for_each_entry(c, e)
		if (e->place == OPEN && overlaps(e, start, end))
			retire(c, e);
	pthread_mutex_unlock(&c->lock);
}

bool umn_cache_overlaps(struct umn_cache *cache, uint64_t start, uint64_t end)
{
	struct cache *c = own(cache);
	bool found = false;

	pthread_mutex_lock(&c->lock);
	for_each_entry(c, e)
		found |= e->place != FREE && overlaps(e, start, end);
	pthread_mutex_unlock(&c->lock);
	return found;
}

struct merge {
	uint64_t start, end;	       /* asked for */
	uint64_t low, high, max_length; /* so far */
	bool all;
	size_t count;
};

static void merge_entry(struct cache *c, struct umn_entry *entry, struct merge *m)
{
	uint64_t low = entry->start < m->low ? entry->start : m->low;
	uint64_t high = entry->end > m->high ? entry->end : m->high;
	/* A stale one may be of memory that is no longer mapped. */
	bool fits = high - low <= m->max_length && umn_entry_untouched(entry);

	if (!overlaps(entry, m->start, m->end) || !(fits || m->all) || !leave_if_idle(c, entry))
		return;
	m->count++;
	if (fits) {
		m->low = low;
		m->high = high;
	}
}

size_t umn_cache_merge(struct umn_cache *cache, uint64_t *start, uint64_t *end, uint64_t max_length, bool all)
{
	struct merge m = {
		.start = *start, .end = *end, .low = *start, .high = *end, .max_length = max_length, .all = all};
	struct cache *c = own(cache);
	struct umn_link *link, *next;
	uint64_t orders, block, last;
	uint32_t order;

	pthread_mutex_lock(&c->lock);
	for (orders = c->shared.orders; orders; orders &= orders - 1) {
		order = (uint32_t)__builtin_ctzll(orders);
		block = m.start >> order;
		last = (m.end - 1) >> order;
		if (last - block > c->count) {
			for_each_entry(c, e)
				if (e->place == OPEN && e->order == order)
					merge_entry(c, e, &m);
			continue;
		}
		for (; block <= last; block++)
			for (link = *umn_bucket(c->shared.index, block, order); link; link = next) {
				next = next_link(link);
				merge_entry(c, umn_entry_of(link), &m);
			}
	}
	pthread_mutex_unlock(&c->lock);
	*start = m.low;
	*end = m.high;
	return m.count;
}

/* ---- The whole ---- */

static void reset(struct cache *c)
{
	pthread_mutex_init(&c->lock, NULL);
	c->leaving = NULL;
	c->leaving_end = &c->leaving;
}

struct umn_cache *umn_cache_new(void)
{
	struct cache *c = aligned_alloc(128, sizeof *c);

	if (!c)
		return NULL;
	memset(c, 0, sizeof *c);
	c->shared.retire = umn_cache_retire;
	c->shared.left = left;
	c->shared.index = new_index(FIRST_SHIFT, NULL);
	if (!c->shared.index) {
		free(c);
		return NULL;
	}
	reset(c);
	return &c->shared;
}

void umn_cache_delete(struct umn_cache *cache)
{
	struct cache *c = own(cache);
	struct umn_index *index;
	struct slab *slab;

	while ((index = c->shared.index)) {
		c->shared.index = index->older;
		free(index);
	}
	while ((slab = c->slabs)) {
		c->slabs = slab->next;
		free(slab);
	}
	pthread_mutex_destroy(&c->lock);
	free(c->heap);
	free(c);
}

void umn_cache_abandon(struct umn_cache *cache)
{
	struct cache *c = own(cache);
	struct umn_index *index = c->shared.index;

	reset(c);
	memset(index->bucket, 0, sizeof *index->bucket << (64 - index->shift));
	memset(c->of_order, 0, sizeof c->of_order);
	c->shared.orders = 0;
	c->hits = 0;
	c->life++;
	c->slabs = NULL;
	c->free = c->kept = NULL;
	c->count = c->entries = 0;
	c->load = (struct umn_cache_load){0};
	c->stale = c->closed = 0;
}

void umn_cache_load(struct umn_cache *cache, struct umn_cache_load *load)
{
	struct cache *c = own(cache);

	pthread_mutex_lock(&c->lock);
	*load = c->load;
	pthread_mutex_unlock(&c->lock);
}

void umn_cache_stats(struct umn_cache *cache, struct umn_cache_stats *stats)
{
	struct cache *c = own(cache);
	int64_t hits;

	pthread_mutex_lock(&c->lock);
	hits = __atomic_load_n(&c->hits, __ATOMIC_RELAXED);
	*stats = (struct umn_cache_stats){.stale = c->stale, .closed = c->closed};
	for_each_entry(c, e) {
		uint64_t state = load(&e->state);

		hits += (int64_t)state / (int64_t)UMN_HIT;
		if (e->place > RESERVED && users(state)) {
			stats->in_use++;
			stats->in_use_bytes += e->end - e->start;
		}
	}
	stats->hits = (uint64_t)hits;
	pthread_mutex_unlock(&c->lock);
}

/* ---- For tests ---- */

static const char *check_entry(struct cache *c, struct umn_entry *e)
{
	uint64_t state = load(&e->state);
	struct umn_link *link;
	int found = 0;

	if ((e->place == OPEN) != !!(state & UMN_OPEN))
		return "an entry is open that should not be, or the other way round";
	if (e->place != RETIRED && (state & UMN_RETIRED))
		return "an entry is still to be made to leave";
	if (e->place != OPEN)
		return NULL;
	if (e->position >= c->count || c->heap[e->position] != e)
		return "an open entry is not where it should be in the heap";
	if (e->position && older(e, c->heap[(e->position - 1) / 2]))
		return "the heap is not in order";
	for (int i = 0; i < links_of(e); i++)
		for (link = *umn_bucket(c->shared.index, block_of(e, i), e->order); link; link = link->next)
			found += link == &e->link[i];
	return found == links_of(e) ? NULL : "an open entry is not in the index, or more than once";
}

const char *umn_cache_check(struct umn_cache *cache)
{
	struct cache *c = own(cache);
	struct umn_cache_load is = {0};
	size_t open = 0, of_order[64] = {0};
	const char *wrong = NULL;

	pthread_mutex_lock(&c->lock);
	for_each_entry(c, e) {
		if (!wrong)
			wrong = check_entry(c, e);
		open += e->place == OPEN;
		of_order[e->order] += e->place == OPEN;
		is.kept += e->place == KEPT;
		is.leaving += e->place == LEAVING;
		is.registrations += e->place != FREE;
		is.bytes += e->place == FREE ? 0 : e->end - e->start;
	}
	if (!wrong && (open != c->count || memcmp(&is, &c->load, sizeof is)))
		wrong = "entries are miscounted";
	for (uint32_t order = 0; order < 64 && !wrong; order++)
		if (of_order[order] != c->of_order[order] || !of_order[order] != !(c->shared.orders >> order & 1))
			wrong = "orders are miscounted";
	pthread_mutex_unlock(&c->lock);
	return wrong;
}
