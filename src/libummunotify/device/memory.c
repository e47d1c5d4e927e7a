/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The kernel looks at one word of each page, by futex operations that wake and move no waiter: they load the word, or add 0 to it
 * atomically, and return EFAULT where that is not permitted. They need no descriptor, and no sandbox refuses them;
 * process_vm_readv and process_vm_writev are refused by some, and a pipe takes two descriptors.
 *
 * The answer holds until the mapping changes. A program that unmaps a buffer while it reads into it crashes here, where a system
 * call would return EFAULT: that is a race of the program's own.
 */
#define _GNU_SOURCE
#include "device/memory.h"

#include <errno.h>
#include <linux/futex.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Any word that can be read: the first one of an operation that takes two. */
static const uint32_t other;

static bool can_read_word(uintptr_t address)
{
	return !syscall(SYS_futex, address, FUTEX_CMP_REQUEUE | FUTEX_PRIVATE_FLAG, 0, NULL, &other, 0) || errno != EFAULT;
}

static bool can_write_word(uintptr_t address)
{
	return syscall(SYS_futex, &other, FUTEX_WAKE_OP | FUTEX_PRIVATE_FLAG, 0, NULL, address,
		       FUTEX_OP(FUTEX_OP_ADD, 0, FUTEX_OP_CMP_EQ, 0)) >= 0 ||
	       errno != EFAULT;
}

static bool can(bool (*can_word)(uintptr_t), uintptr_t start, size_t length)
{
	const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
	uintptr_t at = start & ~(uintptr_t)3; /* a futex is aligned */
	int kept = errno;
	bool result = start + length >= start;

	for (; result && at < start + length; at = (at / page + 1) * page)
		result = can_word(at);
	errno = kept;
	return result;
}

bool device_can_read(const void *start, size_t length)
{
	return can(can_read_word, (uintptr_t)start, length);
}

bool device_can_write(void *start, size_t length)
{
	return can(can_write_word, (uintptr_t)start, length);
}
