/* SPDX-License-Identifier: BSD-3-Clause */
#ifndef UMN_TEST_CHECK_H
#define UMN_TEST_CHECK_H

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#define LENGTH(array) (sizeof(array) / sizeof *(array))

__attribute__((noreturn, format(printf, 1, 2))) static void fail(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	fflush(stdout);
	vfprintf(stderr, format, args);
	fputc('\n', stderr);
	abort();
}

#define check(condition)                                                                                                           \
	do {                                                                                                                       \
		if (!(condition))                                                                                                  \
			fail("%s:%d: not true: %s", __FILE__, __LINE__, #condition);                                               \
	} while (0)

#endif
