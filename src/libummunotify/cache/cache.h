/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The native part of a registration cache: which registration holds given bytes, who uses it, when it is to be deregistered.
 *
 * It watches and registers nothing itself. Whoever owns the cache does (cache.py), and calls the second half of what is
 * declared here, from any thread; that half takes the cache's lock, never for long. The first half is for everybody who does
 * I/O: acquire and release take no lock and make no system call, but for what umn_region_valid needs with some sources.
 *
 *	struct umn_entry *entry = umn_cache_acquire(cache, address, address + length);
 *
 *	if (!entry)
 *		... RegistrationCache.acquire, which registers
 *	post(entry->handle, address, length);
 *	if (umn_cache_release(cache, entry))
 *		... RegistrationCache.collect, which deregisters, now or later
 *
 * An entry's life: reserved, published (open: anybody may find it), retired (given to nobody any more), leaving (not used by
 * anybody, to be deregistered), free. It is retired and leaving at once if nobody uses it; else the last user makes it leave.
 */
#ifndef UMN_CACHE_H
#define UMN_CACHE_H

#include "table/table.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The parts of an entry's state. */
#define UMN_USER UINT64_C(1)		  /* how many use it: 32 bits */
#define UMN_OPEN (UINT64_C(1) << 32)	  /* whoever finds it may use it */
#define UMN_RETIRED (UINT64_C(1) << 33)	  /* once there is no user, somebody has to make it leave */
#define UMN_HIT (UINT64_C(1) << 34)	  /* how often it was found: a signed number in the 30 bits that are left, of which */
#define UMN_MANY_HITS (UINT64_C(1) << 62) /* so many are carried over to the cache's own count */

#define UMN_CHAIN_MAX 64 /* links that a hit follows */

/* For the index. An entry has two links, see umn_bucket. */
struct umn_link {
	struct umn_link *next;
};

/* A registration. Everything but `state` and `stamp` stays as it is while the entry is in use. Entries stay entries for as long as
 * the cache lives, so that a hit may look at one that is no longer what it was. */
struct umn_entry {
	/* What a hit needs, in one cache line. */
	uint64_t state;
	uint64_t start, end; /* bytes that are registered */
	void *handle; /* the owner's */
	/* Of the region, so that a hit need not go there too. It is not renewed while it is here. */
	const struct umn_slot *slot;
	const struct umn_header *header;
	const struct umn_region *late; /* the region if its source's news may come late, or NULL */
	uint32_t overflow;
	uint32_t stamp; /* the cache's clock when it was last released */

	struct umn_link link[2];
	const struct umn_region *region;
	void *watch; /* the owner's */
	struct umn_entry *next; /* the rest is cache.c's */
	size_t position;
	uint32_t key;
	uint32_t life;
	uint8_t order; /* no longer than 1 << order bytes */
	uint8_t place;
} __attribute__((aligned(128)));

struct umn_index {
	struct umn_index *older;
	uint32_t shift;
	struct umn_link *bucket[];
};

struct umn_cache {
	struct umn_index *index;
	uint64_t orders; /* bit n: there are entries of order n */
	uint32_t clock;	 /* counts registrations */
	void (*retire)(struct umn_cache *cache, struct umn_entry *entry);
	bool (*left)(struct umn_cache *cache, struct umn_entry *entry, uint64_t state);
};

/* ---- For everybody ---- */

static inline uint32_t umn_order(uint64_t length)
{
	return length < 2 ? 0 : 64 - (uint32_t)__builtin_clzll(length - 1);
}

/* Memory is divided into blocks of 1 << order bytes, for each order anew; an entry is in the buckets of the one or two blocks of
 * its own order that it touches. So whatever part of it is asked for, the block of the first byte leads to it. */
static inline struct umn_link *const *umn_bucket(const struct umn_index *index, uint64_t block, uint32_t order)
{
	return &index->bucket[((block + ((uint64_t)order << 48)) * UINT64_C(0x9e3779b97f4a7c15)) >> index->shift];
}

static inline struct umn_entry *umn_entry_of(const struct umn_link *link)
{
	return (struct umn_entry *)((uintptr_t)link & -sizeof(struct umn_entry));
}

/* umn_region_untouched and umn_region_valid of its region. */
static inline bool umn_entry_untouched(const struct umn_entry *entry)
{
	return (__atomic_load_n(&entry->slot->state, __ATOMIC_ACQUIRE) & (UMN_LIVE | UMN_INVALID)) == UMN_LIVE &&
	       __atomic_load_n(&entry->header->overflow, __ATOMIC_ACQUIRE) == entry->overflow;
}

static inline bool umn_entry_valid(const struct umn_entry *entry)
{
	return umn_entry_untouched(entry) && (!entry->late || umn_region_valid(entry->late));
}

/* A valid registration that contains [start, end), start < end. It stays registered until it is released. NULL: there is none,
 * or it was not found without the lock. */
static inline struct umn_entry *umn_cache_acquire(struct umn_cache *cache, uint64_t start, uint64_t end)
{
	/* Acquire, here and with the links: whoever published these pointers has initialised what they lead to before. */
	const struct umn_index *index = __atomic_load_n(&cache->index, __ATOMIC_ACQUIRE);
	uint32_t order = umn_order(end - start), i;
	const struct umn_link *link;
	struct umn_entry *entry;
	uint64_t orders, state;

	for (orders = __atomic_load_n(&cache->orders, __ATOMIC_RELAXED) >> order << order; orders; orders &= orders - 1) {
		order = (uint32_t)__builtin_ctzll(orders);
		link = __atomic_load_n(umn_bucket(index, start >> order, order), __ATOMIC_ACQUIRE);
		/* Chains change meanwhile, and entries move to other chains. At worst this misses an entry, and the bound ends
		 * a walk that others keep leading on; the owner then looks again under the lock. */
		for (i = 0; link && i < UMN_CHAIN_MAX; i++, link = __atomic_load_n(&link->next, __ATOMIC_ACQUIRE)) {
			entry = umn_entry_of(link);
			if (__atomic_load_n(&entry->start, __ATOMIC_RELAXED) <= start &&
			    __atomic_load_n(&entry->end, __ATOMIC_RELAXED) >= end)
				goto found;
		}
	}
	return NULL;
found:
	/* The atomic operation takes about as long as to fetch this. */
	__builtin_prefetch(__atomic_load_n(&entry->slot, __ATOMIC_RELAXED));
	/* So far a guess: the entry may have become another since. Count in first, then see whether it is open. An open entry that
	 * is counted in does not become another, as nobody makes it leave without having found no user in the same atomic
	 * operation. Acquire: what is read from here on was written before it was opened. */
	state = __atomic_fetch_add(&entry->state, UMN_USER + UMN_HIT, __ATOMIC_ACQUIRE);
	if ((state & UMN_OPEN) && __atomic_load_n(&entry->start, __ATOMIC_RELAXED) <= start &&
	    __atomic_load_n(&entry->end, __ATOMIC_RELAXED) >= end && umn_entry_valid(entry))
		return entry;
	/* The count may have kept somebody from making it leave, so that is ours to do. */
	state = __atomic_fetch_sub(&entry->state, UMN_USER + UMN_HIT, __ATOMIC_ACQ_REL);
	if (state & UMN_RETIRED)
		cache->left(cache, entry, state);
	return NULL;
}

/* Ends the use of an entry. True: there is something to deregister (umn_cache_take). No system call. */
static inline bool umn_cache_release(struct umn_cache *cache, struct umn_entry *entry)
{
	uint64_t state;

	/* It went stale while it was used: as long as it is ours it can be said to be so. This is only to deregister it soon, so the
	 * check that costs nothing will do. */
	if (!umn_entry_untouched(entry))
		cache->retire(cache, entry);
	__atomic_store_n(&entry->stamp, __atomic_load_n(&cache->clock, __ATOMIC_RELAXED), __ATOMIC_RELAXED);
	/* Release: all use of the handle comes before it is deregistered by whoever finds no user. From here on the entry may
	 * become another at any time. */
	state = __atomic_fetch_sub(&entry->state, UMN_USER, __ATOMIC_ACQ_REL);
	return (state & (UMN_OPEN | UMN_MANY_HITS)) != UMN_OPEN && cache->left(cache, entry, state);
}

/* ---- For the owner ---- */

struct umn_cache *umn_cache_new(void);

/* Frees the memory, whatever is registered. */
void umn_cache_delete(struct umn_cache *cache);

/* In the child of a fork, whose only thread calls it first thing: the cache is empty. To release what was acquired before has no
 * effect. What belongs to the parent is left where it is, in memory that is never freed. */
void umn_cache_abandon(struct umn_cache *cache);

/* An entry for [start, end), which counts as registered from now on. To be published, or freed. NULL: there is no memory. */
struct umn_entry *umn_cache_reserve(struct umn_cache *cache, uint64_t start, uint64_t end);

/* It is registered, and the caller uses it. Others find it if `open`. */
void umn_cache_publish(struct umn_cache *cache, struct umn_entry *entry, const struct umn_region *region, void *handle,
		       void *watch, bool open);

/* Like umn_cache_acquire, but what is there is found. Stale ones in the way are retired. */
struct umn_entry *umn_cache_find(struct umn_cache *cache, uint64_t start, uint64_t end);

/* Retires an entry that the caller uses, or that nobody else can make leave meanwhile. */
void umn_cache_retire(struct umn_cache *cache, struct umn_entry *entry);

/* Retires all entries that overlap [start, end). */
void umn_cache_retire_range(struct umn_cache *cache, uint64_t start, uint64_t end);

/* Makes up to `count` entries leave that nobody uses, those first that were not used for the longest time. How many. */
size_t umn_cache_evict(struct umn_cache *cache, size_t count);

/* Makes entries leave that nobody uses and that overlap [*start, *end), and widens the range by theirs, up to max_length bytes.
 * What does not fit stays, or leaves without that if `all`. How many left. */
size_t umn_cache_merge(struct umn_cache *cache, uint64_t *start, uint64_t *end, uint64_t max_length, bool all);

/* Is any byte of it registered or about to be, by whatever entry? */
bool umn_cache_overlaps(struct umn_cache *cache, uint64_t start, uint64_t end);

/* The next entry to be deregistered, NULL: none. Then it is to be freed, or kept if that failed. */
struct umn_entry *umn_cache_take(struct umn_cache *cache);
void umn_cache_free(struct umn_cache *cache, struct umn_entry *entry);
void umn_cache_keep(struct umn_cache *cache, struct umn_entry *entry);

/* What was kept is to be deregistered once more. */
void umn_cache_retry(struct umn_cache *cache);

/* What counts as registered now: whatever was reserved and not freed. */
struct umn_cache_load {
	size_t registrations;
	uint64_t bytes;
	size_t leaving, kept; /* of the registrations */
};
void umn_cache_load(struct umn_cache *cache, struct umn_cache_load *load);

struct umn_cache_stats {
	uint64_t hits;
	uint64_t stale; /* were retired and had gone stale */
	uint64_t closed; /* were published without being open */
	size_t in_use;	/* registrations */
	uint64_t in_use_bytes;
};
void umn_cache_stats(struct umn_cache *cache, struct umn_cache_stats *stats);

/* For tests: is all in order? NULL, or what is wrong. */
const char *umn_cache_check(struct umn_cache *cache);

#ifdef __cplusplus
}
#endif
#endif
