/* SPDX-License-Identifier: BSD-3-Clause */
/* Put before every source file of the interleave test: each access to shared memory becomes a point at which another of its
 * threads may go on. */
#ifndef UMN_INTERLEAVE_H
#define UMN_INTERLEAVE_H

#include <stddef.h>
#include <stdint.h>

void umn_point(const void *at, size_t size, int write);
/* A slot's state is about to lose these bits. */
void umn_clearing(const void *state, uint32_t bits);
/* For the threads that wait. */
#define sched_yield umn_yield
#define nanosleep umn_nanosleep
#define pthread_mutex_lock umn_mutex_lock
#define pthread_mutex_unlock umn_mutex_unlock
/* The tables' memory belongs to the test. */
#define munmap umn_munmap

#define __atomic_load_n(p, order) (umn_point(p, sizeof *(p), 0), *(const volatile __typeof__(*(p)) *)(p))
#define __atomic_store_n(p, v, order) (umn_point(p, sizeof *(p), 1), (void)(*(volatile __typeof__(*(p)) *)(p) = (v)))
#define umn_modify(p, expression)                                                                                                  \
	({                                                                                                                         \
		__typeof__(p) p_ = (p);                                                                                            \
		__typeof__(*p_) old_ = (umn_point(p_, sizeof *p_, 1), *p_);                                                        \
		*p_ = (expression);                                                                                                \
		old_;                                                                                                              \
	})
#define __sync_fetch_and_add(p, v) umn_modify(p, old_ + (v))
#define __sync_fetch_and_sub(p, v) umn_modify(p, old_ - (v))
#define __sync_fetch_and_or(p, v) umn_modify(p, old_ | (v))
#define __sync_fetch_and_and(p, v) umn_modify(p, (umn_clearing(p_, ~(v)), old_ & (v)))
#define __sync_lock_test_and_set(p, v) umn_modify(p, v)
#define __sync_val_compare_and_swap(p, was, v) umn_modify(p, old_ == (was) ? (v) : old_)

#endif
