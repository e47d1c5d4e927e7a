/* SPDX-License-Identifier: BSD-3-Clause */
/* libfabric's interface, as far as a monitor needs it: the package is built without libfabric. tests/c/libfabric.c compares it with
 * the real headers. It is the same in all versions from 1.13 to 2.6. */
#ifndef UMN_LIB_LIBFABRIC_H
#define UMN_LIB_LIBFABRIC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { FI_CLASS_MEM_MONITOR = 23 };

struct fid_mem_monitor;

struct fid {
	size_t fclass;
	void *context;
	struct fi_ops *ops;
};

struct fi_ops {
	size_t size;
	int (*close)(struct fid *fid);
	int (*bind)(struct fid *fid, struct fid *other, uint64_t flags);
	int (*control)(struct fid *fid, int command, void *argument);
	int (*ops_open)(struct fid *fid, const char *name, uint64_t flags, void **ops, void *context);
	int (*tostr)(const struct fid *fid, char *buffer, size_t length);
	int (*ops_set)(struct fid *fid, const char *name, uint64_t flags, void *ops, void *context);
};

/* What libfabric calls. All but `start` and `stop` under the lock of all its caches, so they must neither wait for anybody who may want
 * that, nor call `notify`. */
struct fi_ops_mem_monitor {
	size_t size;
	int (*start)(struct fid_mem_monitor *monitor);
	void (*stop)(struct fid_mem_monitor *monitor);
	int (*subscribe)(struct fid_mem_monitor *monitor, const void *address, size_t length);
	void (*unsubscribe)(struct fid_mem_monitor *monitor, const void *address, size_t length);
	bool (*valid)(struct fid_mem_monitor *monitor, const void *address, size_t length);
};

/* What the monitor calls. It takes the lock of the caches, and drops the registrations that overlap the range from all of them. */
struct fi_ops_mem_notify {
	size_t size;
	void (*notify)(struct fid_mem_monitor *monitor, const void *address, size_t length);
};

struct fid_mem_monitor {
	struct fid fid;
	struct fi_ops_mem_monitor *export_ops;
	struct fi_ops_mem_notify *import_ops;
};

/* What the program finds under `name` in its libfabric, whether that can be seen by all or only by what it was loaded with. `caller` is
 * an address in the code that asks. `version`: of the symbol. */
void *libfabric_symbol(const void *caller, const char *name, const char *version);

/* Imports a monitor into the libfabric that has this function, or into the provider that was loaded as a plugin. */
int libfabric_import(void *function, struct fid **monitor);

#endif
