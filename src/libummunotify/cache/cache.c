/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The registration cache: what a miss does, and all that calls the registrar.
 *
 * No lock is held while the registrar, the notifier or `interrupted` is called. Each of these may use the cache, may fork, and may
 * take any time. So before such a call everything is in order, and after it nothing is taken for granted: not that the cache is
 * open, nor that this is the same process (relock).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "cache/entries.h"
#include "notifier/notifier.h"
#include "process/error.h"

#define TRIES 16
#define WAIT_NS 10000000

/* How many calls this thread is in that may call the registrar, or a feeder of the notifier. A call within such a call, also by a
 * signal handler or a green thread, that waited for another thread could wait for itself, or for one that waits for it. */
static __thread uint32_t depth __attribute__((tls_model("initial-exec")));

/* Held while a cache is found by one of its entries, while one ends, and while one is made this process's. Comes before the caches' own
 * locks. */
static pthread_mutex_t caches_lock = PTHREAD_MUTEX_INITIALIZER;

/* Others read the events of a notifier that is given. */
static const uint64_t never_known;

/* Of all caches without a notifier of their own: what is limited, they share. */
static struct {
	pthread_mutex_t lock;
	struct ummunotify *umn;
	size_t users;
} shared = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* ---- Processes ---- */

static void in_child(void)
{
	pthread_mutex_init(&caches_lock, NULL);
	pthread_mutex_init(&shared.lock, NULL);
	/* The parent's is not closed: registrations from before the fork still say that they are not valid. */
	shared.umn = NULL;
	shared.users = 0;
	umn_known_generation = UINT64_MAX;
}

static void start_once(void)
{
	umn_process_add_child(in_child);
	umn_users_start();
}

static void init_locks(struct ummunotify_cache *c)
{
	pthread_condattr_t monotonic;

	pthread_mutex_init(&c->lock, NULL);
	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	pthread_cond_init(&c->changed, &monotonic);
	pthread_condattr_destroy(&monotonic);
	c->waiting = 0;
}

/* Every call begins with this: the cache is this process's, and empty if it was another's. Returns the epoch. */
static uint32_t enter(struct ummunotify_cache *c)
{
	uint32_t epoch = umn_process_current();

	if (__atomic_load_n(&c->epoch, __ATOMIC_ACQUIRE) == epoch)
		return epoch;
	pthread_mutex_lock(&caches_lock);
	if (c->epoch != epoch) {
		init_locks(c);
		umn_entries_forget(c);
		c->uncached = NULL;
		if (!c->given) {
			c->umn = NULL;
			c->must_open = true;
		}
		__atomic_store_n(&c->epoch, epoch, __ATOMIC_RELEASE);
	}
	pthread_mutex_unlock(&caches_lock);
	return epoch;
}

static int forked(void)
{
	return umn_fail(UMMUNOTIFY_FORKED, EBADF, "use the cache anew in the child", "the process was forked during the call");
}

/* After a call of a function that may have forked: then the lock may be held by a thread that does not exist here. */
static bool relock(struct ummunotify_cache *c, uint32_t epoch)
{
	if (!umn_process_is(epoch))
		return false;
	pthread_mutex_lock(&c->lock);
	return true;
}

/* ---- The notifier ---- */

/* Of the shared notifier, which nothing but drop_stale reads: so what was delivered was acted on. While this thread is here, some cache
 * uses the notifier, and it stays the shared one. */
static void know_generation(const struct ummunotify *umn)
{
	uint64_t generation = umn_dispatched(umn);

	if (generation) /* release: the entries were closed before */
		__atomic_store_n(&umn_known_generation, generation, __ATOMIC_RELEASE);
}

/* One user more, of the one that there is, or else of this. */
static struct ummunotify *share(struct ummunotify *opened)
{
	struct ummunotify *umn;

	pthread_mutex_lock(&shared.lock);
	if (!shared.umn && opened) {
		shared.umn = opened;
		umn_begin_at_one(opened);
		know_generation(opened);
	}
	umn = shared.umn;
	shared.users += umn != NULL;
	pthread_mutex_unlock(&shared.lock);
	return umn;
}

static int take_shared(const struct ummunotify_cache *c, struct ummunotify **umn)
{
	const struct ummunotify_options defaults = {.size = sizeof defaults};
	struct ummunotify *opened;
	int error;

	*umn = share(NULL);
	if (*umn)
		return 0;
	/* Without the lock, as this may call a feeder. */
	error = ummunotify_open_with(&opened, c->shared ? c->shared : &defaults);
	if (error)
		return error;
	*umn = share(opened);
	if (*umn != opened) /* another thread was faster */
		ummunotify_close(opened);
	return 0;
}

static void give_shared_back(void)
{
	struct ummunotify *unused = NULL;

	pthread_mutex_lock(&shared.lock);
	if (!--shared.users) {
		unused = shared.umn;
		shared.umn = NULL;
	}
	pthread_mutex_unlock(&shared.lock);
	ummunotify_close(unused);
}

/* Before any entry is opened, after which hits read the generation. */
static void set_notifier(struct ummunotify_cache *c, struct ummunotify *umn, const uint64_t *generation)
{
	c->umn = umn;
	__atomic_store_n(&c->generation, generation, __ATOMIC_RELAXED);
}

/* Without the lock. Where no source works there is no notifier, and that is no error. */
static int open_notifier(struct ummunotify_cache *c, uint32_t epoch)
{
	struct ummunotify *umn = NULL;
	bool extra;
	int error;

	if (!__atomic_load_n(&c->must_open, __ATOMIC_ACQUIRE))
		return 0;
	error = take_shared(c, &umn);
	if (error && error != -ENODEV)
		return error;
	if (!relock(c, epoch))
		return forked();
	extra = !c->must_open; /* another thread was faster */
	if (!extra) {
		if (error)
			c->uncached = strdup(ummunotify_error());
		else
			set_notifier(c, umn, umn_generation_of(umn));
		__atomic_store_n(&c->must_open, false, __ATOMIC_RELEASE);
	}
	pthread_mutex_unlock(&c->lock);
	if (extra && !error)
		give_shared_back();
	return 0;
}

/* Once nothing is watched any more, and nothing will be. Called and returns with the lock held. */
static void drop_notifier(struct ummunotify_cache *c)
{
	if (!c->closed || c->given || !c->umn || c->busy || c->stats.registrations)
		return;
	c->umn = NULL;
	pthread_mutex_unlock(&c->lock);
	give_shared_back();
	pthread_mutex_lock(&c->lock);
}

/* The notifier stays open until leave_notifier. False: the cache is closed. Without the lock. */
static bool use_notifier(struct ummunotify_cache *c)
{
	bool open;

	pthread_mutex_lock(&c->lock);
	open = !c->closed;
	c->busy += open;
	pthread_mutex_unlock(&c->lock);
	return open;
}

/* With the lock held, as drop_notifier. */
static void leave_notifier(struct ummunotify_cache *c)
{
	c->busy--;
	drop_notifier(c);
}

/* The cookie is the entry's number. Others may use the notifier too, with any cookies: so it is the region that decides. */
static int on_event(const struct ummunotify_event *event, void *context)
{
	struct umn_entry *entry = umn_entry_by_number(event->cookie);
	struct ummunotify_cache *c;

	(void)context;
	if (!entry)
		return 0;
	pthread_mutex_lock(&caches_lock);
	c = __atomic_load_n(&umn_rest(entry)->cache, __ATOMIC_ACQUIRE);
	if (c && umn_entry_is_ours(entry)) {
		pthread_mutex_lock(&c->lock);
		if (umn_rest(entry)->region == event->region)
			umn_entry_retire(c, entry);
		pthread_mutex_unlock(&c->lock);
	}
	pthread_mutex_unlock(&caches_lock);
	return 0;
}

/* Retires what has changed, in all caches with the same notifier. Without the lock. */
static int drop_stale(struct ummunotify_cache *c, uint32_t epoch)
{
	ptrdiff_t count;
	int error;

	if (c->given && c->given != epoch)
		return umn_fail(UMMUNOTIFY_FORKED, EBADF, "open another cache in the child",
				"this cache's notifier was opened before a fork and watches the parent process");
	error = open_notifier(c, epoch);
	if (error || !c->umn || !ummunotify_changed(c->umn))
		return error;
	count = ummunotify_dispatch(c->umn, on_event, NULL);
	if (count < 0)
		return (int)count;
	if (!c->given)
		know_generation(c->umn);
	return 0;
}

/* ---- Deregistering ---- */

/* Deregisters what is leaving. Without the lock. `quiet`: the registrar's failures are only counted. */
static int deregister_leaving(struct ummunotify_cache *c, uint32_t epoch, void *argument, bool quiet)
{
	struct umn_entry *entry;
	int error, last = 0;
	size_t failed = 0;

	if (!relock(c, epoch))
		return forked();
	while ((entry = umn_entry_take(c))) {
		pthread_mutex_unlock(&c->lock);
		depth++;
		error = c->registrar.deregister(c->registrar.context, entry->shown.handle, argument);
		depth--;
		if (!error && umn_rest(entry)->region && umn_process_is(epoch))
			ummunotify_unwatch(c->umn, umn_rest(entry)->region);
		if (!relock(c, epoch))
			return forked();
		if (!error) {
			umn_entry_free(c, entry);
			continue;
		}
		last = error;
		if (error > 0) {
			umn_entry_put_back(c, entry);
			break;
		}
		umn_entry_keep(c, entry);
		c->stats.failed_deregistrations++;
		failed++;
	}
	drop_notifier(c);
	pthread_mutex_unlock(&c->lock);
	if (last > 0)
		return last;
	if (!failed || quiet)
		return 0;
	return umn_fail(UMMUNOTIFY_REGISTRAR, -last, "flush or shut down the cache to try again",
			"%zu registrations could not be deregistered (%s); they count as registered until it succeeds", failed,
			strerror(-last));
}

/* ---- A miss ---- */

struct miss {
	struct ummunotify_cache *c;
	uint32_t epoch;
	void *argument;
	struct umn_call *call;
	bool nested; /* it must not wait */
	/* The last try's, whose memory changed meanwhile; still in use by this thread. */
	struct umn_entry *previous;
};

static int closed(void)
{
	return umn_fail(UMMUNOTIFY_CLOSED, ESHUTDOWN, "", "this registration cache is closed");
}

static int no_memory(void)
{
	return umn_fail(UMMUNOTIFY_NO_MEMORY, ENOMEM, "", "%s", strerror(ENOMEM));
}

static int cannot_register(const struct miss *m)
{
	return umn_fail_what("cannot register %llu bytes at %#llx", (unsigned long long)(m->call->end - m->call->start),
			     (unsigned long long)m->call->start);
}

static bool is_limit(int error)
{
	switch (-error) {
	case EAGAIN:
	case EDQUOT:
	case EMFILE:
	case ENFILE:
	case ENOBUFS:
	case ENOMEM:
	case ENOSPC:
		return true;
	}
	return false;
}

/* Until another thread has done something. The lock is held, and again afterwards if this returns 0. */
static int wait_for_change(struct miss *m)
{
	struct ummunotify_cache *c = m->c;
	struct timespec end;
	int error = 0;

	c->waiting++;
	if (c->registrar.interrupted) {
		clock_gettime(CLOCK_MONOTONIC, &end);
		end.tv_nsec += WAIT_NS;
		end.tv_sec += end.tv_nsec / 1000000000;
		end.tv_nsec %= 1000000000;
		error = pthread_cond_timedwait(&c->changed, &c->lock, &end);
	} else {
		pthread_cond_wait(&c->changed, &c->lock);
	}
	c->waiting--;
	if (error != ETIMEDOUT)
		return 0;
	pthread_mutex_unlock(&c->lock);
	error = c->registrar.interrupted(c->registrar.context, m->argument);
	if (error)
		return error;
	return relock(c, m->epoch) ? 0 : forked();
}

/* Is another thread about to register what this one needs, or what must not be registered twice? */
static bool is_being_registered(const struct ummunotify_cache *c, const struct umn_call *wanted, uint64_t start, uint64_t end)
{
	for (const struct umn_call *call = c->calls; call; call = call->next)
		if (c->registrar.no_overlap ? call->start < wanted->end && wanted->start < call->end
					    : c->umn && call->start <= start && end <= call->end)
			return true;
	return false;
}

/* Closed meanwhile. With a notifier of the caller's, what was begun is finished. */
static bool is_closed(const struct ummunotify_cache *c)
{
	return !c->given && __atomic_load_n(&c->closed, __ATOMIC_ACQUIRE);
}

/* Ends the use of the last try's registration. Without the lock. */
static void release_previous(struct miss *m)
{
	if (m->previous && umn_process_is(m->epoch))
		umn_entry_release(m->c, m->previous);
	m->previous = NULL;
}

/* Lets `count` leave that are not in use, or waits for another thread to deregister. True: there may be room now; the lock is held.
 * False: there is nothing to wait for, and the lock is held; or `error`, which has ended the call. */
static bool give_way(struct miss *m, size_t count, int *error)
{
	size_t evicted = umn_entries_evict(m->c, count);

	*error = 0;
	m->c->stats.evictions += evicted;
	if (evicted || m->c->leaving)
		return true;
	if (!m->c->leaving_count || m->nested)
		return false;
	*error = wait_for_change(m);
	return !*error;
}

/* Waits until the range can be registered, and reserves it. Without the lock. */
static int make_room(struct miss *m, struct umn_entry **entry)
{
	const uint64_t start = m->call->start, end = m->call->end, length = end - start;
	struct ummunotify_cache *c = m->c;
	uint64_t registrations, bytes;
	bool full;
	int error;

	if (length > c->max_bytes) {
		umn_fail(UMMUNOTIFY_LIMIT, ENOSPC, "", "max_bytes is %llu", (unsigned long long)c->max_bytes);
		return cannot_register(m);
	}
	for (;;) {
		error = deregister_leaving(c, m->epoch, m->argument, true);
		if (error)
			return error;
		if (!relock(c, m->epoch))
			return forked();
		registrations = c->stats.registrations;
		bytes = c->stats.registered_bytes;
		full = registrations >= c->max_registrations || bytes > c->max_bytes - length;
		if (full && m->previous) {
			pthread_mutex_unlock(&c->lock);
			release_previous(m);
			continue;
		}
		if (!full && !(c->registrar.no_overlap && umn_entries_overlap(c, start, end))) {
			*entry = umn_entry_reserve(c, start, end);
			pthread_mutex_unlock(&c->lock);
			return *entry ? 0 : no_memory();
		}
		if (!give_way(m, full, &error)) {
			if (error)
				return error;
			break;
		}
		pthread_mutex_unlock(&c->lock);
	}
	pthread_mutex_unlock(&c->lock);
	if (full)
		umn_fail(UMMUNOTIFY_LIMIT, ENOSPC, "release some, or raise max_registrations or max_bytes",
			 "%llu registrations with %llu bytes are in use, and the cache's limits allow for no more",
			 (unsigned long long)registrations, (unsigned long long)bytes);
	else
		umn_fail(UMMUNOTIFY_REGISTRAR, EBUSY, "release that first",
			 "a part of it is registered and in use, and this registrar cannot register memory twice");
	return cannot_register(m);
}

/* Watches and registers what was reserved. On failure it is reserved no more. `limit`: it failed for a limit. */
static int pin(struct miss *m, struct umn_entry *entry, bool *limit)
{
	const uint64_t start = m->call->start, end = m->call->end;
	struct ummunotify_region *region = NULL;
	struct ummunotify_cache *c = m->c;
	char *refusal = NULL;
	void *handle = NULL;
	int error = 0;

	*limit = false;
	if (c->umn && ummunotify_watch(c->umn, (void *)(uintptr_t)start, end - start, umn_tally_number(entry->users), &region)) {
		const struct ummunotify_failure *failure = ummunotify_failure();

		region = NULL;
		if (failure->code == UMMUNOTIFY_UNSUPPORTED) {
			refusal = strdup(ummunotify_error());
		} else {
			*limit = failure->code == UMMUNOTIFY_LIMIT || failure->code == UMMUNOTIFY_NO_MEMORY;
			error = cannot_register(m);
		}
	}
	if (!error) {
		error = c->registrar.register_memory(c->registrar.context, start, end - start, m->argument, &handle);
		if (!umn_process_is(m->epoch)) {
			free(refusal);
			return forked();
		}
		if (error && region)
			ummunotify_unwatch(c->umn, region);
		if (error < 0) {
			*limit = is_limit(error);
			umn_fail(UMMUNOTIFY_REGISTRAR, -error, "", "%s", strerror(-error));
			cannot_register(m);
		}
	}
	if (!relock(c, m->epoch))
		return forked();
	if (error) {
		umn_entry_free(c, entry);
	} else {
		if (refusal && !c->uncached) {
			c->uncached = refusal;
			refusal = NULL;
		}
		entry->shown.handle = handle;
		umn_rest(entry)->region = region;
		umn_entry_publish(c, entry);
	}
	pthread_mutex_unlock(&c->lock);
	free(refusal);
	return error;
}

/* Registers the range once, whatever has to leave for that. */
static int register_once(struct miss *m, struct umn_entry **entry)
{
	size_t count = 1;
	bool limit;
	int error, ended;

	for (;; count *= 2) {
		error = make_room(m, entry);
		if (error)
			return error;
		error = pin(m, *entry, &limit);
		if (error >= 0 || !limit)
			return error;
		if (m->previous) {
			release_previous(m);
			continue;
		}
		if (!relock(m->c, m->epoch))
			return forked();
		if (!give_way(m, count, &ended)) {
			if (ended)
				return ended;
			pthread_mutex_unlock(&m->c->lock);
			umn_fail(ummunotify_failure()->code, -error, "", "%s; all that is registered is in use",
				 ummunotify_failure()->why);
			return cannot_register(m);
		}
		pthread_mutex_unlock(&m->c->lock);
	}
}

/*
 * Until the memory did not change while it was registered.
 *
 * Registering may itself make the kernel report a change: to lock a part of a huge page splits it. So the last try's
 * registration stays until the next one is made, if the registrar can overlap: what was split for the first stays split, and the second
 * changes nothing.
 */
static int register_range(struct miss *m, struct umn_entry **entry)
{
	struct ummunotify_cache *c = m->c;
	int error;

	for (int i = 0; i < TRIES; i++) {
		if (is_closed(c)) {
			release_previous(m);
			return closed();
		}
		error = register_once(m, entry);
		release_previous(m);
		if (error)
			return error;
		m->previous = *entry;
		if (is_closed(c))
			continue;
		/* After it was published: an event that came earlier did not find it, one that comes later does. */
		if (!umn_rest(*entry)->region || umn_entry_valid(*entry)) {
			m->previous = NULL;
			return 0;
		}
		if (c->registrar.no_overlap)
			release_previous(m);
		if (!relock(c, m->epoch))
			return forked();
		c->stats.retries++;
		pthread_mutex_unlock(&c->lock);
	}
	release_previous(m);
	umn_fail(UMMUNOTIFY_REGISTRAR, EBUSY, "do not unmap or move memory while it is being used",
		 "their mapping changed during each of %d tries", TRIES);
	return cannot_register(m);
}

/* Replaces what overlaps the range and is not in use; but where that is up to the cache, by no more than as much again: without a bound,
 * to use one buffer after the other, each with a page in common with the last, would register all that came before each time. */
static void widen(struct ummunotify_cache *c, struct umn_call *call)
{
	uint64_t limit = c->registrar.max_length < c->max_bytes ? c->registrar.max_length : c->max_bytes;
	uint64_t twice = 2 * (call->end - call->start);

	if (!c->registrar.no_overlap && limit > twice)
		limit = twice;
	c->stats.merges += umn_entries_merge(c, &call->start, &call->end, limit, c->registrar.no_overlap);
}

/* Finds the bytes after all, waits for another thread that registers them, or begins to. With the lock held if this returns 0; then
 * there is an entry, or m->call is on the list. */
static int begin(struct miss *m, uint64_t start, uint64_t end, struct umn_entry **entry)
{
	struct ummunotify_cache *c = m->c;
	const uint64_t mask = c->registrar.granularity - 1;
	int error;

	*entry = NULL;
	m->call->start = start & ~mask;
	m->call->end = (end + mask) & ~mask;
	for (;;) {
		if (__atomic_load_n(&c->closed, __ATOMIC_ACQUIRE))
			return closed();
		error = drop_stale(c, m->epoch);
		if (error)
			return error;
		if (!relock(c, m->epoch))
			return forked();
		*entry = umn_entry_find(c, start, end);
		if (*entry)
			return 0;
		if (!is_being_registered(c, m->call, start, end) || (m->nested && !c->registrar.no_overlap))
			break;
		if (m->nested) {
			pthread_mutex_unlock(&c->lock);
			umn_fail(UMMUNOTIFY_REGISTRAR, EDEADLK, "do not use the same memory there",
				 "a part of it is just being registered, and this call comes from within a registrar or a signal "
				 "handler that has interrupted one");
			return cannot_register(m);
		}
		error = wait_for_change(m);
		if (error)
			return error;
		pthread_mutex_unlock(&c->lock);
	}
	c->stats.misses++;
	m->call->next = c->calls;
	c->calls = m->call;
	return 0;
}

/* Takes m->call off the list. */
static void end(struct miss *m)
{
	struct ummunotify_cache *c = m->c;
	struct umn_call **link = &c->calls;

	while (*link != m->call)
		link = &(*link)->next;
	*link = m->call->next;
	if (c->closed) /* meanwhile */
		umn_entries_retire_range(c, 0, UINT64_MAX);
	if (c->waiting)
		pthread_cond_broadcast(&c->changed);
}

static int miss(struct ummunotify_cache *c, uint64_t start, uint64_t end_, void *argument, struct umn_entry **entry)
{
	struct miss m = {.c = c, .epoch = enter(c), .argument = argument, .nested = depth > 1, .call = malloc(sizeof *m.call)};
	uint64_t low, high;
	int error, later;

	if (!m.call)
		return no_memory();
	if (!use_notifier(c)) {
		free(m.call);
		return closed();
	}
	error = begin(&m, start, end_, entry);
	if (error || *entry) {
		free(m.call);
		if (error && !relock(c, m.epoch))
			return error;
		leave_notifier(c);
		pthread_mutex_unlock(&c->lock);
		return error;
	}
	low = m.call->start;
	high = m.call->end;
	if (c->registrar.merge)
		widen(c, m.call);
	pthread_mutex_unlock(&c->lock);
	error = register_range(&m, entry);
	if (error < 0 && (m.call->start != low || m.call->end != high) && relock(c, m.epoch)) {
		/* What it was merged with may have been unmapped just now, or be too much for a limit. */
		m.call->start = low;
		m.call->end = high;
		pthread_mutex_unlock(&c->lock);
		error = register_range(&m, entry);
	}
	if (!relock(c, m.epoch)) {
		/* The list is the parent's, and was forgotten or will be. */
		return error ? error : forked();
	}
	end(&m);
	leave_notifier(c);
	pthread_mutex_unlock(&c->lock);
	free(m.call);
	later = deregister_leaving(c, m.epoch, argument, true);
	if (!later)
		return error;
	if (!error)
		umn_entry_release(c, *entry);
	return error ? error : later;
}

/* ---- For the caller ---- */

static int check_range(const void *address, size_t length)
{
	const uint64_t start = (uintptr_t)address, end = start + length;
	int error = 0;

	if (!length)
		error = umn_fail(UMMUNOTIFY_RANGE, EINVAL, "", "it is empty");
	else if (!start || end < start || end > UMN_ADDRESS_MAX)
		error = umn_fail(UMMUNOTIFY_RANGE, EINVAL, "", "it is not in user space");
	return error ? umn_fail_what("cannot register %zu bytes at %p", length, address) : 0;
}

/* What is not inline is called last, with all that it needs in registers: see umn_likely. */
#define NOINLINE __attribute__((noinline))

struct ummunotify_registration *ummunotify_cache_find(struct ummunotify_cache *c, const void *address, size_t length)
{
	const uint64_t start = (uintptr_t)address;
	struct umn_entry *counted, *entry = umn_entry_hit(c, start, start + length, &counted);

	if (!umn_likely(entry))
		entry = umn_entry_hit_slowly(c, start, start + length, counted);
	return (struct ummunotify_registration *)entry;
}

static NOINLINE int acquire_slowly(struct ummunotify_cache *c, const void *address, size_t length, void *argument,
				   struct ummunotify_registration **registration, struct umn_entry *counted)
{
	const uint64_t start = (uintptr_t)address;
	struct umn_entry *entry = umn_entry_hit_slowly(c, start, start + length, counted);
	int error = entry ? 0 : check_range(address, length);

	if (!entry && !error) {
		depth++;
		error = miss(c, start, start + length, argument, &entry);
		depth--;
	}
	*registration = error ? NULL : (struct ummunotify_registration *)entry;
	return error;
}

int ummunotify_cache_acquire(struct ummunotify_cache *c, const void *address, size_t length, void *argument,
			     struct ummunotify_registration **registration)
{
	const uint64_t start = (uintptr_t)address;
	struct umn_entry *counted, *entry = umn_entry_hit(c, start, start + length, &counted);

	if (!umn_likely(entry))
		return acquire_slowly(c, address, length, argument, registration, counted);
	*registration = (struct ummunotify_registration *)entry;
	return 0;
}

int ummunotify_cache_release(struct ummunotify_cache *c, struct ummunotify_registration *registration)
{
	return umn_entry_release(c, umn_entry(registration));
}

bool ummunotify_registration_valid(const struct ummunotify_registration *registration)
{
	const struct umn_entry *entry = (const struct umn_entry *)registration;

	return umn_entry_is_ours(entry) && umn_rest(entry)->region && ummunotify_valid(umn_rest(entry)->region);
}

int ummunotify_cache_collect(struct ummunotify_cache *c, void *argument)
{
	uint32_t epoch = enter(c);
	int error = 0, later;

	if (use_notifier(c)) {
		error = drop_stale(c, epoch);
		if (!relock(c, epoch))
			return forked();
		leave_notifier(c);
		pthread_mutex_unlock(&c->lock);
	}
	later = deregister_leaving(c, epoch, argument, error != 0);
	return error ? error : later;
}

int ummunotify_cache_flush(struct ummunotify_cache *c, void *argument)
{
	uint32_t epoch = enter(c);

	pthread_mutex_lock(&c->lock);
	umn_entries_retry(c);
	umn_entries_evict(c, SIZE_MAX);
	pthread_mutex_unlock(&c->lock);
	return deregister_leaving(c, epoch, argument, false);
}

int ummunotify_cache_invalidate(struct ummunotify_cache *c, const void *address, size_t length, void *argument)
{
	const uint64_t start = (uintptr_t)address;
	uint32_t epoch = enter(c);

	pthread_mutex_lock(&c->lock);
	umn_entries_retire_range(c, start, start + length);
	pthread_mutex_unlock(&c->lock);
	return deregister_leaving(c, epoch, argument, false);
}

const char *ummunotify_cache_uncached(struct ummunotify_cache *c)
{
	const char *uncached;

	enter(c);
	pthread_mutex_lock(&c->lock);
	uncached = c->uncached;
	pthread_mutex_unlock(&c->lock);
	return uncached;
}

void ummunotify_cache_stats(struct ummunotify_cache *c, struct ummunotify_cache_stats *stats)
{
	enter(c);
	pthread_mutex_lock(&c->lock);
	umn_entries_stats(c, stats);
	pthread_mutex_unlock(&c->lock);
}

void ummunotify_cache_causes(struct ummunotify_cache *c, uint64_t *causes)
{
	enter(c);
	pthread_mutex_lock(&c->lock);
	memcpy(causes, c->causes, sizeof c->causes);
	pthread_mutex_unlock(&c->lock);
}

/* ---- Opening and closing ---- */

/* As much of a caller's struct as both sides know; the rest is zeros. */
static void copy(void *to, size_t size, const void *from, size_t known)
{
	memcpy(to, from, known < size ? known : size);
}

int ummunotify_cache_open(struct ummunotify_cache **cache, const struct ummunotify_registrar *registrar,
			  const struct ummunotify_cache_options *options)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	struct ummunotify_cache_options wanted = {0};
	struct ummunotify_cache *c;
	int error = umn_process_start();

	*cache = NULL;
	if (error)
		return umn_fail_errno(UMMUNOTIFY_NO_MEMORY, -error, "a page cannot be mapped that forks clear");
	pthread_once(&once, start_once);
	if (options)
		copy(&wanted, sizeof wanted, options, options->size);
	c = umn_wiped_memory(sizeof *c, offsetof(struct ummunotify_cache, epoch));
	if (!c)
		return no_memory();
	copy(&c->registrar, sizeof c->registrar, registrar, registrar->size);
	if (!c->registrar.granularity)
		c->registrar.granularity = 1;
	if (!c->registrar.register_memory || !c->registrar.deregister ||
	    c->registrar.granularity & (c->registrar.granularity - 1)) {
		munmap(c, sizeof *c);
		return umn_fail(UMMUNOTIFY_ARGUMENT, EINVAL, "",
				"a registrar needs two functions, and its granularity is a power of two");
	}
	if (!c->registrar.max_length)
		c->registrar.max_length = SIZE_MAX;
	c->registrar.merge |= c->registrar.no_overlap;
	c->max_bytes = wanted.max_bytes ? wanted.max_bytes : UINT64_MAX;
	c->max_registrations = wanted.max_registrations ? wanted.max_registrations : UINT64_MAX;
	c->shared = wanted.shared;
	set_notifier(c, wanted.umn, &never_known);
	c->epoch = umn_process_current();
	c->given = c->umn ? c->epoch : 0;
	c->must_open = !c->umn;
	init_locks(c);
	if (!umn_entries_start(c)) {
		munmap(c, sizeof *c);
		return no_memory();
	}
	error = open_notifier(c, c->epoch);
	if (error) {
		umn_entries_end(c);
		munmap(c, sizeof *c);
		return error;
	}
	*cache = c;
	return 0;
}

int ummunotify_cache_shutdown(struct ummunotify_cache *c, void *argument)
{
	uint32_t epoch = enter(c);

	pthread_mutex_lock(&c->lock);
	__atomic_store_n(&c->closed, true, __ATOMIC_RELEASE);
	umn_entries_retry(c);
	umn_entries_retire_range(c, 0, UINT64_MAX);
	if (c->waiting)
		pthread_cond_broadcast(&c->changed);
	pthread_mutex_unlock(&c->lock);
	return deregister_leaving(c, epoch, argument, false);
}

void ummunotify_cache_close(struct ummunotify_cache *c)
{
	if (!c)
		return;
	ummunotify_cache_shutdown(c, NULL);
	/* What could not be deregistered, or was not released. */
	umn_for_each_entry(c, entry) if (umn_rest(entry)->region) ummunotify_unwatch(c->umn, umn_rest(entry)->region);
	if (c->umn && !c->given)
		give_shared_back();
	pthread_mutex_lock(&caches_lock);
	umn_entries_end(c);
	pthread_mutex_unlock(&caches_lock);
	pthread_cond_destroy(&c->changed);
	pthread_mutex_destroy(&c->lock);
	free(c->uncached);
	munmap(c, sizeof *c);
}
