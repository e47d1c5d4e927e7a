/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Threads that change mappings at random, against an oracle that knows what each of them has changed. For a notifier (with
 * CHANGES_NOTIFIER, in the library's public interface only), or for a table that something feeds with the changes of this process.
 */
#ifndef CHANGES_H
#define CHANGES_H

#include <stdbool.h>
#include <stdint.h>

#ifdef CHANGES_NOTIFIER
#include "include/ummunotify.h"
typedef struct ummunotify changes_target;
typedef struct ummunotify_region changes_region;
#else
#include "table/table.h"
typedef struct umn_table changes_target;
typedef struct umn_region changes_region;
#endif

struct changes_options {
#ifndef CHANGES_NOTIFIER
	struct umn_source *source; /* the table's, if it has one */
#endif
	uint32_t threads; /* at most CHANGES_THREADS_MAX */
	bool files;	  /* map a file too, and punch holes into it */
	uint64_t changes; /* stop after so many */
	double seconds;	  /* or then */
	uint64_t seed;
};
#define CHANGES_THREADS_MAX 16u

struct changes_totals {
	uint64_t changes;      /* ranges that were changed by a call */
	uint64_t checks;       /* how often a region's validity was compared with the oracle's */
	uint64_t valid;	       /* ... and was valid */
	uint64_t hit;	       /* ... and had to be invalid */
	uint64_t false_alarms; /* ... and was invalid without a reason */
	uint64_t taken;	       /* addresses that another thread was given, perhaps before the unmapping call had returned */
	uint64_t watched, renewed, refused, events;
};

/* NULL, or what went wrong first. */
const char *changes_run(changes_target *target, const struct changes_options *options, struct changes_totals *totals);

#endif
