/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The source `uffd` in a process that closes its descriptors, forks by clone(), moves its mappings, or has hardly any memory, threads or
 * system calls.
 *
 *	uffd_process_test GROUP [CASE]	closed, clone, mappings or limits
 *
 * Each case runs in a process of its own, which an alarm ends: what is to be shown is often that nothing hangs.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "sources/uffd.h"
#include "table/table.h"

#define PAGE ((unsigned long)sysconf(_SC_PAGESIZE))
#define SECONDS 60
#define check(condition)                                                                                                           \
	do {                                                                                                                       \
		if (!(condition)) {                                                                                                \
			fprintf(stderr, "%s:%d: not true: %s (errno %s)\n", __FILE__, __LINE__, #condition, strerror(errno));      \
			abort();                                                                                                   \
		}                                                                                                                  \
	} while (0)

struct notifier {
	struct umn_uffd *uffd;
	struct umn_table *table;
};

static bool open_notifier(struct notifier *n, struct umn_uffd_failure *failure)
{
	uint32_t pages;
	void *memory;

	n->uffd = umn_uffd_new(failure);
	if (!n->uffd)
		return false;
	n->table = umn_table_new(UINT64_MAX);
	umn_table_set_source(n->table, umn_uffd_source(n->uffd));
	pages = umn_table_next_pages(n->table);
	memory = umn_uffd_add_segment(n->uffd, pages);
	check(memory && !umn_table_add_segment(n->table, memory, pages));
	return true;
}

static struct notifier opened(void)
{
	struct umn_uffd_failure failure;
	struct notifier n;

	if (!open_notifier(&n, &failure)) {
		printf("userfaultfd does not work here: step %d, %s\n", failure.step, strerror(failure.error));
		exit(77);
	}
	return n;
}

static void close_notifier(struct notifier *n)
{
	umn_table_close(n->table);
	umn_table_delete(n->table);
	umn_uffd_delete(n->uffd);
}

static int try_watch(struct notifier *n, void *start, size_t length, struct umn_region **region)
{
	return umn_table_watch(n->table, (uint64_t)start, (uint64_t)start + length, 0, NULL, region);
}

static struct umn_region *watch(struct notifier *n, void *start, size_t length)
{
	struct umn_region *region;

	check(!try_watch(n, start, length, &region));
	check(umn_region_untouched(region)); /* valid too, but for a false alarm on a busy machine */
	return region;
}

static uint8_t *map(size_t length)
{
	uint8_t *memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	check(memory != MAP_FAILED);
	return memory;
}

/* With room around it that is not mapped, and nothing to merge with; it can become six times as long. Far from where the kernel puts other
 * threads' memory, which with large pages would fit into the room. */
static uint8_t *map_alone(size_t length)
{
	const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE;
	static uintptr_t room = (uintptr_t)1 << 40;
	uint8_t *memory = (uint8_t *)__atomic_fetch_add(&room, 8 * length, __ATOMIC_RELAXED), *end = memory + 6 * length;

	check(mmap(end, PAGE, PROT_NONE, flags, -1, 0) == end);
	check(mmap(memory, length, PROT_READ | PROT_WRITE, flags, -1, 0) == memory);
	return memory;
}

/* How many of the lines of a file in /proc/self contain it. */
static int count_lines(const char *path, const char *part)
{
	FILE *file = fopen(path, "re");
	char line[8192];
	int count = 0;

	check(file);
	while (fgets(line, sizeof line, file))
		count += strstr(line, part) != NULL;
	fclose(file);
	return count;
}

static int count_mappings(void)
{
	return count_lines("/proc/self/maps", "");
}

static int count_registered(void)
{
	return count_lines("/proc/self/smaps", " uw");
}

/* A change is seen: by the thread that makes it, at once. */
static void check_sees(struct notifier *n)
{
	uint8_t *memory = map(4 * PAGE);
	struct umn_region *region = watch(n, memory, 4 * PAGE);

	munmap(memory, 4 * PAGE);
	check(!umn_region_valid(region) && umn_table_changed(n->table));
	umn_table_unwatch(n->table, region);
}

static int find_uffd(void)
{
	char path[64], name[64];

	for (int fd = 3; fd < 64; fd++) {
		ssize_t length;

		snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
		length = readlink(path, name, sizeof name);
		if (length > 0 && memmem(name, (size_t)length, "[userfaultfd]", 13))
			return fd;
	}
	check(!"there is a userfaultfd");
	return -1;
}

/* ---- Descriptors ---- */

static struct {
	struct notifier n;
	struct umn_region *first, *second;
	uint8_t *memory;
} closed;

static void begin_closed(void)
{
	closed.n = opened();
	closed.memory = map(8 * PAGE);
	closed.first = watch(&closed.n, closed.memory, PAGE);
	closed.second = watch(&closed.n, closed.memory + 4 * PAGE, PAGE);
}

/* Nothing of the notifier is valid, nor can be made valid. Another notifier works. */
static void end_closed(void)
{
	struct umn_region *region;
	struct notifier other;

	check(!umn_region_valid(closed.first) && !umn_region_valid(closed.second) && umn_table_changed(closed.n.table));
	check(try_watch(&closed.n, closed.memory, PAGE, &region) == UMN_UFFD_CLOSED);
	check(umn_uffd_is_broken(closed.n.uffd));
	check(umn_table_renew(closed.n.table, closed.second) == UMN_UFFD_CLOSED);
	check(!umn_region_valid(closed.second));
	other = opened();
	check_sees(&other);
	umn_table_unwatch(closed.n.table, closed.first);
	check_sees(&other);
	close_notifier(&closed.n);
	check_sees(&other);
	close_notifier(&other);
	munmap(closed.memory, 8 * PAGE);
}

static void closed_all(void)
{
	begin_closed();
	closefrom(3);
	/* The reader reads on, so what is changed before the source was asked anything is seen as ever. */
	munmap(closed.memory, PAGE);
	while (umn_region_untouched(closed.first))
		sched_yield();
	check(umn_region_untouched(closed.second));
	end_closed();
}

static void closed_then_watched(void)
{
	struct umn_region *region;

	begin_closed();
	closefrom(3);
	check(try_watch(&closed.n, closed.memory + 2 * PAGE, PAGE, &region) == UMN_UFFD_CLOSED);
	check(!umn_region_untouched(closed.first) && !umn_region_untouched(closed.second));
	end_closed();
}

static void closed_then_unwatched(void)
{
	begin_closed();
	closefrom(3);
	umn_table_unwatch(closed.n.table, closed.first);
	check(!umn_region_untouched(closed.second));
	closed.first = closed.second;
	check(!umn_region_valid(closed.second));
	close_notifier(&closed.n);
	munmap(closed.memory, 8 * PAGE);
}

/* The program's files get the numbers, and stay open. */
static void closed_and_reused(void)
{
	int program = open("/dev/null", O_RDWR);

	begin_closed();
	check(umn_uffd_wake_fd(closed.n.uffd) >= 0);
	for (int fd = 3; fd < 40; fd++)
		check(fd == program || dup2(program, fd) == fd);
	check(umn_uffd_wake_fd(closed.n.uffd) == -UMN_UFFD_CLOSED);
	umn_uffd_acknowledge(closed.n.uffd);
	end_closed();
	for (int fd = 3; fd < 40; fd++)
		check(fcntl(fd, F_GETFD) >= 0);
}

/* Another userfaultfd knows the barrier's ioctl. It is found at the next watch, renew or read. */
static void closed_and_reused_by_userfaultfd(void)
{
	const int flags = O_CLOEXEC | O_NONBLOCK | 1 /* UFFD_USER_MODE_ONLY */;
	struct umn_region *region;
	int fd, other;

	begin_closed();
	fd = find_uffd();
	other = (int)syscall(SYS_userfaultfd, flags);
	check(other >= 0 && dup2(other, fd) == fd);
	munmap(closed.memory, PAGE);
	check(!umn_region_valid(closed.first));
	check(!umn_uffd_source(closed.n.uffd)->wait_delivered(umn_uffd_source(closed.n.uffd), 100));
	check(try_watch(&closed.n, closed.memory + 2 * PAGE, PAGE, &region) == UMN_UFFD_CLOSED);
	end_closed();
	check(fcntl(fd, F_GETFD) >= 0);
}

/* Of an idle notifier the wake-up's sockets are all that can be closed. */
static void closed_while_idle(void)
{
	struct notifier n = opened(), silent = opened();
	struct umn_region *region;
	uint8_t *memory = map(PAGE);

	check_sees(&silent);
	check(umn_uffd_wake_fd(n.uffd) >= 0);
	closefrom(3);
	check_sees(&silent);
	check(try_watch(&n, memory, PAGE, &region) == UMN_UFFD_CLOSED);
	check(umn_uffd_wake_fd(n.uffd) == -UMN_UFFD_CLOSED);
	check_sees(&silent);
	close_notifier(&n);
	check_sees(&silent);
	close_notifier(&silent);
}

/* The reader wakes through a copy of its own: of what was made before it began, and after. */
static void woken(void)
{
	struct notifier n = opened();
	struct pollfd polled = {.events = POLLIN};
	uint8_t *memory = map(2 * PAGE);
	struct umn_region *region;

	for (int before = 0; before < 2; before++) {
		if (before)
			check_sees(&n);
		region = watch(&n, memory, 2 * PAGE);
		polled.fd = umn_uffd_wake_fd(n.uffd);
		umn_table_arm(n.table);
		check(polled.fd >= 0 && !poll(&polled, 1, 0));
		madvise(memory, PAGE, MADV_DONTNEED);
		check(poll(&polled, 1, -1) == 1 && polled.revents == POLLIN && !umn_region_valid(region));
		umn_uffd_acknowledge(n.uffd);
		check(!poll(&polled, 1, 0));
		umn_table_unwatch(n.table, region);
	}
	close_notifier(&n);
}

/* Threads that ask while another closes: never valid after the change, and no hang. */
static void *ask(void *stop)
{
	while (!__atomic_load_n((bool *)stop, __ATOMIC_ACQUIRE)) {
		umn_region_valid(closed.first);
		umn_table_changed(closed.n.table);
	}
	return NULL;
}

static void closed_while_asked(void)
{
	pthread_t threads[2];
	bool stop = false;

	begin_closed();
	for (int i = 0; i < 2; i++)
		pthread_create(&threads[i], NULL, ask, &stop);
	for (int i = 0; i < 200; i++) /* ends and begins an instance each time */
		check_sees(&closed.n);
	closefrom(3);
	munmap(closed.memory, PAGE);
	check(!umn_region_valid(closed.first));
	__atomic_store_n(&stop, true, __ATOMIC_RELEASE);
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	end_closed();
}

/* ---- clone() without any handler ---- */

static pid_t clone_child(void)
{
	return (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
}

/* It sleeps, with a copy of the userfaultfd. */
static pid_t clone_sleeper(void)
{
	pid_t child = clone_child();

	check(child >= 0);
	if (!child) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		for (;;)
			pause();
	}
	return child;
}

static void end_child(pid_t child)
{
	kill(child, SIGKILL);
	check(waitpid(child, NULL, 0) == child);
}

/* What was watched, grew, moved and was split: none of it may stay registered once nothing is watched. */
static void clone_outlives(void)
{
	struct notifier n = opened();
	uint8_t *plain = map_alone(64 * PAGE), *grown = map_alone(64 * PAGE), *moved = map_alone(64 * PAGE);
	uint8_t *split = map_alone(64 * PAGE), *heap = malloc(100000);
	struct umn_region *regions[] = {watch(&n, plain, 64 * PAGE), watch(&n, grown + PAGE, PAGE),
					watch(&n, moved + 3 * PAGE, PAGE), watch(&n, split + 9 * PAGE, PAGE),
					watch(&n, heap, 100000)};
	pid_t child = clone_sleeper();

	check(mremap(grown, 64 * PAGE, 128 * PAGE, 0) == grown);
	check(!munmap(grown + 70 * PAGE, PAGE) && !mprotect(grown + 90 * PAGE, PAGE, PROT_READ));
	moved = mremap(moved, 64 * PAGE, 600 * PAGE, MREMAP_MAYMOVE);
	check(moved != MAP_FAILED && !mprotect(moved + 100 * PAGE, PAGE, PROT_READ));
	check(!mprotect(split + 20 * PAGE, PAGE, PROT_READ));
	for (size_t i = 0; i < sizeof regions / sizeof *regions; i++)
		umn_table_unwatch(n.table, regions[i]);
	check(!count_registered()); /* no thread reads events any more */
	close_notifier(&n);
	munmap(plain, 64 * PAGE);
	munmap(grown, 128 * PAGE);
	check(mremap(moved, 50 * PAGE, 20 * PAGE, 0) == moved);
	munmap(moved, 600 * PAGE);
	madvise(split, 64 * PAGE, MADV_DONTNEED);
	munmap(split, 64 * PAGE);
	free(heap);
	for (int i = 0; i < 100; i++)
		free(malloc(200000));
	end_child(child);
}

/* Threads that move and grow registered mappings while the last region is unwatched. None fails, as each has rooms of its own: what is moved to
 * where another mapping has just been registered may be split. */
static struct {
	uint8_t *memory[2];
	bool stop;
} moves;

static void *move_about(void *number)
{
	uint8_t **memory = &moves.memory[(uintptr_t)number], *rooms[] = {*memory, map_alone(16 * PAGE)}, *to;
	size_t length = 16 * PAGE, next;

	munmap(rooms[1], 16 * PAGE);
	for (uint32_t i = 0; !__atomic_load_n(&moves.stop, __ATOMIC_ACQUIRE); i++, length = next) {
		next = (8 + i % 40) * PAGE;
		if (i % 3)
			to = mremap(*memory, length, next, 0);
		else
			to = mremap(*memory, length, next, MREMAP_MAYMOVE | MREMAP_FIXED, rooms[*memory == rooms[0]]);
		check(to != MAP_FAILED);
		__atomic_store_n(memory, to, __ATOMIC_RELEASE);
	}
	munmap(*memory, length);
	return NULL;
}

static void clone_outlives_moves(void)
{
	struct umn_region *regions[2];
	pthread_t threads[2];
	struct notifier n = opened();
	uint32_t watched = 0;
	pid_t child;

	for (uintptr_t i = 0; i < 2; i++) {
		moves.memory[i] = map_alone(16 * PAGE);
		pthread_create(&threads[i], NULL, move_about, (void *)i);
	}
	while (watched < 50) {
		for (int i = 0; i < 2; i++)
			if (try_watch(&n, __atomic_load_n(&moves.memory[i], __ATOMIC_ACQUIRE), PAGE, &regions[i]))
				regions[i] = NULL;
		child = clone_sleeper();
		for (int i = 0; i < 2; i++)
			if (regions[i]) {
				watched++;
				umn_table_unwatch(n.table, regions[i]);
			}
		check(!count_registered());
		end_child(child);
	}
	__atomic_store_n(&moves.stop, true, __ATOMIC_RELEASE);
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	close_notifier(&n);
}

/* The child has its own source; the parent's goes on. */
static void clone_begins_anew(void)
{
	struct notifier n = opened(), own;
	uint8_t *memory = map(8 * PAGE);
	struct umn_region *region = watch(&n, memory, 4 * PAGE);
	int fd = find_uffd(), status, program;
	pid_t child;

	for (int replace = 0; replace < 2; replace++) {
		child = clone_child();
		if (!child) {
			alarm(SECONDS);
			program = open("/dev/null", O_RDWR);
			if (replace)
				dup2(program, fd);
			umn_process_current();
			check((fcntl(fd, F_GETFD) >= 0) == replace);
			check(!umn_region_valid(region) && umn_table_changed(n.table));
			check(umn_uffd_source(n.uffd)->watch(umn_uffd_source(n.uffd), 4096, 8192) == UMN_UFFD_CLOSED);
			umn_uffd_close(n.uffd);
			own = opened();
			check_sees(&own);
			close_notifier(&own);
			umn_uffd_in_child();
			own = opened();
			check_sees(&own);
			_exit(0);
		}
		check(waitpid(child, &status, 0) == child && !status);
		check(umn_region_valid(region));
	}
	munmap(memory, PAGE);
	check(!umn_region_valid(region));
	umn_table_unwatch(n.table, region);
	close_notifier(&n);
}

/* ---- Mappings ---- */

/* Each mremap of a mapping of which a part is watched does what it does without us. */
static void mremap_partly_watched(void)
{
	static const struct {
		size_t first, pages;
	} parts[] = {{0, 256}, {0, 128}, {10, 20}, {255, 1}};
	static const struct {
		size_t from, to;
		int flags;
		bool changes; /* all of the region's pages */
	} moves[] = {{256, 64, 0, false},
		     {256, 512, 0, false},
		     {256, 512, MREMAP_MAYMOVE, false},
		     {256, 256, MREMAP_MAYMOVE | 4 /* MREMAP_DONTUNMAP */, true},
		     {256, 256, MREMAP_MAYMOVE | MREMAP_FIXED, true}};
	struct notifier n = opened();

	for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
		for (size_t k = 0; k < sizeof moves / sizeof *moves; k++)
			for (int touched = 0; touched < 2; touched++) {
				uint8_t *memory = map_alone(256 * PAGE), *target = map_alone(512 * PAGE), *to, *before;
				struct umn_region *region = watch(&n, memory + parts[i].first * PAGE, parts[i].pages * PAGE);

				if (touched)
					memset(memory, 7, 256 * PAGE);
				to = mremap(memory, moves[k].from * PAGE, moves[k].to * PAGE, moves[k].flags, target);
				check(to != MAP_FAILED);
				check(!touched || (to[0] == 7 && to[60 * PAGE] == 7));
				check(umn_region_valid(region) ==
				      !(moves[k].changes || to != memory || parts[i].first + parts[i].pages > moves[k].to));
				/* And on: of what was moved and has grown, too. */
				before = to;
				to = mremap(to, moves[k].to * PAGE, 700 * PAGE, MREMAP_MAYMOVE);
				check(to != MAP_FAILED && (to == before || !umn_region_valid(region)));
				to = mremap(to, 700 * PAGE, 100 * PAGE, 0);
				check(to != MAP_FAILED);
				umn_table_unwatch(n.table, region);
				to = mremap(to, 100 * PAGE, 300 * PAGE, MREMAP_MAYMOVE);
				check(to != MAP_FAILED && !munmap(to, 300 * PAGE));
			}
	close_notifier(&n);
}

/* What malloc does: the chunk's mapping is moved as it grows, with regions in it. */
static void realloc_watched(void)
{
	struct notifier n = opened();
	struct umn_region *region, *kept;
	uint8_t *memory, *before;
	uint32_t moved = 0;

	for (int round = 0; round < 50; round++) {
		size_t length = 200000;

		memory = malloc(length);
		kept = watch(&n, memory + 5000, 100);
		for (; length < 40000000; length = length * 3 / 2) {
			memset(memory, round, length);
			region = watch(&n, memory + length / 3, length / 5);
			before = memory;
			memory = realloc(memory, length * 3 / 2);
			check(memory && memory[0] == round && memory[length - 1] == round);
			moved += memory != before;
			check(memory == before || (!umn_region_valid(region) && !umn_region_valid(kept)));
			umn_table_unwatch(n.table, region);
		}
		free(memory);
		check(!umn_region_valid(kept));
		umn_table_unwatch(n.table, kept);
	}
	check(moved);
	close_notifier(&n);
}

/* No mapping is split while it is watched, nor after. */
static void mappings_heal(void)
{
	struct notifier n = opened();
	struct umn_region *regions[500];
	int before, watched;

	for (int touched = 0; touched < 3; touched++) {
		uint8_t *memory = map_alone(1024 * PAGE);

		if (touched == 1)
			memset(memory, 1, 1024 * PAGE);
		regions[0] = watch(&n, memory, PAGE); /* the reader, too, has mappings */
		umn_table_unwatch(n.table, regions[0]);
		before = count_mappings();
		for (int i = 0; i < 500; i++)
			regions[i] = watch(&n, memory + 2 * i * PAGE, PAGE);
		watched = count_mappings();
		check(watched < before + 10);
		if (touched == 2)
			memset(memory, 1, 1024 * PAGE);
		madvise(memory + 8 * PAGE, PAGE, MADV_DONTNEED);
		for (int i = 0; i < 500; i++)
			check(umn_region_valid(regions[i]) == (i != 4));
		for (int i = 0; i < 500; i++)
			umn_table_unwatch(n.table, regions[(i * 7) % 500]);
		check(count_mappings() == before && !count_registered());
		munmap(memory, 1024 * PAGE);
	}
	close_notifier(&n);
}

/* A mapping that was moved is unregistered while others are watched. */
static void moved_heals(void)
{
	struct notifier n = opened();
	uint8_t *memory = map_alone(16 * PAGE), *room = map_alone(64 * PAGE);
	struct umn_region *other = watch(&n, map_alone(PAGE), PAGE), *region;

	region = watch(&n, memory + PAGE, PAGE);
	check(mremap(memory, 16 * PAGE, 32 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, room) == room);
	check(!umn_region_valid(region));
	umn_table_unwatch(n.table, region);
	check(count_registered() == 2); /* the other one's and the bell */
	munmap(room, 64 * PAGE);
	check(umn_region_valid(other));
	umn_table_unwatch(n.table, other);
	close_notifier(&n);
}

static void locked_memory(void)
{
	struct notifier n = opened();
	uint8_t *memory = map(4 * PAGE);
	struct umn_region *region = watch(&n, memory, PAGE);

	check(!mlockall(MCL_CURRENT | MCL_FUTURE));
	check_sees(&n);
	check(umn_uffd_wake_fd(n.uffd) >= 0);
	munmap(memory, PAGE);
	check(!umn_region_valid(region));
	umn_table_unwatch(n.table, region);
	check_sees(&n);
	close_notifier(&n);
	n = opened();
	check_sees(&n);
	close_notifier(&n);
}

/* ---- Limits ---- */

static void check_fails(enum umn_uffd_step step, int error)
{
	struct umn_uffd_failure failure = {0};
	struct notifier n;

	check(!open_notifier(&n, &failure));
	if (failure.step != step || failure.error != error)
		fprintf(stderr, "step %d, %s\n", failure.step, strerror(failure.error));
	check(failure.step == step && failure.error == error);
}

/* The notifier is there already: watching fails, and works again afterwards. */
static void check_start_fails(struct notifier *n, enum umn_uffd_step step, int error)
{
	struct umn_uffd_failure failure;
	struct umn_region *region;
	uint8_t *memory = map(PAGE);

	check(try_watch(n, memory, PAGE, &region) == UMN_UFFD_START);
	umn_uffd_start_failure(&failure);
	if (failure.step != step || failure.error != error)
		fprintf(stderr, "step %d, %s\n", failure.step, strerror(failure.error));
	check(failure.step == step && failure.error == error);
	munmap(memory, PAGE);
}

static void become_nobody(void)
{
	check(!setgid(65534) && !setuid(65534));
}

static void no_address_space(void)
{
	struct notifier n = opened();
	struct rlimit limit = {0}, before;

	getrlimit(RLIMIT_AS, &before);
	limit = before;
	limit.rlim_cur = 20 << 20;
	check_sees(&n);
	uint8_t *ballast = map(16 << 20);
	check(!setrlimit(RLIMIT_AS, &limit));
	while (mmap(NULL, 16 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) != MAP_FAILED)
		;
	munmap(ballast, PAGE);
	check_start_fails(&n, UMN_UFFD_MEMORY, ENOMEM);
	check(!setrlimit(RLIMIT_AS, &before));
	check_sees(&n);
	close_notifier(&n);
}

static void no_locked_memory(void)
{
	struct rlimit limit = {.rlim_cur = 256 << 10, .rlim_max = 256 << 10};

	check(!setrlimit(RLIMIT_MEMLOCK, &limit));
	become_nobody();
	check(!mlockall(MCL_FUTURE));
	check_fails(UMN_UFFD_MEMORY, EAGAIN);
}

static void no_threads(void)
{
	struct rlimit limit = {.rlim_cur = 1, .rlim_max = 1};

	check(!setrlimit(RLIMIT_NPROC, &limit));
	become_nobody();
	check_fails(UMN_UFFD_THREAD, EAGAIN);
}

static void dropped_privileges(void)
{
	struct notifier n = opened();
	uint8_t *memory = map_alone(16 * PAGE), *moved;
	struct umn_region *region;
	pid_t child;

	become_nobody();
	check_sees(&n);
	region = watch(&n, memory + 3 * PAGE, PAGE);
	moved = mremap(memory, 16 * PAGE, 200 * PAGE, MREMAP_MAYMOVE);
	check(moved != MAP_FAILED && moved != memory && !umn_region_valid(region));
	check(umn_uffd_wake_fd(n.uffd) >= 0);
	child = clone_sleeper();
	umn_table_unwatch(n.table, region);
	munmap(moved, 200 * PAGE);
	close_notifier(&n);
	end_child(child);
}

static void refuse(int number, int error)
{
	struct sock_filter filter[] = {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
				       BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)number, 0, 1),
				       BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (uint32_t)error),
				       BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
	struct sock_fprog program = {.len = sizeof filter / sizeof *filter, .filter = filter};

	check(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) && !prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program));
}

static void no_clone3(void)
{
	struct notifier n;

	refuse(SYS_clone3, ENOSYS);
	n = opened();
	check_sees(&n);
	close_notifier(&n);
}

/* In a process of its own: glibc remembers that there is no clone3. */
static void clone3_forbidden(void)
{
	struct notifier n = opened();

	refuse(SYS_clone3, EPERM);
	refuse(SYS_clone, EPERM); /* by which older versions make threads on arm64 */
	check_start_fails(&n, UMN_UFFD_THREAD, EPERM);
}

static void no_ioctl(void)
{
	refuse(SYS_ioctl, EPERM);
	check_fails(UMN_UFFD_IOCTL, EPERM);
}

static void no_userfaultfd(void)
{
	struct umn_uffd_failure failure;
	struct notifier n;

	refuse(SYS_userfaultfd, ENOSYS);
	become_nobody();
	check(!open_notifier(&n, &failure));
	check(failure.step == UMN_UFFD_OPEN && failure.error == ENOSYS && failure.device_error);
}

/* The reader shares the program's descriptor table: what is closed makes everything invalid. */
static void check_shared_table(int number)
{
	struct umn_region *region;
	struct notifier n;
	uint8_t *memory = map(4 * PAGE);

	refuse(number, EPERM);
	n = opened();
	check_sees(&n);
	check(umn_uffd_wake_fd(n.uffd) >= 0);
	woken();
	region = watch(&n, memory, PAGE);
	closefrom(3);
	check(!umn_region_valid(region));
	munmap(memory, 4 * PAGE);
	check(!umn_region_valid(region));
	check(umn_table_renew(n.table, region) == UMN_UFFD_CLOSED && umn_uffd_is_broken(n.uffd));
	close_notifier(&n);
	n = opened();
	check_sees(&n);
	close_notifier(&n);
}

static void no_pidfd_getfd(void)
{
	check_shared_table(SYS_pidfd_getfd);
}

static void no_close_range(void)
{
	check_shared_table(SYS_close_range);
}

/* Ordinary memory is watched all the same, of whatever mappings; holes and files are refused. */
static void no_proc(void)
{
	struct notifier n;
	struct umn_region *region;
	uint8_t *memory = map_alone(16 * PAGE), *shared;

	if (unshare(CLONE_NEWNS) || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL)) {
		printf("mounts cannot be changed here\n");
		return;
	}
	check(!umount2("/proc", MNT_DETACH) && access("/proc/self", F_OK));
	n = opened();
	check_sees(&n);
	memset(memory, 1, 16 * PAGE);
	check(!mprotect(memory + 3 * PAGE, PAGE, PROT_READ) && !mprotect(memory + 10 * PAGE, 2 * PAGE, PROT_READ));
	region = watch(&n, memory, 16 * PAGE);
	madvise(memory + 15 * PAGE, PAGE, MADV_DONTNEED);
	check(!umn_region_valid(region));
	umn_table_unwatch(n.table, region);
	munmap(memory + 9 * PAGE, PAGE);
	check(try_watch(&n, memory, 16 * PAGE, &region));
	shared = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	check(try_watch(&n, shared, PAGE, &region) == UMN_UFFD_KIND);
	check_sees(&n);
	close_notifier(&n);
	munmap(memory, 16 * PAGE);
}

static const struct {
	const char *group, *name;
	void (*run)(void);
} cases[] = {
	{"closed", "all", closed_all},
	{"closed", "then watched", closed_then_watched},
	{"closed", "then unwatched", closed_then_unwatched},
	{"closed", "reused", closed_and_reused},
	{"closed", "reused by a userfaultfd", closed_and_reused_by_userfaultfd},
	{"closed", "idle", closed_while_idle},
	{"closed", "while asked", closed_while_asked},
	{"closed", "woken", woken},
	{"clone", "outlives", clone_outlives},
	{"clone", "outlives moves", clone_outlives_moves},
	{"clone", "begins anew", clone_begins_anew},
	{"mappings", "mremap", mremap_partly_watched},
	{"mappings", "realloc", realloc_watched},
	{"mappings", "heal", mappings_heal},
	{"mappings", "moved", moved_heals},
	{"mappings", "locked", locked_memory},
	{"limits", "RLIMIT_AS", no_address_space},
	{"limits", "RLIMIT_MEMLOCK", no_locked_memory},
	{"limits", "RLIMIT_NPROC", no_threads},
	{"limits", "setuid", dropped_privileges},
	{"limits", "clone3", no_clone3},
	{"limits", "clone3 forbidden", clone3_forbidden},
	{"limits", "ioctl", no_ioctl},
	{"limits", "userfaultfd", no_userfaultfd},
	{"limits", "pidfd_getfd", no_pidfd_getfd},
	{"limits", "close_range", no_close_range},
	{"limits", "/proc", no_proc},
};

int main(int argc, char **argv)
{
	int status, failed = 0, run = 0;
	pid_t child;

	setvbuf(stdout, NULL, _IONBF, 0);
	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
		if (argc < 2 || strcmp(argv[1], cases[i].group) || (argc > 2 && strcmp(argv[2], cases[i].name)))
			continue;
		run++;
		child = fork();
		if (!child) {
			alarm(SECONDS);
			cases[i].run();
			exit(0);
		}
		check(waitpid(child, &status, 0) == child);
		if (WIFEXITED(status) && WEXITSTATUS(status) == 77)
			return 77;
		printf("%s, %s: %s\n", cases[i].group, cases[i].name, !status ? "works" : strsignal(WTERMSIG(status)));
		failed |= status;
	}
	return failed || !run;
}
