/* SPDX-License-Identifier: BSD-3-Clause */
/* Where a thread is: its C frames, and its Python frames if it runs Python. */
#ifndef UMN_AUDIT_STACK_H
#define UMN_AUDIT_STACK_H

#include <stdbool.h>

#include "audit/records.h"

#define STACK_FRAMES 40

struct stack {
	int count;
	void *frames[STACK_FRAMES]; /* return addresses */
	char *python;		    /* lines as faulthandler prints them, innermost first; NULL: none */
};

/* Is this address in the library that all of this is in? */
bool stack_is_own(const void *address);

/* The user can do without. */
bool stacks_wanted(void);

/* Of the calling thread, from the program's call into this library on. */
void stack_take(struct stack *stack);
void stack_free(struct stack *stack);

/* Adds "<prefix>frames", a list of [module, offset], and "<prefix>python". */
void stack_record(const char *prefix, const struct stack *stack);

#endif
