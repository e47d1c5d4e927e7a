/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * What `ummunotify run --libfabric` preloads: imports the monitor when a program has called fi_getinfo, without which it cannot open a
 * domain. By then libfabric is loaded and initialised.
 *
 * fi_getinfo has a version for each layout of struct fi_info that there has been. A program must get the one that it was linked with, so
 * each version is provided here, and calls its counterpart.
 *
 * A process that ends without such a call had no use of the monitor. It says so if it has loaded what could have made the call, or if it
 * is the program that was named and has started no other: mpiexec and shells are not meant.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <link.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "bridges/libfabric.h"
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

static bool quiet(void)
{
	const char *quiet = getenv("UMMUNOTIFY_QUIET");

	return quiet && *quiet;
}

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
	if (!libfabric_import(function, &fid) || the.said || quiet())
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

#define STATIC_MARK "mr_cache_monitor" /* a variable's name, which every libfabric holds */

struct loaded {
	bool libfabric, ucx, is_static;
};

/* Only in the program and in what belongs to MPI: to look into all that a process may have loaded would take long. */
static bool may_hold_libfabric(const char *name)
{
	return !*name || strstr(name, "mpi") || strstr(name, "shmem");
}

static bool holds_libfabric(const struct dl_phdr_info *object)
{
	for (size_t i = 0; i < object->dlpi_phnum; i++) {
		const ElfW(Phdr) *segment = &object->dlpi_phdr[i];

		if (segment->p_type == PT_LOAD && (segment->p_flags & (PF_R | PF_W)) == PF_R &&
		    memmem((const void *)(object->dlpi_addr + segment->p_vaddr), segment->p_filesz, STATIC_MARK,
			   strlen(STATIC_MARK)))
			return true;
	}
	return false;
}

static int look_for(struct dl_phdr_info *object, size_t size, void *result)
{
	const char *slash = strrchr(object->dlpi_name, '/'), *name = slash ? slash + 1 : object->dlpi_name;
	struct loaded *loaded = result;

	(void)size;
	if (!strncmp(name, "libfabric.so", strlen("libfabric.so")))
		loaded->libfabric = true;
	else if (!strncmp(name, "libucp.so", strlen("libucp.so")))
		loaded->ucx = true;
	else if (may_hold_libfabric(name) && holds_libfabric(object))
		loaded->is_static = true;
	return 0;
}

static bool is_the_program(void)
{
	const char *number = getenv("UMMUNOTIFY_LIBFABRIC_PROGRAM");
	struct rusage children;

	/* The last says whether it has waited for a child. */
	return number && strtol(number, NULL, 10) == getpid() && !getrusage(RUSAGE_CHILDREN, &children) && !children.ru_maxrss;
}

__attribute__((destructor)) static void say_unused(void)
{
	struct loaded loaded = {0};
	const char *why = "it has not loaded libfabric";

	if (__atomic_load_n(&the.asked, __ATOMIC_RELAXED) || quiet())
		return;
	dl_iterate_phdr(look_for, &loaded);
	if (loaded.is_static)
		why = "it has libfabric linked statically; link it dynamically";
	else if (loaded.ucx)
		why = "it has loaded UCX, which MPI libraries may take instead; with MPICH set MPIR_CVAR_CH4_NETMOD=ofi";
	else if (loaded.libfabric)
		why = "it has loaded libfabric, but not called fi_getinfo, or found that by dlsym";
	else if (!is_the_program())
		return;
	fprintf(stderr, "ummunotify: %s (%d) has no monitor for libfabric: %s\n", program_invocation_short_name, (int)getpid(),
		why);
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
