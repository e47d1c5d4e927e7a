/* SPDX-License-Identifier: BSD-3-Clause */
/* A caller's memory, which a system call would not touch without looking: a bad pointer is EFAULT, not a crash. */
#ifndef UMN_DEVICE_MEMORY_H
#define UMN_DEVICE_MEMORY_H

#include <stdbool.h>
#include <stddef.h>

/* Can all of it be read? */
bool device_can_read(const void *start, size_t length);

/* Can all of it be written? Its contents stay. */
bool device_can_write(void *start, size_t length);

#endif
