/* SPDX-License-Identifier: BSD-3-Clause */
/* What UCX has pinned, and how its caches are told of changes. preload_ucx.c calls this. */
#ifndef UMN_BRIDGES_UCX_H
#define UMN_BRIDGES_UCX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "process/process.h"

/* A cache is about to be made; this is its UCX's ucm_vm_munmap. False: it will not be told, as no source works. */
bool ucx_add_cache(void (*vm_munmap)(void *address, size_t length));

/* Tells all caches of every change up to now, by whichever thread. Before UCX looks into one. */
void ucx_drain(void);

/* For ucx_all_told. One for each notifier, never freed. */
struct ucx_told {
	const uint64_t *generation; /* the notifier's: counts changes */
	uint32_t epoch;		    /* of the process that opened it */
	uint64_t up_to;		    /* the caches have been told of every change that the generation counted up to this */
};
extern struct ucx_told *ucx_told __attribute__((visibility("hidden"))); /* NULL: only ucx_drain can know */
extern size_t ucx_unwatched __attribute__((visibility("hidden")));	/* registrations now that the source refused */

/* Is there nothing that ucx_drain would do? A few loads, in this order, also on Arm, as each acquires. The epoch comes first: in a child
 * the generation is not mapped. `up_to` comes before the generation: a change that the caller can know of has been counted, so
 * if the two are equal, the caches have been told of it before `up_to` was stored (by a release). */
static inline bool ucx_all_told(void)
{
	const struct ucx_told *told = __atomic_load_n(&ucx_told, __ATOMIC_ACQUIRE);
	uint64_t up_to;

	if (!told || !umn_process_is(told->epoch) || __atomic_load_n(&ucx_unwatched, __ATOMIC_ACQUIRE))
		return false;
	up_to = __atomic_load_n(&told->up_to, __ATOMIC_ACQUIRE);
	return __atomic_load_n(told->generation, __ATOMIC_ACQUIRE) == up_to;
}

/* Before memory is pinned. False: no memory. *pin is NULL if there is no cache that could keep the registration. */
struct ucx_pin;
bool ucx_before_pin(const void *address, size_t length, struct ucx_pin **pin);
/* After it; registration NULL: that failed. */
void ucx_after_pin(struct ucx_pin *pin, const void *registration);

/* Before memory is given up, and after it. NULL: not known here. */
struct ucx_pin *ucx_before_unpin(const void *registration);
void ucx_after_unpin(struct ucx_pin *pin, bool failed);

struct ucx_counts {
	const char *source;	 /* NULL: none */
	unsigned long watched;	 /* registrations; */
	unsigned long unwatched; /* those that the source refused */
	unsigned long told;	 /* ranges that have changed */
};
struct ucx_counts ucx_counts(void);

#endif
