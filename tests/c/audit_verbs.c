/* SPDX-License-Identifier: BSD-3-Clause */
/* Memory that is registered in a library which only a plugin sees, as UCX's module sees libibverbs. The library stands in for libibverbs
 * (-DVERBS), and has its structures as far as the audit looks at them; the plugin (-DPLUGIN) registers, and the program loads it:
 *
 *	audit_verbs PLUGIN...
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE ((size_t)sysconf(_SC_PAGESIZE))

struct ibv_pd {
	void *context;
};

struct ibv_mr {
	void *context;
	struct ibv_pd *domain;
	void *address;
	size_t length;
	uint32_t handle, lkey, rkey;
};

struct ibv_mr *ibv_reg_mr_iova2(struct ibv_pd *domain, void *address, size_t length, uint64_t iova, unsigned int access);
int ibv_dereg_mr(struct ibv_mr *registration);
int stale(void);
int verbs_registered(void);

#if defined VERBS

static int registered;

struct ibv_mr *ibv_reg_mr_iova2(struct ibv_pd *domain, void *address, size_t length, uint64_t iova, unsigned int access)
{
	struct ibv_mr *registration = malloc(sizeof *registration);

	(void)iova, (void)access;
	*registration = (struct ibv_mr){domain->context, domain, address, length, 0, (uint32_t)++registered, 0};
	return registration;
}

int ibv_dereg_mr(struct ibv_mr *registration)
{
	free(registration);
	registered--;
	return 0;
}

int verbs_registered(void)
{
	return registered;
}

#elif defined PLUGIN

/* How many are registered in this plugin's library meanwhile, and 10 times as many as there are at the end. */
int stale(void)
{
	static void *context[1000];
	struct ibv_pd domain = {context};
	char *a = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct ibv_mr *registration;
	int meanwhile;

	*a = 1;
	registration = ibv_reg_mr_iova2(&domain, a, PAGE, 0, 0);
	meanwhile = verbs_registered();
	munmap(a, PAGE);
	ibv_dereg_mr(registration);
	return meanwhile + 10 * verbs_registered();
}

#else

int main(int argc, char **argv)
{
	for (int i = 1; i < argc; i++) {
		void *plugin = dlopen(argv[i], RTLD_NOW | RTLD_LOCAL);
		int (*function)(void) = NULL;

		if (plugin)
			*(void **)&function = dlsym(plugin, "stale");
		if (!function || function() != 1) {
			fprintf(stderr, "%s: %s\n", argv[i], plugin ? "wrong" : dlerror());
			return 1;
		}
	}
	return 0;
}

#endif
