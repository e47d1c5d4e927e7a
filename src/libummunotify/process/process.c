/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "process/process.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MODULES_MAX 8
#define KCMP_FILES 2 /* <linux/kcmp.h>, which not all distributions' headers have */

/* In the page that is cleared in a child. */
struct page {
	uint32_t epoch;
	uint32_t lock; /* 1: a thread gives this process its epoch. Free in a child, whatever the parent's threads did. */
};

static struct page *page;
static uint32_t last = 1;		   /* the epoch of this process, or of its parent until it has its own */
static void (*modules[MODULES_MAX])(void); /* the first NULL ends them */
static int start_error;
static pid_t owner; /* the process with this epoch */
static bool shares_descriptors;

static const uint32_t unstarted; /* 0: nothing is of this process before umn_process_start */
const uint32_t *umn_process_epoch = &unstarted;

/* The first use in a child. A signal handler that came in between would wait for the thread that it interrupts. */
static void begin_child(void)
{
	sigset_t all, before;

	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &before);
	while (__atomic_exchange_n(&page->lock, 1, __ATOMIC_ACQUIRE))
		sched_yield();
	if (!__atomic_load_n(&page->epoch, __ATOMIC_RELAXED)) {
		shares_descriptors = !syscall(SYS_kcmp, owner, getpid(), KCMP_FILES, 0, 0);
		for (unsigned int i = 0; i < MODULES_MAX && modules[i]; i++)
			modules[i]();
		shares_descriptors = false;
		owner = getpid();
		if (!++last)
			last = 1;
		/* Release: a thread that finds the epoch finds the modules' new state. */
		__atomic_store_n(&page->epoch, last, __ATOMIC_RELEASE);
	}
	__atomic_store_n(&page->lock, 0, __ATOMIC_RELEASE);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
}

bool umn_process_shares_descriptors(void)
{
	return shares_descriptors;
}

uint32_t umn_process_current(void)
{
	uint32_t epoch = __atomic_load_n(&page->epoch, __ATOMIC_ACQUIRE);

	if (!epoch) {
		begin_child();
		epoch = __atomic_load_n(&page->epoch, __ATOMIC_ACQUIRE);
	}
	return epoch;
}

/* Children that C's fork makes let go of the parent's descriptors at once. Others do so when they first use the library. */
static void after_fork(void)
{
	umn_process_current();
}

static void start(void)
{
	size_t size = (size_t)sysconf(_SC_PAGESIZE);
	void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED) {
		start_error = -errno;
		return;
	}
	if (madvise(memory, size, MADV_WIPEONFORK)) {
		start_error = -errno;
		munmap(memory, size);
		return;
	}
	page = memory;
	page->epoch = last;
	owner = getpid();
	pthread_atfork(NULL, NULL, after_fork);
	__atomic_store_n(&umn_process_epoch, &page->epoch, __ATOMIC_RELEASE);
}

int umn_process_start(void)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	pthread_once(&once, start);
	return start_error;
}

void umn_process_add_child(void (*in_child)(void))
{
	/* By one atomic operation: two threads may add a module each, and a child may be made at any moment. */
	for (unsigned int i = 0; i < MODULES_MAX; i++) {
		void (*none)(void) = NULL;

		if (__atomic_compare_exchange_n(&modules[i], &none, in_child, false, __ATOMIC_RELEASE, __ATOMIC_RELAXED))
			return;
	}
	abort(); /* MODULES_MAX is too small */
}
