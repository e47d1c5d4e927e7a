/* SPDX-License-Identifier: BSD-3-Clause */
/* Programs for `ummunotify audit`: audit MODE. Most pin a page with io_uring, by the bare system calls. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/io_uring.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE ((size_t)sysconf(_SC_PAGESIZE))
#define LARGE ((size_t)4 << 20) /* malloc maps it by itself */

static void check(bool fine, const char *what)
{
	if (!fine) {
		perror(what);
		exit(3);
	}
}
#define CHECK(condition) check(condition, #condition)

/* ---- io_uring ---- */

static struct {
	int fd;
	char *rings;
	struct io_uring_sqe *sqes;
	struct io_uring_params parameters;
} ring;

static void open_ring(void)
{
	size_t size;

	memset(&ring, 0, sizeof ring);
	ring.fd = (int)syscall(SYS_io_uring_setup, 4, &ring.parameters);
	CHECK(ring.fd >= 0);
	size = ring.parameters.sq_off.array + 4 * sizeof(uint32_t);
	if (ring.parameters.cq_off.cqes + 8 * sizeof(struct io_uring_cqe) > size)
		size = ring.parameters.cq_off.cqes + 8 * sizeof(struct io_uring_cqe);
	ring.rings = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, ring.fd, IORING_OFF_SQ_RING);
	CHECK(ring.rings != MAP_FAILED);
	ring.sqes = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, ring.fd, IORING_OFF_SQES);
	CHECK(ring.sqes != MAP_FAILED);
}

static __attribute__((noinline)) void pin_buffer(void *buffer, size_t length)
{
	struct iovec piece = {buffer, length};

	CHECK(!syscall(SYS_io_uring_register, ring.fd, IORING_REGISTER_BUFFERS, &piece, 1));
}

static void unpin_buffer(void)
{
	CHECK(!syscall(SYS_io_uring_register, ring.fd, IORING_UNREGISTER_BUFFERS, NULL, 0));
}

/* Reads from /dev/zero through the pin. */
static __attribute__((noinline)) void use_buffer(void *buffer, size_t length)
{
	unsigned int *tail = (unsigned int *)(ring.rings + ring.parameters.sq_off.tail);
	unsigned int mask = *(unsigned int *)(ring.rings + ring.parameters.sq_off.ring_mask), entry = *tail & mask;
	int zero = open("/dev/zero", O_RDONLY);

	ring.sqes[entry] = (struct io_uring_sqe){
		.opcode = IORING_OP_READ_FIXED, .fd = zero, .addr = (uint64_t)(uintptr_t)buffer, .len = (uint32_t)length};
	((unsigned int *)(ring.rings + ring.parameters.sq_off.array))[entry] = entry;
	__atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
	CHECK(syscall(SYS_io_uring_enter, ring.fd, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) == 1);
	close(zero);
}

static void *map(void *address, size_t length)
{
	void *memory =
		mmap(address, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | (address ? MAP_FIXED : 0), -1, 0);

	CHECK(memory != MAP_FAILED);
	memset(memory, 1, length);
	return memory;
}

/* The address of memory that is gone, as the address of what is there now. */
static void *again;

static __attribute__((noinline)) void free_buffer(void *buffer, size_t length)
{
	munmap(buffer, length);
}

static __attribute__((noinline)) void *thread_that_frees(void *buffer)
{
	pthread_setname_np(pthread_self(), "cleaner");
	free_buffer(buffer, PAGE);
	return NULL;
}

/* ---- Modes ---- */

static void stale(void)
{
	void *a = map(NULL, PAGE);

	open_ring();
	pin_buffer(a, PAGE);
	free_buffer(a, PAGE);
	again = map(a, PAGE);
	use_buffer(again, PAGE);
	unpin_buffer();
}

static void kept(void)
{
	void *a = map(NULL, PAGE);

	open_ring();
	pin_buffer(a, PAGE);
	free_buffer(a, PAGE);
}

static void released(void)
{
	kept();
	unpin_buffer();
}

static void correct(void)
{
	open_ring();
	for (int i = 0; i < 100; i++) {
		void *a = map(NULL, PAGE);

		pin_buffer(a, PAGE);
		use_buffer(a, PAGE);
		unpin_buffer();
		free_buffer(a, PAGE);
	}
	/* What is near a pin may change. */
	char *three = map(NULL, 3 * PAGE);

	pin_buffer(three + PAGE, PAGE);
	munmap(three, PAGE);
	munmap(three + 2 * PAGE, PAGE);
	use_buffer(three + PAGE, PAGE);
	/* The ring goes before the buffer. */
	close(ring.fd);
	munmap(three + PAGE, PAGE);
}

/* By malloc's own call of munmap. */
static __attribute__((noinline)) void free_block(void *block)
{
	free(block);
}

static void freed(void)
{
	char *block = malloc(LARGE);

	memset(block, 1, LARGE);
	open_ring();
	pin_buffer(block, LARGE);
	free_block(block);
	map((char *)((uintptr_t)block & ~(PAGE - 1)), LARGE);
	use_buffer(block, PAGE);
}

static void by_thread(void)
{
	void *a = map(NULL, PAGE);
	pthread_t thread;

	open_ring();
	pin_buffer(a, PAGE);
	CHECK(!pthread_create(&thread, NULL, thread_that_frees, a));
	pthread_join(thread, NULL);
	map(a, PAGE);
	use_buffer(a, PAGE);
}

/* By a system call that libc's functions do not make. */
static void bare(void)
{
	void *a = map(NULL, PAGE);
	long result = SYS_munmap;

	open_ring();
	pin_buffer(a, PAGE);
#ifdef __x86_64__
	__asm__ volatile("syscall" : "+a"(result) : "D"(a), "S"(PAGE) : "rcx", "r11", "memory");
#else
	result = syscall(SYS_munmap, a, PAGE);
#endif
	CHECK(!result);
	free(malloc(100)); /* not this one's change */
	map(a, PAGE);
	use_buffer(a, PAGE);
}

/* In a forked child, with memory and a ring of its own; the parent's is pinned all the time. */
static void child(void)
{
	void *a = map(NULL, PAGE);
	pid_t pid;
	int status;

	open_ring();
	pin_buffer(a, PAGE);
	pid = fork();
	if (!pid) {
		free_buffer(a, PAGE); /* a copy */
		stale();
		exit(0);
	}
	CHECK(waitpid(pid, &status, 0) == pid && !status);
	use_buffer(a, PAGE);
	unpin_buffer();
}

static void wait_for_record(void)
{
	nanosleep(&(struct timespec){.tv_nsec = 500000000}, NULL);
}

/* The change is recorded by the thread that reads: no call comes after it. */
static void killed(void)
{
	kept();
	wait_for_record();
	raise(SIGKILL);
}

static void crash(void)
{
	stale();
	prctl(PR_SET_DUMPABLE, 0);
	raise(SIGSEGV);
}

static void many(void)
{
	enum { COUNT = 10000 };
	static struct iovec pieces[COUNT];
	char *memory = map(NULL, COUNT * PAGE);

	open_ring();
	for (size_t i = 0; i < COUNT; i++)
		pieces[i] = (struct iovec){memory + i * PAGE, PAGE};
	CHECK(!syscall(SYS_io_uring_register, ring.fd, IORING_REGISTER_BUFFERS, pieces, COUNT));
	free_buffer(memory + 10 * PAGE, 5 * PAGE);
	CHECK(munmap(memory + 9000 * PAGE, PAGE) == 0);
	unpin_buffer();
}

/* Each descriptor that the program did not open. */
static void descriptors(void)
{
	void *a = map(NULL, PAGE);

	open_ring();
	pin_buffer(a, PAGE);
	for (int fd = 3; fd < 256; fd++)
		if (fd != ring.fd)
			close(fd);
	for (int fd = 3; fd < 64; fd++)
		if (fd != ring.fd)
			dup2(ring.fd, fd);
	free_buffer(a, PAGE);
	map(a, PAGE);
	use_buffer(a, PAGE);
	wait_for_record();
}

static __attribute__((noinline)) void shrink(const char *path)
{
	CHECK(!truncate(path, 0));
}

/* Locked pages of a file that another process cuts. */
static void truncated(void)
{
	char path[] = "/dev/shm/ummunotify-audit-XXXXXX";
	int fd = mkstemp(path), status;
	void *memory;
	pid_t pid;

	CHECK(fd >= 0 && !ftruncate(fd, (off_t)PAGE));
	memory = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK(memory != MAP_FAILED && !mlock(memory, PAGE));
	pid = fork();
	if (!pid) {
		prctl(PR_SET_NAME, "cutter");
		shrink(path);
		wait_for_record(); /* to be named */
		_exit(0);
	}
	CHECK(waitpid(pid, &status, 0) == pid && !status);
	unlink(path);
}

static void executes(void)
{
	kept();
	wait_for_record();
	CHECK(!execl("/proc/self/exe", "audit", "nothing", (char *)NULL));
}

static bool end_of_looks;

/* Reads changes all the time, as each function does that may change memory. */
static void *looks(void *unused)
{
	while (!__atomic_load_n(&end_of_looks, __ATOMIC_RELAXED))
		madvise(NULL, 0, MADV_NORMAL);
	return unused;
}

/* The program has a virtual machine of its own beside the audit's. The kernel tells both of a change, and so BPF. It tells the newer
 * one first, which takes its time if it has the memory often: the audit may read the first report before the second comes. */
static void machine(void)
{
	enum { COPIES = 100, ROUNDS = 200 };
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC), own;
	void *a = map(NULL, PAGE);
	pthread_t thread;

	open_ring();
	pin_buffer(a, PAGE); /* now the audit has its machine */
	unpin_buffer();
	own = ioctl(kvm, KVM_CREATE_VM, 0);
	CHECK(kvm >= 0 && own >= 0);
	for (unsigned int i = 0; i < COPIES; i++) {
		struct kvm_userspace_memory_region copy = {
			.slot = i, .guest_phys_addr = 2 * i * PAGE, .memory_size = PAGE, .userspace_addr = (uintptr_t)a};

		CHECK(!ioctl(own, KVM_SET_USER_MEMORY_REGION, &copy));
	}
	CHECK(!pthread_create(&thread, NULL, looks, NULL));
	for (int i = 0; i < ROUNDS; i++) {
		pin_buffer(a, PAGE);
		free_buffer(a, PAGE);
		map(a, PAGE);
		map(a, PAGE); /* another change */
		unpin_buffer();
	}
	__atomic_store_n(&end_of_looks, true, __ATOMIC_RELAXED);
	pthread_join(thread, NULL);
}

/* ---- Programs that are right, if unusual: each ends as it does without the audit ---- */

static pthread_barrier_t barrier;
static bool went_on;

static void *cancelled_thread(void *buffer)
{
	pthread_barrier_wait(&barrier);
	pthread_barrier_wait(&barrier); /* it is cancelled now, and does not act upon that */
	free_buffer(buffer, PAGE);	/* nor here */
	went_on = true;
	pthread_testcancel();
	return NULL;
}

/* A thread that is to end frees memory first; munmap is no point where threads are cancelled. */
static void cancelled(void)
{
	void *a = map(NULL, PAGE), *result;
	pthread_t thread;

	open_ring();
	pin_buffer(a, PAGE);
	pthread_barrier_init(&barrier, NULL, 2);
	CHECK(!pthread_create(&thread, NULL, cancelled_thread, a));
	pthread_barrier_wait(&barrier);
	pthread_cancel(thread);
	pthread_barrier_wait(&barrier);
	CHECK(!pthread_join(thread, &result) && result == PTHREAD_CANCELED && went_on);
	unpin_buffer();
}

/* Which of io_uring's functions are there? Asked with addresses that the kernel refuses. */
static void asks(void)
{
	void *nowhere = mmap(NULL, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	open_ring();
	for (int opcode = 15; opcode <= 16; opcode++)
		CHECK(syscall(SYS_io_uring_register, ring.fd, opcode, NULL, 32) < 0);
	CHECK(syscall(SYS_io_uring_register, ring.fd, IORING_REGISTER_BUFFERS, nowhere, 1) < 0 && errno == EFAULT);
	CHECK(syscall(SYS_io_uring_register, ring.fd, IORING_REGISTER_BUFFERS, 8, 1) < 0 && errno == EFAULT);
}

/* A new ring has the number of an old one, which was closed by dup2. */
static void recycled(void)
{
	int zero = open("/dev/zero", O_RDONLY), number;
	void *a = map(NULL, PAGE);

	open_ring();
	number = ring.fd;
	pin_buffer(a, PAGE);
	CHECK(!munmap(ring.sqes, PAGE) && dup2(zero, number) == number);
	/* The old one's pages are given up by the kernel a little later, and none of them is `a`. */
	CHECK(!syscall(SYS_close, number));
	open_ring();
	CHECK(ring.fd == number);
	pin_buffer(a, PAGE);
	use_buffer(a, PAGE);
	free_buffer(a, PAGE);
	map(a, PAGE);
	use_buffer(a, PAGE);
	unpin_buffer();
}

/* A child that shares the memory, but not the descriptors, closes the ring. */
static void vforks(void)
{
	void *a = map(NULL, PAGE);
	int status;
	pid_t pid;

	open_ring();
	pin_buffer(a, PAGE);
	pid = vfork();
	if (!pid) {
		for (int fd = 3; fd < 64; fd++)
			close(fd);
		_exit(0);
	}
	CHECK(pid > 0 && waitpid(pid, &status, 0) == pid && !status);
	free_buffer(a, PAGE);
	map(a, PAGE);
	use_buffer(a, PAGE);
	unpin_buffer();
}

static void *volatile to_free;

static void free_it(int number)
{
	(void)number;
	free_buffer(to_free, PAGE);
}

/* A signal handler with a stack of 8 KiB, as SIGSTKSZ is, frees memory. */
static void handler(void)
{
	char *stack = mmap(NULL, 3 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	const stack_t alternative = {.ss_sp = stack + PAGE, .ss_size = 2 * PAGE};
	struct sigaction action = {.sa_handler = free_it, .sa_flags = SA_ONSTACK};

	to_free = map(NULL, PAGE);
	open_ring();
	pin_buffer(to_free, PAGE);
	CHECK(!mprotect(stack + PAGE, 2 * PAGE, PROT_READ | PROT_WRITE));
	CHECK(!sigaltstack(&alternative, NULL) && !sigaction(SIGUSR1, &action, NULL));
	raise(SIGUSR1);
	unpin_buffer();
}

/* A thread with the smallest stack there is frees memory. */
static void small_stack(void)
{
	pthread_attr_t attributes;
	pthread_t thread;
	void *a = map(NULL, PAGE);

	open_ring();
	pin_buffer(a, PAGE);
	pthread_attr_init(&attributes);
	CHECK(!pthread_attr_setstacksize(&attributes, PTHREAD_STACK_MIN));
	CHECK(!pthread_create(&thread, &attributes, thread_that_frees, a) && !pthread_join(thread, NULL));
	unpin_buffer();
}

/* The disk with the records is full. */
static void full(void)
{
	const char *directory = getenv("UMMUNOTIFY_AUDIT_DIRECTORY");
	static char path[4096], block[4096];
	int fd;

	if (directory) {
		snprintf(path, sizeof path, "%s/full", directory);
		fd = open(path, O_WRONLY | O_CREAT, 0600);
		CHECK(fd >= 0);
		for (int i = 0; i < 1000 && write(fd, block, sizeof block) > 0; i++)
			; /* of a small one: that is the caller's affair */
		close(fd);
	}
	open_ring();
	for (int i = 0; i < 50; i++) {
		void *a = map(NULL, PAGE);

		pin_buffer(a, PAGE);
		free_buffer(a, PAGE);
		unpin_buffer();
	}
}

static void end_it(int number)
{
	(void)number;
	exit(7);
}

/* A signal handler ends the program in the midst of what it does. */
static void ends(void)
{
	void *a = map(NULL, PAGE);
	struct timespec now;

	signal(SIGVTALRM, end_it);
	open_ring();
	pin_buffer(a, PAGE);
	clock_gettime(CLOCK_MONOTONIC, &now);
	CHECK(!setitimer(ITIMER_VIRTUAL, &(struct itimerval){.it_value.tv_usec = 1 + now.tv_nsec % 20000}, NULL));
	while (true) {
		free_buffer(a, PAGE);
		map(a, PAGE);
		unpin_buffer();
		pin_buffer(a, PAGE);
	}
}

static sigjmp_buf away;

static void jump(int number)
{
	(void)number;
	siglongjmp(away, 1);
}

/* A signal handler jumps out of whatever is being done, and the program goes on. */
static void jumps(void)
{
	void *a = map(NULL, PAGE);
	volatile int left = 200;

	signal(SIGVTALRM, jump);
	open_ring();
	while (left-- > 0) {
		if (!sigsetjmp(away, 1)) {
			CHECK(!setitimer(ITIMER_VIRTUAL, &(struct itimerval){.it_value.tv_usec = 1 + 37 * left % 3000}, NULL));
			while (true) {
				pin_buffer(a, PAGE);
				unpin_buffer();
			}
		}
		syscall(SYS_io_uring_register, ring.fd, IORING_UNREGISTER_BUFFERS, NULL, 0);
	}
	pin_buffer(a, PAGE);
	free_buffer(a, PAGE);
	map(a, PAGE);
	use_buffer(a, PAGE);
	unpin_buffer();
}

/* Maps and frees all the time, beside a pin; prints the ns of processor time that each round takes. */
static void rate(const char *how, long count)
{
	struct timespec from, to;
	void *pinned = map(NULL, PAGE);

	open_ring();
	pin_buffer(pinned, PAGE);
	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &from);
	for (long i = 0; i < count; i++) {
		if (!strcmp(how, "mmap")) {
			char *a = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

			*a = 1;
			munmap(a, 4 * PAGE);
		} else if (!strcmp(how, "pin")) {
			unpin_buffer();
			pin_buffer(pinned, PAGE);
		} else {
			char *volatile a = malloc(!strcmp(how, "small") ? 64 : LARGE);

			*a = 1;
			free(a);
		}
	}
	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &to);
	printf("%.1f\n", ((double)(to.tv_sec - from.tv_sec) * 1e9 + (double)(to.tv_nsec - from.tv_nsec)) / (double)count);
	unpin_buffer();
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		void (*run)(void);
	} modes[] = {{"stale", stale},	       {"kept", kept},	      {"released", released},	{"correct", correct},
		     {"freed", freed},	       {"thread", by_thread}, {"bare", bare},		{"child", child},
		     {"killed", killed},       {"crash", crash},      {"many", many},		{"descriptors", descriptors},
		     {"truncated", truncated}, {"exec", executes},    {"cancelled", cancelled}, {"asks", asks},
		     {"recycled", recycled},   {"vforks", vforks},    {"handler", handler},	{"small_stack", small_stack},
		     {"full", full},	       {"ends", ends},	      {"jumps", jumps},		{"machine", machine}};
	const char *mode = argc > 1 ? argv[1] : "";

	for (size_t i = 0; i < sizeof modes / sizeof *modes; i++)
		if (!strcmp(mode, modes[i].name)) {
			modes[i].run();
			return 7;
		}
	if (!strcmp(mode, "rate"))
		rate(argv[2], strtol(argv[3], NULL, 10));
	else
		CHECK(!strcmp(mode, "nothing"));
	return 0;
}
