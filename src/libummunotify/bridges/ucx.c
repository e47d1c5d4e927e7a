/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * UCX's registration caches, told of every change.
 *
 * UCX finds registrations by address, in caches of its own (ucs_rcache). They are told what was unmapped by ucm, which patches functions
 * of libc, or by the program: ucm_vm_munmap. Here registrations are watched where they are made (the functions of libibverbs that pin
 * memory), and before each call in which UCX may look into a cache, the caches are told of what has changed.
 *
 * Why no stale registration is used:
 *
 * 1. A region is watched before its memory is pinned, and until after it was given up. So whatever is in a cache is watched, and a
 *    change has made `ummunotify_changed` true before the address can be given to another mapping.
 * 2. A caller that can know of a change makes its call after it. The call drains first. ummunotify_changed stays true until the callbacks
 *    of all threads are done, and a drain waits for those of others: so after it the caches have been told of this change, by
 *    whichever thread.
 * 3. A cache that was told has either dropped its registrations of that range, or put the range on a list that it works off before it finds
 *    anything, under the lock that a look-up takes. This is so in UCX from 1.13 to 1.22 (src/ucs/memory/rcache.c, rcache.inl), with its
 *    default RCACHE_MAX_UNRELEASED=inf: with less, a thread of UCX's from 1.16 on empties that list, and look-ups do not wait for it.
 * 4. A registration that enters a cache while the caches are being told is in the cache's page table, whose lock its thread holds, before it is
 *    watched: the range is put on the list then, and the next look-up drops the registration.
 * 5. Memory that UCX looks up later than in the call that it was given to (a rendezvous, in ucp_worker_progress) is in use until the
 *    operation is complete. A change of it in between is the program's mistake without any cache as well.
 * 6. Memory of UCX's own: it may be mapped where another thread has just unmapped something, after the call has drained. So there is
 *    a drain after uct_mem_alloc too, by which UCX allocates what it registers, and before ucs_rcache_get, which all but the fastest look-ups
 *    call.
 *
 * What the source cannot watch is told as changed before each look-up, so it is registered anew each time.
 *
 * Locks. UCX calls here under its own locks, and `expel` takes UCX's: ucm's (shared) and the short one of a cache's list, neither of
 * which UCX holds when it calls here. The cache's page table it only tries to lock. So the order is UCX's page table, then
 * dispatch's lock, or `lock`; then ucm's. No registration is given up inside ucm_vm_munmap, so nothing here is called back from there.
 *
 * Forks. A child's first drain opens a notifier of its own, and drops all that its caches have inherited.
 */
#define _GNU_SOURCE
#include "bridges/ucx.h"

#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "bridges/preload.h"
#include "include/ummunotify.h"
#include "notifier/notifier.h"
#include "process/process.h"

#define BUCKETS 4096 /* a power of two */

struct ucx_pin {
	const void *registration;
	struct ummunotify_region *region; /* NULL: not watched */
	void *address;
	size_t length;
	struct ucx_pin *next;	       /* in its bucket */
	struct ucx_pin *older, *newer; /* of those that are not watched */
};

/* One for each UCX in the process. They are never removed. */
struct ucm {
	void (*vm_munmap)(void *address, size_t length);
	struct ucm *next;
};

static struct {
	struct ummunotify *umn; /* set once in each process */
	struct ucm *ucms;
	unsigned long told;

	pthread_mutex_t lock; /* of what follows, and for changing what is above */
	bool tried, inherited;
	struct ucx_pin *pins[BUCKETS];
	struct ucx_pin *unwatched; /* the newest */
	unsigned long watched, refused;
} the = {.lock = PTHREAD_MUTEX_INITIALIZER};

struct ucx_told *ucx_told;
size_t ucx_unwatched;

/* ---- Telling ---- */

static void expel(void *start, size_t length)
{
	for (struct ucm *ucm = __atomic_load_n(&the.ucms, __ATOMIC_ACQUIRE); ucm; ucm = ucm->next)
		ucm->vm_munmap(start, length);
	__atomic_add_fetch(&the.told, 1, __ATOMIC_RELAXED);
}

static int expel_changed(const struct ummunotify_event *event, void *context)
{
	(void)context;
	expel((void *)event->start, event->end - event->start); /* NOLINT(performance-no-int-to-ptr) */
	return 0;
}

static void expel_unwatched(void)
{
	pthread_mutex_lock(&the.lock);
	for (struct ucx_pin *pin = the.unwatched; pin; pin = pin->older)
		expel(pin->address, pin->length);
	pthread_mutex_unlock(&the.lock);
}

/* A number that another thread has just made larger may become smaller again: then ucx_drain is called once more. Nothing else reads
 * events, so what was delivered was told. */
static void note_told(const struct ummunotify *umn)
{
	struct ucx_told *told = __atomic_load_n(&ucx_told, __ATOMIC_ACQUIRE);
	uint64_t generation = umn_dispatched(umn);

	if (told && told->generation == umn_generation_of(umn) && generation)
		__atomic_store_n(&told->up_to, generation, __ATOMIC_RELEASE);
}

/* A notifier that was just opened; before it watches anything. */
static void use(struct ummunotify *umn)
{
	struct ucx_told *told = umn_counts_in_time(umn) ? malloc(sizeof *told) : NULL;

	umn_begin_at_one(umn); /* so that umn_dispatched knows */
	if (told)
		*told = (struct ucx_told){umn_generation_of(umn), umn_process_current(), umn_dispatched(umn)};
	__atomic_store_n(&the.umn, umn, __ATOMIC_RELEASE);
	__atomic_store_n(&ucx_told, told, __ATOMIC_RELEASE);
}

/* Threads that drain meanwhile find the parent's notifier, which has changed; and wait for the lock. It is not closed: they use it. */
static void begin_in_child(void)
{
	struct ummunotify *umn;

	pthread_mutex_lock(&the.lock);
	if (the.inherited) {
		/* If it fails, the parent's stays, with which nothing can be watched, and all is expelled by each drain. */
		if (!ummunotify_open(&umn, NULL)) {
			/* What is in the caches now is not watched. Registrations by other threads wait for the lock, or fail to be watched. */
			expel(NULL, SIZE_MAX);
			use(umn);
		}
		the.inherited = false;
	}
	pthread_mutex_unlock(&the.lock);
}

static __attribute__((noinline)) void tell(void)
{
	struct ummunotify *umn;
	int before = errno;

	umn_process_current();
	if (__atomic_load_n(&the.inherited, __ATOMIC_ACQUIRE))
		begin_in_child();
	umn = __atomic_load_n(&the.umn, __ATOMIC_ACQUIRE);
	if (ummunotify_dispatch(umn, expel_changed, NULL) < 0)
		expel(NULL, SIZE_MAX); /* it cannot be known what has changed */
	else
		note_told(umn);
	if (__atomic_load_n(&ucx_unwatched, __ATOMIC_ACQUIRE))
		expel_unwatched();
	errno = before;
}

void ucx_drain(void)
{
	struct ummunotify *umn = __atomic_load_n(&the.umn, __ATOMIC_ACQUIRE);

	if (!umn)
		return;
	if (ummunotify_changed(umn) || __atomic_load_n(&ucx_unwatched, __ATOMIC_ACQUIRE))
		tell();
	else
		note_told(umn);
}

/* ---- Registrations ---- */

static struct ucx_pin **bucket_of(const void *registration)
{
	return &the.pins[((uintptr_t)registration * UINT64_C(0x9e3779b97f4a7c15) >> 32) % BUCKETS];
}

/* The lock is held. */
static struct ucx_pin *take(const void *registration)
{
	struct ucx_pin **link = bucket_of(registration), *pin;

	while (*link && (*link)->registration != registration)
		link = &(*link)->next;
	pin = *link;
	if (pin)
		*link = pin->next;
	return pin;
}

/* The lock is held. */
static void put(struct ucx_pin *pin)
{
	struct ucx_pin **bucket = bucket_of(pin->registration);

	pin->next = *bucket;
	*bucket = pin;
}

/* The lock is held. */
static void link_unwatched(struct ucx_pin *pin)
{
	pin->older = the.unwatched;
	if (pin->older)
		pin->older->newer = pin;
	the.unwatched = pin;
	the.refused++;
	__atomic_add_fetch(&ucx_unwatched, 1, __ATOMIC_SEQ_CST);
}

static void release(struct ucx_pin *pin)
{
	if (pin->region) {
		ummunotify_unwatch(the.umn, pin->region);
	} else {
		pthread_mutex_lock(&the.lock);
		*(pin->newer ? &pin->newer->older : &the.unwatched) = pin->older;
		if (pin->older)
			pin->older->newer = pin->newer;
		__atomic_sub_fetch(&ucx_unwatched, 1, __ATOMIC_SEQ_CST);
		pthread_mutex_unlock(&the.lock);
	}
	free(pin);
}

bool ucx_before_pin(const void *address, size_t length, struct ucx_pin **pin)
{
	*pin = NULL;
	if (!__atomic_load_n(&the.umn, __ATOMIC_ACQUIRE))
		return true;
	umn_process_current();
	if (__atomic_load_n(&the.inherited, __ATOMIC_ACQUIRE))
		begin_in_child();
	*pin = calloc(1, sizeof **pin);
	if (!*pin)
		return false;
	(*pin)->address = (void *)address;
	(*pin)->length = length;
	if (ummunotify_watch(__atomic_load_n(&the.umn, __ATOMIC_ACQUIRE), address, length, 0, &(*pin)->region))
		(*pin)->region = NULL;
	pthread_mutex_lock(&the.lock);
	if ((*pin)->region)
		the.watched++;
	else
		link_unwatched(*pin);
	pthread_mutex_unlock(&the.lock);
	return true;
}

void ucx_after_pin(struct ucx_pin *pin, const void *registration)
{
	struct ucx_pin *old = pin;
	int before = errno;

	if (!pin)
		return;
	if (registration) {
		pthread_mutex_lock(&the.lock);
		old = take(registration); /* it was given up without our knowledge; or libibverbs calls its own functions */
		pin->registration = registration;
		put(pin);
		pthread_mutex_unlock(&the.lock);
	}
	if (old)
		release(old);
	errno = before;
}

struct ucx_pin *ucx_before_unpin(const void *registration)
{
	struct ucx_pin *pin;

	if (!__atomic_load_n(&the.umn, __ATOMIC_ACQUIRE))
		return NULL;
	umn_process_current();
	/* Before it is given up: after that another thread may be given the same pointer. */
	pthread_mutex_lock(&the.lock);
	pin = take(registration);
	pthread_mutex_unlock(&the.lock);
	return pin;
}

void ucx_after_unpin(struct ucx_pin *pin, bool failed)
{
	int before = errno;

	if (pin && failed) {
		pthread_mutex_lock(&the.lock);
		put(pin);
		pthread_mutex_unlock(&the.lock);
	} else if (pin) {
		release(pin);
	}
	errno = before;
}

/* ---- Caches ---- */

/* Pins stay allocated: another thread may have been changing them. */
static void in_child(void)
{
	pthread_mutex_init(&the.lock, NULL);
	for (size_t i = 0; i < BUCKETS; i++)
		the.pins[i] = NULL;
	the.unwatched = NULL;
	ucx_told = NULL;
	ucx_unwatched = 0;
	the.watched = the.refused = the.told = 0;
	__atomic_store_n(&the.inherited, the.umn != NULL, __ATOMIC_RELEASE);
}

/* The lock is held. */
static void open_once(void)
{
	struct ummunotify *umn;

	if (the.tried)
		return;
	the.tried = true;
	if (!umn_process_start())
		umn_process_add_child(in_child);
	if (!ummunotify_open(&umn, NULL))
		use(umn);
	else if (!bridge_quiet())
		fprintf(stderr, "ummunotify: UCX goes on with its own hooks: %s\n", ummunotify_error());
}

/* The lock is held. */
static bool add_ucm(void (*vm_munmap)(void *address, size_t length))
{
	struct ucm *ucm;

	for (ucm = the.ucms; ucm; ucm = ucm->next)
		if (ucm->vm_munmap == vm_munmap)
			return true;
	ucm = malloc(sizeof *ucm);
	if (!ucm)
		return false;
	*ucm = (struct ucm){vm_munmap, the.ucms};
	__atomic_store_n(&the.ucms, ucm, __ATOMIC_RELEASE);
	return true;
}

bool ucx_add_cache(void (*vm_munmap)(void *address, size_t length))
{
	bool added;

	if (__atomic_load_n(&the.umn, __ATOMIC_ACQUIRE))
		ucx_drain(); /* in a child it opens another notifier */
	pthread_mutex_lock(&the.lock);
	open_once();
	added = the.umn && add_ucm(vm_munmap);
	pthread_mutex_unlock(&the.lock);
	return added;
}

struct ucx_counts ucx_counts(void)
{
	struct ucx_counts counts;

	pthread_mutex_lock(&the.lock);
	counts = (struct ucx_counts){
		.source = the.umn ? ummunotify_source(the.umn) : NULL,
		.watched = the.watched,
		.unwatched = the.refused,
		.told = __atomic_load_n(&the.told, __ATOMIC_RELAXED),
	};
	pthread_mutex_unlock(&the.lock);
	return counts;
}
