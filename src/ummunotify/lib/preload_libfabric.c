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
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "include/ummunotify.h"
#include "libfabric.h"

#define LIBFABRICS 8 /* in one process */

struct fi_info;

#define PARAMETERS uint32_t version, const char *node, const char *service, uint64_t flags, const struct fi_info *hints, struct fi_info **info
typedef int getinfo_function(PARAMETERS);

/* Once for each libfabric in the process. */
static void import(getinfo_function *function)
{
	static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
	static const void *seen[LIBFABRICS];
	static size_t count;
	const char *monitor = getenv("FI_MR_CACHE_MONITOR"), *quiet = getenv("UMMUNOTIFY_QUIET");
	struct fid *fid;
	Dl_info info;
	bool known;

	if (!dladdr((void *)function, &info))
		return;
	pthread_mutex_lock(&lock);
	known = count == LIBFABRICS;
	for (size_t i = 0; i < count; i++)
		known |= seen[i] == info.dli_fbase;
	if (!known)
		seen[count++] = info.dli_fbase;
	pthread_mutex_unlock(&lock);
	/* A monitor would switch on the cache. */
	if (known || (monitor && !strcmp(monitor, "disabled")))
		return;
	if (libfabric_import((void *)function, &fid) && !(quiet && *quiet))
		fprintf(stderr, "ummunotify: libfabric goes on with its own monitor: %s\n", ummunotify_error());
}

__attribute__((noinline)) static int getinfo(const char *symbol_version, const void *caller, PARAMETERS)
{
	static __thread bool inside; /* libfabric calls fi_getinfo too */
	getinfo_function *function = (getinfo_function *)libfabric_symbol(caller, "fi_getinfo", symbol_version);
	bool outside = !inside;
	int result;

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

#define PROVIDE(minor)                                                                                                                 \
	__attribute__((visibility("default"))) int fi_getinfo_##minor(PARAMETERS);                                                     \
	__asm__(".symver fi_getinfo_" #minor ", fi_getinfo@FABRIC_1." #minor);                                                         \
	int fi_getinfo_##minor(PARAMETERS)                                                                                             \
	{                                                                                                                              \
		return getinfo("FABRIC_1." #minor, __builtin_return_address(0), version, node, service, flags, hints, info);           \
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
