/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Two MPI ranks that exchange messages from and into memory that they change all the time: how many arrive wrong? Every byte is checked.
 *
 *	mpiexec -n 2 mpi send|window LENGTH MESSAGES [THREADS]
 *
 * send: messages there and back. window: a window on changed memory; the other rank puts into it from changed memory, and gets
 * from it. An MPI library over RDMA finds its registrations of this memory by the address: a stale one sends what was there, or
 * receives into pages that are mapped no more. Exits with 1 if any message was wrong. Each thread has memory and messages of its own.
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
enum { SLOTS = 4, MOST_THREADS = 16 };

struct thread {
	pthread_t id;
	int number;
	unsigned int shared, own; /* seeds: what both ranks know, and what is this rank's */
	char *slots[KINDS][USES][SLOTS];
	long wrong[KINDS], checked[KINDS];
};

static size_t length;
static long rounds;
static int rank;
static struct thread threads[MOST_THREADS];

static char *map(char *address, int flags)
{
	void *mapped =
		(void *)syscall(SYS_mmap, address, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);

	return mapped == MAP_FAILED ? NULL : mapped;
}

static char *make(enum kind kind)
{
	char *room;

	if (kind == FREE)
		return malloc(length);
	/* With room around it, so that no registration reaches into another's. */
	room = mmap(NULL, 3 * length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(room != MAP_FAILED);
	return map(room + length, MAP_FIXED);
}

static void change(enum kind kind, char **slot)
{
	char *other;

	switch (kind) {
	case FREE:
		free(*slot);
		*slot = malloc(length);
		break;
	case MUNMAP:
		CHECK(!syscall(SYS_munmap, *slot, length));
		*slot = map(*slot, MAP_FIXED_NOREPLACE);
		if (!*slot) /* another thread has got it */
			*slot = make(kind);
		break;
	case MADVISE:
		CHECK(!syscall(SYS_madvise, *slot, length, MADV_DONTNEED));
		break;
	case MREMAP:
		other = map(NULL, 0);
		CHECK(other);
		*other = 1;
		CHECK((char *)syscall(SYS_mremap, other, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, *slot) == *slot);
		break;
	case MMAP:
		CHECK(map(*slot, MAP_FIXED));
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
static char *choose(struct thread *t, enum kind kind, enum use use)
{
	char **slot = &t->slots[kind][use][rand_r(&t->own) % SLOTS];

	if (rand_r(&t->own) % 2)
		change(kind, slot);
	return *slot;
}

static void check(struct thread *t, enum kind kind, const char *slot, long message)
{
	t->wrong[kind] += !is_right(slot, message);
	t->checked[kind]++;
}

static void send_and_receive(struct thread *t, long message, enum kind kind)
{
	char *slot = choose(t, kind, ORIGIN);

	for (int from = 0; from < 2; from++) {
		if (from == rank) {
			fill(slot, message);
			DO(MPI_Send(slot, (int)length, MPI_BYTE, !rank, t->number, MPI_COMM_WORLD));
		} else {
			fill(slot, -1);
			DO(MPI_Recv(slot, (int)length, MPI_BYTE, from, t->number, MPI_COMM_WORLD, MPI_STATUS_IGNORE));
			check(t, kind, slot, message);
		}
		slot = choose(t, kind, ORIGIN);
	}
}

/* Both ranks do it at once. */
static void put_and_get(struct thread *t, long message, enum kind kind)
{
	char *target = choose(t, kind, TARGET), *slot;
	MPI_Win window;

	fill(target, -1);
	DO(MPI_Win_create(target, (MPI_Aint)length, 1, MPI_INFO_NULL, MPI_COMM_WORLD, &window));
	DO(MPI_Win_fence(0, window));
	slot = choose(t, kind, ORIGIN);
	fill(slot, message);
	DO(MPI_Put(slot, (int)length, MPI_BYTE, !rank, 0, (int)length, MPI_BYTE, window));
	DO(MPI_Win_fence(0, window));
	check(t, kind, target, message);
	slot = choose(t, kind, ORIGIN);
	fill(slot, -1);
	DO(MPI_Get(slot, (int)length, MPI_BYTE, !rank, 0, (int)length, MPI_BYTE, window));
	DO(MPI_Win_fence(0, window));
	check(t, kind, slot, message);
	DO(MPI_Win_free(&window));
}

static void (*transfer)(struct thread *t, long message, enum kind kind);

static void *work(void *argument)
{
	struct thread *t = argument;

	for (enum kind kind = 0; kind < KINDS; kind++)
		for (int i = 0; i < 2 * SLOTS; i++)
			t->slots[kind][i / SLOTS][i % SLOTS] = make(kind);
	for (long message = 1; message <= rounds; message++)
		transfer(t, message, (enum kind)(rand_r(&t->shared) % KINDS));
	return NULL;
}

int main(int argc, char **argv)
{
	long sum[2][KINDS] = {0}, all[2][KINDS], wrong = 0;
	int provided, size, count = argc > 4 ? atoi(argv[4]) : 1;

	DO(MPI_Init_thread(&argc, &argv, count > 1 ? MPI_THREAD_MULTIPLE : MPI_THREAD_SINGLE, &provided));
	DO(MPI_Comm_rank(MPI_COMM_WORLD, &rank));
	DO(MPI_Comm_size(MPI_COMM_WORLD, &size));
	CHECK(argc >= 4 && size == 2 && count <= MOST_THREADS && (count == 1 || provided == MPI_THREAD_MULTIPLE));
	transfer = strcmp(argv[1], "window") != 0 ? send_and_receive : put_and_get;
	length = strtoul(argv[2], NULL, 10);
	rounds = strtol(argv[3], NULL, 10) / count / (transfer == put_and_get ? 4 : 2); /* what both check in one */
	mallopt(M_MMAP_THRESHOLD, 4096);						/* so free unmaps */
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
	fflush(stdout);
	DO(MPI_Finalize());
	return wrong > 0;
}
