/* SPDX-License-Identifier: BSD-3-Clause */
/* ucx.c in a library that is loaded late, and that nothing else sees, as Python loads its modules: ucx_late LIBRARY ARGUMENTS... */
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

int main(int argc, char **argv)
{
	const void *libc_munmap = dlsym(RTLD_DEFAULT, "munmap");
	void *library;
	int (*test)(int, char **);
	char before[16];
	int result;

	memcpy(before, libc_munmap, sizeof before);
	library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
	test = library ? (int (*)(int, char **))dlsym(library, "ucx_test") : NULL;
	if (!test) {
		fprintf(stderr, "%s\n", dlerror());
		return 1;
	}
	result = test(argc - 1, argv + 1);
	printf("munmap is %s\n", memcmp(before, libc_munmap, sizeof before) ? "patched" : "as it was");
	return result;
}
