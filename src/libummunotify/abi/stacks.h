/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */
/* The records in the ring buffer of the BPF program that takes the stacks of changes (bpf/stacks.bpf.c). */
#ifndef UMN_STACKS_H
#define UMN_STACKS_H

#include "abi/layout.h"

#define UMN_STACK_USER 48 /* frames */
#define UMN_STACK_KERNEL 32
#define UMN_STACK_RING_BYTES (1u << 20) /* some 1,400 stacks; a power of two, and a multiple of any page */

struct umn_stack {
	uint64_t time;	     /* of the change: CLOCK_MONOTONIC, in ns */
	uint64_t start, end; /* of the change */
	uint32_t process;    /* that made it, and its thread, as the table's owner numbers them; 0: it has none there */
	uint32_t thread;
	char process_name[16], thread_name[16];
	uint64_t caller; /* where the innermost function returns to, if it has made no frame (those of the C library do not); 0 */
	uint32_t user_frames, kernel_frames;
	uint64_t user[UMN_STACK_USER]; /* innermost first: where it is, then return addresses */
	uint64_t kernel[UMN_STACK_KERNEL];
};
UMN_STATIC_ASSERT(sizeof(struct umn_stack) == 720, "a stack");

#endif
