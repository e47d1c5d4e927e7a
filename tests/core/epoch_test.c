/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The epoch in children of all kinds (process/process.h).
 *
 *	epoch_test		all tests
 *	epoch_test threads	the one for ThreadSanitizer, which cannot cope with processes that share memory
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "process/process.h"

#define load(p) __atomic_load_n(p, __ATOMIC_ACQUIRE)
#define store(p, v) __atomic_store_n(p, v, __ATOMIC_RELEASE)

/* What the modules did in this process and its ancestors. Ordinary memory: ThreadSanitizer sees if the epoch does not publish it. */
static unsigned int first_resets, second_resets;
/* For the module: tells that it runs, and waits to go on. Shared with children. */
static struct shared {
	int inside, go_on, passed;
} *shared;
static int must_wait, must_raise;
/* The module waits until so many threads are about to ask for the epoch, and a little longer. */
static unsigned int awaited, asking;
static uint32_t in_handler;

static void first_module(void)
{
	if (must_wait) {
		store(&shared->inside, 1);
		while (!load(&shared->go_on))
			sched_yield();
	}
	if (must_raise)
		raise(SIGUSR1);
	if (awaited) {
		while (__atomic_load_n(&asking, __ATOMIC_RELAXED) < awaited)
			sched_yield();
		usleep(20000);
	}
	first_resets++;
}

static void second_module(void)
{
	second_resets++;
	check(second_resets == first_resets); /* in the order of adding */
}

/* ---- Kinds of children ---- */

/* With a copy of the memory. C's fork runs pthread_atfork's handlers, the others do not. */
static pid_t raw_clone(void)
{
	return (pid_t)syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, 0);
}

static const struct kind {
	const char *name;
	pid_t (*make)(void);
	bool has_handlers;
} kinds[] = {{"fork", fork, true}, {"_Fork", _Fork, false}, {"clone", raw_clone, false}};

static void wait_for(pid_t pid)
{
	int status;

	check(pid > 0 && waitpid(pid, &status, __WALL) == pid);
	check(WIFEXITED(status) && !WEXITSTATUS(status));
}

static void in_child(const struct kind *kind, void (*function)(const struct kind *))
{
	pid_t pid = kind->make();

	if (pid == 0) {
		function(kind);
		_exit(0);
	}
	wait_for(pid);
}

/* ---- One child ---- */

static uint32_t parents;

static void check_child(const struct kind *kind)
{
	unsigned int before = first_resets - kind->has_handlers;
	uint32_t epoch;

	/* Before any call: what is of the parent is dead. */
	check(!umn_process_is(parents));
	check(kind->has_handlers == (*umn_process_epoch != 0));
	epoch = umn_process_current();
	check(epoch && epoch != parents && umn_process_is(epoch) && !umn_process_is(parents));
	check(umn_process_current() == epoch && first_resets == before + 1 && second_resets == before + 1);
}

static void test_child(const struct kind *kind)
{
	unsigned int before = first_resets;

	parents = umn_process_current();
	in_child(kind, check_child);
	check(umn_process_is(parents) && umn_process_current() == parents && first_resets == before);
}

/* ---- Children of children, of which some make no call ---- */

#define DEPTH 12

static uint32_t ancestors[DEPTH];
static unsigned int depth, ancestor_count;

static void descend(const struct kind *kind)
{
	bool asks = depth % 3;

	(void)kind;
	for (unsigned int i = 0; i < ancestor_count; i++)
		check(!umn_process_is(ancestors[i]));
	if (asks) {
		ancestors[ancestor_count++] = umn_process_current();
		for (unsigned int i = 0; i + 1 < ancestor_count; i++)
			check(ancestors[i] != ancestors[ancestor_count - 1]);
	}
	if (++depth < DEPTH)
		in_child(&kinds[depth * 7 / 3 % LENGTH(kinds)], descend);
	for (unsigned int i = 0; i < ancestor_count; i++)
		check(umn_process_is(ancestors[i]) == (asks && i + 1 == ancestor_count));
}

static void test_descendants(void)
{
	depth = 1;
	ancestor_count = 0;
	descend(NULL);
	check(umn_process_is(ancestors[0]));
}

/* ---- Children that share the memory count as the process ---- */

static char stack[65536];

static int check_sharing(void *unused)
{
	(void)unused;
	check(umn_process_is(parents) && umn_process_current() == parents);
	return 0;
}

static void test_sharing(void)
{
	unsigned int before = first_resets;
	char *arguments[] = {"true", NULL}, *environment[] = {NULL};
	pid_t pid;

	parents = umn_process_current();
	wait_for(clone(check_sharing, stack + sizeof stack, CLONE_VM | SIGCHLD, NULL));
	wait_for(clone(check_sharing, stack + sizeof stack, CLONE_VM | CLONE_VFORK | SIGCHLD, NULL));
	wait_for(clone(check_sharing, stack + sizeof stack, CLONE_VM | CLONE_FILES | CLONE_FS | SIGCHLD, NULL));
	pid = vfork();
	if (pid == 0)
		_exit(!(umn_process_is(parents) && umn_process_current() == parents));
	wait_for(pid);
	check(!posix_spawn(&pid, "/bin/true", NULL, NULL, arguments, environment));
	wait_for(pid);
	check(umn_process_is(parents) && first_resets == before && second_resets == before);
}

/* A child of one that shares the memory: its memory is a copy of the process's. */
static int fork_from_sharing(void *kind)
{
	in_child(kind, check_child);
	return 0;
}

static void test_child_of_sharing(void)
{
	/* Not C's fork, which is for threads that C made. */
	for (size_t i = 1; i < LENGTH(kinds); i++) {
		parents = umn_process_current();
		wait_for(clone(fork_from_sharing, stack + sizeof stack, CLONE_VM | SIGCHLD, (void *)&kinds[i]));
		check(umn_process_is(parents));
	}
}

/* ---- Threads of a child that race for the first use ---- */

#define RACERS 8

static pthread_barrier_t barrier;
static unsigned int expected_resets;

/* Half of them find the epoch without the lock. No order but the epoch's own, for ThreadSanitizer. */
static void *race(void *epoch)
{
	pthread_barrier_wait(&barrier);
	if (__atomic_fetch_add(&asking, 1, __ATOMIC_RELAXED) % 2)
		while (!__atomic_load_n(umn_process_epoch, __ATOMIC_RELAXED))
			sched_yield();
	*(uint32_t *)epoch = umn_process_current();
	check(first_resets == expected_resets && second_resets == expected_resets); /* done before the call returned */
	return NULL;
}

static void race_in_child(const struct kind *kind)
{
	uint32_t epochs[RACERS];
	pthread_t threads[RACERS];

	expected_resets = first_resets + !kind->has_handlers;
	awaited = RACERS;
	pthread_barrier_init(&barrier, NULL, RACERS);
	for (int i = 0; i < RACERS; i++)
		check(!pthread_create(&threads[i], NULL, race, &epochs[i]));
	for (int i = 0; i < RACERS; i++)
		pthread_join(threads[i], NULL);
	for (int i = 0; i < RACERS; i++)
		check(epochs[i] && epochs[i] == epochs[0]);
	check(umn_process_is(epochs[0]));
}

/* ---- A child made while a thread of its parent is in a module ---- */

static void *first_use(void *unused)
{
	umn_process_current();
	return unused;
}

static void no_lock_is_held(const struct kind *kind)
{
	(void)kind;
	must_wait = 0;
	check(umn_process_current() && *umn_process_epoch); /* it would wait for the parent's thread */
	store(&shared->passed, 1);
}

static void fork_during_first_use(const struct kind *kind)
{
	pthread_t thread;

	must_wait = 1;
	check(!pthread_create(&thread, NULL, first_use, NULL));
	while (!load(&shared->inside))
		sched_yield();
	in_child(kind, no_lock_is_held);
	check(load(&shared->passed));
	store(&shared->go_on, 1);
	pthread_join(thread, NULL);
	check(*umn_process_epoch && umn_process_is(umn_process_current()));
}

static void test_fork_during_first_use(const struct kind *kind)
{
	memset(shared, 0, sizeof *shared);
	in_child(kind, fork_during_first_use);
}

/* ---- Signals ---- */

static void handler(int signal)
{
	(void)signal;
	in_handler = umn_process_current();
}

/* The handler waits for the thread that it interrupts, unless it comes only when the first use is over. */
static void signal_during_first_use(const struct kind *kind)
{
	sigset_t mask;

	(void)kind;
	check(!in_handler);
	check(umn_process_current() && in_handler == umn_process_current());
	sigprocmask(SIG_BLOCK, NULL, &mask);
	check(!sigismember(&mask, SIGUSR1));
}

static void test_signal(const struct kind *kind)
{
	signal(SIGUSR1, handler);
	must_raise = 1;
	in_handler = 0;
	in_child(kind, signal_during_first_use);
	must_raise = 0;
}

int main(int argc, char **argv)
{
	bool only_threads = argc > 1 && !strcmp(argv[1], "threads");

	check(!*umn_process_epoch && !umn_process_is(1)); /* nothing is of this process yet */
	check(!umn_process_start() && !umn_process_start() && umn_process_current());
	umn_process_add_child(first_module);
	umn_process_add_child(second_module);
	shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	check(shared != MAP_FAILED);

	for (size_t i = 0; i < LENGTH(kinds); i++)
		in_child(&kinds[i], race_in_child);
	if (only_threads)
		return 0;
	for (size_t i = 0; i < LENGTH(kinds); i++)
		test_child(&kinds[i]);
	test_descendants();
	test_sharing();
	test_child_of_sharing();
	/* C's fork makes the first use itself, so a thread cannot be in it; nor can a handler run in a test's place. */
	for (size_t i = 1; i < LENGTH(kinds); i++) {
		test_fork_during_first_use(&kinds[i]);
		test_signal(&kinds[i]);
	}
	check(!first_resets && !second_resets);
	return 0;
}
