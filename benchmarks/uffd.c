/* SPDX-License-Identifier: BSD-3-Clause */
/* The least that a program with a userfaultfd of its own can do: what the source `uffd` is compared with. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

static int uffd = -1;
static pthread_t thread;
static uint64_t seen;

static void *reader(void *unused)
{
	struct pollfd polled = {.fd = uffd, .events = POLLIN};
	struct uffd_msg message;

	(void)unused;
	for (;;) {
		poll(&polled, 1, -1);
		if (read(uffd, &message, sizeof message) == sizeof message)
			__atomic_fetch_add(&seen, 1, __ATOMIC_RELAXED);
	}
	return NULL;
}

/* 0 or -1. The thread ends with the process. */
int bench_uffd_open(void)
{
	struct uffdio_api api = {.api = UFFD_API,
				 .features = UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE |
					     UFFD_FEATURE_PAGEFAULT_FLAG_WP};

	uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
	return uffd < 0 || ioctl(uffd, UFFDIO_API, &api) || pthread_create(&thread, NULL, reader, NULL) ? -1 : 0;
}

/* Pages, each by itself. 0 or -1. */
int bench_uffd_register(const uint64_t *addresses, uint32_t n)
{
	struct uffdio_register page = {.mode = UFFDIO_REGISTER_MODE_WP};

	for (uint32_t i = 0; i < n; i++) {
		page.range = (struct uffdio_range){addresses[i], (uint64_t)sysconf(_SC_PAGESIZE)};
		if (ioctl(uffd, UFFDIO_REGISTER, &page))
			return -1;
	}
	return 0;
}

/* How many events it has read. */
uint64_t bench_uffd_seen(void)
{
	return __atomic_load_n(&seen, __ATOMIC_RELAXED);
}

/* Asks the kernel `n` times whether a change is under way. */
void bench_uffd_ask(uint32_t n)
{
	struct uffdio_writeprotect nonsense = {.mode = ~UINT64_C(0)};

	for (uint32_t i = 0; i < n; i++)
		ioctl(uffd, UFFDIO_WRITEPROTECT, &nonsense);
}
