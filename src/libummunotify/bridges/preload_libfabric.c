/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * What `ummunotify run --libfabric` preloads: imports the monitor when a program has called fi_getinfo, without which it cannot open a
 * domain. By then libfabric is loaded and initialised.
 *
 * fi_getinfo has a version for each layout of struct fi_info that there has been. A program must get the one that it was linked with, so
 * each version is provided here, and calls its counterpart.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <link.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bridges/libfabric.h"
#include "bridges/preload.h"
#include "include/ummunotify.h"

#define LIBFABRICS 32 /* and plugins, in one process */
#define PLUGIN "-fi.so"

struct fi_info;

#define PARAMETERS                                                                                                                 \
	uint32_t version, const char *node, const char *service, uint64_t flags, const struct fi_info *hints, struct fi_info **info
typedef int getinfo_function(PARAMETERS);

static struct {
	pthread_mutex_t lock;
	const void *seen[LIBFABRICS];
	size_t count;
	bool said, asked; /* asked: fi_getinfo was called */
} the = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* The lock is held. Once for each. */
static void import_into(void *function)
{
	struct fid *fid;
	Dl_info info;

	if (!dladdr(function, &info) || the.count == LIBFABRICS)
		return;
	for (size_t i = 0; i < the.count; i++)
		if (the.seen[i] == info.dli_fbase)
			return;
	the.seen[the.count++] = info.dli_fbase;
	if (!libfabric_import(function, &fid) || the.said || bridge_quiet())
		return;
	fprintf(stderr, "ummunotify: libfabric goes on with its own monitor: %s\n", ummunotify_error());
	the.said = true;
}

/* Providers that libfabric has loaded. It does not unload them. */
struct plugins {
	size_t count;
	const char *names[LIBFABRICS];
};

static int look_at(struct dl_phdr_info *library, size_t size, void *plugins)
{
	const char *name = strrchr(library->dlpi_name, '/');
	struct plugins *found = plugins;

	(void)size;
	if (name && strstr(name, PLUGIN) && found->count < LIBFABRICS)
		found->names[found->count++] = library->dlpi_name;
	return 0;
}

static void import(getinfo_function *function)
{
	const char *monitor = getenv("FI_MR_CACHE_MONITOR");
	struct plugins plugins = {0};
	void *handle, *inside;

	/* A monitor would switch on the cache. */
	if (monitor && !strcmp(monitor, "disabled"))
		return;
	dl_iterate_phdr(look_at, &plugins);
	pthread_mutex_lock(&the.lock);
	import_into((void *)function);
	for (size_t i = 0; i < plugins.count; i++) {
		handle = dlopen(plugins.names[i], RTLD_LAZY | RTLD_NOLOAD);
		inside = handle ? dlsym(handle, "ofi_open_mr_cache") : NULL;
		if (inside)
			import_into(inside);
		if (handle)
			dlclose(handle);
	}
	pthread_mutex_unlock(&the.lock);
}

__attribute__((noinline)) static int getinfo(const char *symbol_version, const void *caller, PARAMETERS)
{
	static __thread bool inside; /* libfabric calls fi_getinfo too */
	getinfo_function *function = (getinfo_function *)libfabric_symbol(caller, "fi_getinfo", symbol_version);
	bool outside = !inside;
	int result;

	__atomic_store_n(&the.asked, true, __ATOMIC_RELAXED);
	if (!function)
		return -ENOSYS;
	inside = true;
	result = function(version, node, service, flags, hints, info);
	if (outside) {
		inside = false;
		import(function);
	}
	return result;
}

/* ---- A program that did not call it ---- */

__attribute__((destructor)) static void say_unused(void)
{
	struct bridge_loaded loaded;
	const char *why;

	if (__atomic_load_n(&the.asked, __ATOMIC_RELAXED) || !bridge_says_unused("libummunotify-ucx.so"))
		return;
	bridge_look(&loaded, "mr_cache_monitor"); /* a variable's name */
	if (loaded.is_static)
		why = "it has libfabric linked statically; link it dynamically";
	else if (loaded.ucx)
		why = "it has loaded UCX, which MPI libraries may take instead; use `ummunotify run --ucx`, or with MPICH set "
		      "MPIR_CVAR_CH4_NETMOD=ofi";
	else if (loaded.libfabric)
		why = "it has loaded libfabric, but not called fi_getinfo, or found that by dlsym";
	else if (bridge_is_the_program())
		why = "it has not loaded libfabric";
	else
		return;
	bridge_say("has no monitor for libfabric: %s", why);
}

/* ---- The versions ---- */

#define PROVIDE(minor)                                                                                                             \
	__attribute__((visibility("default"))) int fi_getinfo_##minor(PARAMETERS);                                                 \
	__asm__(".symver fi_getinfo_" #minor ", fi_getinfo@FABRIC_1." #minor);                                                     \
	int fi_getinfo_##minor(PARAMETERS)                                                                                         \
	{                                                                                                                          \
		return getinfo("FABRIC_1." #minor, __builtin_return_address(0), version, node, service, flags, hints, info);       \
	}
PROVIDE(0)
PROVIDE(1)
PROVIDE(2)
PROVIDE(3)
PROVIDE(4)
PROVIDE(5)
PROVIDE(6)
PROVIDE(7)
PROVIDE(8)
PROVIDE(9)
PROVIDE(10)
PROVIDE(11)
PROVIDE(12)
PROVIDE(13)
PROVIDE(14)
PROVIDE(15)
PROVIDE(16)
PROVIDE(17)
PROVIDE(18)
PROVIDE(19)
