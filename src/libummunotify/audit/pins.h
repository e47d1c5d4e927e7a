/* SPDX-License-Identifier: BSD-3-Clause */
/* What the program has pinned, what changed it, and what was used afterwards. The files beside this one stand before the functions that
 * pin, use and change memory, and call this. */
#ifndef UMN_AUDIT_PINS_H
#define UMN_AUDIT_PINS_H

#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "process/process.h"

struct pin;

/* By what a pin is found. */
enum key {
	KEY_ID,	    /* only here */
	KEY_PIN,    /* by what it is given up: an mr, a ring's slot, an address; see pins_key */
	KEY_LOCAL,  /* an lkey */
	KEY_REMOTE, /* an rkey */
	KEYS,
};

/* A key of two numbers and of what they are. Never 0. */
uint64_t pins_key(const char *what, uint64_t first, uint64_t second);

/* Before memory is pinned: watches it. `interface` and `call` are string constants. NULL: it is not audited. Then what came of it. */
struct pin *pins_begin(const char *interface, const char *call, const void *address, size_t length);
void pins_add(struct pin *pin, const uint64_t keys[KEYS]);
void pins_drop(struct pin *pin);

/* Before a pin is given up; afterwards pins_drop, or pins_add if that failed. */
struct pin *pins_take(uint64_t key, const char *call);
void pins_restore(struct pin *pin);

/* A pin is about to be used. */
void pins_use(enum key kind, uint64_t key, uint64_t address, uint64_t length, const char *call);

/* Around what may change memory, so that a change has the stack of its call:
 *
 *	if (!pins_quiet())
 *		pins_before(CALLER);
 *	... the call
 *	if (!pins_quiet())
 *		pins_after("munmap", CALLER);
 *
 * `caller`: of the function that stands before another; the library's own calls are none of the program's. */
void pins_before(const void *caller);
void pins_after(const char *call, const void *caller);

/* What pins_quiet reads. */
extern struct pins_state {
	const uint64_t *generation; /* NULL: nothing is pinned, or changes get no stacks from here */
	uint64_t seen;		    /* the generation when all was read; with several threads perhaps an earlier one */
	uint32_t epoch;		    /* the process's: in a child the generation is not mapped */
	uint32_t wanted;	    /* stacks */
} pins_state;

/* Nothing has changed that was not looked at. The opening of a notifier releases `generation`, which is acquired here: the epoch is
 * there before it. What this thread has changed is in the generation that it loads. `seen` may be loaded sooner or later: what equals
 * that generation was stored after all changes up to it were read. */
static inline bool pins_quiet(void)
{
	const uint64_t *generation = __atomic_load_n(&pins_state.generation, __ATOMIC_ACQUIRE);

	return !generation ||
	       (umn_process_is(pins_state.epoch) &&
		__atomic_load_n(generation, __ATOMIC_ACQUIRE) == __atomic_load_n(&pins_state.seen, __ATOMIC_RELAXED) &&
		!__atomic_load_n(&pins_state.wanted, __ATOMIC_ACQUIRE));
}

/* While something of the audit's own is half done, in a call that the program may leave by a jump out of a signal handler. */
static inline sigset_t pins_hold_signals(void)
{
	sigset_t all, before;

	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &before);
	return before;
}

static inline void pins_let_signals(sigset_t before)
{
	pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* While the program's calls are not to be looked at in this thread: inside a call that pins. */
extern __thread bool pins_inside __attribute__((tls_model("initial-exec")));

#endif
