/* SPDX-License-Identifier: BSD-3-Clause */
/* What the preloaded bridges have in common: what they say, and when.
 *
 * A process that ends without having used a bridge says so if it has loaded what could have used it, or if it is the program that
 * `ummunotify run` was given and has started no other: mpiexec and shells are not meant. */
#ifndef UMN_BRIDGES_PRELOAD_H
#define UMN_BRIDGES_PRELOAD_H

#include <stdbool.h>

/* UMMUNOTIFY_QUIET, and UMMUNOTIFY_REPORT. */
bool bridge_quiet(void);
bool bridge_reports(void);

/* Is it worth saying that this bridge was not used? A process that has the other one too needs only one of them; then only with
 * UMMUNOTIFY_REPORT. */
bool bridge_says_unused(const char *other);

struct bridge_loaded {
	bool libfabric, ucx;
	bool is_static; /* `mark` is in the program or in what belongs to MPI */
};

/* `mark`: read-only data that every copy of the library holds, also one that was linked statically. */
void bridge_look(struct bridge_loaded *loaded, const char *mark);

bool bridge_is_the_program(void);

/* A line on standard error, with the program's name before it. */
__attribute__((format(printf, 1, 2))) void bridge_say(const char *format, ...);

#endif
