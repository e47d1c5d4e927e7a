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

static void *add_route(struct next_route **routes, const void *caller, const char *name)
{
	struct next_route *route = malloc(sizeof *route);
	void *found = find(caller, name);

	if (!route || !found) {
		free(route);
		return found;
	}
	*route = (struct next_route){.caller = caller, .found = found};
	pthread_mutex_lock(&lock);
	route->next = *routes;
	__atomic_store_n(routes, route, __ATOMIC_RELEASE);
	pthread_mutex_unlock(&lock);
	return found;
}

void *next_for(struct next_route **routes, const void *caller, const char *name)
{
	void *found = next_known(routes, caller);

	return found ? found : add_route(routes, caller, name);
}
