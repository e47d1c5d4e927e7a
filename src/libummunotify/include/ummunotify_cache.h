/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * A cache of registrations: memory is registered (pinned) when it is first used, stays so for the next use, and is never used through a
 * registration that is older than its mapping.
 *
 *	static int reg(void *context, uint64_t address, size_t length, void *argument, void **handle)
 *	{
 *		*handle = ibv_reg_mr(context, (void *)address, length, ACCESS);
 *		return *handle ? 0 : -errno;
 *	}
 *
 *	static int dereg(void *context, void *handle, void *argument)
 *	{
 *		return -ibv_dereg_mr(handle);
 *	}
 *
 *	struct ummunotify_registrar registrar = {sizeof registrar, reg, dereg, NULL, pd};
 *
 *	ummunotify_cache_open(&cache, &registrar, NULL);
 *	...
 *	if (ummunotify_cache_acquire(cache, buffer, length, NULL, &registration))
 *		errx(1, "%s", ummunotify_error());
 *	post(((struct ibv_mr *)registration->handle)->lkey, buffer, length);
 *	...						wait until the transfer is done
 *	ummunotify_cache_release(cache, registration);
 *
 * Results are those of ummunotify.h: 0 or a count, or a negative errno that ummunotify_error() explains; and a positive number where one
 * of the registrar's functions has returned it. docs/cache.md says what is guaranteed.
 *
 * Threads: any thread may call any function, but for ummunotify_cache_close. A hit takes no lock. Registrations may be released by
 * another thread than the one that acquired them.
 *
 * Forks: in a child with memory of its own the cache is empty. It works there if it was opened without a notifier and the
 * registrar works; it never deregisters what is the parent's. To release what was acquired before the fork does nothing.
 */
#ifndef UMMUNOTIFY_CACHE_H
#define UMMUNOTIFY_CACHE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

struct ummunotify;
struct ummunotify_options;
struct ummunotify_cache;

/* Memory that is registered. It stays as it is until it is released. */
struct ummunotify_registration {
	void *handle;	     /* the registrar's */
	uint64_t start, end; /* what the handle covers: what was asked for, or more */
};

/*
 * What registers. Its functions are called without any lock held, by several threads at once. `argument` is that of the call in which
 * this happens, and is for the caller's use.
 *
 * They may use the cache, as may a signal handler that interrupts them. Such a call never waits for another: memory that is just
 * being registered it registers once more, or it fails with -EDEADLK if the registrar cannot do that.
 */
struct ummunotify_registrar {
	size_t size; /* of this struct, as the caller knows it */

	/* 0; or -errno, of which EAGAIN, EDQUOT, EMFILE, ENFILE, ENOBUFS, ENOMEM and ENOSPC stand for a limit: then the cache
	 * deregisters what is not in use and tries again. A positive number ends the call that returns it. */
	int (*register_memory)(void *context, uint64_t address, size_t length, void *argument, void **handle);

	/* 0; or -errno: the memory counts as still registered, until a flush succeeds. A positive number ends the call that returns
	 * it; the next one that deregisters tries again. */
	int (*deregister)(void *context, void *handle, void *argument);

	/* NULL, or called every 10 ms while a call waits for another thread's. A positive number ends the call that returns it. */
	int (*interrupted)(void *context, void *argument);

	void *context;

	size_t granularity; /* a power of two: whole multiples of it are registered. 0 means 1 */
	size_t max_length;  /* what is merged gets no longer. 0: no limit */
	bool merge;	    /* what overlaps and is not in use is registered in one piece */
	bool no_overlap;    /* memory cannot be registered twice at a time; implies `merge` */
};

struct ummunotify_cache_options {
	size_t size; /* of this struct, as the caller knows it */
	struct ummunotify
		*umn; /* must outlive the cache, which reads its events. NULL: the one that all such caches of a process share */
	/* How to open that one, for the first cache that needs it. Must outlive the cache, as it may open it in a child. NULL: as
	 * ummunotify_open(..., NULL) does. */
	const struct ummunotify_options *shared;
	uint64_t max_bytes;	    /* registered at a time, in use or not. 0: no limit */
	uint64_t max_registrations; /* likewise */
};

/* Opens a cache. Where no source works it is opened all the same, and memory is registered for each use; see
 * ummunotify_cache_uncached. `options` may be NULL; `registrar` is copied. */
int ummunotify_cache_open(struct ummunotify_cache **cache, const struct ummunotify_registrar *registrar,
			  const struct ummunotify_cache_options *options);

/* Deregisters all that is not in use, the rest when its last user releases it; from now on acquire fails with -ESHUTDOWN. Other threads
 * may be using the cache. To call it once more tries again what could not be deregistered. */
int ummunotify_cache_shutdown(struct ummunotify_cache *cache, void *argument);

/* Frees the memory, after ummunotify_cache_shutdown if that was not called. No thread may be using the cache or a registration. What
 * could not be deregistered is forgotten. NULL is fine. */
void ummunotify_cache_close(struct ummunotify_cache *cache);

/* ---- Using memory ---- */

/* A registration that contains these bytes and is valid, from the cache or made now. It stays registered until it is released.
 * -ENOSPC or another errno of that kind (UMMUNOTIFY_LIMIT): a limit is reached, and all that is registered is in use. */
int ummunotify_cache_acquire(struct ummunotify_cache *cache, const void *address, size_t length, void *argument,
			     struct ummunotify_registration **registration);

/* The same if it is in the cache, or else NULL. Takes no lock; makes no system call, but for what ummunotify_valid needs. */
struct ummunotify_registration *ummunotify_cache_find(struct ummunotify_cache *cache, const void *address, size_t length);

/* Ends a use. 1: there is something to deregister now, for ummunotify_cache_collect; it may be left to the next call that
 * registers. Otherwise 0. */
int ummunotify_cache_release(struct ummunotify_cache *cache, struct ummunotify_registration *registration);

/* Nothing has changed the mapping since the memory was registered. If this is false after a transfer, the program has changed it
 * meanwhile. Always false for what was registered for one use. */
bool ummunotify_registration_valid(const struct ummunotify_registration *registration);

/* ---- Housekeeping. -errno: something could not be deregistered (UMMUNOTIFY_REGISTRAR); everything else was. ---- */

/* Deregisters what has changed and is not in use. */
int ummunotify_cache_collect(struct ummunotify_cache *cache, void *argument);

/* Deregisters all that is not in use, and tries again what could not be deregistered. */
int ummunotify_cache_flush(struct ummunotify_cache *cache, void *argument);

/* Whatever overlaps these bytes is used for nothing new, and deregistered now or when its last user releases it. */
int ummunotify_cache_invalidate(struct ummunotify_cache *cache, const void *address, size_t length, void *argument);

/* Why memory is registered for each use, once it was: no source works, or the memory is of a kind whose changes it cannot see. NULL:
 * it was not so far. */
const char *ummunotify_cache_uncached(struct ummunotify_cache *cache);

struct ummunotify_cache_stats {
	uint64_t hits;	    /* calls that were given what was registered already */
	uint64_t misses;    /* calls that had to register */
	uint64_t stale;	    /* registrations that were used for nothing new, as their memory had changed */
	uint64_t evictions; /* registrations that were given up for others, because of a limit */
	uint64_t merges;    /* registrations that became part of a larger one */
	uint64_t retries;   /* how often memory changed while it was being registered */
	uint64_t uncached;  /* registrations for one use */
	uint64_t failed_deregistrations;
	uint64_t registrations; /* registered now, or being registered */
	uint64_t registered_bytes;
	uint64_t in_use; /* of the registrations */
	uint64_t in_use_bytes;
	uint64_t not_deregistered; /* of the registrations: those that the registrar failed to deregister */
};
/* Takes time in proportion to the number of registrations. */
void ummunotify_cache_stats(struct ummunotify_cache *cache, struct ummunotify_cache_stats *stats);

/* Of `stale`: how many registrations each system call made so, by its number, on an array of UMMUNOTIFY_CACHE_CAUSES. The last one
 * counts all else: a page fault, the kernel itself, a call with a greater number, a source that does not know. */
#define UMMUNOTIFY_CACHE_CAUSES 513
void ummunotify_cache_causes(struct ummunotify_cache *cache, uint64_t *causes);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
