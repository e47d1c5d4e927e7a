/* SPDX-License-Identifier: BSD-3-Clause */
/* The source `uffd`, as sources/uffd.py. */
#define _GNU_SOURCE
#include "sources/uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "sources/connection.h"

#define WAIT_MILLISECONDS 100 /* then everything may be invalid */

struct uffd_feed {
	struct feed feed;
	struct umn_uffd *uffd;
};

static void explain(const struct umn_uffd_failure *failure)
{
	switch (failure->step) {
	case UMN_UFFD_OPEN:
		fail(ENODEV, "the system call userfaultfd is refused (%s), and so is /dev/userfaultfd (errno %d)", strerror(failure->error),
		     failure->device_error);
		return;
	case UMN_UFFD_IOCTL:
		fail(ENODEV, "the ioctl of a userfaultfd is refused (%s); allow ioctl in the seccomp filter", strerror(failure->error));
		return;
	case UMN_UFFD_FEATURES:
		fail(ENODEV, "this kernel's userfaultfd cannot watch memory without protecting it; use Linux 5.18 or later");
		return;
	case UMN_UFFD_PROOF:
		fail(ENODEV, "the kernel's userfaultfd did not tell of an unmapped page as it should");
		return;
	case UMN_UFFD_TABLES:
		fail(ENODEV, "this process has as many notifiers as it can have; close some");
		return;
	case UMN_UFFD_MEMORY:
		fail(ENOMEM, "there is no memory for the source uffd (%s); raise RLIMIT_AS, or after mlockall(MCL_FUTURE) RLIMIT_MEMLOCK",
		     strerror(failure->error));
		return;
	case UMN_UFFD_THREAD:
		fail(ENODEV,
		     "the thread that reads the events cannot be started (%s); raise RLIMIT_NPROC and the cgroup's pids.max, or let the "
		     "seccomp filter refuse clone3 with ENOSYS",
		     strerror(failure->error));
		return;
	case UMN_UFFD_READER:
		fail(ENODEV,
		     "the thread that reads the events did not get its copy of the userfaultfd (%s); allow pidfd_open and pidfd_getfd in "
		     "the seccomp filter, or refuse close_range too",
		     strerror(failure->error));
	}
}

int feed_explain_uffd_start(void)
{
	struct umn_uffd_failure failure;

	umn_uffd_start_failure(&failure);
	explain(&failure);
	return -UMN_UFFD_START;
}

static int make_counter(struct feed *feed)
{
	struct uffd_feed *f = (struct uffd_feed *)feed;
	int fd = memfd_create("ummunotify", MFD_CLOEXEC);
	void *page = MAP_FAILED;
	char path[32];
	int error = 0;

	if (fd >= 0 && !ftruncate(fd, UMN_PAGE))
		page = mmap(NULL, UMN_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (page != MAP_FAILED) {
		/* One that can only be read. */
		snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
		feed->counter_fd = open(path, O_RDONLY | O_CLOEXEC);
	}
	if (feed->counter_fd < 0)
		error = fail(errno, "the counter's page cannot be made (%s)", strerror(errno));
	if (fd >= 0)
		close(fd);
	if (!error) {
		feed->counter = page;
		umn_uffd_set_counter(f->uffd, page);
	} else if (page != MAP_FAILED) {
		munmap(page, UMN_PAGE);
	}
	return error;
}

static void *add_segment(struct feed *feed, uint32_t pages)
{
	struct uffd_feed *f = (struct uffd_feed *)feed;
	void *memory = umn_uffd_add_segment(f->uffd, pages);

	if (!memory)
		fail(errno, "%s", strerror(errno));
	return memory;
}

static int bind_feed(struct feed *feed)
{
	(void)feed;
	return 0; /* it feeds what is watched, from when it is watched */
}

static int wake_fd(struct feed *feed)
{
	int fd = umn_uffd_wake_fd(((struct uffd_feed *)feed)->uffd);

	return fd < 0 ? fail(-fd, "%s", strerror(-fd)) : fd;
}

static void acknowledge(struct feed *feed)
{
	umn_uffd_acknowledge(((struct uffd_feed *)feed)->uffd);
}

static bool doubtful(struct feed *feed)
{
	return !feed->source->wait_delivered(feed->source, WAIT_MILLISECONDS);
}

static void release(struct feed *feed)
{
	umn_uffd_close(((struct uffd_feed *)feed)->uffd);
	if (feed->counter)
		munmap((void *)feed->counter, UMN_PAGE);
	feed->counter = NULL;
	if (feed->counter_fd >= 0)
		close(feed->counter_fd);
	feed->counter_fd = -1;
}

static void free_feed(struct feed *feed)
{
	umn_uffd_delete(((struct uffd_feed *)feed)->uffd);
	free(feed);
}

struct feed *feed_open_uffd(bool counter)
{
	struct uffd_feed *f = calloc(1, sizeof *f);
	struct umn_uffd_failure failure = {.step = UMN_UFFD_MEMORY, .error = ENOMEM};

	if (!f || !(f->uffd = umn_uffd_new(&failure))) {
		explain(&failure);
		free(f);
		return NULL;
	}
	(void)counter;
	f->feed = (struct feed){.name = "uffd",
				.source = umn_uffd_source(f->uffd),
				.counter_fd = -1,
				.add_segment = add_segment,
				.bind = bind_feed,
				.wake_fd = wake_fd,
				.make_counter = make_counter,
				.acknowledge = acknowledge,
				.doubtful = doubtful,
				.release = release,
				.free = free_feed};
	return &f->feed;
}
