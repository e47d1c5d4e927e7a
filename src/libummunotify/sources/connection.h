/* SPDX-License-Identifier: BSD-3-Clause */
/* A source's connection to one table. */
#ifndef UMN_CONNECTION_H
#define UMN_CONNECTION_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "table/table.h"

struct ummunotify_feeder;

/* One thread at a time for each connection, but for `acknowledge` and `may_have_missed`. Functions that fail return a negative
 * errno and have noted why (error.h). */
struct umn_connection {
	const char *name;	   /* "daemon:kvm" */
	struct umn_source *source; /* NULL: it need not be told what is watched, and its news is never late */
	const uint64_t *counter;   /* counts changes before they are in the table; NULL: the table's generation does */
	int wake_fd;		   /* what add_wakeup has added, if that is a descriptor that stays open; -1 */
	/* Memory for the table's next segment. */
	int (*add_segment)(struct umn_connection *connection, uint32_t pages, void **memory);
	/* Begins to feed: the changes of this process from now on. Called once there is a segment. */
	int (*bind)(struct umn_connection *connection);
	/* Adds what is readable after a wake-up to an epoll; once. */
	int (*add_wakeup)(struct umn_connection *connection, int epoll);
	/* Makes it unreadable until the next wake-up. */
	void (*acknowledge)(struct umn_connection *connection);
	/* May a change have been missed since this was last asked? Waits, for a source whose news comes late. 0, 1, or a negative errno: it
	 * cannot be known any more, or not in this thread. */
	int (*may_have_missed)(struct umn_connection *connection);
	/* Notes why it refused to watch [start, end) with this errno (umn_source.watch). Returns -error. NULL: it refuses nothing. */
	int (*refused)(struct umn_connection *connection, int error, uint64_t start, uint64_t end);
	/* A descriptor of a page that begins with the counter, which can only be read; the caller's to close. */
	int (*open_counter)(struct umn_connection *connection);
	/* Stops feeding and releases everything but the segments' memory, which is the table's. */
	void (*release)(struct umn_connection *connection);
	/* In a child, for which nothing is released: closes the descriptors that it inherited, if they are certain to be ours. */
	void (*in_child)(struct umn_connection *connection);
	/* Frees its own memory; in a child too. */
	void (*free)(struct umn_connection *connection);
};

enum umn_source_kind { UMN_BPF, UMN_DAEMON, UMN_UFFD };

/* What a source's name stands for. */
struct umn_candidate {
	const char *name;
	enum umn_source_kind kind;
	int probe; /* enum umn_probe; -1: as it comes */
};

/* The candidates that `wanted` names, best first. The number; or -EINVAL, and it has been said why. */
#define UMN_CANDIDATES_MAX 8
int umn_candidates(const char *wanted, const struct umn_candidate **candidates);

/* NULL: it does not work here, and it has been said why. `counter`: open_counter will be called. */
struct umn_connection *umn_connect(const struct umn_candidate *candidate, const struct ummunotify_feeder *feeder, bool counter);

/* What umn_connect chooses from. */
struct umn_connection *umn_connect_daemon(int probe, bool counter);
struct umn_connection *umn_connect_feeder(int probe, const struct ummunotify_feeder *feeder, bool counter);
struct umn_connection *umn_connect_uffd(void);

#endif
