/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "audit/records.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "abi/layout.h"

#define SIZE ((size_t)16 << 20) /* sparse */
#define END_ROOM 8		/* for brackets */
#define FILES_MAX 10000		/* of processes that had the same number one after the other */

UMN_STATIC_ASSERT(sizeof(struct counts) == 48, "records.py unpacks it");

/* A shared mapping stays in a child, so the file belongs to one process number. */
static struct {
	struct counts *counts;
	pid_t pid;
	size_t next; /* the first free byte */

	pthread_mutex_t lock; /* of a record that is being made */
	char text[24 << 10];
	size_t length;
	bool in_list;
	unsigned int items;
} the = {.lock = PTHREAD_MUTEX_INITIALIZER};

double records_now(void)
{
	struct timespec now;

	clock_gettime(CLOCK_REALTIME, &now);
	return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

/* The descriptor of a new file, or -1. */
static int create(const char *directory)
{
	struct rlimit limit;
	char path[4096];
	int fd = -1;

	if (!getrlimit(RLIMIT_FSIZE, &limit) && limit.rlim_cur < SIZE)
		return -1; /* a signal would end the program */

	for (unsigned int i = 0; fd < 0 && i < FILES_MAX; i++) {
		if (snprintf(path, sizeof path, "%s/%d.%u", directory, (int)getpid(), i) >= (int)sizeof path)
			return -1;
		fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
		if (fd < 0 && errno != EEXIST)
			return -1;
	}
	if (fd >= 0 && ftruncate(fd, (off_t)SIZE)) {
		close(fd);
		return -1;
	}
	return fd;
}

/* A page of a file that finds no room on its disk is a signal, unless the kernel writes there first: mincore sets the byte that it is
 * asked about. */
static bool make_page(char *at)
{
	return !mincore((void *)((uintptr_t)at & ~(uintptr_t)(sysconf(_SC_PAGESIZE) - 1)), 1, (unsigned char *)at);
}

/* Bytes that are not written yet. The page of what is before them is there. */
static bool make_pages(char *from, const char *to)
{
	const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);

	for (char *at = from + (-(uintptr_t)from & (page - 1)); at < to; at += page)
		if (!make_page(at))
			return false;
	return true;
}

/* ---- JSON ---- */

/* False: there was no room, and nothing is added. */
static bool add_arguments(const char *format, va_list arguments)
{
	const size_t room = sizeof the.text - END_ROOM - the.length;
	int length = vsnprintf(the.text + the.length, room, format, arguments);

	if (length < 0 || (size_t)length >= room)
		return false;
	the.length += (size_t)length;
	return true;
}

static __attribute__((format(printf, 1, 2))) bool add(const char *format, ...)
{
	va_list arguments;
	bool added;

	va_start(arguments, format);
	added = add_arguments(format, arguments);
	va_end(arguments);
	return added;
}

void record_begin(const char *kind)
{
	pthread_mutex_lock(&the.lock);
	the.length = 0;
	add("{\"record\":\"%s\"", kind);
}

void record_number(const char *name, uint64_t value)
{
	add(",\"%s\":%llu", name, (unsigned long long)value);
}

void record_time(const char *name, double value)
{
	add(",\"%s\":%.6f", name, value);
}

void record_escape(char *into, size_t room, const char *text)
{
	size_t length = 0;

	for (const unsigned char *at = (const unsigned char *)text; *at && length + 7 < room; at++)
		length += (size_t)snprintf(into + length, room - length,
					   *at == '"' || *at == '\\' ? "\\%c"
					   : *at < ' ' || *at > '~'  ? "\\u%04x"
								     : "%c",
					   *at);
	into[length] = 0;
}

void record_text(const char *name, const char *value)
{
	static char text[12 << 10]; /* under the lock */

	record_escape(text, sizeof text, value);
	add(",\"%s\":\"%s\"", name, text);
}

void record_list(const char *name)
{
	the.in_list = add(",\"%s\":[", name);
	the.items = 0;
}

void record_item(const char *format, ...)
{
	const size_t before = the.length;
	va_list arguments;

	if (!the.in_list)
		return;
	va_start(arguments, format);
	if ((the.items && !add(",")) || !add_arguments(format, arguments))
		the.length = before;
	else
		the.items++;
	va_end(arguments);
}

void record_list_end(void)
{
	if (the.in_list)
		the.text[the.length++] = ']'; /* of END_ROOM */
}

void record_end(void)
{
	const size_t at = the.next;
	char *file = (char *)the.counts;

	the.text[the.length++] = '}';
	if (!the.counts || the.pid != getpid()) {
		/* Not asked for, or a child that has no file yet. */
	} else if (at + the.length + 1 > SIZE || !make_pages(file + at, file + at + the.length + 1)) {
		the.counts->lost++;
	} else {
		memcpy(file + at, the.text, the.length);
		__atomic_store_n(file + at + the.length, '\n', __ATOMIC_RELEASE);
		the.next = at + the.length + 1;
	}
	pthread_mutex_unlock(&the.lock);
}

/* ---- The file ---- */

/* The words of a command, with blanks in between. */
static void record_command(void)
{
	char words[2048];
	int fd = open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
	ssize_t length = fd < 0 ? 0 : read(fd, words, sizeof words - 1);

	if (fd >= 0)
		close(fd);
	if (length < 0)
		length = 0;
	for (ssize_t i = 0; i + 1 < length; i++)
		if (!words[i])
			words[i] = ' ';
	words[length] = 0;
	record_text("command", words);
}

struct counts *records_open(void)
{
	const char *directory = getenv("UMMUNOTIFY_AUDIT_DIRECTORY");
	void *memory;
	int fd;

	if (the.counts && the.pid == getpid())
		return the.counts;
	the.counts = NULL;
	pthread_mutex_init(&the.lock, NULL); /* a child of a fork: a thread of the parent's may have had it */
	fd = directory && *directory ? create(directory) : -1;
	if (fd < 0)
		return NULL;
	memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	close(fd);
	if (memory == MAP_FAILED)
		return NULL;
	if (!make_page(memory)) {
		munmap(memory, SIZE);
		return NULL;
	}
	the.counts = memory;
	the.pid = getpid();
	the.next = sizeof *the.counts;
	the.counts->magic = COUNTS_MAGIC;
	record_begin("process");
	record_number("pid", (uint64_t)getpid());
	record_number("parent", (uint64_t)getppid());
	record_time("time", records_now());
	record_command();
	record_end();
	return the.counts;
}
