/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The owner's side of a probe that the kernel may skip at times, and that knows when: see `doubt` in bpf/watch.bpf.c. While there
 * is a CPU where this can happen, nobody may take a region for valid because it is untouched.
 */
#ifndef UMN_DOUBT_H
#define UMN_DOUBT_H

#include "abi/layout.h"
#include "table/table.h"

struct umn_doubt {
	struct umn_source source;
	const struct umn_doubts *shared;
};

/* fd: the map. 0 or -errno. */
int umn_doubt_open(struct umn_doubt *doubt, int fd);
/* umn_show_secret, but again while the kernel may have skipped the probe meanwhile, for some seconds at most. 0 or -errno. */
int umn_doubt_show_secret(struct umn_doubt *doubt, uint64_t secret);
/* Lets go of the map: from then on there is no doubt. Other threads may be looking meanwhile. */
void umn_doubt_abandon(struct umn_doubt *doubt);
/* Nobody is looking any more. */
void umn_doubt_close(struct umn_doubt *doubt);

#endif
