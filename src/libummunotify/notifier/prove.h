/* SPDX-License-Identifier: BSD-3-Clause */
#ifndef UMN_PROVE_H
#define UMN_PROVE_H

#include "sources/connection.h"
#include "table/table.h"

/* Changes pages of its own and looks whether that is seen: nothing is trusted before. 0, or it has been said why not. */
int umn_prove(struct umn_table *table, struct umn_connection *connection);

#endif
