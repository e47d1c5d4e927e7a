/* SPDX-License-Identifier: BSD-3-Clause */
/* What a process leaves for the report: a file of its own in the directory that `ummunotify audit` made, mapped and shared. So what was
 * written is there however the process ends, and no descriptor is needed, which the program could close.
 *
 * The file begins with a struct counts; then come records, a line of JSON each. The newline is written last: a line without one is not
 * complete. audit/records.py reads it. */
#ifndef UMN_AUDIT_RECORDS_H
#define UMN_AUDIT_RECORDS_H

#include <stddef.h>
#include <stdint.h>

struct counts {
	uint32_t magic, ended; /* 1: by exit, or by returning from main */
	uint64_t pins, unwatched, changed, used, lost /* records for which there was no room */;
};
#define COUNTS_MAGIC 0x31747561 /* "aut1" */

/* Makes this process's file, if it has none. NULL: that is not possible, or not asked for. */
struct counts *records_open(void);

/* One record at a time: from record_begin to record_end other threads wait. What has no room is left out, or cut off if it is text. */
void record_begin(const char *kind);
void record_number(const char *name, uint64_t value);
void record_text(const char *name, const char *value);
/* Seconds since 1970. */
void record_time(const char *name, double value);
/* A list, as valid JSON. */
void record_list(const char *name);
__attribute__((format(printf, 1, 2))) void record_item(const char *format, ...);
void record_list_end(void);
void record_end(void);

/* Each byte that is not printable ASCII as a character of its own, as if the text were Latin-1; the reader turns it back. */
void record_escape(char *into, size_t room, const char *text);

double records_now(void);

#endif
