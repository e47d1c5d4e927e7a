/* SPDX-License-Identifier: BSD-3-Clause */
/* The source `uffd`, as sources/uffd.py. */
#define _GNU_SOURCE
#include "core/uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "feed.h"

#define SETTLE_MILLISECONDS 100 /* then everything may be invalid */

struct uffd_feed {
	struct feed feed;
	struct umn_uffd *uffd;
	bool counter;
};

static void explain(const struct umn_uffd_failure *failure)
{
	switch (failure->step) {
	case UMN_UFFD_OPEN:
		fail(ENODEV, "the system call userfaultfd is refused (%s), and so is /dev/userfaultfd (errno %d)", strerror(failure->error),
		     failure->device_error);
		return;
	case UMN_UFFD_FEATURES:
		fail(ENODEV, "this kernel's userfaultfd cannot watch memory without protecting it; use Linux 5.18 or later");
		return;
	case UMN_UFFD_MAPS:
		fail(ENODEV, "/proc/self/maps cannot be read (%s); mount /proc", strerror(failure->error));
		return;
	case UMN_UFFD_PROOF:
		fail(ENODEV, "the kernel's userfaultfd did not tell of an unmapped page as it should");
		return;
	case UMN_UFFD_TABLES:
		fail(ENODEV, "this process has as many notifiers as it can have; close some");
		return;
	case UMN_UFFD_MEMORY:
		fail(ENOMEM, "%s", strerror(ENOMEM));
	}
}

/* Puts a page that can be mapped once more in the place of the first. */
static int make_counter(struct feed *feed, void *memory)
{
	int fd = memfd_create("ummunotify", MFD_CLOEXEC);
	char path[32];

	if (fd >= 0 && !ftruncate(fd, UMN_PAGE) &&
	    mmap(memory, UMN_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == memory) {
		/* One that can only be read. */
		snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
		feed->counter_fd = open(path, O_RDONLY | O_CLOEXEC);
	}
	if (feed->counter_fd < 0)
		fail(errno, "the counter's page cannot be made (%s)", strerror(errno));
	if (fd >= 0)
		close(fd);
	return feed->counter_fd < 0 ? -1 : 0;
}

static void *add_segment(struct feed *feed, uint32_t pages)
{
	struct uffd_feed *f = (struct uffd_feed *)feed;
	void *memory = umn_uffd_add_segment(f->uffd, pages);

	if (!memory) {
		fail(errno, "%s", strerror(errno));
		return NULL;
	}
	if (f->counter && feed->counter_fd < 0 && make_counter(feed, memory)) {
		umn_uffd_close(f->uffd); /* before a change is fed to it */
		munmap(memory, (size_t)pages * UMN_PAGE);
		return NULL;
	}
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
	return !feed->source->settle(feed->source, SETTLE_MILLISECONDS);
}

static void release(struct feed *feed)
{
	umn_uffd_close(((struct uffd_feed *)feed)->uffd);
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
	struct umn_uffd_failure failure = {.step = UMN_UFFD_MEMORY};

	if (!f || !(f->uffd = umn_uffd_new(&failure))) {
		explain(&failure);
		free(f);
		return NULL;
	}
	f->counter = counter;
	f->feed = (struct feed){.name = "uffd",
				.source = umn_uffd_source(f->uffd),
				.counter_fd = -1,
				.add_segment = add_segment,
				.bind = bind_feed,
				.wake_fd = wake_fd,
				.acknowledge = acknowledge,
				.doubtful = doubtful,
				.release = release,
				.free = free_feed};
	return &f->feed;
}
