/* SPDX-License-Identifier: BSD-3-Clause */
/* What the tests in C share. */
#ifndef CHECK_H
#define CHECK_H

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE ((unsigned long)sysconf(_SC_PAGESIZE))

#define check(condition)                                                                                                           \
	do {                                                                                                                       \
		if (!(condition)) {                                                                                                \
			fprintf(stderr, "%s:%d: %s: this does not hold: %s (errno %d)\n", __FILE__, __LINE__, __func__,            \
				#condition, errno);                                                                                \
			abort();                                                                                                   \
		}                                                                                                                  \
	} while (0)

/* Private anonymous memory that is in use; at `where` if that is not NULL. */
static inline char *get_pages(size_t count, void *where)
{
	char *memory = (char *)mmap(where, count * PAGE, PROT_READ | PROT_WRITE,
				    MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE | (where ? MAP_FIXED : 0), -1, 0);

	check(memory != MAP_FAILED);
	for (size_t i = 0; i < count; i++)
		memory[i * PAGE] = 1;
	return memory;
}

struct test {
	const char *name;
	void (*run)(void);
};

/* Runs the test that the first argument names, or all, and says which were run. */
static inline int run_tests(const struct test *tests, size_t count, const char *name)
{
	bool found = false;

	usleep(1); /* libtsan makes room for a thread's signals in its first call that waits, and loses one that comes meanwhile */
	for (size_t i = 0; i < count; i++)
		if (!name || !strcmp(name, tests[i].name)) {
			tests[i].run();
			printf("%s\n", tests[i].name);
			fflush(stdout);
			found = true;
		}
	if (!found)
		fprintf(stderr, "there is no test %s\n", name);
	return !found;
}

#endif
