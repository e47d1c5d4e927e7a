/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The owner's side of a probe that the kernel may skip at times, and that knows when (bpf/watch.bpf.c). While there is a CPU where
 * this can happen, an untouched region does not count as valid.
 */
#ifndef UMN_PROBE_GAP_H
#define UMN_PROBE_GAP_H

#include "abi/layout.h"
#include "table/table.h"

struct umn_probe_gap {
	struct umn_source source;
	const struct umn_probe_gaps *shared;
};

/* fd: the map. 0 or -errno. */
int umn_probe_gap_open(struct umn_probe_gap *gap, int fd);
/* umn_show_secret, but again while the kernel may have skipped the probe meanwhile, for some seconds at most. 0 or -errno. */
int umn_probe_gap_show_secret(struct umn_probe_gap *gap, uint64_t secret);
/* Lets go of the map: from then on there is no gap. Other threads may be looking meanwhile. */
void umn_probe_gap_abandon(struct umn_probe_gap *gap);
/* No thread is looking any more. */
void umn_probe_gap_close(struct umn_probe_gap *gap);

#endif
