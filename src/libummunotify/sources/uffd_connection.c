/* SPDX-License-Identifier: BSD-3-Clause */
/* The source `uffd`: its connection, and its words. How it works, and why no change is missed: uffd.c. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <unistd.h>

#include "process/error.h"
#include "sources/connection.h"
#include "sources/uffd.h"

#define WAIT_MILLISECONDS 100 /* for changes under way; then everything is invalidated instead */

struct uffd_connection {
	struct umn_connection connection; /* first: one is cast to the other */
	struct umn_uffd *uffd;
};

static struct umn_uffd *uffd_of(struct umn_connection *connection)
{
	return ((struct uffd_connection *)connection)->uffd;
}

/* ---- Why it does not work here ---- */

static void explain_failure(const struct umn_uffd_failure *failure)
{
	const enum ummunotify_code code = UMMUNOTIFY_UNAVAILABLE;
	char error[64];

	snprintf(error, sizeof error, "%s", strerror(failure->error));
	switch (failure->step) {
	case UMN_UFFD_OPEN:
		/* The only flag that not every kernel knows. */
		if (failure->error == EINVAL) {
			umn_fail(code, ENODEV, "use Linux 5.18 or later",
				 "this kernel's userfaultfd lacks UFFD_USER_MODE_ONLY (Linux 5.11)");
			return;
		}
		umn_fail(code, ENODEV,
			 "allow userfaultfd in the container's seccomp profile, or give this user access to /dev/userfaultfd; the "
			 "kernel has to be Linux 5.18 or later with CONFIG_USERFAULTFD",
			 "the system call userfaultfd is refused (%s), and so is /dev/userfaultfd (%s)", error,
			 strerror(failure->device_error));
		return;
	case UMN_UFFD_FEATURES:
		if (failure->error == EOPNOTSUPP)
			umn_fail(
				code, ENODEV, "use Linux 5.18 or later",
				"this kernel's userfaultfd lacks UFFD_FEATURE_EXACT_ADDRESS (Linux 5.18): it may not tell reliably "
				"whether changes are under way, as before Linux 5.15");
		else
			umn_fail(code, ENODEV,
				 "use Linux 5.18 or later, on an architecture with write-protecting userfaultfd (x86-64, arm64)",
				 "this kernel's userfaultfd cannot watch memory without protecting it "
				 "(UFFD_FEATURE_PAGEFAULT_FLAG_WP, Linux 5.7)");
		return;
	case UMN_UFFD_IOCTL:
		umn_fail(code, ENODEV, "allow ioctl in the seccomp filter", "the ioctl of a userfaultfd is refused (%s)", error);
		return;
	case UMN_UFFD_PROOF:
		umn_fail(code, ENODEV, "please report this with the kernel's version",
			 "the kernel's userfaultfd did not tell of an unmapped page as it should");
		return;
	case UMN_UFFD_TABLES:
		umn_fail(UMMUNOTIFY_LIMIT, ENODEV, "close notifiers that are no longer needed",
			 "this process has %d notifiers, as many as it can have", UMN_UFFD_TABLES_MAX);
		return;
	case UMN_UFFD_MEMORY:
		umn_fail(code, ENODEV, "raise RLIMIT_AS, or after mlockall(MCL_FUTURE) RLIMIT_MEMLOCK: it needs some 2 MiB",
			 "there is no memory for userfaultfd's reader (%s)", error);
		return;
	case UMN_UFFD_THREAD:
		umn_fail(
			code, ENODEV,
			"raise RLIMIT_NPROC (ulimit -u) and the cgroup's pids.max; a seccomp filter that refuses clone3 must do so with ENOSYS",
			"the thread that reads userfaultfd's events cannot be started (%s)", error);
		return;
	case UMN_UFFD_READER:
		umn_fail(code, ENODEV, "allow pidfd_open and pidfd_getfd in the seccomp filter, or refuse close_range too",
			 "the thread that reads the events did not get its copy of the userfaultfd (%s)", error);
	}
}

/* ---- Why it does not watch this memory ---- */

struct line {
	uint64_t start, end, inode;
	char permissions[5], name[100];
};

/* The next line of /proc/self/maps. */
static bool next_line(FILE *maps, struct line *line)
{
	char text[512];
	int at = 0;

	if (!fgets(text, sizeof text, maps))
		return false;
	if (sscanf(text, "%" SCNx64 "-%" SCNx64 " %4s %*x %*x:%*x %" SCNu64 " %n", &line->start, &line->end, line->permissions,
		   &line->inode, &at) != 4)
		return false;
	snprintf(line->name, sizeof line->name, "%.*s", (int)strcspn(text + at, "\n"), text + at);
	return true;
}

static void blame(const struct line *line)
{
	char text[200];

	snprintf(text, sizeof text, "%#" PRIx64 "-%#" PRIx64 " %s %s", line->start, line->end, line->permissions,
		 *line->name ? line->name : "(anonymous)");
	umn_fail_mapping(text);
}

/* NULL: not known to be of a kind whose changes cannot be seen. */
static const char *kind_of(const struct line *line)
{
	if (line->permissions[3] == 's')
		return strncmp(line->name, "/SYSV", 5) ? "shared memory" : "a System V shared memory segment";
	if (line->inode && strncmp(line->name, "/anon_hugepage", 14))
		return "a file's";
	if (!strncmp(line->name, "[v", 2))
		return "the kernel's own";
	return NULL;
}

static int explain_kind(uint64_t start, uint64_t end)
{
	const enum ummunotify_code code = UMMUNOTIFY_UNSUPPORTED;
	FILE *maps = fopen("/proc/self/maps", "re");
	const char *kind = NULL;
	struct line line = {0}, first = {0};

	while (maps && !kind && next_line(maps, &line))
		if (line.start < end && line.end > start) {
			kind = kind_of(&line);
			if (!first.end)
				first = line;
		}
	if (maps)
		fclose(maps);
	if (kind)
		umn_fail(code, EOPNOTSUPP, "use the source bpf or daemon, which see this too",
			 "it is %s, and userfaultfd tells only of private anonymous memory", kind);
	else
		umn_fail(code, EOPNOTSUPP, "use the source bpf or daemon", "the kernel refuses to register it with userfaultfd");
	if (kind || first.end)
		blame(kind ? &line : &first);
	return -EOPNOTSUPP;
}

static int explain_hole(uint64_t start, uint64_t end)
{
	FILE *maps = fopen("/proc/self/maps", "re");
	struct line line;

	while (maps && start < end && next_line(maps, &line) && line.start <= start)
		if (line.end > start)
			start = line.end;
	if (maps)
		fclose(maps);
	if (start < end)
		return umn_fail(UMMUNOTIFY_UNSUPPORTED, UMN_UFFD_UNMAPPED, "", "nothing is mapped at %#" PRIx64, start);
	return umn_fail(UMMUNOTIFY_UNSUPPORTED, UMN_UFFD_UNMAPPED, "", "some of it was not mapped");
}

static int refused(struct umn_connection *connection, int error, uint64_t start, uint64_t end)
{
	(void)connection;
	switch (error) {
	case UMN_UFFD_UNMAPPED:
		return explain_hole(start, end);
	case UMN_UFFD_KIND:
		return explain_kind(start, end);
	case UMN_UFFD_OTHER:
		return umn_fail(UMMUNOTIFY_UNSUPPORTED, error, "let its user unregister it, or use the source bpf or daemon",
				"another userfaultfd of this process has registered some of it, and memory can have only one");
	case UMN_UFFD_OWN:
		return umn_fail(UMMUNOTIFY_UNSUPPORTED, error, "", "some of it is what ummunotify itself works with");
	case UMN_UFFD_MAPPINGS:
		return umn_fail(UMMUNOTIFY_LIMIT, error, "raise the sysctl vm.max_map_count",
				"the kernel has no memory for another region, or the process too many mappings");
	case UMN_UFFD_NO_PROC:
		return umn_fail(UMMUNOTIFY_UNSUPPORTED, error, "mount /proc",
				"it is huge pages, and without /proc it cannot be told of which kind");
	case UMN_UFFD_CLOSED:
		return umn_fail(
			UMMUNOTIFY_DESCRIPTOR, error, "close this notifier, and open another after descriptors were closed",
			"the program has closed or replaced a descriptor of the source uffd, which sees no more changes: all regions "
			"are invalid");
	case UMN_UFFD_START: {
		struct umn_uffd_failure failure;

		umn_uffd_start_failure(&failure);
		explain_failure(&failure);
		return -error;
	}
	}
	return umn_fail_errno(UMMUNOTIFY_UNAVAILABLE, error, "userfaultfd cannot begin to watch");
}

/* ---- The connection ---- */

static int add_segment(struct umn_connection *connection, uint32_t pages, void **memory)
{
	*memory = umn_uffd_add_segment(uffd_of(connection), pages);
	return *memory ? 0 : umn_fail_errno(UMMUNOTIFY_NO_MEMORY, errno, "the table cannot grow");
}

static int bind_table(struct umn_connection *connection)
{
	(void)connection;
	return 0; /* it feeds what is watched, from when it is watched */
}

static int add_wakeup(struct umn_connection *connection, int epoll)
{
	struct epoll_event event = {.events = EPOLLIN};
	int fd = umn_uffd_wake_fd(uffd_of(connection));

	if (fd < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event))
		return umn_fail_errno(UMMUNOTIFY_UNAVAILABLE, fd < 0 ? -fd : errno, "the wake-up cannot be waited for");
	connection->wake_fd = fd;
	return 0;
}

static void acknowledge(struct umn_connection *connection)
{
	umn_uffd_acknowledge(uffd_of(connection));
}

static int may_have_missed(struct umn_connection *connection)
{
	if (connection->source->wait_delivered(connection->source, WAIT_MILLISECONDS))
		return 0;
	return umn_uffd_is_broken(uffd_of(connection)) ? refused(connection, UMN_UFFD_CLOSED, 0, 0) : 1;
}

static int open_counter(struct umn_connection *connection)
{
	int fd = memfd_create("ummunotify", MFD_CLOEXEC), counter_fd = -1, error;
	void *page = MAP_FAILED;
	char path[32];

	if (fd >= 0 && !ftruncate(fd, UMN_PAGE))
		page = mmap(NULL, UMN_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (page != MAP_FAILED) {
		/* A second one of the same file, for reading only. */
		snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
		counter_fd = open(path, O_RDONLY | O_CLOEXEC);
	}
	error = errno;
	if (fd >= 0)
		close(fd);
	if (counter_fd < 0) {
		if (page != MAP_FAILED)
			munmap(page, UMN_PAGE);
		return umn_fail_errno(UMMUNOTIFY_UNAVAILABLE, error, "the counter's page cannot be made");
	}
	madvise(page, UMN_PAGE, MADV_DONTFORK);
	connection->counter = page;
	umn_uffd_set_counter(uffd_of(connection), page);
	return counter_fd;
}

static void release(struct umn_connection *connection)
{
	umn_uffd_close(uffd_of(connection));
	if (connection->counter)
		munmap((void *)connection->counter, UMN_PAGE);
	connection->counter = NULL;
}

/* The module has let go of what all its tables share (umn_uffd_in_child). */
static void in_child(struct umn_connection *connection)
{
	umn_uffd_close(uffd_of(connection));
}

static void free_connection(struct umn_connection *connection)
{
	umn_uffd_delete(uffd_of(connection));
	free(connection);
}

struct umn_connection *umn_connect_uffd(void)
{
	struct uffd_connection *c = calloc(1, sizeof *c);
	struct umn_uffd_failure failure = {.step = UMN_UFFD_MEMORY, .error = ENOMEM};

	if (!c || !(c->uffd = umn_uffd_new(&failure))) {
		explain_failure(&failure);
		free(c);
		return NULL;
	}
	c->connection = (struct umn_connection){.name = "uffd",
						.wake_fd = -1,
						.source = umn_uffd_source(c->uffd),
						.add_segment = add_segment,
						.bind = bind_table,
						.add_wakeup = add_wakeup,
						.acknowledge = acknowledge,
						.may_have_missed = may_have_missed,
						.refused = refused,
						.open_counter = open_counter,
						.release = release,
						.in_child = in_child,
						.free = free_connection};
	return &c->connection;
}
