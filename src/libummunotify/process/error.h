/* SPDX-License-Identifier: BSD-3-Clause */
/* Every error is made here, once, for C and Python: see ummunotify_failure in ummunotify.h. */
#ifndef UMN_ERROR_H
#define UMN_ERROR_H

#include "include/ummunotify.h"

/* Notes what failed, for ummunotify_failure of this thread. `remedy` may be "". Returns -error. */
__attribute__((format(printf, 4, 5))) int umn_fail(enum ummunotify_code code, int error, const char *remedy, const char *why, ...);

/* Puts `what` before what was noted last, so that it reads "what: why; remedy". Returns the same -error. */
__attribute__((format(printf, 1, 2))) int umn_fail_what(const char *what, ...);

/* The mapping that is to blame, as /proc/self/maps has it. */
void umn_fail_mapping(const char *mapping);

/* For ummunotify_tried: the source with what was noted last. */
void umn_forget_tried(void);
void umn_note_tried(const char *source);

/* A system call that failed with an errno. */
int umn_fail_errno(enum ummunotify_code code, int error, const char *what);

#endif
