/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "cache/entries.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define FIRST_SHIFT 56 /* 256 buckets */
#define BATCH 64
#define SLABS_AT_ONCE 16

#define load(p) __atomic_load_n(p, __ATOMIC_ACQUIRE)
#define store(p, v) __atomic_store_n(p, v, __ATOMIC_RELEASE)

UMN_STATIC_ASSERT(sizeof(struct umn_entry) == 64, "a hit needs one cache line of the entry");
UMN_STATIC_ASSERT(sizeof(struct umn_rest) == 64, "umn_rest relies on it");
UMN_STATIC_ASSERT(offsetof(struct umn_slab, entries) == UMN_SLAB_FIRST * sizeof(struct umn_entry), "numbers are places");
UMN_STATIC_ASSERT(UMN_COUNTS_PER_CHUNK % UMN_SLAB_NUMBERS == 0, "the counts of a slab are in one chunk");

uint64_t umn_known_generation = UINT64_MAX;

/* ---- Hits ---- */

static bool left(struct ummunotify_cache *c, struct umn_entry *entry);

static struct umn_entry *search(struct ummunotify_cache *c, uint64_t start, uint64_t end)
{
	uint64_t orders = load(&c->orders) & umn_orders_for(end - start);
	const struct umn_index *index = load(&c->index);
	struct umn_entry *entry;
	uint32_t order, i;
	umn_link link;

	for (; orders; orders &= orders - 1) {
		order = (uint32_t)__builtin_ctzll(orders);
		link = load(umn_bucket(index, start >> order, order));
		/* Chains change meanwhile, and entries move to other chains. At worst this misses an entry, and the bound ends
		 * a walk that others keep leading on; the caller then looks again under the lock. */
		for (i = 0; link && i < UMN_CHAIN_MAX; i++, link = load(umn_next_link(link))) {
			entry = umn_entry_of(link);
			if (umn_entry_contains(entry, start, end))
				return entry;
		}
	}
	return NULL;
}

/* A user less, after which a closed entry may have to leave. */
static bool count_down(struct ummunotify_cache *c, struct umn_entry *entry)
{
	umn_users_add(entry->users, &umn_rest(entry)->others, -1);
	return !umn_entry_is_open(entry) && left(c, entry);
}

struct umn_entry *umn_entry_hit_slowly(struct ummunotify_cache *c, uint64_t start, uint64_t end, struct umn_entry *counted)
{
	struct umn_entry *entry = counted;

	if (entry && !umn_entry_contains(entry, start, end)) { /* another on the same chain */
		count_down(c, entry);
		entry = NULL;
	}
	if (!entry) {
		entry = start < end ? search(c, start, end) : NULL; /* or it is empty, or wraps round */
		if (!entry)
			return NULL;
		umn_users_add(entry->users, &umn_rest(entry)->others, 1);
	}
	if (umn_entry_is_open(entry) && umn_entry_contains(entry, start, end) && umn_entry_valid(entry)) {
		__atomic_fetch_add(&c->other_hits, 1, __ATOMIC_RELAXED);
		return entry;
	}
	count_down(c, entry);
	return NULL;
}

bool umn_entry_release_slowly(struct ummunotify_cache *c, struct umn_entry *entry, bool counted)
{
	/* What was acquired before a fork is the parent's; there are zeros here. */
	if (!umn_entry_is_ours(entry))
		return false;
	if (!counted)
		return left(c, entry);
	/* It went stale while it was used: as long as it is ours it can be said to be so. */
	if (umn_entry_is_open(entry) && !umn_entry_untouched(entry)) {
		pthread_mutex_lock(&c->lock);
		umn_entry_retire(c, entry);
		pthread_mutex_unlock(&c->lock);
	}
	__atomic_store_n(&entry->stamp, __atomic_load_n(&c->clock, __ATOMIC_RELAXED), __ATOMIC_RELAXED);
	return count_down(c, entry);
}

/* ---- The order of use ---- */

/*
 * A heap by `key`, which is what the entry's stamp was when it was last looked at. Stamps only grow, so the entry on top is the
 * least recently used one if its key is still its stamp, and else it has to go where it belongs now.
 */
static bool older(const struct umn_entry *a, const struct umn_entry *b)
{
	return (int32_t)(umn_rest(a)->key - umn_rest(b)->key) < 0;
}

static void heap_set(struct ummunotify_cache *c, size_t i, struct umn_entry *entry)
{
	c->heap[i] = entry;
	umn_rest(entry)->position = i;
}

static void heap_sift(struct ummunotify_cache *c, size_t i)
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

static void heap_add(struct ummunotify_cache *c, struct umn_entry *entry, uint32_t key)
{
	umn_rest(entry)->key = key;
	heap_set(c, c->count++, entry);
	heap_sift(c, umn_rest(entry)->position);
}

static void heap_remove(struct ummunotify_cache *c, struct umn_entry *entry)
{
	struct umn_entry *last = c->heap[--c->count];

	if (last == entry)
		return;
	heap_set(c, umn_rest(entry)->position, last);
	heap_sift(c, umn_rest(entry)->position);
}

/* ---- The index ---- */

static struct umn_index *new_index(uint32_t shift, struct umn_index *older)
{
	struct umn_index *index;
	const size_t size = sizeof *index + (sizeof *index->bucket << (64 - shift));

	index = aligned_alloc(64, size);

	if (index) {
		memset(index, 0, size);
		index->shift = shift;
		index->older = older;
	}
	return index;
}

static uint64_t block_of(const struct umn_entry *entry, int i)
{
	return (i ? entry->shown.end - 1 : entry->shown.start) >> umn_rest(entry)->order;
}

/* How many blocks it touches. */
static int links_of(const struct umn_entry *entry)
{
	return block_of(entry, 0) == block_of(entry, 1) ? 1 : 2;
}

static void link_to(struct umn_index *index, struct umn_entry *entry)
{
	umn_link *bucket;

	for (int i = 0; i < links_of(entry); i++) {
		bucket = (umn_link *)umn_bucket(index, block_of(entry, i), umn_rest(entry)->order);
		store(&umn_rest(entry)->next_link[i], *bucket);
		store(bucket, (umn_link)entry | (umn_link)i);
	}
}

/* Failing that, chains get longer. The old index stays, as hits may be in it. */
static void grow_index(struct ummunotify_cache *c)
{
	struct umn_index *index = new_index(c->all->shift - 1, c->all);

	if (!index)
		return;
	for (size_t i = 0; i < c->count; i++)
		link_to(index, c->heap[i]);
	c->all = index;
	store(&c->index, index);
}

static void link_entry(struct ummunotify_cache *c, struct umn_entry *entry)
{
	link_to(c->all, entry);
	if (!c->of_order[umn_rest(entry)->order]++)
		store(&c->orders, c->orders | UINT64_C(1) << umn_rest(entry)->order);
}

static void unlink_entry(struct ummunotify_cache *c, struct umn_entry *entry)
{
	umn_link *at;

	for (int i = 0; i < links_of(entry); i++) {
		at = (umn_link *)umn_bucket(c->all, block_of(entry, i), umn_rest(entry)->order);
		while (*at != ((umn_link)entry | (umn_link)i))
			at = umn_next_link(*at);
		store(at, umn_rest(entry)->next_link[i]);
	}
	if (!--c->of_order[umn_rest(entry)->order])
		store(&c->orders, c->orders & ~(UINT64_C(1) << umn_rest(entry)->order));
}

/* The link after this one, and after the same entry's other link if both are on this chain: they are neighbours then. */
static umn_link next_link(umn_link link)
{
	umn_link next = *umn_next_link(link);

	return next && umn_entry_of(next) == umn_entry_of(link) ? *umn_next_link(next) : next;
}

/* ---- Leaving ---- */

static int32_t users(const struct umn_entry *entry)
{
	return umn_users_sum(entry->users, &umn_rest(entry)->others);
}

static void wake(struct ummunotify_cache *c)
{
	if (c->waiting)
		pthread_cond_broadcast(&c->changed);
}

static void push_leaving(struct ummunotify_cache *c, struct umn_entry *entry)
{
	umn_rest(entry)->place = UMN_LEAVING;
	c->leaving_count++;
	umn_rest(entry)->next = NULL;
	*c->leaving_end = entry;
	c->leaving_end = &umn_rest(entry)->next;
	wake(c);
}

/* The entry is in the heap. To be followed by a barrier, and by leave_or. */
static void close_entry(struct ummunotify_cache *c, struct umn_entry *entry)
{
	heap_remove(c, entry);
	unlink_entry(c, entry);
	umn_rest(entry)->place = UMN_RETIRED;
	/* Relaxed will do, but for ThreadSanitizer. */
	__atomic_store_n(&entry->open, UMN_CLOSED, __ATOMIC_SEQ_CST);
}

/* After a barrier. False: it is in use. */
static bool leave_if_unused(struct ummunotify_cache *c, struct umn_entry *entry)
{
	if (users(entry))
		return false;
	push_leaving(c, entry);
	return true;
}

/* Still in use, so hits may go on finding it. A thread that saw it closed meanwhile looks again under the lock. */
static void reopen(struct ummunotify_cache *c, struct umn_entry *entry)
{
	umn_rest(entry)->place = UMN_OPEN;
	link_entry(c, entry);
	store(&entry->open, ((const struct umn_region *)umn_rest(entry)->region)->source ? UMN_OPENED_LATE : UMN_OPENED);
}

/* An open entry leaves if it has no user; else it stays open. */
static bool evict(struct ummunotify_cache *c, struct umn_entry *entry)
{
	if (users(entry))
		return false;
	close_entry(c, entry);
	umn_users_barrier();
	if (leave_if_unused(c, entry))
		return true;
	reopen(c, entry);
	heap_add(c, entry, c->clock);
	return false;
}

static void count_stale(struct ummunotify_cache *c, struct umn_entry *entry)
{
	uint32_t syscall;

	if (umn_entry_untouched(entry))
		return;
	/* A feeder that is half done may not have said it yet. Shared memory: it may be any number. */
	syscall = (uint32_t)__atomic_load_n(&entry->slot->syscall, __ATOMIC_RELAXED);
	c->stats.stale++;
	c->causes[syscall < UMMUNOTIFY_CACHE_CAUSES ? syscall : UMMUNOTIFY_CACHE_CAUSES - 1]++;
}

void umn_entry_retire(struct ummunotify_cache *c, struct umn_entry *entry)
{
	if (umn_rest(entry)->place != UMN_OPEN)
		return;
	count_stale(c, entry);
	close_entry(c, entry);
	umn_users_barrier();
	leave_if_unused(c, entry);
}

/* The count of a closed entry went down. By now it may be another entry; if that has to leave, this is as good a time as any. */
static bool left(struct ummunotify_cache *c, struct umn_entry *entry)
{
	bool leaves;

	if (!umn_entry_is_ours(entry))
		return false;
	pthread_mutex_lock(&c->lock);
	leaves = umn_rest(entry)->place == UMN_RETIRED && leave_if_unused(c, entry);
	pthread_mutex_unlock(&c->lock);
	return leaves;
}

size_t umn_entries_evict(struct ummunotify_cache *c, size_t count)
{
	struct umn_entry *entry, *closed[BATCH], *busy = NULL;
	size_t n = 0, batch;
	uint32_t stamp;

	do {
		for (batch = 0; batch < BATCH && n + batch < count && c->count;) {
			entry = c->heap[0];
			stamp = __atomic_load_n(&entry->stamp, __ATOMIC_RELAXED);
			if (users(entry)) {
				heap_remove(c, entry);
				umn_rest(entry)->next = busy;
				busy = entry;
			} else if (stamp != umn_rest(entry)->key) {
				umn_rest(entry)->key = stamp;
				heap_sift(c, 0);
			} else {
				close_entry(c, entry);
				closed[batch++] = entry;
			}
		}
		if (batch)
			umn_users_barrier();
		for (size_t i = 0; i < batch; i++) {
			if (leave_if_unused(c, closed[i])) {
				n++;
				continue;
			}
			reopen(c, closed[i]);
			umn_rest(closed[i])->next = busy;
			busy = closed[i];
		}
	} while (batch);
	for (; (entry = busy); heap_add(c, entry, c->clock))
		busy = umn_rest(entry)->next;
	return n;
}

struct umn_entry *umn_entry_take(struct ummunotify_cache *c)
{
	struct umn_entry *entry = c->leaving;

	if (!entry)
		return NULL;
	c->leaving = umn_rest(entry)->next;
	if (!c->leaving)
		c->leaving_end = &c->leaving;
	return entry;
}

void umn_entry_put_back(struct ummunotify_cache *c, struct umn_entry *entry)
{
	c->leaving_count--;
	push_leaving(c, entry);
}

void umn_entry_keep(struct ummunotify_cache *c, struct umn_entry *entry)
{
	c->leaving_count--;
	c->stats.not_deregistered++;
	umn_rest(entry)->place = UMN_KEPT;
	umn_rest(entry)->next = c->kept;
	c->kept = entry;
	wake(c);
}

void umn_entries_retry(struct ummunotify_cache *c)
{
	struct umn_entry *entry;

	while ((entry = c->kept)) {
		c->kept = umn_rest(entry)->next;
		c->stats.not_deregistered--;
		push_leaving(c, entry);
	}
}

/* ---- Coming ---- */

/* Slabs of closed caches, and all by number. */
static struct {
	pthread_mutex_t lock;
	uint32_t epoch;
	struct umn_slab *free;
	struct umn_slab *fresh, *fresh_end; /* never used */
	uint32_t count;
	struct umn_slab *by_number[UMN_SLABS];
} slabs = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void lock_slabs(void)
{
	pthread_mutex_lock(&slabs.lock);
}

/* Of a child: the list may have been half changed in the parent. What it has lost stays lost. */
static void slabs_in_child(void)
{
	pthread_mutex_init(&slabs.lock, NULL);
	slabs.free = NULL;
	slabs.fresh = slabs.fresh_end = NULL;
}

void *umn_wiped_memory(size_t size, size_t wiped)
{
	void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED)
		return NULL;
	if (madvise(memory, wiped, MADV_WIPEONFORK)) {
		munmap(memory, size);
		return NULL;
	}
	return memory;
}

/* Never unmapped. Several at a time, for fewer system calls. */
static struct umn_slab *allocate_slab(void)
{
	const size_t size = SLABS_AT_ONCE * sizeof *slabs.fresh;

	if (slabs.fresh == slabs.fresh_end) {
		struct umn_slab *fresh = umn_wiped_memory(size, size);

		if (!fresh)
			return NULL;
		slabs.fresh = fresh;
		slabs.fresh_end = fresh + SLABS_AT_ONCE;
	}
	return slabs.fresh++;
}

static struct umn_slab *new_slab(void)
{
	struct umn_slab *slab;

	lock_slabs();
	slab = slabs.free;
	if (slab) {
		slabs.free = slab->next;
	} else if (slabs.count < UMN_SLABS && (slab = allocate_slab())) {
		slab->number = slabs.count * UMN_SLAB_NUMBERS;
		for (uint32_t i = 0; i < UMN_SLAB_ENTRIES; i++)
			slab->entries[i].users = umn_tally_of(slab->number + UMN_SLAB_FIRST + i);
		/* A child that is made in between leaves a number unused. */
		store(&slabs.by_number[slabs.count++], slab);
	}
	pthread_mutex_unlock(&slabs.lock);
	return slab;
}

struct umn_entry *umn_entry_by_number(uint64_t number)
{
	struct umn_slab *slab =
		number < (uint64_t)UMN_SLABS * UMN_SLAB_NUMBERS ? load(&slabs.by_number[number / UMN_SLAB_NUMBERS]) : NULL;
	uint32_t i = number % UMN_SLAB_NUMBERS;

	return slab && i >= UMN_SLAB_FIRST ? &slab->entries[i - UMN_SLAB_FIRST] : NULL;
}

static bool add_slab(struct ummunotify_cache *c)
{
	const size_t more = UMN_SLAB_ENTRIES;
	struct umn_entry **heap;
	struct umn_slab *slab;

	if (c->heap_room < c->entries + more) {
		heap = realloc(c->heap, (2 * c->entries + more) * sizeof *heap);
		if (!heap)
			return false;
		c->heap = heap;
		c->heap_room = 2 * c->entries + more;
	}
	slab = new_slab();
	if (!slab)
		return false;
	slab->earlier_hits = umn_users_sum64(umn_tally_of(slab->number));
	slab->next = c->slabs;
	c->slabs = slab;
	c->entries += more;
	for (size_t i = more; i-- > 0;) {
		store(&slab->rests[i].cache, c);
		store(&slab->rests[i].epoch, c->epoch);
		slab->rests[i].next = c->free;
		c->free = &slab->entries[i];
	}
	return true;
}

struct umn_entry *umn_entry_reserve(struct ummunotify_cache *c, uint64_t start, uint64_t end)
{
	struct umn_entry *entry;

	if (!c->free && !add_slab(c))
		return NULL;
	entry = c->free;
	c->free = umn_rest(entry)->next;
	umn_rest(entry)->place = UMN_RESERVED;
	umn_rest(entry)->order = umn_order(end - start);
	__atomic_store_n(&entry->shown.start, start, __ATOMIC_RELAXED);
	__atomic_store_n(&entry->shown.end, end, __ATOMIC_RELAXED);
	umn_rest(entry)->region = NULL;
	c->stats.registrations++;
	c->stats.registered_bytes += end - start;
	return entry;
}

void umn_entry_free(struct ummunotify_cache *c, struct umn_entry *entry)
{
	c->leaving_count -= umn_rest(entry)->place == UMN_LEAVING;
	c->stats.registrations--;
	c->stats.registered_bytes -= entry->shown.end - entry->shown.start;
	umn_rest(entry)->place = UMN_FREE;
	umn_rest(entry)->region = NULL;
	umn_rest(entry)->next = c->free;
	c->free = entry;
	wake(c);
}

void umn_entry_publish(struct ummunotify_cache *c, struct umn_entry *entry)
{
	const struct umn_region *region = (const struct umn_region *)umn_rest(entry)->region;

	__atomic_store_n(&entry->stamp, c->clock + 1, __ATOMIC_RELAXED);
	/* What is used from now on is used later than this. */
	__atomic_store_n(&c->clock, c->clock + 2, __ATOMIC_RELAXED);
	/* Hits that found the wrong entry may be counted too, for a moment. */
	umn_users_add(entry->users, &umn_rest(entry)->others, 1);
	if (!region) {
		umn_rest(entry)->place = UMN_RETIRED;
		c->stats.uncached++;
		return;
	}
	entry->slot = region->slot;
	entry->header = region->header;
	entry->overflow = __atomic_load_n(&region->overflow, __ATOMIC_RELAXED);
	/* With the lock held: either the change's event comes later, and then finds the region here, or the change is seen here. So none
	 * becomes known that leaves a stale entry open. */
	if (!umn_entry_untouched(entry)) {
		umn_rest(entry)->place = UMN_RETIRED;
		return;
	}
	umn_rest(entry)->place = UMN_OPEN;
	heap_add(c, entry, entry->stamp);
	link_entry(c, entry);
	if (c->count > UINT64_C(1) << (63 - c->all->shift))
		grow_index(c);
	/* Release: a hit that finds it open finds the rest. */
	store(&entry->open, region->source ? UMN_OPENED_LATE : UMN_OPENED);
}

struct umn_entry *umn_entry_find(struct ummunotify_cache *c, uint64_t start, uint64_t end)
{
	uint64_t orders = c->orders & umn_orders_for(end - start);
	umn_link link, next;
	struct umn_entry *entry;
	uint32_t order;

	for (; orders; orders &= orders - 1) {
		order = (uint32_t)__builtin_ctzll(orders);
		for (link = *umn_bucket(c->all, start >> order, order); link; link = next) {
			next = next_link(link);
			entry = umn_entry_of(link);
			if (!umn_entry_contains(entry, start, end))
				continue;
			if (umn_entry_valid(entry)) {
				/* Under the lock it stays open. */
				umn_users_add(entry->users, &umn_rest(entry)->others, 1);
				__atomic_fetch_add(&c->other_hits, 1, __ATOMIC_RELAXED);
				return entry;
			}
			umn_entry_retire(c, entry);
		}
	}
	return NULL;
}

/* ---- Ranges ---- */

static bool overlaps(const struct umn_entry *entry, uint64_t start, uint64_t end)
{
	return entry->shown.start < end && entry->shown.end > start;
}

void umn_entries_retire_range(struct ummunotify_cache *c, uint64_t start, uint64_t end)
{
	struct umn_entry *entry, *closed = NULL;

	umn_for_each_entry(c, e)
	{
		if (umn_rest(e)->place != UMN_OPEN || !overlaps(e, start, end))
			continue;
		count_stale(c, e);
		close_entry(c, e);
		umn_rest(e)->next = closed;
		closed = e;
	}
	if (closed)
		umn_users_barrier();
	while ((entry = closed)) {
		closed = umn_rest(entry)->next;
		leave_if_unused(c, entry);
	}
}

bool umn_entries_overlap(struct ummunotify_cache *c, uint64_t start, uint64_t end)
{
	umn_for_each_entry(c, e) if (umn_rest(e)->place != UMN_FREE && overlaps(e, start, end)) return true;
	return false;
}

struct merge {
	uint64_t start, end;		/* asked for */
	uint64_t low, high, max_length; /* so far */
	bool all;
	size_t count;
};

static void merge_entry(struct ummunotify_cache *c, struct umn_entry *entry, struct merge *m)
{
	uint64_t low = entry->shown.start < m->low ? entry->shown.start : m->low;
	uint64_t high = entry->shown.end > m->high ? entry->shown.end : m->high;
	/* A stale one may be of memory that is no longer mapped. */
	bool fits = high - low <= m->max_length && umn_entry_untouched(entry);

	if (!overlaps(entry, m->start, m->end) || !(fits || m->all) || !evict(c, entry))
		return;
	m->count++;
	if (fits) {
		m->low = low;
		m->high = high;
	}
}

size_t umn_entries_merge(struct ummunotify_cache *c, uint64_t *start, uint64_t *end, uint64_t max_length, bool all)
{
	struct merge m = {.start = *start, .end = *end, .low = *start, .high = *end, .max_length = max_length, .all = all};
	umn_link link, next;
	uint64_t orders, block, last;
	uint32_t order;

	for (orders = c->orders; orders; orders &= orders - 1) {
		order = (uint32_t)__builtin_ctzll(orders);
		block = m.start >> order;
		last = (m.end - 1) >> order;
		if (last - block > c->count) {
			umn_for_each_entry(c, e) if (umn_rest(e)->place == UMN_OPEN && umn_rest(e)->order == order)
				merge_entry(c, e, &m);
			continue;
		}
		for (; block <= last; block++)
			for (link = *umn_bucket(c->all, block, order); link; link = next) {
				next = next_link(link);
				merge_entry(c, umn_entry_of(link), &m);
			}
	}
	*start = m.low;
	*end = m.high;
	return m.count;
}

/* ---- The whole ---- */

static void start_slabs(void)
{
	umn_process_add_child(slabs_in_child);
}

bool umn_entries_start(struct ummunotify_cache *c)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	pthread_once(&once, start_slabs);
	c->all = c->index = new_index(FIRST_SHIFT, NULL);
	c->leaving_end = &c->leaving;
	return c->all;
}

void umn_entries_forget(struct ummunotify_cache *c)
{
	memset(c->all->bucket, 0, sizeof *c->all->bucket << (64 - c->all->shift));
	memset(c->of_order, 0, sizeof c->of_order);
	memset(&c->stats, 0, sizeof c->stats);
	memset(c->causes, 0, sizeof c->causes);
	c->other_hits = 0;
	c->orders = 0;
	c->clock = 0;
	store(&c->index, c->all);
	c->calls = NULL;
	c->slabs = NULL;
	c->free = c->kept = c->leaving = NULL;
	c->leaving_end = &c->leaving;
	c->leaving_count = c->count = c->entries = 0;
	c->busy = 0;
}

void umn_entries_end(struct ummunotify_cache *c)
{
	struct umn_index *index;
	struct umn_slab *slab;

	while ((slab = c->slabs)) {
		bool used = false;

		c->slabs = slab->next;
		lock_slabs();
		for (uint32_t i = 0; i < UMN_SLAB_ENTRIES; i++) {
			used |= users(&slab->entries[i]) != 0;
			slab->rests[i].place = UMN_FREE;
			slab->rests[i].region = NULL;
			slab->rests[i].cache = NULL;
		}
		if (!used) {
			slab->next = slabs.free;
			slabs.free = slab;
		}
		pthread_mutex_unlock(&slabs.lock);
	}
	while ((index = c->all)) {
		c->all = index->older;
		free(index);
	}
	free(c->heap);
}

void umn_entries_stats(struct ummunotify_cache *c, struct ummunotify_cache_stats *stats)
{
	*stats = c->stats;
	stats->hits = __atomic_load_n(&c->other_hits, __ATOMIC_RELAXED);
	for (struct umn_slab *slab = c->slabs; slab; slab = slab->next)
		stats->hits += umn_users_sum64(umn_tally_of(slab->number)) - slab->earlier_hits;
	umn_for_each_entry(c, e) if (umn_rest(e)->place > UMN_RESERVED && users(e))
	{
		stats->in_use++;
		stats->in_use_bytes += e->shown.end - e->shown.start;
	}
}
