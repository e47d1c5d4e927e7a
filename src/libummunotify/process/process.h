/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Which process this is: how everything here notices that it was inherited through a fork.
 *
 * The epoch lies in a page that the kernel clears in every child with an address space of its own, however the child was
 * made: fork, _Fork, clone, daemon(3) (MADV_WIPEONFORK, Linux 4.14). A child that shares the memory (vfork, posix_spawn, CLONE_VM)
 * counts as the process itself. What belongs to a process notes the epoch when it is made, and is dead when the two differ: one
 * load. The first call that asks for the epoch in a child takes a new number, after the modules have forgotten what they had.
 *
 * No lock is taken before a fork, and none needs to be free then: what is in use at that moment is never used in the child.
 */
#ifndef UMN_PROCESS_H
#define UMN_PROCESS_H

#include <stdbool.h>
#include <stdint.h>

/* The page. 0: a child that has not asked yet. Set by umn_process_start, never unmapped. */
extern const uint32_t *umn_process_epoch;

/* Makes the page, once. 0 or a negative errno. */
int umn_process_start(void);

/* This process's epoch, never 0; after umn_process_start. Any thread. */
uint32_t umn_process_current(void);

/* Is something that was made in this epoch this process's? No system call, no lock. The load needs no order: a thread of the child
 * runs after the fork that cleared the page. */
static inline bool umn_process_is(uint32_t epoch)
{
	return __atomic_load_n(umn_process_epoch, __ATOMIC_RELAXED) == epoch;
}

/* What a module does in a child, before the first use of anything there: forget the parent's state. Threads that held the module's
 * locks do not exist, and its data may be half changed; so it initialises both anew. It may close descriptors that
 * are certain to be its own. Modules add themselves once, in umn_process_start's caller or later; called in the order of adding. */
void umn_process_add_child(void (*in_child)(void));

/* While these functions run: does the child share the parent's descriptor table (clone with CLONE_FILES, without CLONE_VM)? What it closed
 * would be closed for the parent. False where the kernel does not say (kcmp). */
bool umn_process_shares_descriptors(void);

#endif
