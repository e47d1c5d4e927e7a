/* SPDX-License-Identifier: BSD-3-Clause */
/* A source's connection to one table: what sources/base.py is in Python. */
#ifndef UMN_LIB_FEED_H
#define UMN_LIB_FEED_H

#include <stdbool.h>
#include <stdint.h>

#include "table/table.h"

#define FEED_FDS 67

/* The notifier calls these one at a time, for all feeds of the process together, and there is no fork meanwhile; but for
 * `acknowledge`, `doubtful`, and `wake_fd` once it has been made. Those that fail return a negative errno (NULL) and have said why
 * (fail below). */
struct feed {
	const char *name;
	struct umn_source *source; /* NULL: it need not be told what is watched */
	int counter_fd;		   /* a page of memory that begins with a counter of changes, to be mapped; -1: not asked for */
	const uint64_t *counter;   /* that counter; NULL: it is the table's generation */
	void *(*add_segment)(struct feed *feed, uint32_t pages);
	int (*bind)(struct feed *feed);
	int (*wake_fd)(struct feed *feed);
	int (*make_counter)(struct feed *feed); /* NULL: there is one already, if it was asked for */
	int (*fds)(struct feed *feed, int *fds); /* those without which changes would be missed, at most FEED_FDS; NULL: none */
	void (*acknowledge)(struct feed *feed);
	bool (*doubtful)(struct feed *feed);
	void (*release)(struct feed *feed); /* everything but its own memory; also in the child of a fork */
	void (*free)(struct feed *feed);
};

/* NULL: it does not work here. */
struct feed *feed_open_daemon(bool counter);
struct feed *feed_open_uffd(bool counter); /* make_counter makes it, if it is wanted */

/* Says why watching failed with UMN_UFFD_START. Returns the negative errno. */
int feed_explain_uffd_start(void);

/* Says why, for ummunotify_error. Returns -error. */
__attribute__((format(printf, 2, 3))) int fail(int error, const char *format, ...);

#endif
