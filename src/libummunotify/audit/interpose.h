/* SPDX-License-Identifier: BSD-3-Clause */
/* What the files that stand before other libraries' functions have in common. */
#ifndef UMN_AUDIT_INTERPOSE_H
#define UMN_AUDIT_INTERPOSE_H

#include <dlfcn.h>
#include <stdbool.h>
#include <stdint.h>

#include "audit/stack.h"
#include "bridges/next.h"

#define EXPORT __attribute__((visibility("default")))

/* The C library's function, or that of another library preloaded. */
#define LIBC(name)                                                                                                                 \
	({                                                                                                                         \
		static __typeof__(&name) found;                                                                                    \
                                                                                                                                   \
		if (__builtin_expect(!__atomic_load_n(&found, __ATOMIC_RELAXED), 0))                                               \
			__atomic_store_n(&found, (__typeof__(&name))dlsym(RTLD_NEXT, #name), __ATOMIC_RELAXED);                    \
		found;                                                                                                             \
	})

/* io_uring.c: what the C library's functions are used for. */
void io_uring_mapped(int fd, int64_t offset, void *address);
void io_uring_closing(int fd);
/* Makes the call and sets *result, if it is about an io_uring. */
bool io_uring_call(long number, const long arguments[6], long (*make)(long number, ...), long *result);

#endif
