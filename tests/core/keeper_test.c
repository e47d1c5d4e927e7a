/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Files that stay open without descriptors (process/keeper.h): by an io_uring, and by a thread where a seccomp filter refuses
 * io_uring_setup.
 *
 *	keeper_test ring|thread
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "process/error.h"
#include "process/keeper.h"

#define MANY 80

/* More thread-local memory than the keeper's thread has stack: C takes it from the stack. */
static __thread volatile char thread_local[1 << 20];

static bool by_thread;

/* From now on this thread and its children get EPERM. */
static void refuse(long call)
{
	struct sock_filter filter[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)call, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = {.len = LENGTH(filter), .filter = filter};

	check(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) && !prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program));
}

static unsigned int count(const char *directory)
{
	DIR *entries = opendir(directory);
	unsigned int n = 0;

	check(entries);
	while (readdir(entries))
		n++;
	closedir(entries);
	return n;
}

/* A thread stays in /proc for a moment after it was joined. */
static void wait_for_threads(unsigned int n)
{
	while (count("/proc/self/task") != n)
		sched_yield();
}

static bool is_mapped(const char *what)
{
	FILE *maps = fopen("/proc/self/maps", "re");
	bool found = false;
	char line[512];

	check(maps);
	while (fgets(line, sizeof line, maps))
		found |= strstr(line, what) != NULL;
	fclose(maps);
	return found;
}

static struct umn_keeper *keep(const int *fds, size_t n)
{
	struct umn_keeper *keeper = umn_keeper_new(fds, n);

	if (!keeper)
		fail("umn_keeper_new: %s", ummunotify_error());
	return keeper;
}

/* A pipe that ends once all copies of its write end are closed. */
struct pipe {
	int out, in;
};

static struct pipe make_pipe(void)
{
	int ends[2];

	check(!pipe2(ends, O_CLOEXEC));
	return (struct pipe){ends[0], ends[1]};
}

static bool has_ended(int out)
{
	struct pollfd polled = {.fd = out};

	return poll(&polled, 1, 0) == 1 && (polled.revents & POLLHUP);
}

/* A ring's files are closed by a kernel thread, a little later. */
static void wait_for_end(int out)
{
	struct pollfd polled = {.fd = out};

	check(poll(&polled, 1, -1) == 1 && (polled.revents & POLLHUP));
}

static void close_all_but(int fd)
{
	check(fd == 3 || !close_range(3, (unsigned int)fd - 1, 0));
	check(!close_range((unsigned int)fd + 1, ~0u, 0));
}

/* ---- Tests, each in a process of its own ---- */

static void test_kept_without_descriptors(void)
{
	unsigned int threads = count("/proc/self/task");
	struct pipe pipe = make_pipe();
	struct umn_keeper *keeper = keep(&pipe.in, 1);

	check(count("/proc/self/task") == threads + by_thread && is_mapped("io_uring") == !by_thread);
	close_all_but(pipe.out);
	check(!has_ended(pipe.out));
	umn_keeper_release(keeper);
	wait_for_end(pipe.out);
	wait_for_threads(threads);
	check(!is_mapped("io_uring"));
}

/* Each of many, whatever their order, and none but these. */
static void test_many(void)
{
	struct pipe pipes[MANY], others[MANY];
	struct umn_keeper *keeper;
	int fds[MANY];

	for (int i = 0; i < MANY; i++) {
		others[i] = make_pipe();
		pipes[i] = make_pipe();
		fds[i * 37 % MANY] = pipes[i].in;
	}
	keeper = keep(fds, MANY);
	for (int i = 0; i < MANY; i++) {
		close(pipes[i].in);
		close(others[i].in);
	}
	for (int i = 0; i < MANY; i++)
		check(!has_ended(pipes[i].out) && has_ended(others[i].out));
	umn_keeper_release(keeper);
	for (int i = 0; i < MANY; i++)
		wait_for_end(pipes[i].out);
}

/* The program's pipes end when the program closes them, made before or after. */
static void test_programs_pipes_end(void)
{
	struct pipe kept = make_pipe(), before = make_pipe(), after;
	struct umn_keeper *keeper = keep(&kept.in, 1);
	char byte;

	after = make_pipe();
	close(before.in);
	close(after.in);
	check(read(before.out, &byte, 1) == 0 && read(after.out, &byte, 1) == 0);
	umn_keeper_release(keeper);
}

/* A child keeps nothing open: neither while it lives nor by what it does with its copy. */
static void test_child(void)
{
	struct pipe kept = make_pipe(), alive = make_pipe();
	struct umn_keeper *keeper = keep(&kept.in, 1);
	pid_t pid;
	char byte;
	int status;

	close(kept.in);
	pid = fork();
	if (pid == 0) {
		close(alive.in);
		umn_keeper_forget(keeper);
		check(!is_mapped("io_uring") && count("/proc/self/task") == 3); /* with . and .. */
		check(read(alive.out, &byte, 1) == 1);				/* until the parent has seen the end */
		_exit(0);
	}
	check(!has_ended(kept.out));
	umn_keeper_release(keeper);
	wait_for_end(kept.out);
	check(write(alive.in, "", 1) == 1);
	check(waitpid(pid, &status, 0) == pid && !status);
}

/* A child that dies does not end what the parent keeps. */
static void test_dead_child(void)
{
	struct pipe kept = make_pipe();
	struct umn_keeper *keeper = keep(&kept.in, 1);
	pid_t pid;

	close(kept.in);
	pid = fork();
	if (pid == 0)
		_exit(0);
	check(waitpid(pid, NULL, 0) == pid && !has_ended(kept.out));
	umn_keeper_release(keeper);
	wait_for_end(kept.out);
}

static void *keep_in_thread(void *fd)
{
	return keep(fd, 1);
}

/* The thread that made it ends: the kernel then lets go of what is that thread's. */
static void test_made_by_a_thread(void)
{
	struct pipe kept = make_pipe();
	pthread_t thread;
	void *keeper;

	check(!pthread_create(&thread, NULL, keep_in_thread, &kept.in) && !pthread_join(thread, &keeper));
	close_all_but(kept.out);
	check(!has_ended(kept.out));
	umn_keeper_release(keeper);
	wait_for_end(kept.out);
}

static void test_nothing_is_left(void)
{
	unsigned int descriptors = count("/proc/self/fd"), threads = count("/proc/self/task");
	struct pipe pipe = make_pipe();

	for (int i = 0; i < 300; i++) {
		struct umn_keeper *keeper = keep(&pipe.in, 1);

		check(count("/proc/self/fd") == descriptors + 2);
		umn_keeper_release(keeper);
	}
	close(pipe.in);
	wait_for_end(pipe.out);
	close(pipe.out);
	check(count("/proc/self/fd") == descriptors);
	wait_for_threads(threads);
	umn_keeper_release(NULL);
}

static void test_impossible(void)
{
	int fds[200] = {0}, closed = make_pipe().in;
	unsigned int threads = count("/proc/self/task"), descriptors;

	check(!umn_keeper_new(fds, 0) && !umn_keeper_new(fds, LENGTH(fds)));
	check(ummunotify_failure()->error == EINVAL);
	close(closed);
	descriptors = count("/proc/self/fd");
	check(!umn_keeper_new(&closed, 1) && ummunotify_failure()->error);
	check(count("/proc/self/fd") == descriptors);
	wait_for_threads(threads);
}

/* The reason names both ways. */
static void test_both_refused(void)
{
	unsigned int threads = count("/proc/self/task");
	struct pipe pipe = make_pipe();

	if (!by_thread)
		refuse(SYS_io_uring_setup);
	refuse(SYS_close_range);
	check(!umn_keeper_new(&pipe.in, 1));
	check(ummunotify_failure()->code == UMMUNOTIFY_UNAVAILABLE);
	check(strstr(ummunotify_error(), "io_uring is refused (Operation not permitted)"));
	check(strstr(ummunotify_error(), "a thread with descriptors of its own (Operation not permitted)"));
	wait_for_threads(threads);
	close(pipe.in);
	check(has_ended(pipe.out));
}

static const struct {
	const char *name;
	void (*run)(void);
} tests[] = {
	{"kept without descriptors", test_kept_without_descriptors},
	{"many", test_many},
	{"the program's pipes end", test_programs_pipes_end},
	{"child", test_child},
	{"dead child", test_dead_child},
	{"made by a thread", test_made_by_a_thread},
	{"nothing is left", test_nothing_is_left},
	{"impossible", test_impossible},
	{"both refused", test_both_refused},
};

int main(int argc, char **argv)
{
	int status;

	if (argc != 2)
		return 2;
	by_thread = !strcmp(argv[1], "thread");
	thread_local[0] = 1;
	if (!by_thread && syscall(SYS_io_uring_setup, 1, NULL) < 0 && errno != EFAULT) {
		printf("io_uring does not work here: %s\n", strerror(errno));
		return 77;
	}
	if (by_thread)
		refuse(SYS_io_uring_setup);
	for (size_t i = 0; i < LENGTH(tests); i++) {
		pid_t pid = fork();

		if (pid == 0) {
			tests[i].run();
			_exit(0);
		}
		check(waitpid(pid, &status, 0) == pid);
		if (status)
			fail("%s: status %#x", tests[i].name, status);
	}
	return 0;
}
