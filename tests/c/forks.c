/* SPDX-License-Identifier: BSD-3-Clause */
/* Children of every kind, made by any thread while others are inside the library: in one with memory of its own nothing is valid and
 * every call says so; one that shares the memory counts as the parent; neither disturbs the parent. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <ummunotify.h>

#include "check.h"

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define HAS_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer) || __has_feature(address_sanitizer)
#define HAS_SANITIZER 1
#endif
#endif

extern pid_t _Fork(void) __attribute__((weak)); /* glibc 2.34 */

static struct ummunotify *umn;
static struct ummunotify_region *region;
static char *memory;
static bool child_allocates = true;

/* ---- Kinds of children ---- */

#ifndef HAS_SANITIZER
static pid_t by_clone(void)
{
	return (pid_t)syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, NULL);
}

/* It shares the descriptors, but not the memory. */
static pid_t by_clone_files(void)
{
	return (pid_t)syscall(SYS_clone, SIGCHLD | CLONE_FILES, NULL, NULL, NULL, NULL);
}

static pid_t by_Fork(void)
{
	return _Fork ? _Fork() : by_clone();
}
#endif

static const struct kind {
	const char *name;
	pid_t (*make)(void);
	bool runs_handlers; /* fork's: the child may allocate memory */
} kinds[] = {
	{"fork", fork, true},
#ifndef HAS_SANITIZER /* whose own locks these do not know */
	{"_Fork", by_Fork, false},
	{"clone", by_clone, false},
	{"clone, CLONE_FILES", by_clone_files, false},
#endif
};

static void expect_exit(pid_t child)
{
	int status;

	check(child > 0 && waitpid(child, &status, 0) == child);
	check(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static int never(const struct ummunotify_event *event, void *context)
{
	(void)event, (void)context;
	abort();
}

static void all_fails(void)
{
	struct ummunotify_event event;
	struct ummunotify_stats stats;
	struct ummunotify_region *none;

	check(!ummunotify_valid(region) && ummunotify_valid_now(region) == 0 && ummunotify_changed(umn));
	check(ummunotify_check(umn) == -EBADF && ummunotify_failure()->code == UMMUNOTIFY_FORKED);
	check(ummunotify_failure()->error == EBADF && strstr(ummunotify_error(), "fork"));
	check(ummunotify_watch(umn, memory, PAGE, 1, &none) == -EBADF);
	check(ummunotify_renew(umn, region) == -EBADF && !ummunotify_valid(region));
	check(ummunotify_unwatch(umn, region) == -EBADF);
	check(ummunotify_read(umn, &event, 1) == -EBADF);
	check(ummunotify_dispatch(umn, never, NULL) == -EBADF);
	check(ummunotify_wait(umn, 0) == -EBADF && ummunotify_failure()->code == UMMUNOTIFY_FORKED);
	check(ummunotify_fd(umn) == -EBADF);
	check(ummunotify_stats(umn, &stats) == -EBADF);
	ummunotify_shutdown(umn);
	check(ummunotify_check(umn) == -EBADF);
}

static void watch_own(void)
{
	struct ummunotify *own;
	struct ummunotify_region *of_own;

	check(!ummunotify_open(&own, NULL));
	check(!ummunotify_watch(own, memory, PAGE, 1, &of_own) && ummunotify_valid(of_own));
	madvise(memory, PAGE, MADV_DONTNEED);
	check(!ummunotify_valid(of_own));
	ummunotify_close(own);
}

/* The parent is told as before, and nothing of its has been taken. */
static void parent_goes_on(void)
{
	struct ummunotify_event event;

	check(ummunotify_valid(region));
	madvise(memory, PAGE, MADV_DONTNEED);
	memory[0] = 1;
	check(!ummunotify_valid(region) && ummunotify_changed(umn));
	check(ummunotify_wait(umn, 30000) == 1);
	check(ummunotify_read(umn, &event, 1) == 1 && event.region == region);
	check(!ummunotify_renew(umn, region) && ummunotify_valid(region));
}

static void begin(void)
{
	memory = get_pages(1, NULL);
	check(!ummunotify_open(&umn, NULL));
	check(!ummunotify_watch(umn, memory, PAGE, 1, &region));
	check(ummunotify_fd(umn) >= 0);
}

static void end(void)
{
	ummunotify_close(umn);
	munmap(memory, PAGE);
}

static void make_children(int count)
{
	for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
		for (int j = 0; j < count; j++) {
			pid_t child = kinds[i].make();

			if (!child) {
				all_fails();
				if (kinds[i].runs_handlers && child_allocates) {
					ummunotify_close(umn);
					watch_own();
				}
				_exit(0);
			}
			expect_exit(child);
		}
}

static void test_kinds(void)
{
	begin();
	make_children(1);
	parent_goes_on();
	end();
}

/* Closing, and ending without closing, in the child. */
static void test_ends(void)
{
	pid_t child;

	begin();
	child = fork();
	if (!child) {
		ummunotify_close(umn);
		exit(0);
	}
	expect_exit(child);
	parent_goes_on();
	child = fork();
	if (!child)
		exit(0);
	expect_exit(child);
	parent_goes_on();
	end();
}

static void test_grandchildren(void)
{
	pid_t child;

	begin();
	child = fork();
	if (!child) {
		/* The first call is made in the grandchild. */
		make_children(1);
		all_fails();
		/* One's own in a child is a grandchild's parent's. */
		ummunotify_close(umn);
		check(!ummunotify_open(&umn, NULL));
		check(!ummunotify_watch(umn, memory, PAGE, 1, &region) && ummunotify_valid(region));
		make_children(1);
		parent_goes_on();
		_exit(0);
	}
	expect_exit(child);
	parent_goes_on();
	end();
}

static void test_daemon(void)
{
	pid_t child;
	int ends[2];
	char byte = 0;

	begin();
	check(!pipe(ends));
	child = fork();
	if (!child) {
		ummunotify_close(umn);
		check(!ummunotify_open(&umn, NULL));
		check(!ummunotify_watch(umn, memory, PAGE, 1, &region));
		check(!daemon(1, 1)); /* forks, and ends the parent */
		all_fails();
		watch_own();
		check(write(ends[1], &byte, 1) == 1);
		_exit(0);
	}
	close(ends[1]);
	check(read(ends[0], &byte, 1) == 1);
	close(ends[0]);
	expect_exit(child);
	parent_goes_on();
	end();
}

/* ---- Children that share the memory ---- */

#ifndef HAS_SANITIZER
static int shares_memory(void *unused)
{
	(void)unused;
	if (!ummunotify_valid(region) || ummunotify_changed(umn) || ummunotify_check(umn))
		return 1;
	madvise(memory, PAGE, MADV_DONTNEED);
	memory[0] = 1;
	return ummunotify_valid(region);
}
#endif

static void test_shared_memory(void)
{
	char *const arguments[] = {(char *)"true", NULL};
	char *stack = get_pages(16, NULL);
	struct ummunotify_event event;
	pid_t child;

	begin();
#ifndef HAS_SANITIZER /* ThreadSanitizer forks where vfork is called */
	child = vfork();
	if (!child)
		_exit(!ummunotify_valid(region));
	expect_exit(child);
	parent_goes_on();
#endif
	check(!posix_spawnp(&child, "true", NULL, NULL, arguments, environ));
	expect_exit(child);
	parent_goes_on();
#ifndef HAS_SANITIZER
	child = clone(shares_memory, stack + 16 * PAGE, CLONE_VM | CLONE_VFORK | SIGCHLD, NULL);
	expect_exit(child);
	check(!ummunotify_valid(region)); /* what it has changed */
	check(ummunotify_read(umn, &event, 1) == 1 && !ummunotify_renew(umn, region));
	parent_goes_on();
#endif
	(void)event;
	munmap(stack, 16 * PAGE);
	end();
}

/* ---- While other threads are inside ---- */

static bool stop;

static int take(const struct ummunotify_event *event, void *context)
{
	(void)event, (void)context;
	return 0;
}

static void *work(void *unused)
{
	char *pages = get_pages(4, NULL);
	struct ummunotify_region *regions[4];

	while (!__atomic_load_n(&stop, __ATOMIC_ACQUIRE)) {
		for (int i = 0; i < 4; i++)
			check(!ummunotify_watch(umn, pages + i * PAGE, PAGE, 0, &regions[i]));
		madvise(pages, 2 * PAGE, MADV_DONTNEED);
		check(ummunotify_dispatch(umn, take, NULL) >= 0);
		for (int i = 0; i < 4; i++)
			check(!ummunotify_unwatch(umn, regions[i]));
	}
	munmap(pages, 4 * PAGE);
	return unused;
}

static void *open_and_close(void *unused)
{
	struct ummunotify *other;

	while (!__atomic_load_n(&stop, __ATOMIC_ACQUIRE)) {
		check(!ummunotify_open(&other, NULL));
		ummunotify_close(other);
	}
	return unused;
}

static void *fork_often(void *unused)
{
	make_children(20);
	return unused;
}

static void test_threads_inside(void)
{
	pthread_t threads[3], forker;

	begin();
	stop = false;
#ifdef HAS_SANITIZER
	child_allocates =
		false; /* AddressSanitizer's allocator of GCC 12 leaves its locks held in the child of a threaded process */
#endif
	check(!pthread_create(&threads[0], NULL, work, NULL) && !pthread_create(&threads[1], NULL, work, NULL) &&
	      !pthread_create(&threads[2], NULL, open_and_close, NULL));
	make_children(20);
	check(!pthread_create(&forker, NULL, fork_often, NULL)); /* not by the main thread */
	pthread_join(forker, NULL);
	__atomic_store_n(&stop, true, __ATOMIC_RELEASE);
	for (int i = 0; i < 3; i++)
		pthread_join(threads[i], NULL);
	check(ummunotify_valid(region) || !ummunotify_renew(umn, region)); /* other threads' changes may be taken for its */
	check(ummunotify_dispatch(umn, take, NULL) >= 0);
	parent_goes_on();
	end();
}

int main(int argc, char **argv)
{
	static const struct test tests[] = {
		{"kinds", test_kinds},
		{"ends", test_ends},
		{"grandchildren", test_grandchildren},
		{"daemon", test_daemon},
		{"shared_memory", test_shared_memory},
		{"threads_inside", test_threads_inside},
	};

	alarm(300); /* a child that waits for a lock for ever */
	return run_tests(tests, sizeof tests / sizeof *tests, argc > 1 ? argv[1] : NULL);
}
