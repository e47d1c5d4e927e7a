/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * How many use a registration: counted by each thread for itself, so that a hit needs no atomic read-modify-write operation.
 *
 * Every entry of a cache has a number, for good. Each thread has a count by that number: one more when the thread acquires the entry, one
 * less when it releases it. A count may be negative, as another thread may release; the sum over all threads is how many use it.
 *
 *	user:	count += 1; barrier; is the entry open?		no: count -= 1, and as below
 *	user:	count -= 1; barrier; is the entry open?		no: under the lock, is the sum 0? then it has no user
 *	owner:	entry.open = 0; membarrier(); is the sum 0?	then it has no user (umn_users_none)
 *
 * The user's barriers are for the compiler only. membarrier(2) (PRIVATE_EXPEDITED) executes a full barrier on every CPU that runs a thread
 * of this process, at some point of that thread's program; so that point comes either after the thread has changed its count, and
 * then the owner sees the change, or before the thread looks whether the entry is open, and then it is not. Without membarrier
 * both could miss each other, also on x86: the count may still be in the thread's store buffer while the thread reads
 * "open", which is the one reordering that x86 makes. On Arm any two accesses may be reordered.
 *
 * Counts are not read all at the same moment. That does no harm: once the owner is past membarrier all users that found the entry
 * open are counted; from then on a count goes up only to go down again by itself. So the sum read is at
 * least the number of users left when the last count is read, and if it is 0 there is none, for good.
 *
 * A user's count goes down only after all that it did with the handle (release; x86 orders stores anyway), and the owner reads counts with
 * acquire, so the deregistration comes after that.
 *
 * A signal handler may acquire and release between any two instructions of the thread that it interrupts. So a count is changed by one
 * instruction: on x86 without the lock prefix, elsewhere by a relaxed atomic operation. The memory of ended threads
 * is given to new ones, counts included, and never freed.
 *
 * Where the kernel refuses membarrier (seccomp), or there is no memory, a user counts in the entry itself, by an atomic operation that is
 * a full barrier.
 */
#ifndef UMN_USERS_H
#define UMN_USERS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define UMN_COUNTS_PER_CHUNK 1024u
#define UMN_CHUNKS 8192u /* eight million registrations in a process */

struct umn_thread {
	int32_t *chunk[UMN_CHUNKS];
	struct umn_thread *next;
	uint32_t taken; /* by a thread */
};

/* Never NULL: umn_no_thread until the thread has counted something. Initial-exec: one load instead of a call. Such variables of all
 * libraries that are loaded later share some hundred bytes. */
extern __thread struct umn_thread *umn_thread __attribute__((tls_model("initial-exec")));
extern struct umn_thread umn_no_thread;

/* Where a number's count is, so that a hit need not calculate it. */
struct umn_tally {
	uint16_t chunk;	 /* as bytes in `chunk` */
	uint16_t offset; /* as bytes in that */
};
_Static_assert(UMN_CHUNKS * sizeof(int32_t *) <= UINT16_MAX + 1u, "tallies have 16 bits");

static inline uint32_t umn_tally_number(struct umn_tally tally)
{
	return tally.chunk / sizeof(int32_t *) * UMN_COUNTS_PER_CHUNK + tally.offset / sizeof(int32_t);
}

static inline struct umn_tally umn_tally_of(uint32_t number)
{
	return (struct umn_tally){.chunk = (uint16_t)(number / UMN_COUNTS_PER_CHUNK * sizeof(int32_t *)),
				  .offset = (uint16_t)(number % UMN_COUNTS_PER_CHUNK * sizeof(int32_t))};
}

#if defined(__SANITIZE_THREAD__)
#define UMN_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define UMN_TSAN 1
#endif
#endif

/* What counts and their neighbours are changed with. The second ones order: see above. */
#ifdef UMN_TSAN /* which does not know of membarrier */
#define umn_count_up(count) ((void)__atomic_fetch_add(count, 1, __ATOMIC_SEQ_CST))
#define umn_count_down(count) ((void)__atomic_fetch_sub(count, 1, __ATOMIC_SEQ_CST))
#define umn_count_hit(count) ((void)__atomic_fetch_add(count, 1, __ATOMIC_RELAXED))
#define UMN_OPEN_ORDER __ATOMIC_SEQ_CST
#else
#ifdef __x86_64__
#define umn_count_hit(count) __asm__ volatile("incq %0" : "+m"(*(count)) : : "cc")
#define umn_count_up(count) __asm__ volatile("incl %0" : "+m"(*(count)) : : "cc", "memory")
#define umn_count_down(count) __asm__ volatile("decl %0" : "+m"(*(count)) : : "cc", "memory")
#else
#define umn_count_hit(count) ((void)__atomic_fetch_add(count, 1, __ATOMIC_RELAXED))
#define umn_count_up(count) (__atomic_fetch_add(count, 1, __ATOMIC_RELAXED), __atomic_signal_fence(__ATOMIC_SEQ_CST))
#define umn_count_down(count) (__atomic_fetch_sub(count, 1, __ATOMIC_RELEASE), __atomic_signal_fence(__ATOMIC_SEQ_CST))
#endif
#define UMN_OPEN_ORDER __ATOMIC_ACQUIRE
#endif

/* Once, before anything is counted. */
void umn_users_start(void);

/* This thread's count; NULL: it has none yet, see umn_users_add. */
static inline int32_t *umn_users_count(struct umn_tally tally)
{
	char *chunk = (char *)__atomic_load_n((int32_t **)((char *)umn_thread->chunk + tally.chunk), __ATOMIC_RELAXED);

	return __builtin_expect(!!chunk, 1) ? (int32_t *)(chunk + tally.offset) : NULL;
}

/* One user more or less, where there is no count yet. Never fails. */
void umn_users_add(struct umn_tally tally, int32_t *others, int change);

/* All users that found an entry open before this are seen by umn_users_sum after it. One system call, for any number of entries that were
 * closed before. */
void umn_users_barrier(void);

/* The sum of all threads' counts. */
int32_t umn_users_sum(struct umn_tally tally, const int32_t *others);

/* For statistics: what all threads have added to the two counts at this even number, as one. */
uint64_t umn_users_sum64(struct umn_tally tally);

#endif
