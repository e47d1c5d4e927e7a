/* SPDX-License-Identifier: BSD-3-Clause */
/* What UCX has pinned, and how its caches are told of changes. preload_ucx.c calls this. */
#ifndef UMN_BRIDGES_UCX_H
#define UMN_BRIDGES_UCX_H

#include <stdbool.h>
#include <stddef.h>

/* A cache is about to be made; this is its UCX's ucm_vm_munmap. False: it will not be told, as no source works. */
bool ucx_add_cache(void (*vm_munmap)(void *address, size_t length));

/* Tells all caches of every change up to now, by whichever thread. Before UCX looks into one. */
void ucx_drain(void);

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
