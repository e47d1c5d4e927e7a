/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Keeps files open that the program cannot close: BPF links and the virtual machine, without which changes would go unseen.
 *
 * An io_uring stays while its ring is mapped, and with it the files that are registered with it; no descriptor is needed (Linux 5.1;
 * proved at each start by the self-test, whose descriptors are closed by then). Where io_uring is refused (seccomp, the sysctl
 * kernel.io_uring_disabled), a thread keeps them, in a descriptor table of its own.
 */
#ifndef UMN_KEEPER_H
#define UMN_KEEPER_H

#include <stddef.h>

struct umn_keeper;

/* The files behind `count` descriptors stay open until umn_keeper_release; the caller may close the descriptors. NULL: it has
 * been said why (error.h). */
struct umn_keeper *umn_keeper_new(const int *fds, size_t count);

/* In the process that made it. NULL is fine. */
void umn_keeper_release(struct umn_keeper *keeper);

/* In a child, which has neither the mapping nor the thread. */
void umn_keeper_forget(struct umn_keeper *keeper);

#endif
