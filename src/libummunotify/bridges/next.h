/* SPDX-License-Identifier: BSD-3-Clause */
/* The functions behind those that a preloaded library defines. Each caller gets the one that it would have got without us: there may be
 * several libraries with that function in a process, also where only some callers see them. */
#ifndef UMN_BRIDGES_NEXT_H
#define UMN_BRIDGES_NEXT_H

#include <stddef.h>

#define CALLER __builtin_extract_return_addr(__builtin_return_address(0))

#define NEXT(name)                                                                                                                 \
	({                                                                                                                         \
		static struct next_route *routes;                                                                                  \
		next_for(&routes, CALLER, #name);                                                                                  \
	})

/* Found for a caller. Never removed: there are as many as calls in the program's code. */
struct next_route {
	const void *caller;
	void *found;			/* NULL: see next */
	const void *(*caller_of)(void); /* the caller is another preloaded library: this tells for which caller it calls */
	struct next_route *next;
};

/* Acquire, as add_route() releases: what is in the list is complete. */
static inline const struct next_route *next_route(struct next_route *const *routes, const void *caller)
{
	const struct next_route *route = __atomic_load_n(routes, __ATOMIC_ACQUIRE);

	while (route && route->caller != caller)
		route = route->next;
	return route;
}

/* NULL: not found yet. */
static inline void *next_known(struct next_route *const *routes, const void *caller)
{
	const struct next_route *route = next_route(routes, caller);

	return route ? route->found : NULL;
}

void *next_for(struct next_route **routes, const void *caller, const char *name);

/* Exported: for which caller this library's function is at work that this thread has called last. The preloaded library behind it asks;
 * what the dynamic linker would find for this library as a caller is this library again. */
const void *ummunotify_next_caller(void);

/* The library with this address, as dlopen returns it; never unloaded from now on. NULL: none. */
void *next_keep(const void *address);

#endif
