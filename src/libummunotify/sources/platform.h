/* SPDX-License-Identifier: BSD-3-Clause */
/* What a source needs from the operating system that Python's standard library does not have. */
#ifndef UMN_PLATFORM_H
#define UMN_PLATFORM_H

#include <stddef.h>
#include <stdint.h>

/* The first address that user space cannot use. */
uint64_t umn_user_limit(void);

/* Zaps a page of this process's own, showing `secret` to the kernel's feeder (shake_hands in watch.bpf.c). 0 or -errno. */
int umn_show_secret(uint64_t secret);

/* A new page with something in it. Address or NULL. */
void *umn_test_page(void);

/* How often the kernel skipped a run of this BPF program, from its own count; negative: -errno. */
int64_t umn_skipped_runs(int program_fd);

/* The reading side of a BPF ring buffer of one page, used only as a wake-up: poll its fd, then clear it. */
struct umn_ring {
	uint64_t *consumed;
	const uint64_t *produced;
};
int umn_ring_map(struct umn_ring *ring, int fd); /* 0 or -errno */
void umn_ring_clear(struct umn_ring *ring);	 /* also after umn_ring_unmap */
void umn_ring_unmap(struct umn_ring *ring);

#endif
