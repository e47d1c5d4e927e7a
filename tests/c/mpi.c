/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Two MPI ranks that exchange messages from and into memory that they change all the time: how many arrive wrong? Every byte is checked.
 *
 *	mpiexec -n 2 mpi send|window LENGTH MESSAGES [THREADS]
 *
 * send: messages in both directions at once. window: a window on changed memory; the other rank puts into it from changed memory, and
 * gets from it. An MPI library over RDMA finds its registrations of this memory by the address: a stale one sends what was there, or
 * receives into pages that are mapped no more. Several messages are under way at a time, and memory is changed meanwhile: not theirs.
 * Exits with 1 if any message was wrong. Each thread has memory and messages of its own.
 */
#define _GNU_SOURCE
#include <malloc.h>
#include <mpi.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define CHECK(condition)                                                                                                           \
	do                                                                                                                         \
		if (!(condition)) {                                                                                                \
			fprintf(stderr, "%s:%d: %s: %m\n", __FILE__, __LINE__, #condition);                                        \
			MPI_Abort(MPI_COMM_WORLD, 2);                                                                              \
		}                                                                                                                  \
	while (0)

#define DO(call) CHECK((call) == MPI_SUCCESS)

/* All but the first two by system calls, as allocators other than libc's do. */
enum kind { NOTHING, FREE, MUNMAP, MADVISE, MREMAP, MMAP, KINDS };
static const char *const names[KINDS] = {"nothing", "free", "munmap", "madvise", "mremap", "mmap"};

enum use { ORIGIN, TARGET, USES };
enum { SLOTS = 8, AT_A_TIME = KINDS * SLOTS, MOST_THREADS = 16 };

struct thread {
	pthread_t id;
	int number;
	unsigned int shared, own;	 /* seeds: what both ranks know, and what is this rank's */
	char *slots[KINDS][USES][SLOTS]; /* each for one message at a time */
	char *windows[KINDS];		 /* each for SLOTS messages */
	long wrong[KINDS], checked[KINDS];
};

static size_t length;
static long rounds;
static int rank;
static struct thread threads[MOST_THREADS];

static char *map(char *address, size_t size, int flags)
{
	void *mapped = (void *)syscall(SYS_mmap, address, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);

	return mapped == MAP_FAILED ? NULL : mapped;
}

static char *make(enum kind kind, size_t size)
{
	char *room;

	if (kind == FREE)
		return malloc(size);
	/* With room around it, so that no registration reaches into another's. */
	room = mmap(NULL, 3 * size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(room != MAP_FAILED);
	return map(room + size, size, MAP_FIXED);
}

static void change(enum kind kind, char **slot, size_t size)
{
	char *other;

	switch (kind) {
	case FREE:
		free(*slot);
		*slot = malloc(size);
		break;
	case MUNMAP:
		CHECK(!syscall(SYS_munmap, *slot, size));
		*slot = map(*slot, size, MAP_FIXED_NOREPLACE);
		if (!*slot) /* another thread has got it */
			*slot = make(kind, size);
		break;
	case MADVISE:
		CHECK(!syscall(SYS_madvise, *slot, size, MADV_DONTNEED));
		break;
	case MREMAP:
		other = map(NULL, size, 0);
		CHECK(other);
		*other = 1;
		CHECK((char *)syscall(SYS_mremap, other, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, *slot) == *slot);
		break;
	case MMAP:
		CHECK(map(*slot, size, MAP_FIXED));
		break;
	default:
		break;
	}
	CHECK(*slot);
}

static uint64_t word(long message, size_t i)
{
	return ((uint64_t)message << 32 | i) * UINT64_C(0x9e3779b97f4a7c15);
}

static void fill(char *slot, long message)
{
	for (size_t i = 0; i < length / sizeof(uint64_t); i++)
		((uint64_t *)slot)[i] = word(message, i);
}

static bool is_right(const char *slot, long message)
{
	for (size_t i = 0; i < length / sizeof(uint64_t); i++)
		if (((const uint64_t *)slot)[i] != word(message, i))
			return false;
	return true;
}

/* Half of the time it is as it was, so that what is cached is used. */
static char *choose(struct thread *t, enum kind kind, char **slot, size_t size)
{
	if (rand_r(&t->own) % 2)
		change(kind, slot, size);
	return *slot;
}

static char *filled(struct thread *t, enum kind kind, enum use use, int i, long message)
{
	char *slot = choose(t, kind, &t->slots[kind][use][i], length);

	fill(slot, message);
	return slot;
}

static void check(struct thread *t, enum kind kind, const char *slot, long message)
{
	t->wrong[kind] += !is_right(slot, message);
	t->checked[kind]++;
}

/* The messages of a rank have numbers of their own. */
static long numbered(long message, int from)
{
	return 2 * message + from;
}

/* How many of the messages that are left. */
static long send_and_receive(struct thread *t, long left)
{
	MPI_Request requests[2 * AT_A_TIME];
	MPI_Status statuses[2 * AT_A_TIME];
	int order[AT_A_TIME], count = left < AT_A_TIME ? (int)left : AT_A_TIME;

	for (int i = 0, j; i < AT_A_TIME; i++) { /* the same for both ranks */
		j = rand_r(&t->shared) % (i + 1);
		order[i] = order[j];
		order[j] = i;
	}
	for (int i = 0; i < count; i++) {
		enum kind kind = (enum kind)(order[i] / SLOTS);
		int slot = order[i] % SLOTS;

		DO(MPI_Irecv(filled(t, kind, TARGET, slot, -1), (int)length, MPI_BYTE, !rank, t->number, MPI_COMM_WORLD,
			     &requests[2 * i]));
		DO(MPI_Isend(filled(t, kind, ORIGIN, slot, numbered(left - i, rank)), (int)length, MPI_BYTE, !rank, t->number,
			     MPI_COMM_WORLD, &requests[2 * i + 1]));
	}
	DO(MPI_Waitall(2 * count, requests, statuses));
	for (int i = 0; i < count; i++) {
		enum kind kind = (enum kind)(order[i] / SLOTS);

		check(t, kind, t->slots[kind][TARGET][order[i] % SLOTS], numbered(left - i, !rank));
	}
	return count;
}

static long put_and_get(struct thread *t, long left)
{
	enum kind kind = (enum kind)(left / SLOTS % KINDS);
	int count = left < SLOTS ? (int)left : SLOTS;
	size_t size = SLOTS * length;
	char *target = choose(t, kind, &t->windows[kind], size);
	MPI_Win window;

	for (int i = 0; i < count; i++)
		fill(target + (size_t)i * length, -1);
	DO(MPI_Win_create(target, (MPI_Aint)size, (int)length, MPI_INFO_NULL, MPI_COMM_WORLD, &window));
	DO(MPI_Win_fence(0, window));
	for (int i = 0; i < count; i++)
		DO(MPI_Put(filled(t, kind, ORIGIN, i, numbered(left - i, rank)), (int)length, MPI_BYTE, !rank, i, (int)length,
			   MPI_BYTE, window));
	DO(MPI_Win_fence(0, window));
	for (int i = 0; i < count; i++)
		check(t, kind, target + (size_t)i * length, numbered(left - i, !rank));
	for (int i = 0; i < count; i++)
		DO(MPI_Get(filled(t, kind, TARGET, i, -1), (int)length, MPI_BYTE, !rank, i, (int)length, MPI_BYTE, window));
	DO(MPI_Win_fence(0, window));
	/* What this rank has put there. */
	for (int i = 0; i < count; i++)
		check(t, kind, t->slots[kind][TARGET][i], numbered(left - i, rank));
	DO(MPI_Win_free(&window));
	return count;
}

static long (*transfer)(struct thread *t, long left);

static void *work(void *argument)
{
	struct thread *t = argument;

	for (enum kind kind = 0; kind < KINDS; kind++) {
		for (int i = 0; i < USES * SLOTS; i++)
			t->slots[kind][i / SLOTS][i % SLOTS] = make(kind, length);
		t->windows[kind] = make(kind, SLOTS * length);
	}
	for (long left = rounds; left;)
		left -= transfer(t, left);
	return NULL;
}

int main(int argc, char **argv)
{
	long sum[2][KINDS] = {0}, all[2][KINDS], wrong = 0;
	double started;
	int provided, size, count = argc > 4 ? atoi(argv[4]) : 1;

	DO(MPI_Init_thread(&argc, &argv, count > 1 ? MPI_THREAD_MULTIPLE : MPI_THREAD_SINGLE, &provided));
	DO(MPI_Comm_rank(MPI_COMM_WORLD, &rank));
	DO(MPI_Comm_size(MPI_COMM_WORLD, &size));
	CHECK(argc >= 4 && size == 2 && count <= MOST_THREADS && (count == 1 || provided == MPI_THREAD_MULTIPLE));
	transfer = strcmp(argv[1], "window") != 0 ? send_and_receive : put_and_get;
	length = strtoul(argv[2], NULL, 10);
	rounds = strtol(argv[3], NULL, 10) / count / (transfer == put_and_get ? 4 : 2); /* what both check in one */
	mallopt(M_MMAP_THRESHOLD, 4096);						/* so free unmaps */
	started = MPI_Wtime();
	for (int i = 0; i < count; i++) {
		threads[i] = (struct thread){.number = i, .shared = (unsigned int)i, .own = (unsigned int)(2 * i + rank)};
		if (count == 1)
			work(&threads[i]);
		else
			CHECK(!pthread_create(&threads[i].id, NULL, work, &threads[i]));
	}
	for (int i = 0; i < count; i++) {
		CHECK(count == 1 || !pthread_join(threads[i].id, NULL));
		for (int kind = 0; kind < KINDS; kind++) {
			sum[0][kind] += threads[i].wrong[kind];
			sum[1][kind] += threads[i].checked[kind];
		}
	}
	DO(MPI_Allreduce(sum, all, 2 * KINDS, MPI_LONG, MPI_SUM, MPI_COMM_WORLD));
	for (int kind = 0; kind < KINDS; kind++) {
		if (!rank)
			printf("%s: %ld of %ld wrong\n", names[kind], all[0][kind], all[1][kind]);
		wrong += all[0][kind];
	}
	if (!rank)
		printf("in %.1f s\n", MPI_Wtime() - started);
	fflush(stdout);
	DO(MPI_Finalize());
	return wrong > 0;
}
