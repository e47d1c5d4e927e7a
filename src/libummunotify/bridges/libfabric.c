/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * libfabric's memory monitor, made of a notifier.
 *
 * libfabric's caches find registrations by address. What they ask and tell the monitor is about an address and a length, the same for
 * all caches (one for each domain) and all registrations that have these. So the monitor keeps a range for each address and length that
 * was subscribed, with one watched region, and `valid` is what that says. libfabric asks about no other range.
 *
 * Why no change is missed:
 *
 * 1. While a cache has a registration, its range is kept. A change makes the region invalid before the address can be given to
 *    another mapping, so from then on `valid` is false for all registrations of that range, in all caches.
 * 2. An invalid range stays so: nothing renews it. It has to be forgotten before the range can be subscribed to afresh, and is only when
 *    no cache has a registration of that range any more, which would count as valid again: when as many have unsubscribed as had
 *    subscribed, or after `expel`. That calls `notify`, which drops the range's registrations from all caches, and does so again if
 *    there was a subscription since before the call. A subscription to an invalid range shares it, and its registration has to be made
 *    once more: a false alarm.
 * 3. libfabric pins first and subscribes then. A change in between is missed if there was no subscription to the range before. It is a
 *    change of memory that a call of libfabric's is registering at that moment: the program would be wrong without any cache as well
 *    (docs/model.md).
 *
 * Locks. libfabric calls `subscribe`, `unsubscribe` and `valid` under one lock of all its caches, and `stop` when no cache uses the
 * monitor (all versions from 1.13 to 2.6). So the table of ranges is changed only in these calls, never by the thread, and
 * `valid`, which each use of a cached registration calls, takes no lock and writes nothing but a bit. `lock` is for what the thread
 * shares with the others. The thread holds no lock when it calls `notify`; the order is libfabric's, this one's, the notifier's.
 * A thread that unmaps memory waits for none of them, so memory may be freed under all of them.
 *
 * Memory. Only the thread gives ranges back, between two dispatches: those that were unwatched before the next one begins are in no
 * event. They come from blocks, which stay: so they are not between libfabric's own entries, which then lie together. The thread
 * frees large memory too, since libfabric's own monitor may take libfabric's lock in munmap.
 *
 * Forks. In a child nothing is valid: its monitors are dead, and have no ranges, until `start` opens another notifier.
 */
#define _GNU_SOURCE
#include "bridges/libfabric.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "include/ummunotify.h"
#include "include/ummunotify_libfabric.h"
#include "notifier/notifier.h"
#include "process/descriptor.h"
#include "process/error.h"
#include "process/process.h"
#include "table/table.h"

#define VERSION (1u << 16 | 13) /* 1.13 */
#define MIN_RANGES 16384u	/* that many are kept at least, if there is memory */
#define MIN_PLACES 1024u	/* of a table; a power of two */
#define ROBBED_MILLISECONDS 10	/* between looks, once the program has closed what the thread waits for */

struct range {
	const void *address;
	size_t length;
	struct ummunotify_region *region;
	uint32_t references;	     /* subscriptions */
	bool joined;		     /* there has been one since it was last cleared */
	bool done;		     /* no cache has a registration of it; to be forgotten in libfabric's next call */
	bool forgotten;		     /* not in the table, and not watched */
	struct range *older, *newer; /* in the order in which they were added, or last found in use */
	struct range *evicted;	     /* the next in the list of those to be expelled, */
	struct range *unfreed;	     /* of those that are done, to be given back, or spare */
	bool is_evicted;
};

#define RANGES_PER_BLOCK 64

struct block {
	struct block *next;
	struct range ranges[RANGES_PER_BLOCK];
};

/* Where `valid` looks: a line of the processor's cache, in which is all that it needs of a region that is never renewed, so that
 * the region's own line need not be loaded. */
struct place {
	const void *address; /* NULL: free */
	size_t length;
	const struct umn_slot *slot; /* the region's; NULL: not valid */
	uint32_t overflow;	     /* the region's */
	uintptr_t range;	     /* USED: `valid` has been asked since this was cleared */
};
#define USED ((uintptr_t)1)

/* With linear probing, at most half full. One pointer leads to all of it, so a child finds a sound one. */
struct table {
	struct table *unfreed; /* the next in the list of those to be freed */
	unsigned int shift;
	size_t mask;
	struct place places[];
};

struct monitor {
	struct fid_mem_monitor fid;
	struct fi_ops ops;	       /* libfabric's, but for `close` */
	int (*close)(struct fid *fid); /* libfabric's */
	struct ummunotify *umn;
	pthread_t thread;
	struct umn_descriptor wake_out, wake_in; /* a pipe, for the thread */
	bool dead; /* no thread: not started yet, or inherited through a fork (nothing is valid), or the process ends */

	/* Under libfabric's lock, and written under `lock` too: */
	struct table *table;
	struct range *oldest, *newest;
	const struct umn_header *header; /* of all regions */
	uint32_t epoch;
	bool confirms;			/* the source has to be asked too */
	size_t count, limit, evictions; /* evictions: of those that are counted */
	uint64_t checked, stale;
	uint64_t known; /* the generation up to which what had changed was expelled; the thread stores it. Never 0, as a closed
			   notifier's is */

	pthread_mutex_t lock; /* of what follows, and of a range's joined, done and forgotten */
	bool quit;
	bool running;
	struct range *done, *evicted, *unfreed, *spare;
	struct block *blocks;
	struct table *unfreed_tables;
	uint64_t subscribed, refused, notices;
	struct monitor *next;
};

/* Of the list of monitors. Taken before a monitor's. */
static pthread_mutex_t list_lock = PTHREAD_MUTEX_INITIALIZER;
static struct monitor *monitors; /* changed by single stores */

/* ---- The table of ranges ---- */

static struct range *range_of(const struct place *place)
{
	return (struct range *)(place->range & ~USED);
}

/* Addresses and lengths are mostly of whole pages; the high bits of the product depend on all of both. */
static inline size_t home_of(const struct table *table, const void *address, size_t length)
{
	return ((uintptr_t)address ^ length << 20 ^ length >> 12) * UINT64_C(0x9e3779b97f4a7c15) >> table->shift;
}

/* The range's place, or the free one where it would be. */
static inline struct place *find(struct table *table, const void *address, size_t length)
{
	size_t i = home_of(table, address, length);

	while (table->places[i].address && (table->places[i].address != address || table->places[i].length != length))
		i = (i + 1) & table->mask;
	return &table->places[i];
}

static struct table *new_table(size_t places)
{
	struct table *table = calloc(1, sizeof *table + places * sizeof *table->places);

	if (table) {
		table->mask = places - 1;
		table->shift = 64 - (unsigned int)__builtin_ctzll(places);
	}
	return table;
}

/* Makes room for one more. */
static bool reserve(struct monitor *m)
{
	struct table *table = m->table, *larger;

	if (table && 2 * (m->count + 1) <= table->mask + 1)
		return true;
	larger = new_table(table ? 2 * (table->mask + 1) : MIN_PLACES);
	if (!larger)
		return false;
	for (size_t i = 0; table && i <= table->mask; i++)
		if (table->places[i].address)
			*find(larger, table->places[i].address, table->places[i].length) = table->places[i];
	__atomic_store_n(&m->table, larger, __ATOMIC_RELEASE);
	if (table) {
		table->unfreed = m->unfreed_tables;
		m->unfreed_tables = table;
	}
	return true;
}

static void remove_place(struct table *table, struct place *place)
{
	size_t hole = (size_t)(place - table->places), i = hole, home;

	*place = (struct place){0};
	/* What was pushed past the hole, from a place before it, moves there. */
	while (table->places[i = (i + 1) & table->mask].address) {
		home = home_of(table, table->places[i].address, table->places[i].length);
		if (((i - home) & table->mask) < ((i - hole) & table->mask))
			continue;
		table->places[hole] = table->places[i];
		table->places[i] = (struct place){0};
		hole = i;
	}
}

/* ---- Ranges: libfabric's lock and `lock` are held ---- */

static void unlink_range(struct monitor *m, struct range *range)
{
	*(range->older ? &range->older->newer : &m->oldest) = range->newer;
	*(range->newer ? &range->newer->older : &m->newest) = range->older;
}

static void link_range(struct monitor *m, struct range *range)
{
	range->older = m->newest;
	range->newer = NULL;
	*(m->newest ? &m->newest->newer : &m->oldest) = range;
	m->newest = range;
}

static void forget(struct monitor *m, struct range *range)
{
	remove_place(m->table, find(m->table, range->address, range->length));
	unlink_range(m, range);
	m->count--;
	m->evictions -= range->is_evicted;
	ummunotify_unwatch(m->umn, range->region);
	range->forgotten = true;
	range->unfreed = m->unfreed;
	m->unfreed = range;
}

static void forget_done(struct monitor *m)
{
	struct range *range, *following;

	for (range = m->done; range; range = following) {
		following = range->unfreed;
		forget(m, range);
	}
	m->done = NULL;
}

/* False: the program has closed the pipe. Both ends count: writing to one without the other would send the program a SIGPIPE. */
static bool wake_thread(struct monitor *m)
{
	const char byte = 0;

	if (!umn_descriptor_intact(&m->wake_out) || !umn_descriptor_intact(&m->wake_in))
		return false;
	/* If it is full, the thread has been woken often, and has not yet looked. */
	return write(m->wake_in.fd, &byte, 1) == 1 || errno == EAGAIN;
}

/* Has the thread expel the one that was not in use for longest: of the older ones, the first that `valid` was not asked about since it
 * last came up. It is not valid from now on. False: there is none. */
static bool evict(struct monitor *m)
{
	for (size_t tries = 2 * m->count; tries; tries--) {
		struct range *range = m->oldest;
		struct place *place = find(m->table, range->address, range->length);
		bool is_used = place->range & USED;

		unlink_range(m, range);
		link_range(m, range);
		place->range &= ~USED;
		if (is_used || range->is_evicted)
			continue;
		place->slot = NULL;
		range->is_evicted = true;
		m->evictions++;
		range->evicted = m->evicted;
		m->evicted = range;
		return true;
	}
	return false;
}

static void give_back(struct monitor *m, struct range *range)
{
	range->unfreed = m->spare;
	m->spare = range;
}

static struct range *new_range(struct monitor *m)
{
	struct range *range;
	struct block *block;

	if (!m->spare) {
		block = malloc(sizeof *block);
		if (!block)
			return NULL;
		block->next = m->blocks;
		m->blocks = block;
		for (int i = RANGES_PER_BLOCK - 1; i >= 0; i--)
			give_back(m, &block->ranges[i]);
	}
	range = m->spare;
	m->spare = range->unfreed;
	return range;
}

/* 0, or a negative errno, as ummunotify_watch. */
static int add(struct monitor *m, const void *address, size_t length)
{
	const struct umn_region *region;
	struct range *range;
	int error;

	range = reserve(m) ? new_range(m) : NULL;
	if (!range)
		return -ENOMEM;
	*range = (struct range){.address = address, .length = length, .references = 1};
	error = ummunotify_watch(m->umn, address, length, (uint64_t)range, &range->region);
	if (error) {
		give_back(m, range);
		/* Versions before 2.1 never unsubscribe. */
		if (error == -ENOMEM)
			m->limit = m->count - m->count / 8;
	} else {
		region = (const struct umn_region *)range->region;
		*find(m->table, address, length) =
			(struct place){address, length, region->slot, region->overflow, (uintptr_t)range};
		m->header = region->header;
		m->epoch = region->epoch;
		m->confirms = region->source != NULL;
		link_range(m, range);
		m->count++;
	}
	if (m->count - m->evictions > m->limit) {
		while (m->count - m->evictions > m->limit && evict(m))
			continue;
		wake_thread(m);
	}
	return error;
}

/* ---- What libfabric calls ---- */

static int start(struct fid_mem_monitor *fid);

static void stop(struct fid_mem_monitor *fid)
{
	struct monitor *m = (struct monitor *)fid;

	umn_process_current();
	/* The thread stays: the caller may hold what `notify` waits for. */
	pthread_mutex_lock(&m->lock);
	m->running = false;
	while (m->oldest)
		forget(m, m->oldest);
	m->done = NULL;
	pthread_mutex_unlock(&m->lock);
}

static int subscribe(struct fid_mem_monitor *fid, const void *address, size_t length)
{
	struct monitor *m = (struct monitor *)fid;
	struct range *range;
	int error = 0;

	umn_process_current();
	pthread_mutex_lock(&m->lock);
	forget_done(m);
	range = m->table ? range_of(find(m->table, address, length)) : NULL;
	if (range) {
		range->references++;
		range->joined = true;
	} else {
		error = add(m, address, length);
	}
	m->subscribed += !error;
	m->refused += !!error;
	pthread_mutex_unlock(&m->lock);
	return error; /* then libfabric does not keep the registration in its cache */
}

static void unsubscribe(struct fid_mem_monitor *fid, const void *address, size_t length)
{
	struct monitor *m = (struct monitor *)fid;
	struct range *range;

	umn_process_current();
	pthread_mutex_lock(&m->lock);
	forget_done(m);
	range = m->table ? range_of(find(m->table, address, length)) : NULL;
	if (range && !--range->references)
		forget(m, range);
	pthread_mutex_unlock(&m->lock);
}

/* No registration is stale: so a range need not be looked for. The caller holds libfabric's lock.
 *
 * `known` comes first, by an acquire, as in the cache (umn_entry_unchanged). The registrations of what had changed up to it were
 * dropped, under libfabric's lock, before it was stored (by a release): so the one that is asked about is none of these. Not near the
 * limit, where it counts what is in use; nor, though it would be right, while a range is there that has changed. */
static bool none_stale(const struct monitor *m)
{
	uint64_t known = __atomic_load_n(&m->known, __ATOMIC_ACQUIRE);

	return m->count && umn_process_is(m->epoch) && !m->confirms && !m->evictions &&
	       !__atomic_load_n(&m->done, __ATOMIC_RELAXED) && m->count < m->limit - m->limit / 8 &&
	       umn_generation(m->header) == known;
}

static bool is_untouched(const struct monitor *m, const void *address, size_t length)
{
	struct table *table = __atomic_load_n(&m->table, __ATOMIC_RELAXED);
	struct place *place = table ? find(table, address, length) : NULL;
	/* In this order: see umn_region_untouched. */
	bool result = place && umn_process_is(m->epoch) && place->slot &&
		      umn_slot_untouched(place->slot, m->header, place->overflow) &&
		      (!m->confirms || umn_region_valid((const struct umn_region *)range_of(place)->region));

	if (result && !(place->range & USED))
		place->range |= USED;
	return result;
}

static bool valid(struct fid_mem_monitor *fid, const void *address, size_t length)
{
	struct monitor *m = (struct monitor *)fid;
	bool result = none_stale(m) || is_untouched(m, address, length);

	/* Stores, for at_exit to load from another thread; under libfabric's lock, so nothing is lost. */
	__atomic_store_n(&m->checked, m->checked + 1, __ATOMIC_RELAXED);
	if (!result)
		__atomic_store_n(&m->stale, m->stale + 1, __ATOMIC_RELAXED);
	return result;
}

static struct fi_ops_mem_monitor export_ops = {
	.size = sizeof export_ops,
	.start = start,
	.stop = stop,
	.subscribe = subscribe,
	.unsubscribe = unsubscribe,
	.valid = valid,
};

/* ---- The thread that notifies ---- */

/* Sees to it that no cache has a registration of the range. */
static void expel(struct monitor *m, struct range *range)
{
	pthread_mutex_lock(&m->lock);
	while (!range->forgotten && !range->done) {
		/* A registration comes into a cache and is subscribed in one go, under the lock that `notify` takes. So those that were
		 * subscribed before this are dropped, and others say so. */
		range->joined = false;
		m->notices++;
		pthread_mutex_unlock(&m->lock);
		m->fid.import_ops->notify(&m->fid, range->address, range->length);
		pthread_mutex_lock(&m->lock);
		if (!range->forgotten && !range->joined) {
			range->done = true;
			range->unfreed = m->done;
			__atomic_store_n(&m->done, range, __ATOMIC_RELAXED);
		}
	}
	pthread_mutex_unlock(&m->lock);
}

static int expel_changed(const struct ummunotify_event *event, void *monitor)
{
	expel(monitor, (struct range *)event->cookie);
	return 0;
}

static void free_tables(struct table *table)
{
	struct table *unfreed;

	for (; table; table = unfreed) {
		unfreed = table->unfreed;
		free(table);
	}
}

static void free_blocks(struct block *block)
{
	struct block *next;

	for (; block; block = next) {
		next = block->next;
		free(block);
	}
}

/* Returns false once it is to end. */
static bool work(struct monitor *m)
{
	struct range *evicted, *unfreed, *following;
	struct table *tables;
	uint64_t known;
	bool quit;

	pthread_mutex_lock(&m->lock);
	quit = m->quit;
	evicted = m->evicted;
	unfreed = m->unfreed;
	tables = m->unfreed_tables;
	m->evicted = m->unfreed = NULL;
	m->unfreed_tables = NULL;
	pthread_mutex_unlock(&m->lock);
	/* What is forgotten from here on is not freed before this returns. */
	for (; evicted; evicted = evicted->evicted)
		expel(m, evicted);
	pthread_mutex_lock(&m->lock);
	for (; unfreed; unfreed = following) {
		following = unfreed->unfreed;
		give_back(m, unfreed);
	}
	pthread_mutex_unlock(&m->lock);
	free_tables(tables);
	if (ummunotify_dispatch(m->umn, expel_changed, m) >= 0) {
		known = umn_dispatched(m->umn);
		if (known)
			__atomic_store_n(&m->known, known, __ATOMIC_RELEASE);
	}
	return !quit;
}

/* `valid` does not depend on the thread: without what it waits for it is only later. */
static void wait_for_work(struct monitor *m)
{
	bool has_pipe = umn_descriptor_intact(&m->wake_out);
	struct pollfd polled[] = {{.fd = ummunotify_fd(m->umn), .events = POLLIN},
				  {.fd = has_pipe ? m->wake_out.fd : -1, .events = POLLIN}};
	char bytes[64];

	poll(polled, 2, polled[0].fd < 0 || !has_pipe ? ROBBED_MILLISECONDS : -1);
	while (has_pipe && polled[1].revents && umn_descriptor_intact(&m->wake_out) &&
	       read(m->wake_out.fd, bytes, sizeof bytes) == sizeof bytes)
		continue;
}

static void *run(void *argument)
{
	struct monitor *m = argument;

	do
		wait_for_work(m);
	while (work(m));
	return NULL;
}

/* False: the program has closed the pipe, so the thread may not end, and what it uses must stay. */
static bool end_thread(struct monitor *m)
{
	pthread_mutex_lock(&m->lock);
	m->quit = true;
	pthread_mutex_unlock(&m->lock);
	if (!wake_thread(m))
		return false;
	pthread_join(m->thread, NULL);
	umn_descriptor_close(&m->wake_out);
	umn_descriptor_close(&m->wake_in);
	return true;
}

/* After the thread has ended, or in a child. */
static void free_monitor(struct monitor *m)
{
	while (m->oldest)
		forget(m, m->oldest);
	free_blocks(m->blocks);
	free_tables(m->unfreed_tables);
	ummunotify_close(m->umn);
	free(m->table);
	free(m);
}

static int start_thread(struct monitor *m)
{
	sigset_t all, before;
	int ends[2], error;

	m->quit = false;
	if (pipe2(ends, O_CLOEXEC | O_NONBLOCK))
		return umn_fail_errno(UMMUNOTIFY_LIMIT, errno, "a descriptor cannot be made");
	umn_descriptor_set(&m->wake_out, ends[0]);
	umn_descriptor_set(&m->wake_in, ends[1]);
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before); /* the program's signals are not for it */
	error = pthread_create(&m->thread, NULL, run, m);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (!error)
		return 0;
	umn_descriptor_close(&m->wake_out);
	umn_descriptor_close(&m->wake_in);
	return umn_fail_errno(UMMUNOTIFY_UNAVAILABLE, error, "a thread cannot be started");
}

/* Opens the notifier and starts the thread. */
static int open_monitor(struct monitor *m)
{
	int error = ummunotify_open(&m->umn, NULL);

	if (error)
		return error;
	umn_begin_at_one(m->umn);
	__atomic_store_n(&m->known, umn_dispatched(m->umn), __ATOMIC_RELAXED); /* nothing is watched yet */
	error = ummunotify_fd(m->umn);					       /* the thread is woken from now on */
	if (error >= 0)
		error = start_thread(m);
	if (error < 0) {
		ummunotify_close(m->umn);
		m->umn = NULL;
	}
	return error;
}

/* ---- Forks, and the end ---- */

/* The ranges stay allocated: another thread may have been changing them. */
static void in_child(void)
{
	for (struct monitor *m = monitors; m; m = m->next) {
		pthread_mutex_init(&m->lock, NULL);
		umn_descriptor_close(&m->wake_out);
		umn_descriptor_close(&m->wake_in);
		m->dead = true;
		m->table = m->unfreed_tables = NULL;
		m->oldest = m->newest = m->evicted = m->unfreed = m->spare = NULL;
		m->blocks = NULL;
		m->done = NULL;
		m->count = m->evictions = 0;
	}
	pthread_mutex_init(&list_lock, NULL);
}

static int start(struct fid_mem_monitor *fid)
{
	struct monitor *m = (struct monitor *)fid;
	int error = 0;

	umn_process_current();
	/* Or a program has forked after it imported the monitor, and uses libfabric in the child: it can, if no domain was open. */
	if (m->dead) {
		ummunotify_close(m->umn);
		m->umn = NULL;
		error = open_monitor(m);
		m->dead = error != 0;
	}
	pthread_mutex_lock(&m->lock);
	m->running = !error;
	pthread_mutex_unlock(&m->lock);
	return error;
}

/* fi_close. */
static int close_fid(struct fid *fid)
{
	struct monitor *m = (struct monitor *)fid;
	struct monitor **link = &monitors;
	bool running;
	int error;

	umn_process_current();
	pthread_mutex_lock(&m->lock);
	running = m->running;
	pthread_mutex_unlock(&m->lock);
	if (running)
		return umn_fail(UMMUNOTIFY_UNAVAILABLE, EBUSY, "close the domains first", "libfabric's caches use it");
	error = m->close(fid);
	if (error)
		return error;
	pthread_mutex_lock(&list_lock);
	while (*link != m)
		link = &(*link)->next;
	__atomic_store_n(link, m->next, __ATOMIC_RELEASE);
	pthread_mutex_unlock(&list_lock);
	if (m->dead || end_thread(m))
		free_monitor(m);
	return 0;
}

static void at_exit(void)
{
	const char *report = secure_getenv("UMMUNOTIFY_REPORT");

	umn_process_current();
	pthread_mutex_lock(&list_lock);
	for (struct monitor *m = monitors; m; m = m->next) {
		if (m->dead)
			continue;
		/* Before libfabric's own destructors: after them there are no caches to notify. */
		end_thread(m);
		m->dead = true;
		if (report && *report)
			fprintf(stderr,
				"ummunotify: libfabric's monitor, source %s: %lu subscribed, %lu refused, %lu checked, %lu of them stale, "
				"%lu notified\n",
				ummunotify_source(m->umn), m->subscribed, m->refused,
				__atomic_load_n(&m->checked, __ATOMIC_RELAXED), __atomic_load_n(&m->stale, __ATOMIC_RELAXED),
				m->notices);
	}
	pthread_mutex_unlock(&list_lock);
}

static void once(void)
{
	if (umn_process_start())
		return; /* opening a notifier fails for the same reason, and says it */
	umn_process_add_child(in_child);
	atexit(at_exit);
}

/* ---- Importing ---- */

void *libfabric_symbol(const void *caller, const char *name, const char *version)
{
	Dl_info info;
	void *found, *handle;

	/* In the order in which the dynamic linker would have looked, had the caller been linked with it. */
	found = version ? dlvsym(RTLD_NEXT, name, version) : dlsym(RTLD_DEFAULT, name);
	if (found || !dladdr(caller, &info))
		return found;
	handle = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
	if (handle) {
		found = version ? dlvsym(handle, name, version) : dlsym(handle, name);
		dlclose(handle);
	}
	return found;
}

static size_t range_limit(void)
{
	const char *count = getenv("FI_MR_CACHE_MAX_COUNT");
	size_t limit = count ? strtoul(count, NULL, 0) : 0;

	return limit < MIN_RANGES / 4 ? MIN_RANGES : limit < SIZE_MAX / 4 ? 4 * limit : SIZE_MAX;
}

typedef int open_function(uint32_t version, const char *name, void *attr, size_t attr_length, uint64_t flags, struct fid **fid,
			  void *context);
typedef int open_cache_function(uint32_t version, void *attr, size_t attr_length, uint64_t flags, struct fid **fid, void *context);

/* What stands for all caches. A provider that is a plugin has a copy of libfabric's caches and monitors of its own, and this function
 * is the way to them. */
static int open_cache(void *function, struct fid **cache)
{
	open_function *fi_open = NULL;
	void *handle, *inside = NULL;
	Dl_info info, other;

	/* A reference that is never given up: libfabric has pointers into the monitor, and the monitor into libfabric. */
	handle = dladdr(function, &info) ? dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD | RTLD_NODELETE) : NULL;
	if (handle) {
		inside = dlsym(handle, "ofi_open_mr_cache");
		if (inside && (!dladdr(inside, &other) || other.dli_fbase != info.dli_fbase))
			inside = NULL; /* another library's */
	}
	fi_open = (open_function *)dlsym(handle ? handle : RTLD_DEFAULT, "fi_open");
	if (handle)
		dlclose(handle);
	if (inside)
		return ((open_cache_function *)inside)(VERSION, NULL, 0, 0, cache, NULL);
	return fi_open ? fi_open(VERSION, "mr_cache", NULL, 0, 0, cache, NULL) : -ENOSYS;
}

/* Gives it to libfabric's caches. 0, or it has been said why not. */
static int bind_monitor(struct monitor *m, void *function)
{
	struct fid *cache;
	int error = open_cache(function, &cache);

	if (error)
		return umn_fail(UMMUNOTIFY_UNAVAILABLE, ENOENT, "use version 1.13 or later",
				"this libfabric cannot be given a monitor (error %d)", -error);
	error = cache->ops->bind(cache, &m->fid.fid, 0);
	cache->ops->close(cache);
	if (error == -EBUSY)
		return umn_fail(UMMUNOTIFY_UNAVAILABLE, EBUSY, "",
				"libfabric has been given another monitor already, or a domain is open");
	if (error)
		return umn_fail(UMMUNOTIFY_UNAVAILABLE, ENOENT, "", "libfabric does not take the monitor (error %d)", -error);
	return 0;
}

static struct monitor *new_monitor(void)
{
	const struct umn_descriptor none = UMN_NO_DESCRIPTOR;
	struct monitor *m = calloc(1, sizeof *m);

	if (!m) {
		umn_fail_errno(UMMUNOTIFY_NO_MEMORY, ENOMEM, "no memory");
		return NULL;
	}
	m->fid.fid.fclass = FI_CLASS_MEM_MONITOR;
	m->fid.export_ops = &export_ops;
	m->limit = range_limit();
	m->wake_out = m->wake_in = none;
	pthread_mutex_init(&m->lock, NULL);
	return m;
}

int libfabric_import(void *function, struct fid **monitor)
{
	static pthread_once_t first = PTHREAD_ONCE_INIT;
	struct monitor *m = new_monitor();
	int error;

	if (!m)
		return -ENOMEM;
	pthread_once(&first, once);
	/* Where one source was found another will be, when it is wanted: see `start`. */
	m->dead = __atomic_load_n(&monitors, __ATOMIC_ACQUIRE) != NULL;
	error = m->dead ? 0 : open_monitor(m);
	if (error) {
		free(m);
		return error;
	}
	error = bind_monitor(m, function);
	if (error) {
		if (m->dead || end_thread(m))
			free_monitor(m);
		return error;
	}
	m->ops = *m->fid.fid.ops;
	m->close = m->ops.close;
	m->ops.close = close_fid;
	m->fid.fid.ops = &m->ops;
	pthread_mutex_lock(&list_lock);
	m->next = monitors;
	__atomic_store_n(&monitors, m, __ATOMIC_RELEASE);
	pthread_mutex_unlock(&list_lock);
	*monitor = &m->fid.fid;
	return 0;
}

int ummunotify_libfabric_import(struct fid **monitor)
{
	void *function = libfabric_symbol(__builtin_return_address(0), "fi_open", NULL);
	void *handle = NULL;

	/* It may have been loaded by name, for its loader alone. */
	if (!function && (handle = dlopen("libfabric.so.1", RTLD_LAZY | RTLD_NOLOAD))) {
		function = dlsym(handle, "fi_open");
		dlclose(handle);
	}
	if (!function)
		return umn_fail(UMMUNOTIFY_UNAVAILABLE, ENOENT, "link the program with it, or load it first",
				"no libfabric of version 1.13 or later is loaded");
	return libfabric_import(function, monitor);
}
