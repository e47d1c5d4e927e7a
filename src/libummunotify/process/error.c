/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "process/error.h"

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#define TRIED_MAX 8

/* One per thread: a signal handler that uses the library replaces what the code that it interrupts would read. Only a pointer to it is
 * thread-local: the library's thread-local memory has to fit into what the C library keeps for all that are loaded later. */
struct words {
	struct {
		struct ummunotify_failure failure;
		char what[160], why[1600], remedy[400], mapping[200], text[2400];
	} last;
	struct {
		size_t count;
		struct ummunotify_tried is[TRIED_MAX];
		char why[TRIED_MAX][600], remedy[TRIED_MAX][300];
	} tried;
};

static __thread struct words *own;
static pthread_key_t key;

static void free_words(void *words)
{
	own = NULL;
	munmap(words, sizeof(struct words));
}

static void make_key(void)
{
	pthread_key_create(&key, free_words);
}

/* Without memory all threads share one: their words may be mixed up. */
static struct words *words(void)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	static struct words shared;
	int error = errno;
	void *memory;

	if (own)
		return own;
	memory = mmap(NULL, sizeof *own, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	errno = error;
	if (memory == MAP_FAILED)
		return &shared;
	pthread_once(&once, make_key);
	own = memory;
	pthread_setspecific(key, own);
	return own;
}
#define last (words()->last)
#define tried (words()->tried)

const struct ummunotify_failure *ummunotify_failure(void)
{
	last.failure.what = last.what;
	last.failure.why = last.why;
	last.failure.remedy = last.remedy;
	last.failure.mapping = last.mapping;
	return &last.failure;
}

const char *ummunotify_error(void)
{
	/* What does not fit is cut off. GCC 16 warns of that unless the result is used. */
	int length = snprintf(last.text, sizeof last.text, "%s%s%s%s%s", last.what, *last.what ? ": " : "", last.why,
			      *last.remedy ? "; " : "", last.remedy);

	return length < 0 ? last.what : last.text;
}

static void copy(char *to, size_t size, const char *from)
{
	size_t length = strnlen(from, size - 1);

	memmove(to, from, length);
	to[length] = 0;
}

int umn_fail(enum ummunotify_code code, int error, const char *remedy, const char *why, ...)
{
	char text[sizeof last.why]; /* the arguments may be what was noted last */
	va_list arguments;

	va_start(arguments, why);
	vsnprintf(text, sizeof text, why, arguments);
	va_end(arguments);
	copy(last.remedy, sizeof last.remedy, remedy);
	memcpy(last.why, text, sizeof text);
	*last.what = *last.mapping = 0;
	last.failure.code = code;
	last.failure.error = error;
	return -error;
}

int umn_fail_what(const char *what, ...)
{
	va_list arguments;

	va_start(arguments, what);
	vsnprintf(last.what, sizeof last.what, what, arguments);
	va_end(arguments);
	return -last.failure.error;
}

void umn_fail_mapping(const char *mapping)
{
	snprintf(last.mapping, sizeof last.mapping, "%s", mapping);
}

int umn_fail_errno(enum ummunotify_code code, int error, const char *what)
{
	return umn_fail(code, error, "", "%s (%s)", what, strerror(error));
}

void umn_forget_tried(void)
{
	tried.count = 0;
}

void umn_note_tried(const char *source)
{
	size_t i = tried.count;

	if (i == TRIED_MAX)
		return;
	copy(tried.why[i], sizeof tried.why[i], last.why);
	copy(tried.remedy[i], sizeof tried.remedy[i], last.remedy);
	tried.is[i] = (struct ummunotify_tried){source, tried.why[i], tried.remedy[i]};
	tried.count++;
}

const struct ummunotify_tried *ummunotify_tried(size_t i)
{
	return i < tried.count ? &tried.is[i] : NULL;
}
