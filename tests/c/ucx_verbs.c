/* SPDX-License-Identifier: BSD-3-Clause */
/* Stands in for libibverbs, so that a cache of UCX's can register memory without a device: it touches the pages, as pinning does. Its
 * functions have libibverbs' versions, and one calls another through the PLT. */
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>

struct ibv_mr {
	char *address;
	size_t length;
};

struct ibv_mr *ibv_reg_mr_iova2(void *pd, void *address, size_t length, uint64_t iova, unsigned int access);
struct ibv_mr *ibv_reg_mr(void *pd, void *address, size_t length, int access);
int ibv_dereg_mr(struct ibv_mr *registration);
long ucx_verbs_registered(void);

static long registered;

struct ibv_mr *ibv_reg_mr_iova2(void *pd, void *address, size_t length, uint64_t iova, unsigned int access)
{
	struct ibv_mr *registration = malloc(sizeof *registration);

	(void)iova, (void)access;
	if (!pd || !registration) { /* as a device that has no more room */
		free(registration);
		errno = ENOMEM;
		return NULL;
	}
	*registration = (struct ibv_mr){address, length};
	for (size_t i = 0; i < length; i += 4096)
		__atomic_add_fetch(registration->address + i, 0, __ATOMIC_RELAXED);
	__atomic_add_fetch(&registered, 1, __ATOMIC_RELAXED);
	return registration;
}

struct ibv_mr *ibv_reg_mr(void *pd, void *address, size_t length, int access)
{
	return ibv_reg_mr_iova2(pd, address, length, (uint64_t)address, (unsigned int)access);
}

int ibv_dereg_mr(struct ibv_mr *registration)
{
	if (!registration)
		return EINVAL;
	free(registration);
	__atomic_sub_fetch(&registered, 1, __ATOMIC_RELAXED);
	return 0;
}

long ucx_verbs_registered(void)
{
	return __atomic_load_n(&registered, __ATOMIC_RELAXED);
}
