/* SPDX-License-Identifier: BSD-3-Clause */
/* Put before every source file of the stress tests: at some accesses to shared memory another thread gets the processor. */
#ifndef UMN_CHAOS_H
#define UMN_CHAOS_H

void umn_chaos(void);

/* The names in the replacements are the builtins. */
#define __atomic_load_n(p, order) (umn_chaos(), __atomic_load_n(p, order))
#define __atomic_store_n(p, v, order) (umn_chaos(), __atomic_store_n(p, v, order))
#define __sync_fetch_and_add(p, v) (umn_chaos(), __sync_fetch_and_add(p, v))
#define __sync_fetch_and_sub(p, v) (umn_chaos(), __sync_fetch_and_sub(p, v))
#define __sync_fetch_and_or(p, v) (umn_chaos(), __sync_fetch_and_or(p, v))
#define __sync_fetch_and_and(p, v) (umn_chaos(), __sync_fetch_and_and(p, v))
#define __sync_lock_test_and_set(p, v) (umn_chaos(), __sync_lock_test_and_set(p, v))
#define __sync_val_compare_and_swap(p, was, v) (umn_chaos(), __sync_val_compare_and_swap(p, was, v))

#endif
