/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The registrations of a cache: found by address without a lock, kept in the order of their last use, given up when unused.
 *
 * An entry is reserved (it counts as registered), published (open: hits may find it), retired (used for nothing new), leaving (without
 * users, to be deregistered), and free again. A hit meets entries in any state. It keeps one only if it is counted as a user and then
 * finds it open (users.h). Three rules follow:
 *
 * - What a hit reads of an open entry is written before it is opened, and changes only after it was closed and had no user.
 * - An entry leaves once: under the lock, when it is closed and its users' sum is 0.
 * - Entries and indices stay memory of their kind: a link leads to an entry, be it the wrong one. Slabs of entries are never freed; what
 *   a closed cache had is used by the next ones, under the same numbers.
 *
 * Everything but umn_entry_hit and umn_entry_release needs the cache's lock.
 */
#ifndef UMN_ENTRIES_H
#define UMN_ENTRIES_H

#include <pthread.h>

#include "cache/users.h"
#include "include/ummunotify.h"
#include "include/ummunotify_cache.h"
#include "process/process.h"
#include "table/table.h"

#define UMN_CHAIN_MAX 64 /* links that a hit follows */

/* Where an entry is. Read and written with the lock held. */
enum umn_place {
	UMN_FREE,
	UMN_RESERVED,
	UMN_OPEN,    /* in the index and in the heap */
	UMN_RETIRED, /* closed, and in use */
	UMN_LEAVING,
	UMN_KEPT, /* the registrar failed to deregister it */
};

/* What a hit needs, in one cache line. In a child of a fork it is zeros (MADV_WIPEONFORK), with the rest of the entry and the first page of
 * the cache: so a hit finds nothing there, a release finds a closed entry, and neither has to ask which process this is. */
struct umn_entry {
	struct ummunotify_registration shown;
	/* Of the region, so that a hit need not go there too. It is never renewed. */
	const struct umn_slot *slot;
	const struct umn_header *header;
	uint64_t unused;
	uint32_t open; /* enum umn_open */
	uint32_t overflow;
	uint32_t stamp; /* the cache's clock when it was last released */
	struct umn_tally users;
};

enum umn_open {
	UMN_CLOSED,
	UMN_OPENED,
	UMN_OPENED_LATE, /* and its source's news may come late: what is untouched is not yet valid */
};

/* An entry and which of its two links; 0: the end. See umn_bucket. */
typedef uintptr_t umn_link;

/* The rest of an entry, see umn_rest. */
struct umn_rest {
	umn_link next_link[2];
	struct ummunotify_region *region; /* NULL: its changes cannot be seen */
	struct ummunotify_cache *cache;
	struct umn_entry *next; /* of the list that goes with its place */
	size_t position;	/* in the heap */
	uint32_t key;
	uint32_t epoch; /* the process that it belongs to */
	int32_t others; /* users that are not counted by thread */
	uint8_t order;	/* no longer than 1 << order bytes */
	uint8_t place;
};

/* Numbers are those of places in slabs. In the first two is the slab's header; their counts are one of hits, in 64 bits. */
#define UMN_SLAB_NUMBERS 64u
#define UMN_SLAB_FIRST 2u
#define UMN_SLAB_ENTRIES (UMN_SLAB_NUMBERS - UMN_SLAB_FIRST)
#define UMN_SLABS (UMN_CHUNKS * UMN_COUNTS_PER_CHUNK / UMN_SLAB_NUMBERS)

struct umn_slab {
	struct umn_slab *next;
	uint64_t earlier_hits; /* when this cache got it */
	uint32_t number;
	struct umn_entry entries[UMN_SLAB_ENTRIES] __attribute__((aligned(128)));
	uint64_t unused[16];
	struct umn_rest rests[UMN_SLAB_ENTRIES];
};

struct umn_index {
	struct umn_index *older;
	uint32_t shift;
	umn_link bucket[] __attribute__((aligned(64)));
};

/* A thread that registers a range. In memory of its own, not on the stack: green threads (greenlet) move stacks away. */
struct umn_call {
	struct umn_call *next;
	uint64_t start, end;
};

#ifdef __x86_64__
#define UMN_HIT_PAGE 4096
#else
#define UMN_HIT_PAGE 65536 /* the largest pages that there are */
#endif

/* The generation of the shared notifier up to which every change is known to the caches: what it hit is not open any more. Never 0,
 * as a closed notifier's is. See umn_entry_unchanged. */
extern uint64_t umn_known_generation __attribute__((visibility("hidden")));

struct ummunotify_cache {
	/* What hits read; rarely written. Zeros in a child. */
	union {
		struct {
			struct umn_index *index;
			uint64_t orders; /* bit n: there are entries of order n */
			const uint64_t *
				generation; /* the shared notifier's; or of a notifier with other readers, one that is never known */
			uint32_t clock;	    /* counts registrations */
		};
		char page[UMN_HIT_PAGE];
	};

	uint32_t epoch; /* the process that the entries are of */
	pthread_mutex_t lock;
	pthread_cond_t changed; /* a call has ended, or an entry has left */
	uint32_t waiting;	/* threads, for `changed` */
	uint32_t busy;		/* threads that may be using the notifier */
	bool closed;
	struct ummunotify_registrar registrar;
	uint64_t max_bytes, max_registrations;
	const struct ummunotify_options *shared;
	uint32_t given;		/* the notifier is the caller's, and of the process with this epoch */
	bool must_open;		/* it is the shared one, and was not asked for in this process */
	struct ummunotify *umn; /* NULL: no source works, or it was not opened yet */
	char *uncached;

	struct umn_call *calls;
	struct umn_slab *slabs;
	struct umn_entry *free;
	struct umn_entry *leaving, **leaving_end; /* first come, first deregistered */
	struct umn_entry *kept;
	size_t leaving_count;		     /* with those that are being deregistered */
	struct ummunotify_cache_stats stats; /* but for hits and what is in use */
	uint64_t causes[UMMUNOTIFY_CACHE_CAUSES];
	uint64_t other_hits; /* those that are not counted by thread; atomic */

	struct umn_index *all;	 /* the index, as hits do not find it in a child */
	size_t count;		 /* open entries */
	struct umn_entry **heap; /* of these; on top is that with the oldest key */
	size_t heap_room, entries;
	size_t of_order[64];
};

/* ---- Hits ---- */

/* At least 1. */
static inline uint32_t umn_order(uint64_t length)
{
	return 64 - (uint32_t)__builtin_clzll((length - 1) | 1);
}

/* Those that may hold so many bytes. None for more than half of all addresses. */
static inline uint64_t umn_orders_for(uint64_t length)
{
	return ~UINT64_C(0) << (umn_order(length) - 1) << 1;
}

/* Memory is divided into blocks of 1 << order bytes, for each order anew; an entry is in the buckets of the one or two blocks of
 * its own order that it touches. So whatever part of it is asked for, the block of the first byte leads to it. */
static inline const umn_link *umn_bucket(const struct umn_index *index, uint64_t block, uint32_t order)
{
	/* Eight blocks next to each other are in one cache line of buckets, in an order of the line's own. */
	return &index->bucket[((block / 8 + ((uint64_t)order << 48)) * UINT64_C(0x9e3779b97f4a7c15)) >> index->shift ^ block % 8];
}

static inline struct umn_entry *umn_entry_of(umn_link link)
{
	return (struct umn_entry *)(link & -sizeof(struct umn_entry));
}

static inline struct umn_rest *umn_rest(const struct umn_entry *entry)
{
	return (struct umn_rest *)((uintptr_t)entry + offsetof(struct umn_slab, rests) - offsetof(struct umn_slab, entries));
}

/* Is it of this process? In a child that has not asked for its epoch yet, both epochs are 0. */
static inline bool umn_entry_is_ours(const struct umn_entry *entry)
{
	uint32_t epoch = __atomic_load_n(&umn_rest(entry)->epoch, __ATOMIC_ACQUIRE);

	return epoch && umn_process_is(epoch);
}

static inline umn_link *umn_next_link(umn_link link)
{
	return &umn_rest(umn_entry_of(link))->next_link[link & 1];
}

static inline struct umn_entry *umn_entry(struct ummunotify_registration *registration)
{
	return (struct umn_entry *)registration;
}

/* umn_region_untouched of its region. */
static inline bool umn_entry_untouched(const struct umn_entry *entry)
{
	return (__atomic_load_n(&entry->slot->state, __ATOMIC_ACQUIRE) & (UMN_LIVE | UMN_INVALID)) == UMN_LIVE &&
	       __atomic_load_n(&entry->header->overflow, __ATOMIC_ACQUIRE) == entry->overflow;
}

static inline bool umn_entry_valid(const struct umn_entry *entry)
{
	return umn_entry_untouched(entry) && (__atomic_load_n(&entry->open, __ATOMIC_RELAXED) != UMN_OPENED_LATE ||
					      umn_region_valid((const struct umn_region *)umn_rest(entry)->region));
}

/*
 * No watched region was hit by a change that is not known yet: so an entry that was found open after `known` was loaded is untouched,
 * and its slot's line need not be read.
 *
 * If the caller can know of a change, the generation loaded here counts it (see umn_region_untouched). If `known` is that number,
 * the entries that it hit were closed before `known` was stored (release), so the caller, having loaded `known` (acquire) first, did not
 * find them open. In the other order an entry could be found open, be closed by another thread that makes its change known, and
 * pass for untouched.
 */
static inline bool umn_entry_unchanged(const struct ummunotify_cache *c, uint64_t known)
{
	return __atomic_load_n(__atomic_load_n(&c->generation, __ATOMIC_RELAXED), __ATOMIC_ACQUIRE) == known;
}

static inline bool umn_entry_contains(const struct umn_entry *entry, uint64_t start, uint64_t end)
{
	return __atomic_load_n(&entry->shown.start, __ATOMIC_RELAXED) <= start &&
	       __atomic_load_n(&entry->shown.end, __ATOMIC_RELAXED) >= end;
}

static inline bool umn_entry_is_open(const struct umn_entry *entry)
{
	return __atomic_load_n(&entry->open, UMN_OPEN_ORDER) != UMN_CLOSED;
}

/* What is not inline below is what is rarely needed: so a hit needs no registers that would have to be saved. */
#define umn_likely(x) __builtin_expect(!!(x), 1)
#define UMN_ALWAYS_INLINE static inline __attribute__((always_inline))

/* What umn_entry_hit leaves: the first entry on the chain is not the one, its source's news may come late, or this is the thread's first use of
 * some of the entries. `counted`: an entry whose count is up, or NULL. */
struct umn_entry *umn_entry_hit_slowly(struct ummunotify_cache *c, uint64_t start, uint64_t end, struct umn_entry *counted);

/* With the count up, if `counted`. */
bool umn_entry_release_slowly(struct ummunotify_cache *c, struct umn_entry *entry, bool counted);

/* An open and valid entry that contains [start, end), with one user more; or NULL: then umn_entry_hit_slowly has to be called, with
 * `counted`. */
UMN_ALWAYS_INLINE struct umn_entry *umn_entry_hit(struct ummunotify_cache *c, uint64_t start, uint64_t end,
						  struct umn_entry **counted)
{
	/* Acquire, here and with the link: what these pointers lead to was initialised before they were published. In a
	 * child there are no orders, and the index is not looked at. */
	uint64_t orders = __atomic_load_n(&c->orders, __ATOMIC_ACQUIRE),
		 known = __atomic_load_n(&umn_known_generation, __ATOMIC_ACQUIRE);
	struct umn_entry *entry;
	uint32_t order;
	int32_t *count;
	umn_link link;

	*counted = NULL;
	/* Empty, or it wraps round. */
	if (!umn_likely(orders && start < end))
		return NULL;
	/* The shortest that may hold so many bytes: mostly the first. To calculate it (umn_order) takes longer on many CPUs. */
	while ((end - start - 1) >> (order = (uint32_t)__builtin_ctzll(orders))) {
		orders &= orders - 1;
		if (!orders)
			return NULL;
	}
	link = __atomic_load_n(umn_bucket(__atomic_load_n(&c->index, __ATOMIC_ACQUIRE), start >> order, order), __ATOMIC_ACQUIRE);
	entry = umn_entry_of(link);
	if (!umn_likely(link))
		return NULL;
	/* So far a guess, and the entry may become another at any time. First the count, then all checks; see users.h. Acquire: what is
	 * read from here on was written before it was opened, and stays so while it is counted. */
	count = umn_users_count(entry->users);
	if (!umn_likely(count))
		return NULL;
	umn_count_up(count);
	*counted = entry;
	if (!umn_likely(__atomic_load_n(&entry->open, UMN_OPEN_ORDER) == UMN_OPENED && umn_entry_contains(entry, start, end) &&
			(umn_entry_unchanged(c, known) || umn_entry_untouched(entry))))
		return NULL;
	/* The count of hits lies where the counts of the slab's numbers begin. */
	umn_count_hit((uint64_t *)((uintptr_t)count & -(UMN_SLAB_NUMBERS * sizeof *count)));
	return entry;
}

/* One user less. True: there is something to deregister. */
UMN_ALWAYS_INLINE bool umn_entry_release(struct ummunotify_cache *c, struct umn_entry *entry)
{
	uint64_t known = __atomic_load_n(&umn_known_generation, __ATOMIC_ACQUIRE);
	uint32_t clock;
	int32_t *count;

	/* A stale one is to be deregistered soon, no more, so the check that costs nothing will do. */
	if (!umn_likely(umn_entry_is_open(entry) && (umn_entry_unchanged(c, known) || umn_entry_untouched(entry))))
		return umn_entry_release_slowly(c, entry, true);
	/* Mostly it is not another, and the line stays as it is for other threads. */
	clock = __atomic_load_n(&c->clock, __ATOMIC_RELAXED);
	if (!umn_likely(__atomic_load_n(&entry->stamp, __ATOMIC_RELAXED) == clock))
		__atomic_store_n(&entry->stamp, clock, __ATOMIC_RELAXED);
	count = umn_users_count(entry->users);
	if (!umn_likely(count))
		return umn_entry_release_slowly(c, entry, true);
	umn_count_down(count);
	/* From here on the entry may become another at any time. */
	return umn_likely(umn_entry_is_open(entry)) ? false : umn_entry_release_slowly(c, entry, false);
}

/* ---- Under the lock ---- */

/* Zeros, of which the first `wiped` bytes are zeros again in a child with memory of its own. NULL: there is no memory. */
void *umn_wiped_memory(size_t size, size_t wiped);

/* Of new memory; the rest of the cache is zeros. False: there is no memory. */
bool umn_entries_start(struct ummunotify_cache *c);

/* In the child of a fork: as after umn_entries_start. What was there is the parent's, and stays where it is. */
void umn_entries_forget(struct ummunotify_cache *c);

/* The slabs go to the next caches, but for those with an entry in use. No other thread uses the cache. */
void umn_entries_end(struct ummunotify_cache *c);

/* An entry for [start, end), which counts as registered from now on. NULL: there is no memory. */
struct umn_entry *umn_entry_reserve(struct ummunotify_cache *c, uint64_t start, uint64_t end);
void umn_entry_free(struct ummunotify_cache *c, struct umn_entry *entry);

/* It is registered and watched, and the caller uses it. Hits may find it, unless its changes cannot be seen. */
void umn_entry_publish(struct ummunotify_cache *c, struct umn_entry *entry);

/* An open and valid entry that contains [start, end), with one user more. Stale ones in the way are retired. */
struct umn_entry *umn_entry_find(struct ummunotify_cache *c, uint64_t start, uint64_t end);

/* An open entry is used for nothing new, and leaves if it has no user. */
void umn_entry_retire(struct ummunotify_cache *c, struct umn_entry *entry);
void umn_entries_retire_range(struct ummunotify_cache *c, uint64_t start, uint64_t end);

/* Makes up to `count` open entries without users leave, the least recently used first. Returns how many. */
size_t umn_entries_evict(struct ummunotify_cache *c, size_t count);

/* Makes open entries without users leave that overlap [*start, *end), and widens the range by theirs, up to max_length bytes.
 * What does not fit stays, or leaves all the same if `all`. Returns how many left. */
size_t umn_entries_merge(struct ummunotify_cache *c, uint64_t *start, uint64_t *end, uint64_t max_length, bool all);

/* Is any byte of it registered or about to be, by whatever entry? */
bool umn_entries_overlap(struct ummunotify_cache *c, uint64_t start, uint64_t end);

/* The next entry to be deregistered, NULL: none. Then it is to be freed, put back, or kept if that failed. */
struct umn_entry *umn_entry_take(struct ummunotify_cache *c);
void umn_entry_put_back(struct ummunotify_cache *c, struct umn_entry *entry);
void umn_entry_keep(struct ummunotify_cache *c, struct umn_entry *entry);
void umn_entries_retry(struct ummunotify_cache *c); /* what was kept leaves once more */

void umn_entries_stats(struct ummunotify_cache *c, struct ummunotify_cache_stats *stats);

/* Each entry, in any place. */
#define umn_for_each_entry(c, e)                                                                                                   \
	for (struct umn_slab *slab_ = (c)->slabs; slab_; slab_ = slab_->next)                                                      \
		for (struct umn_entry *e = slab_->entries; e < slab_->entries + UMN_SLAB_ENTRIES; e++)

/* The entry with this number, NULL: there never was one. It may be any cache's, or free. Needs no lock. */
struct umn_entry *umn_entry_by_number(uint64_t number);

#endif
