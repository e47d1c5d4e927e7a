/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * libummunotify as the memory monitor of libfabric: its cache of registrations then drops those whose memory was changed.
 *
 *	struct fid *monitor;
 *
 *	fi_getinfo(...);
 *	if (ummunotify_libfabric_import(&monitor))
 *		errx(1, "%s", ummunotify_error());
 *	fi_fabric(...); fi_domain(...);
 *	...
 *	fi_close(...);		all domains,
 *	fi_close(monitor);	then this, if libfabric is to be used without it
 *
 * What is guaranteed, and where this works: docs/libfabric.md.
 */
#ifndef UMMUNOTIFY_LIBFABRIC_H
#define UMMUNOTIFY_LIBFABRIC_H

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

struct fid; /* <rdma/fabric.h> */

/* Gives libfabric, version 1.13 or later, a monitor that learns of changes from what ummunotify_open(&umn, NULL) finds. To be called
 * after the first fi_getinfo, and before the first domain is opened. libfabric is the one that the program is
 * linked with or has loaded: this library is not linked with it.
 *
 * fi_close(*monitor) takes it back, and fails with -EBUSY while a domain with a cache is open. From then on libfabric has no monitor,
 * and caches nothing, until another one is imported.
 *
 * -ENODEV: no source works; -ENOENT: no libfabric is loaded, or it is too old; -EBUSY: libfabric has an imported monitor already, or a
 * domain is open; ummunotify_error() says more. */
int ummunotify_libfabric_import(struct fid **monitor);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
