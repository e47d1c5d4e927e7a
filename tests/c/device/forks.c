/* SPDX-License-Identifier: BSD-3-Clause */
/* Children. */
#include "device.h"

#include <sys/syscall.h>

static void expect_exit(pid_t child)
{
	int status;

	check(child > 0 && waitpid(child, &status, 0) == child && status == 0);
}

/* Lets the other process go on, and waits until it does the same. */
static void meet(int *to, int *from)
{
	char byte = 0;

	check(write(to[1], &byte, 1) == 1 && read(from[0], &byte, 1) == 1);
}

static void test_fork(void)
{
	int fd = open_device(), up[2], down[2];
	char *memory = get_pages(4, NULL);
	volatile uint64_t *counter = map_counter(fd), *own;
	struct ummunotify_event events[4];
	pid_t child;

	check(!pipe(up) && !pipe(down));
	watch(fd, memory, PAGE, 1);
	watch(fd, memory + PAGE, PAGE, 2);
	child = fork();
	if (!child) {
		/* What the child does to its own copy is nobody's affair. */
		munmap(memory, PAGE);
		check(!readable(fd) && *counter == 0);
		nothing(fd);
		meet(up, down); /* the parent changes page 1 */
		own = map_counter(fd);
		check(*counter == 1 && *own == 1);
		wait_readable(fd);
		check(get(fd, events, 4) == 2);
		is_inval(&events[0], 2);
		hint_is(&events[0], memory + PAGE, memory + 2 * PAGE);
		is_last(&events[1], 1);
		nothing(fd);
		check(try_register(fd, memory, PAGE, 1) == -1 && errno == EINVAL);
		check(try_unregister(fd, 9) == -1 && errno == EINVAL);
		watch(fd, memory + 2 * PAGE, PAGE, 3); /* of the parent's memory */
		unwatch(fd, 1);
		if (!fork()) {		/* and so it goes on */
			meet(up, down); /* the parent changes page 2 */
			check(get(fd, events, 4) == 2);
			is_inval(&events[0], 3);
			_exit(0);
		}
		check(wait(NULL) > 0);
		/* A descriptor of its own for its own memory. */
		int mine = open_device();

		watch(mine, memory + 3 * PAGE, PAGE, 1);
		change(memory + 3 * PAGE);
		check(get(mine, events, 4) == 2);
		nothing(fd);
		close(mine);
		close(fd);
		_exit(0);
	}
	check(read(up[0], events, 1) == 1);
	change(memory + PAGE);
	check(write(down[1], events, 1) == 1);
	check(read(up[0], events, 1) == 1);
	change(memory); /* not watched any more, thanks to the child */
	change(memory + 2 * PAGE);
	check(write(down[1], events, 1) == 1);
	expect_exit(child);
	nothing(fd); /* the child has read it */
	change(memory + 2 * PAGE);
	check(get(fd, events, 4) == 2);
	is_inval(&events[0], 3);
	close(fd);
	for (int i = 0; i < 2; i++) {
		close(up[i]);
		close(down[i]);
	}
	munmap((void *)counter, PAGE);
	munmap(memory, 4 * PAGE);
}

/* It is open until all have closed it. */
static void test_fork_and_close(void)
{
	int before = count_fds(), fd = open_device(), up[2], down[2];
	char *memory = get_pages(1, NULL);
	struct ummunotify_event events[4];
	pid_t child;

	check(!pipe(up) && !pipe(down));
	watch(fd, memory, PAGE, 1);
	child = fork();
	if (!child) {
		meet(up, down);
		check(get(fd, events, 4) == 2);
		is_inval(&events[0], 1);
		unwatch(fd, 1);
		nothing(fd);
		_exit(0);
	}
	check(!close(fd));
	check(read(up[0], events, 1) == 1);
	change(memory);
	check(write(down[1], events, 1) == 1);
	expect_exit(child);
	for (int i = 0; i < 2; i++) {
		close(up[i]);
		close(down[i]);
	}
	/* A thread lets go of what is left once it hears that the child is gone. */
	for (int i = 0; count_fds() > before && i < 30000; i++)
		usleep(1000);
	check(count_fds() <= before); /* what another test had left may be gone, too */
	munmap(memory, PAGE);
}

static void test_parent_ends(void)
{
	int fd, up[2];
	struct ummunotify_event events[4];
	char *memory = get_pages(1, NULL), byte = 0;
	pid_t parent;

	check(!pipe(up));
	parent = fork();
	if (!parent) {
		fd = open_device();
		watch(fd, memory, PAGE, 1);
		pid_t self = getpid();

		if (!fork()) {
			for (int i = 0; getppid() == self && i < 30000; i++)
				usleep(1000);
			/* There is nothing left that could change. */
			check(get(fd, events, 4) == -EAGAIN);
			check(try_register(fd, memory, PAGE, 2) == -1 && errno == ESRCH);
			check(!close(fd));
			check(write(up[1], &byte, 1) == 1);
			_exit(0);
		}
		_exit(0);
	}
	expect_exit(parent);
	close(up[1]);
	check(read(up[0], &byte, 1) == 1);
	close(up[0]);
	munmap(memory, PAGE);
}

static void test_vfork(void)
{
	int fd = open_device();
	char *memory = get_pages(1, NULL);
	struct ummunotify_event events[4];
	pid_t child;

	watch(fd, memory, PAGE, 1);
	child = vfork();
	if (!child) {
		/* What programs do before they execute another. */
		dup2(0, fd);
		close(fd);
		close_range(3, ~0u, 0);
		_exit(0);
	}
	expect_exit(child);
	change(memory);
	check(get(fd, events, 4) == 2);
	close(fd);
	munmap(memory, PAGE);
}

/* Made without fork's handlers: it has the server that an earlier fork has started, or every call fails. */
static void test_clone(void)
{
	int fd = open_device();
	char *memory = get_pages(2, NULL);
	struct ummunotify_event events[4];
	pid_t child;

	watch(fd, memory, PAGE, 1);
	for (int served = 0; served < 2; served++) {
		change(memory);
		child = (pid_t)syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, NULL);
		if (!child) {
			if (served) {
				check(get(fd, events, 4) == 2);
				is_inval(&events[0], 1);
				watch(fd, memory + PAGE, PAGE, 2); /* of the parent's memory */
			} else {
				check(get(fd, events, 4) == -EBADF);
				check(try_register(fd, memory, PAGE, 2) == -1 && errno == EBADF);
				check(try_unregister(fd, 1) == -1 && errno == EBADF);
			}
			check(!close(fd));
			check(get(fd, events, 4) == -EBADF);
			_exit(0);
		}
		expect_exit(child);
		if (!served) {
			check(get(fd, events, 4) == 2);
			child = fork(); /* starts the server */
			if (!child)
				_exit(0);
			expect_exit(child);
		}
	}
	change(memory + PAGE);
	check(get(fd, events, 4) == 2);
	is_inval(&events[0], 2);
	close(fd);
	munmap(memory, 2 * PAGE);
}

static int duplicated_fd;
static bool stop;

static void *duplicate(void *unused)
{
	while (!__atomic_load_n(&stop, __ATOMIC_ACQUIRE)) {
		int copy = dup(duplicated_fd);

		check(copy >= 0 && !close(copy));
	}
	return unused;
}

/* The probe kvm takes a clone without flags for a change there: docs/architecture.md, "Inside a system call". */
#ifdef __aarch64__
static const bool clone_may_alarm = true;
#else
static const bool clone_may_alarm = false;
#endif

/* Children that are made while another thread holds the device's locks do not wait for them. */
static void test_threads_inside(void)
{
	int fd = open_device();
	char *memory = get_pages(1, NULL);
	struct ummunotify_event events[4];
	pthread_t thread;
	pid_t child;

	duplicated_fd = fd;
	stop = false;
	watch(fd, memory, PAGE, 1);
	check(!pthread_create(&thread, NULL, duplicate, NULL));
	for (int i = 0; i < 200; i++) {
		child = i % 2 ? fork() : (pid_t)syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, NULL);
		if (!child) {
			int n = get(fd, events, 4);

			check(n == -EAGAIN || n == -EBADF || (clone_may_alarm && n == 2));
			check(!close(fd));
			_exit(0);
		}
		expect_exit(child);
	}
	__atomic_store_n(&stop, true, __ATOMIC_RELEASE);
	pthread_join(thread, NULL);
	change(memory);
	check(get(fd, events, 4) == 2);
	close(fd);
	munmap(memory, PAGE);
}

const struct test fork_tests[] = {
	{"fork", test_fork},
	{"fork_and_close", test_fork_and_close},
	{"parent_ends", test_parent_ends},
	{"vfork", test_vfork},
	{"clone", test_clone},
	{"threads_inside", test_threads_inside},
	{0},
};
