/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "bridges/next.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void *next_keep(const void *address)
{
	Dl_info info;

	return dladdr(address, &info) ? dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD | RTLD_NODELETE) : NULL;
}

/* In the order in which the dynamic linker would have looked. */
static void *find(const void *caller, const char *name)
{
	void *found = dlsym(RTLD_NEXT, name), *handle = next_keep(caller);

	if (handle) {
		if (!found)
			found = dlsym(handle, name);
		dlclose(handle);
	}
	handle = found ? next_keep(found) : NULL;
	if (handle)
		dlclose(handle);
	return found;
}

static __thread const void *last_caller __attribute__((tls_model("initial-exec")));

__attribute__((visibility("default"))) const void *ummunotify_next_caller(void)
{
	return last_caller;
}

/* NULL: the caller is no preloaded library. */
static const void *(*caller_of(const void *caller))(void)
{
	const void *(*function)(void) = NULL;
	void *handle = next_keep(caller);
	Dl_info callers, found;

	if (handle) {
		*(void **)&function = dlsym(handle, "ummunotify_next_caller");
		dlclose(handle);
	}
	/* The program's handle finds what is preloaded, too. */
	if (!function || !dladdr(caller, &callers) || !dladdr(*(void **)&function, &found) || callers.dli_fbase != found.dli_fbase)
		return NULL;
	return function;
}

/* NULL: not found, or no memory. */
static const struct next_route *add_route(struct next_route **routes, const void *caller, const char *name)
{
	struct next_route *route = malloc(sizeof *route);

	if (!route)
		return NULL;
	*route = (struct next_route){.caller = caller, .caller_of = caller_of(caller)};
	if (!route->caller_of)
		route->found = find(caller, name);
	if (!route->caller_of && !route->found) {
		free(route);
		return NULL;
	}
	pthread_mutex_lock(&lock);
	route->next = *routes;
	__atomic_store_n(routes, route, __ATOMIC_RELEASE);
	pthread_mutex_unlock(&lock);
	return route;
}

void *next_for(struct next_route **routes, const void *caller, const char *name)
{
	const struct next_route *route = NULL;

	/* As many as there are preloaded libraries before this one, and the caller itself. */
	for (int i = 0; i < 8 && caller; i++) {
		route = next_route(routes, caller);
		if (!route)
			route = add_route(routes, caller, name);
		if (!route || !route->caller_of)
			break;
		caller = route->caller_of();
	}
	last_caller = caller;
	return route ? route->found : find(caller, name);
}
