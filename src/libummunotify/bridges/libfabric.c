/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * libfabric's memory monitor, made of a notifier.
 *
 * libfabric's caches find registrations by address. What they ask and tell the monitor is about an address and a length, the same for
 * all caches (one for each domain) and all registrations that have these. So the monitor keeps a range for each address and length that
 * was subscribed, with one watched region, and `valid` is what that says. Of an unknown range it is false.
 *
 * Why no change is missed:
 *
 * 1. While a cache has a registration, its range is kept. A change makes the region invalid before the address can be given away
 *    again, so from then on `valid` is false for all registrations of that range, in all caches.
 * 2. An invalid range stays so: nothing renews it. It has to be forgotten before the range can be subscribed to afresh, and is only when
 *    no cache has a registration of that range any more, which would count as valid again: when as many have unsubscribed as had
 *    subscribed, or after `expel`. It calls `notify`, which drops the range's registrations from all caches, and does so again if
 *    there was a subscription since before the call. Whoever subscribes to an invalid range shares it, and will have to register once
 *    more: a false alarm.
 * 3. libfabric pins first and subscribes then. A change in between is missed if nobody has subscribed to the range before. It is a
 *    change of memory that a call of libfabric's is registering at that moment: the program would be wrong without any cache as well
 *    (docs/model.md).
 *
 * No deadlocks: the order of locks is libfabric's, ours, the notifier's. The thread holds none when it calls `notify`. Whoever unmaps
 * memory waits for none of them, so memory may be freed under all of them.
 */
#define _GNU_SOURCE
#include "bridges/libfabric.h"

#include <dlfcn.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <search.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "process/error.h"
#include "include/ummunotify.h"
#include "include/ummunotify_libfabric.h"

#define VERSION (1u << 16 | 13) /* 1.13 */
#define PIECE 64	  /* events read at a time */
#define MIN_RANGES 16384u /* that many are kept at least, if there is memory */

struct range {
	const void *address;
	size_t length;
	struct ummunotify_region *region;
	uint32_t references; /* subscriptions */
	bool joined;	     /* there has been one since it was last cleared */
	bool expelled;	     /* not valid, whatever its region says */
	bool forgotten;
	struct range *older, *newer; /* in order of their last use. `older` also links what is to be freed */
};

struct monitor {
	struct fid_mem_monitor fid;
	struct fi_ops ops;		/* libfabric's, but for `close` */
	int (*close)(struct fid *fid);	/* libfabric's */
	struct ummunotify *umn;
	pthread_t thread;
	int wake;  /* the thread: an eventfd */
	bool dead; /* there is no thread: not started yet, or inherited through a fork (nothing is valid), or the process ends */
	pthread_mutex_t lock; /* of what follows */
	bool quit;
	bool running;
	void *ranges; /* a tree, by address and length */
	struct range *oldest, *newest;
	size_t count, limit;
	bool reading;	       /* the thread may know ranges that were forgotten meanwhile, */
	struct range *unfreed; /* which are here therefore */
	uint64_t subscribed, refused, checked, stale, notices;
	struct monitor *next;
};

/* Of the list of monitors. Taken before a monitor's. */
static pthread_mutex_t listing = PTHREAD_MUTEX_INITIALIZER;
static struct monitor *monitors;

/* ---- Ranges: the lock is held ---- */

static int compare(const void *left, const void *right)
{
	const struct range *a = left, *b = right;

	if (a->address != b->address)
		return a->address < b->address ? -1 : 1;
	return a->length < b->length ? -1 : a->length > b->length;
}

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

static struct range *find(struct monitor *m, const void *address, size_t length)
{
	const struct range key = {.address = address, .length = length};
	struct range **found = tfind(&key, &m->ranges, compare);

	if (!found)
		return NULL;
	unlink_range(m, *found);
	link_range(m, *found);
	return *found;
}

static void forget(struct monitor *m, struct range *range)
{
	tdelete(range, &m->ranges, compare);
	unlink_range(m, range);
	m->count--;
	ummunotify_unwatch(m->umn, range->region);
	if (m->reading) {
		range->forgotten = true;
		range->older = m->unfreed;
		m->unfreed = range;
	} else
		free(range);
}

static void wake_thread(struct monitor *m)
{
	const uint64_t one = 1;

	/* It can only fail when the thread has been woken very often and has not yet come to it. */
	if (write(m->wake, &one, sizeof one) < 0)
		return;
}

/* 0, or a negative errno, as ummunotify_watch. */
static int add(struct monitor *m, const void *address, size_t length)
{
	struct range *range = calloc(1, sizeof *range);
	int error;

	if (!range)
		return -ENOMEM;
	range->address = address;
	range->length = length;
	range->references = 1;
	error = ummunotify_watch(m->umn, address, length, (uint64_t)range, &range->region);
	if (!error && !tsearch(range, &m->ranges, compare)) {
		ummunotify_unwatch(m->umn, range->region);
		error = -ENOMEM;
	}
	if (error)
		free(range);
	else {
		link_range(m, range);
		m->count++;
	}
	/* Versions before 2.1 never unsubscribe. */
	if (error == -ENOMEM)
		m->limit = m->count - m->count / 8;
	if (m->count > m->limit)
		wake_thread(m);
	return error;
}

/* ---- What libfabric calls ---- */

static int start(struct fid_mem_monitor *fid);

static void stop(struct fid_mem_monitor *fid)
{
	struct monitor *m = (struct monitor *)fid;

	/* The thread stays: whoever calls this may hold what `notify` waits for. */
	pthread_mutex_lock(&m->lock);
	m->running = false;
	while (m->oldest)
		forget(m, m->oldest);
	pthread_mutex_unlock(&m->lock);
}

static int subscribe(struct fid_mem_monitor *fid, const void *address, size_t length)
{
	struct monitor *m = (struct monitor *)fid;
	struct range *range;
	int error = 0;

	pthread_mutex_lock(&m->lock);
	range = find(m, address, length);
	if (range) {
		range->references++;
		range->joined = true;
	} else
		error = add(m, address, length);
	m->subscribed += !error;
	m->refused += !!error;
	pthread_mutex_unlock(&m->lock);
	return error; /* then libfabric does not keep the registration in its cache */
}

static void unsubscribe(struct fid_mem_monitor *fid, const void *address, size_t length)
{
	struct monitor *m = (struct monitor *)fid;
	struct range *range;

	pthread_mutex_lock(&m->lock);
	range = find(m, address, length);
	if (range && !--range->references)
		forget(m, range);
	pthread_mutex_unlock(&m->lock);
}

static bool valid(struct fid_mem_monitor *fid, const void *address, size_t length)
{
	struct monitor *m = (struct monitor *)fid;
	struct range *range;
	bool result;

	pthread_mutex_lock(&m->lock);
	range = find(m, address, length);
	result = range && !range->expelled && ummunotify_valid(range->region);
	m->checked++;
	m->stale += !result;
	pthread_mutex_unlock(&m->lock);
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

/* Sees to it that no cache has a registration of the range, and forgets it. `reading` is set, and the lock is held, but not all the
 * time. */
static void expel(struct monitor *m, struct range *range)
{
	range->expelled = true;
	do {
		/* A registration comes into a cache and is subscribed in one go, under the lock that `notify` takes. So those that were
		 * subscribed before this are dropped, and others say so. */
		range->joined = false;
		m->notices++;
		pthread_mutex_unlock(&m->lock);
		m->fid.import_ops->notify(&m->fid, range->address, range->length);
		pthread_mutex_lock(&m->lock);
	} while (range->joined && !range->forgotten);
	if (!range->forgotten)
		forget(m, range);
}

/* Returns how many changes there were. */
static ptrdiff_t deliver(struct monitor *m)
{
	struct ummunotify_event events[PIECE];
	struct range *range;
	ptrdiff_t count;

	pthread_mutex_lock(&m->lock);
	m->reading = true;
	pthread_mutex_unlock(&m->lock);
	count = ummunotify_read(m->umn, events, PIECE);
	pthread_mutex_lock(&m->lock);
	for (ptrdiff_t i = 0; i < count; i++) {
		range = (struct range *)events[i].cookie;
		if (!range->forgotten)
			expel(m, range);
	}
	while (m->count > m->limit)
		expel(m, m->oldest);
	m->reading = false;
	while ((range = m->unfreed)) {
		m->unfreed = range->older;
		free(range);
	}
	pthread_mutex_unlock(&m->lock);
	return count;
}

static void *run(void *argument)
{
	struct monitor *m = argument;
	struct pollfd polled[] = {{.fd = ummunotify_fd(m->umn), .events = POLLIN}, {.fd = m->wake, .events = POLLIN}};
	uint64_t count;
	bool quit = false;

	do {
		if (poll(polled, 2, -1) < 0 || (polled[1].revents && read(m->wake, &count, sizeof count) < 0))
			continue;
		while (deliver(m) > 0)
			;
		pthread_mutex_lock(&m->lock);
		quit = m->quit;
		pthread_mutex_unlock(&m->lock);
	} while (!quit);
	return NULL;
}

static void end_thread(struct monitor *m)
{
	pthread_mutex_lock(&m->lock);
	m->quit = true;
	wake_thread(m);
	pthread_mutex_unlock(&m->lock);
	pthread_join(m->thread, NULL);
	pthread_mutex_lock(&m->lock);
	close(m->wake);
	m->wake = -1;
	pthread_mutex_unlock(&m->lock);
}

/* Opens the notifier and starts the thread. */
static int open_monitor(struct monitor *m)
{
	int error = ummunotify_open(&m->umn, NULL);
	sigset_t all, before;

	if (error)
		return error;
	m->quit = false;
	m->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (m->wake < 0) {
		error = umn_fail(UMMUNOTIFY_UNAVAILABLE, errno, "", "a descriptor cannot be made (%s)", strerror(errno));
		goto close;
	}
	error = ummunotify_fd(m->umn);
	if (error < 0)
		goto close_wake;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before); /* the program's signals are not for it */
	error = pthread_create(&m->thread, NULL, run, m);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (!error)
		return 0;
	error = umn_fail(UMMUNOTIFY_UNAVAILABLE, error, "", "a thread cannot be started (%s)", strerror(error));
close_wake:
	close(m->wake);
close:
	ummunotify_close(m->umn);
	return error;
}

/* ---- Forks, and the end ---- */

static void before_fork(void)
{
	pthread_mutex_lock(&listing);
	for (struct monitor *m = monitors; m; m = m->next)
		pthread_mutex_lock(&m->lock);
}

static void in_parent(void)
{
	for (struct monitor *m = monitors; m; m = m->next)
		pthread_mutex_unlock(&m->lock);
	pthread_mutex_unlock(&listing);
}

static void in_child(void)
{
	for (struct monitor *m = monitors; m; m = m->next) {
		pthread_mutex_init(&m->lock, NULL);
		if (!m->dead)
			close(m->wake);
		m->wake = -1;
		m->dead = true;
		m->reading = false; /* the thread has not been inherited */
	}
	pthread_mutex_init(&listing, NULL);
}

static int start(struct fid_mem_monitor *fid)
{
	struct monitor *m = (struct monitor *)fid;
	int error = 0;

	/* Or a program has forked after it imported the monitor, and uses libfabric in the child: it can, if no domain was open. */
	if (m->dead) {
		while (m->oldest)
			forget(m, m->oldest);
		ummunotify_close(m->umn);
		error = open_monitor(m);
		m->dead = error != 0;
		if (error)
			m->umn = NULL;
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

	pthread_mutex_lock(&m->lock);
	running = m->running;
	pthread_mutex_unlock(&m->lock);
	if (running)
		return umn_fail(UMMUNOTIFY_UNAVAILABLE, EBUSY, "", "libfabric's caches use it: close the domains first");
	error = m->close(fid);
	if (error)
		return error;
	pthread_mutex_lock(&listing);
	while (*link != m)
		link = &(*link)->next;
	*link = m->next;
	pthread_mutex_unlock(&listing);
	if (!m->dead)
		end_thread(m);
	ummunotify_close(m->umn);
	free(m);
	return 0;
}

static void at_exit(void)
{
	const char *report = secure_getenv("UMMUNOTIFY_LIBFABRIC_REPORT");

	pthread_mutex_lock(&listing);
	for (struct monitor *m = monitors; m; m = m->next) {
		if (m->dead)
			continue;
		/* Before libfabric's own destructors: then there is nobody left to notify. */
		end_thread(m);
		m->dead = true;
		if (report && *report)
			fprintf(stderr,
				"ummunotify: libfabric's monitor, source %s: %lu subscribed, %lu refused, %lu checked, %lu of them stale, "
				"%lu notified\n",
				ummunotify_source(m->umn), m->subscribed, m->refused, m->checked, m->stale, m->notices);
	}
	pthread_mutex_unlock(&listing);
}

static void once(void)
{
	/* After the notifier's, which were registered when the first was opened: of those called before a fork the last comes first. */
	pthread_atfork(before_fork, in_parent, in_child);
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

int libfabric_import(void *function, struct fid **monitor)
{
	static pthread_once_t first = PTHREAD_ONCE_INIT;
	struct fid *cache;
	struct monitor *m;
	int error;

	m = calloc(1, sizeof *m);
	if (!m)
		return umn_fail_errno(UMMUNOTIFY_NO_MEMORY, ENOMEM, "no memory");
	m->fid.fid.fclass = FI_CLASS_MEM_MONITOR;
	m->fid.export_ops = &export_ops;
	m->limit = range_limit();
	pthread_mutex_init(&m->lock, NULL);
	m->wake = -1;
	pthread_mutex_lock(&listing);
	m->dead = monitors != NULL; /* where one source was found another will be, when it is wanted: see `start` */
	pthread_mutex_unlock(&listing);
	error = m->dead ? 0 : open_monitor(m);
	if (error) {
		free(m);
		return error;
	}
	pthread_once(&first, once);
	pthread_mutex_lock(&listing); /* so that there is no fork before it is in the list */
	error = open_cache(function, &cache);
	if (error)
		umn_fail(UMMUNOTIFY_UNAVAILABLE, ENOENT, "", "this libfabric cannot be given a monitor (error %d); use version 1.13 or later", -error);
	else {
		error = cache->ops->bind(cache, &m->fid.fid, 0);
		cache->ops->close(cache);
		if (error == -EBUSY)
			umn_fail(UMMUNOTIFY_UNAVAILABLE, EBUSY, "", "libfabric has been given another monitor already, or a domain is open");
		else if (error)
			umn_fail(UMMUNOTIFY_UNAVAILABLE, -error, "", "libfabric does not take the monitor (error %d)", -error);
	}
	if (!error) {
		m->ops = *m->fid.fid.ops;
		m->close = m->ops.close;
		m->ops.close = close_fid;
		m->fid.fid.ops = &m->ops;
		m->next = monitors;
		monitors = m;
	}
	pthread_mutex_unlock(&listing);
	if (error) {
		if (!m->dead)
			end_thread(m);
		ummunotify_close(m->umn);
		free(m);
		return error == -EBUSY ? error : -ENOENT;
	}
	*monitor = &m->fid.fid;
	return 0;
}

int ummunotify_libfabric_import(struct fid **monitor)
{
	void *function = libfabric_symbol(__builtin_return_address(0), "fi_open", NULL);
	void *handle = NULL;

	/* It may have been loaded by name, and be seen by nobody. */
	if (!function && (handle = dlopen("libfabric.so.1", RTLD_LAZY | RTLD_NOLOAD))) {
		function = dlsym(handle, "fi_open");
		dlclose(handle);
	}
	if (!function)
		return umn_fail(UMMUNOTIFY_UNAVAILABLE, ENOENT, "", "no libfabric of version 1.13 or later is loaded; link the program with it, or load it first");
	return libfabric_import(function, monitor);
}
