/* SPDX-License-Identifier: BSD-3-Clause */
/* Looks into a table's private memory, so the library does not have it. */
#ifndef TABLE_CHECK_H
#define TABLE_CHECK_H

#include "table/table.h"

/* Is the index sound, and is no memory lost? NULL, or what is wrong. */
const char *umn_table_check(struct umn_table *table);

#endif
