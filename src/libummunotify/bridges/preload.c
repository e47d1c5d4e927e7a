/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "bridges/preload.h"

#include <errno.h>
#include <link.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

static bool is_set(const char *name)
{
	const char *value = secure_getenv(name);

	return value && *value;
}

bool bridge_quiet(void)
{
	return is_set("UMMUNOTIFY_QUIET");
}

bool bridge_reports(void)
{
	return is_set("UMMUNOTIFY_REPORT");
}

bool bridge_says_unused(const char *other)
{
	const char *preloaded = getenv("LD_PRELOAD");

	return !bridge_quiet() && (bridge_reports() || !preloaded || !strstr(preloaded, other));
}

struct search {
	struct bridge_loaded *loaded;
	const char *mark;
};

/* Only the program and what belongs to MPI: to search all that a process may have loaded would take long. */
static bool may_hold(const char *name)
{
	return !*name || strstr(name, "mpi") || strstr(name, "shmem");
}

static bool holds(const struct dl_phdr_info *object, const char *mark)
{
	for (size_t i = 0; i < object->dlpi_phnum; i++) {
		const ElfW(Phdr) *segment = &object->dlpi_phdr[i];

		if (segment->p_type == PT_LOAD && (segment->p_flags & (PF_R | PF_W)) == PF_R &&
		    memmem((const void *)(object->dlpi_addr + segment->p_vaddr), segment->p_filesz, mark, strlen(mark)))
			return true;
	}
	return false;
}

static int look_at(struct dl_phdr_info *object, size_t size, void *argument)
{
	const char *slash = strrchr(object->dlpi_name, '/'), *name = slash ? slash + 1 : object->dlpi_name;
	struct search *search = argument;

	(void)size;
	if (!strncmp(name, "libfabric.so", strlen("libfabric.so")))
		search->loaded->libfabric = true;
	else if (!strncmp(name, "libucp.so", strlen("libucp.so")))
		search->loaded->ucx = true;
	else if (may_hold(name) && holds(object, search->mark))
		search->loaded->is_static = true;
	return 0;
}

void bridge_look(struct bridge_loaded *loaded, const char *mark)
{
	struct search search = {loaded, mark};

	*loaded = (struct bridge_loaded){0};
	dl_iterate_phdr(look_at, &search);
}

bool bridge_is_the_program(void)
{
	const char *number = getenv("UMMUNOTIFY_RUN_PROGRAM");
	struct rusage children;

	/* The last says whether it has waited for a child. */
	return number && strtol(number, NULL, 10) == getpid() && !getrusage(RUSAGE_CHILDREN, &children) && !children.ru_maxrss;
}

void bridge_say(const char *format, ...)
{
	char text[512];
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(text, sizeof text, format, arguments);
	va_end(arguments);
	fprintf(stderr, "ummunotify: %s (%d) %s\n", program_invocation_short_name, (int)getpid(), text);
}
