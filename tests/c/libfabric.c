/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The monitor, imported into the real libfabric, but with this program in the part of libfabric's caches: it calls what they call, under
 * a lock that stands for theirs, and is told instead of them. tests/vm/test_libfabric_rdma.py has the caches themselves.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <sys/wait.h>

/* The monitor's own declarations, under other names, */
#define FI_CLASS_MEM_MONITOR OUR_CLASS
#define fid our_fid
#define fi_ops our_ops
#define fi_ops_mem_monitor our_ops_mem_monitor
#define fi_ops_mem_notify our_ops_mem_notify
#define fid_mem_monitor our_mem_monitor
#include "bridges/libfabric.h"
#undef FI_CLASS_MEM_MONITOR
#undef fid
#undef fi_ops
#undef fi_ops_mem_monitor
#undef fi_ops_mem_notify
#undef fid_mem_monitor
/* and libfabric's. */
#include <rdma/fi_ext.h>
#include <ummunotify.h>
#include <ummunotify_libfabric.h>

#include "check.h"

#define same(ours, theirs) _Static_assert((ours) == (theirs), #theirs)
#define same_member(ours, theirs, member) same(offsetof(struct ours, member), offsetof(struct theirs, member))
same((int)OUR_CLASS, (int)FI_CLASS_MEM_MONITOR);
same(sizeof(struct our_fid), sizeof(struct fid));
same_member(our_fid, fid, fclass);
same_member(our_fid, fid, context);
same_member(our_fid, fid, ops);
same(sizeof(struct our_ops), sizeof(struct fi_ops));
same_member(our_ops, fi_ops, close);
same_member(our_ops, fi_ops, bind);
same_member(our_ops, fi_ops, ops_set);
same(sizeof(struct our_ops_mem_monitor), sizeof(struct fi_ops_mem_monitor));
same_member(our_ops_mem_monitor, fi_ops_mem_monitor, start);
same_member(our_ops_mem_monitor, fi_ops_mem_monitor, stop);
same_member(our_ops_mem_monitor, fi_ops_mem_monitor, subscribe);
same_member(our_ops_mem_monitor, fi_ops_mem_monitor, unsubscribe);
same_member(our_ops_mem_monitor, fi_ops_mem_monitor, valid);
same(sizeof(struct our_ops_mem_notify), sizeof(struct fi_ops_mem_notify));
same_member(our_ops_mem_notify, fi_ops_mem_notify, notify);
same(sizeof(struct our_mem_monitor), sizeof(struct fid_mem_monitor));
same_member(our_mem_monitor, fid_mem_monitor, export_ops);
same_member(our_mem_monitor, fid_mem_monitor, import_ops);

static struct fid *fid;
static struct fid_mem_monitor *monitor;
static struct fi_ops_mem_monitor *ops;
static struct fi_ops_mem_notify *real_ops;
static pthread_mutex_t mm_lock = PTHREAD_MUTEX_INITIALIZER; /* libfabric's one lock of all caches */
static atomic_uint notices;
static const void *last;
static void (*drop)(const char *address, size_t length);
static void (*dropped)(void); /* called once, when libfabric's lock has been released */

static void notify(struct fid_mem_monitor *to, const void *address, size_t length)
{
	void (*then)(void);

	check(to == monitor);
	pthread_mutex_lock(&mm_lock);
	last = address;
	if (drop)
		drop((const char *)address, length);
	then = dropped;
	dropped = NULL;
	pthread_mutex_unlock(&mm_lock);
	if (then)
		then();
	notices++;
	real_ops->notify(to, address, length); /* there is no cache, but whoever calls this must not deadlock */
}

static struct fi_ops_mem_notify our_notify = {.size = sizeof our_notify, .notify = notify};

static void import(void)
{
	if (ummunotify_libfabric_import(&fid)) {
		fprintf(stderr, "%s\n", ummunotify_error());
		abort();
	}
	monitor = (struct fid_mem_monitor *)fid;
	ops = monitor->export_ops;
	real_ops = monitor->import_ops;
	monitor->import_ops = &our_notify;
	check(!ops->start(monitor));
}

static void end(void)
{
	ops->stop(monitor);
	check(!fi_close(fid));
}

static int subscribe(const void *address, size_t length)
{
	int error;

	pthread_mutex_lock(&mm_lock);
	error = ops->subscribe(monitor, address, length);
	pthread_mutex_unlock(&mm_lock);
	return error;
}

static void unsubscribe(const void *address, size_t length)
{
	pthread_mutex_lock(&mm_lock);
	ops->unsubscribe(monitor, address, length);
	pthread_mutex_unlock(&mm_lock);
}

static bool valid(const void *address, size_t length)
{
	bool result;

	pthread_mutex_lock(&mm_lock);
	result = ops->valid(monitor, address, length);
	pthread_mutex_unlock(&mm_lock);
	return result;
}

/* Returns when there have been that many; if they do not come, never. */
static void await(unsigned int count)
{
	while (notices < count)
		usleep(100);
}

/* The thread is done with an invalid range when it has forgotten it: then it can be subscribed to afresh. */
static void renew(const void *address, size_t length)
{
	for (;;) {
		check(!subscribe(address, length));
		if (valid(address, length))
			return;
		usleep(100);
	}
}

static void *replace(char *memory, size_t pages)
{
	check(!syscall(SYS_munmap, memory, pages * PAGE));
	return get_pages(pages, memory);
}

static void test_importing(void)
{
	struct fid *second;

	import();
	check(ummunotify_libfabric_import(&second) == -EBUSY);
	check(fi_close(fid) == -FI_EBUSY);
	end();
	import();
	end();
}

static void test_the_case(void)
{
	char *a = get_pages(2, NULL);
	unsigned int before;

	import();
	before = notices;
	check(!valid(a, 2 * PAGE));
	check(!subscribe(a, 2 * PAGE));
	check(valid(a, 2 * PAGE));
	check(replace(a, 2) == a);
	check(!valid(a, 2 * PAGE));
	await(before + 1);
	check(last == a && !valid(a, 2 * PAGE));
	renew(a, 2 * PAGE);
	madvise(a + PAGE, PAGE, MADV_DONTNEED);
	check(!valid(a, 2 * PAGE));
	end();
	munmap(a, 2 * PAGE);
}

static void test_unsubscribing(void)
{
	char *a = get_pages(1, NULL);
	unsigned int before;

	import();
	check(!subscribe(a, PAGE) && !subscribe(a, PAGE));
	unsubscribe(a, PAGE);
	check(valid(a, PAGE));
	unsubscribe(a, PAGE);
	check(!valid(a, PAGE));
	unsubscribe(a, PAGE);
	before = notices;
	replace(a, 1);
	renew(a, PAGE);
	check(notices == before);
	end();
	munmap(a, PAGE);
}

/* Memory is freed, and its registration joined by another, while the thread cannot get libfabric's lock. */
static void test_under_libfabrics_lock(void)
{
	char *a = get_pages(1, NULL);
	unsigned int before;

	import();
	check(!subscribe(a, PAGE));
	before = notices;
	pthread_mutex_lock(&mm_lock);
	replace(a, 1);
	check(!ops->valid(monitor, a, PAGE));
	usleep(20000); /* by now it waits, most likely */
	check(!ops->subscribe(monitor, a, PAGE));
	check(!ops->valid(monitor, a, PAGE));
	replace(a, 1); /* what joined is stale as well */
	check(!ops->valid(monitor, a, PAGE));
	pthread_mutex_unlock(&mm_lock);
	await(before + 1);
	check(!valid(a, PAGE));
	renew(a, PAGE);
	end();
	munmap(a, PAGE);
}

static char *joined;

static void join(void)
{
	check(!subscribe(joined, PAGE));
	replace(joined, 1);
}

/* A registration that came after `notify`, and is stale by the time that the range is forgotten. */
static void test_joining(void)
{
	unsigned int before;

	import();
	joined = get_pages(1, NULL);
	check(!subscribe(joined, PAGE));
	before = notices;
	pthread_mutex_lock(&mm_lock);
	dropped = join;
	replace(joined, 1); /* with the lock, or `join` could take the memory away while this still fills it */
	pthread_mutex_unlock(&mm_lock);
	await(before + 1);
	renew(joined, PAGE);
	check(notices >= before + 2);
	end();
	munmap(joined, PAGE);
}

/* As libfabric before 2.1: nobody unsubscribes. */
static void test_limit(void)
{
	enum { N = 20000 };
	char *memory = get_pages(N, NULL);
	unsigned int before, i, kept = 0;

	import();
	before = notices;
	for (i = 0; i < N; i++)
		check(!subscribe(memory + i * PAGE, PAGE));
	await(before + N - 16384);
	check(!valid(memory, PAGE)); /* the caches have been told */
	for (i = 0; i < N; i++)
		kept += valid(memory + i * PAGE, PAGE);
	check(kept == 16384);
	end();
	munmap(memory, N * PAGE);
}

static void test_what_uffd_cannot_watch(void)
{
	int fd = memfd_create("page", 0);
	struct ummunotify *umn;
	bool uffd;
	void *page;

	check(!ummunotify_open(&umn, NULL));
	uffd = !strcmp(ummunotify_source(umn), "uffd");
	ummunotify_close(umn);
	check(fd >= 0 && !ftruncate(fd, PAGE));
	page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	import();
	check(subscribe(page, PAGE) == (uffd ? -EOPNOTSUPP : 0) && valid(page, PAGE) == !uffd);
	check(!ftruncate(fd, 0) && !valid(page, PAGE));
	end();
	munmap(page, PAGE);
	close(fd);
}

static void test_fork(void)
{
	char *a = get_pages(1, NULL);
	int status, child;

	import();
	check(!subscribe(a, PAGE));
	child = fork();
	if (!child) {
		check(!valid(a, PAGE));
		subscribe(a, PAGE);
		check(!valid(a, PAGE) && subscribe(&status, sizeof status) < 0);
		ops->stop(monitor);
		check(!ops->start(monitor)); /* the first domain that the child opens */
		check(!subscribe(a, PAGE) && valid(a, PAGE));
		replace(a, 1);
		check(!valid(a, PAGE));
		renew(a, PAGE);
		exit(0);
	}
	check(waitpid(child, &status, 0) == child && status == 0);
	check(valid(a, PAGE));
	end();
	munmap(a, PAGE);
}

/* ---- Caches of several domains, and threads that free and register their own memory ---- */

enum { CACHES = 2, THREADS = 3, BUFFERS = 4, ROUNDS = 30000 };

static struct {
	char *memory;
	unsigned int version; /* how often its pages were replaced */
} buffers[THREADS * BUFFERS];
static struct {
	bool used;
	unsigned int version; /* which it has pinned */
} cached[CACHES][THREADS * BUFFERS];
static bool unsubscribes;
static atomic_uint hits;

/* mm_lock is held here and below. */
static void drop_entry(int cache, int i)
{
	cached[cache][i].used = false;
	if (unsubscribes)
		ops->unsubscribe(monitor, buffers[i].memory, PAGE);
}

static void drop_entries(const char *address, size_t length)
{
	for (int cache = 0; cache < CACHES; cache++)
		for (int i = 0; i < THREADS * BUFFERS; i++)
			if (cached[cache][i].used && buffers[i].memory < address + length && address < buffers[i].memory + PAGE)
				drop_entry(cache, i);
}

static void enroll(int cache, int i)
{
	unsigned int version;

	pthread_mutex_lock(&mm_lock);
	if (cached[cache][i].used && ops->valid(monitor, buffers[i].memory, PAGE)) {
		check(cached[cache][i].version == buffers[i].version); /* else it is a change that was missed */
		hits++;
		pthread_mutex_unlock(&mm_lock);
		return;
	}
	if (cached[cache][i].used)
		drop_entry(cache, i);
	pthread_mutex_unlock(&mm_lock);
	version = buffers[i].version; /* it pins */
	pthread_mutex_lock(&mm_lock);
	cached[cache][i].used = true;
	cached[cache][i].version = version;
	if (ops->subscribe(monitor, buffers[i].memory, PAGE))
		drop_entry(cache, i);
	pthread_mutex_unlock(&mm_lock);
}

static void *work(void *argument)
{
	int first = (int)(intptr_t)argument * BUFFERS, i;
	unsigned int seed = (unsigned int)first + 1;

	for (int round = 0; round < ROUNDS; round++) {
		i = first + rand_r(&seed) % BUFFERS;
		if (rand_r(&seed) % 4)
			enroll(rand_r(&seed) % CACHES, i);
		else {
			replace(buffers[i].memory, 1);
			buffers[i].version++;
		}
	}
	return NULL;
}

static void run_caches(void)
{
	pthread_t threads[THREADS];
	int i;

	import();
	drop = drop_entries;
	hits = 0;
	memset(cached, 0, sizeof cached);
	for (i = 0; i < THREADS * BUFFERS; i++)
		buffers[i].memory = get_pages(1, NULL);
	for (i = 0; i < THREADS; i++)
		check(!pthread_create(&threads[i], NULL, work, (void *)(intptr_t)i));
	for (i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	check(hits > 0);
	pthread_mutex_lock(&mm_lock);
	for (i = 0; i < THREADS * BUFFERS; i++)
		for (int cache = 0; cache < CACHES; cache++)
			cached[cache][i].used = false;
	pthread_mutex_unlock(&mm_lock);
	end();
	drop = NULL;
	for (i = 0; i < THREADS * BUFFERS; i++)
		munmap(buffers[i].memory, PAGE);
	printf("%u hits, %u notices\n", hits, notices);
}

static void test_caches(void)
{
	unsubscribes = false;
	run_caches();
	unsubscribes = true;
	run_caches();
}

int main(int argc, char **argv)
{
	static const struct test tests[] = {
		{"importing", test_importing},		{"the_case", test_the_case}, {"unsubscribing", test_unsubscribing},
		{"lock", test_under_libfabrics_lock},	{"joining", test_joining},   {"limit", test_limit},
		{"kinds", test_what_uffd_cannot_watch}, {"fork", test_fork},	     {"caches", test_caches},
	};

	struct fi_info *info;

	/* Initialises libfabric. Until then a monitor can be imported once only. */
	if (!fi_getinfo(FI_VERSION(1, 13), NULL, NULL, 0, NULL, &info))
		fi_freeinfo(info);
	return run_tests(tests, sizeof tests / sizeof *tests, argc > 1 ? argv[1] : NULL);
}
