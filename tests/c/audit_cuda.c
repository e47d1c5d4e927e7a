/* SPDX-License-Identifier: BSD-3-Clause */
/* CUDA's registration of host memory, in the driver's place and in a program's. */
#define _GNU_SOURCE
#include <assert.h>
#include <stddef.h>
#include <sys/mman.h>

int cuMemHostRegister_v2(void *address, size_t length, unsigned int flags);
int cuMemHostUnregister(void *address);

#ifdef DRIVER
int cuMemHostRegister_v2(void *address, size_t length, unsigned int flags)
{
	return !address || !length || flags;
}

int cuMemHostUnregister(void *address)
{
	return !address;
}
#else
int main(void)
{
	const size_t page = 4096;
	void *a = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	assert(!cuMemHostRegister_v2(a, page, 0) && !cuMemHostUnregister(a));
	munmap(a, page);
	a = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	assert(!cuMemHostRegister_v2(a, page, 0));
	munmap(a, page);
	return 0;
}
#endif
