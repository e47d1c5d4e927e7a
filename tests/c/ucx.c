/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Does UCX's registration cache give out registrations of memory that has changed since? One of UCX's caches, made, registered with and
 * looked up as libuct_ib and libucp do: registrations through libibverbs (ucx_verbs.c stands in for it), a call of UCP's that drains, and then
 * a look-up that nothing stands before.
 *
 *	ucx THREADS ROUNDS [fork|fail|dlsym]
 *
 * Prints what was wrong of how many look-ups after a change, for each kind of change. Each thread has memory of its own; what one
 * drains is mostly the others'.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <ucm/api/ucm.h>
#include <ucp/api/ucp.h>
#include <ucs/memory/rcache.h>
#include <unistd.h>

#define NEW (UCP_API_MINOR > 13)
#ifndef LIBUCS /* where the functions are that nothing stands before */
#define LIBUCS "libucs.so.0"
#define LIBUCP "libucp.so.0"
#endif
#define CHECK(condition)                                                                                                           \
	do                                                                                                                         \
		if (!(condition)) {                                                                                                \
			fprintf(stderr, "%s:%d: %s: %m\n", __FILE__, __LINE__, #condition);                                        \
			_exit(1);                                                                                                  \
		}                                                                                                                  \
	while (0)

struct ibv_mr;
struct ibv_mr *ibv_reg_mr(void *pd, void *address, size_t length, int access);
int ibv_dereg_mr(struct ibv_mr *registration);
long ucx_verbs_registered(void);

enum kind { MUNMAP, MADVISE, MREMAP, MMAP, TRUNCATE, KINDS };
static const char *const names[KINDS] = {"munmap", "madvise", "mremap", "mmap", "truncate"};

enum { PAGES = 4, SLOTS = 2 * KINDS };
#define LENGTH ((size_t)PAGES * 4096)

struct slot {
	enum kind kind;
	char *address;
	int file;
	unsigned long version; /* of its memory */
};

struct region {
	ucs_rcache_region_t super;
	struct ibv_mr *registration;
	unsigned long version;
};

struct thread {
	pthread_t id;
	unsigned int seed;
	struct slot slots[SLOTS];
	unsigned long wrong[KINDS], changed[KINDS], hits;
};

static ucs_rcache_t *cache;
static ucp_context_h context;
static unsigned long rounds;
static char device; /* its address stands for a protection domain */
static bool fails;  /* every second registration */
static typeof(ucs_rcache_get) *get;

static ucs_status_t mem_reg(void *of, ucs_rcache_t *rcache, void *slot, ucs_rcache_region_t *super, uint16_t flags)
{
	struct region *region = (struct region *)super;
	static unsigned int count;
	void *pd = fails && __atomic_add_fetch(&count, 1, __ATOMIC_RELAXED) % 2 ? NULL : &device;

	(void)of, (void)rcache, (void)flags;
	region->version = ((struct slot *)slot)->version;
	region->registration = ibv_reg_mr(pd, (void *)super->super.start, super->super.end - super->super.start, 0);
	return region->registration ? UCS_OK : UCS_ERR_IO_ERROR;
}

static void mem_dereg(void *of, ucs_rcache_t *rcache, ucs_rcache_region_t *super)
{
	(void)of, (void)rcache;
	CHECK(!ibv_dereg_mr(((struct region *)super)->registration));
}

static void dump_region(void *of, ucs_rcache_t *rcache, ucs_rcache_region_t *super, char *text, size_t size)
{
	(void)of, (void)rcache, (void)super;
	snprintf(text, size, "a registration");
}

#if NEW
static void merge(void *of, ucs_rcache_t *rcache, void *slot, ucs_rcache_region_t *super)
{
	(void)of, (void)rcache, (void)slot, (void)super;
}
#endif

static const ucs_rcache_ops_t ops = {
	.mem_reg = mem_reg,
	.mem_dereg = mem_dereg,
	.dump_region = dump_region,
#if NEW
	.merge = merge,
#endif
};

static bool make_cache(void)
{
	ucs_rcache_params_t params = {
		.region_struct_size = sizeof(struct region),
#if !NEW
		.alignment = UCS_PGT_ADDR_ALIGN,
		.max_alignment = 4096,
#endif
		.ucm_events = UCM_EVENT_VM_UNMAPPED,
		.ucm_event_priority = 1000,
		.ops = &ops,
		.max_regions = -1ul,
		.max_size = -1ul,
		.max_unreleased = -1ul,
	};

	return ucs_rcache_create(&params, "test", NULL, &cache) == UCS_OK;
}

static char *map(char *address, int flags, int file)
{
	void *mapped = (void *)syscall(SYS_mmap, address, LENGTH, PROT_READ | PROT_WRITE, flags, file, 0);

	return mapped == MAP_FAILED ? NULL : mapped;
}

static void new_slot(struct slot *slot, enum kind kind)
{
	slot->kind = kind;
	slot->file = -1;
	if (kind == TRUNCATE) {
		slot->file = memfd_create("ucx", MFD_CLOEXEC);
		CHECK(slot->file >= 0 && !ftruncate(slot->file, LENGTH));
	}
	/* With room around it, so that no registration reaches into another's. */
	slot->address = mmap(NULL, 3 * LENGTH, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(slot->address != MAP_FAILED);
	slot->address =
		map(slot->address + LENGTH, MAP_FIXED | (slot->file < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED), slot->file);
	CHECK(slot->address);
}

/* By system calls, as allocators other than libc's make them. */
static void change(struct slot *slot)
{
	char *other;

	switch (slot->kind) {
	case MUNMAP:
		CHECK(!syscall(SYS_munmap, slot->address, LENGTH));
		other = map(slot->address, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1);
		if (!other) /* another thread has got it */
			new_slot(slot, MUNMAP);
		break;
	case MADVISE:
		CHECK(!syscall(SYS_madvise, slot->address, LENGTH, MADV_DONTNEED));
		break;
	case MREMAP:
		other = map(NULL, MAP_PRIVATE | MAP_ANONYMOUS, -1);
		CHECK(other);
		*other = 1;
		CHECK((char *)syscall(SYS_mremap, other, LENGTH, LENGTH, MREMAP_MAYMOVE | MREMAP_FIXED, slot->address) ==
		      slot->address);
		break;
	case MMAP:
		CHECK(map(slot->address, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1));
		break;
	default:
		CHECK(!ftruncate(slot->file, 0) && !ftruncate(slot->file, LENGTH));
	}
	slot->version++;
}

/* An operation of UCP's that takes a buffer, up to its look-up. */
static void begin_operation(void)
{
	ucp_mem_map_params_t params = {
		.field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH,
	};
	ucp_mem_h nothing;

	CHECK(ucp_mem_map(context, &params, &nothing) == UCS_OK);
	CHECK(ucp_mem_unmap(context, nothing) == UCS_OK);
}

/* Is what the cache gives out of the memory that is there now? */
static bool look_up(struct slot *slot, bool *hit)
{
	ucs_rcache_region_t *super;
	ucs_status_t status;
	bool right;

	begin_operation();
	for (;;) {
#if NEW
		status = get(cache, slot->address, LENGTH, 4096, PROT_READ | PROT_WRITE, slot, &super);
#else
		status = get(cache, slot->address, LENGTH, PROT_READ | PROT_WRITE, slot, &super);
#endif
		if (status == UCS_OK)
			break;
		/* UCX keeps what it could not register, to say so again. */
		CHECK(fails);
		ucm_vm_munmap(slot->address, LENGTH);
	}
	right = ((struct region *)super)->version == slot->version;
	*hit = super->refcount > 2;
	ucs_rcache_region_put(cache, super);
	return right;
}

static void *work(void *argument)
{
	struct thread *t = argument;
	struct slot *slot;
	bool changed, hit;

	for (int i = 0; i < SLOTS; i++)
		new_slot(&t->slots[i], i % KINDS);
	for (unsigned long i = 0; i < rounds; i++) {
		slot = &t->slots[rand_r(&t->seed) % SLOTS];
		changed = rand_r(&t->seed) % 2;
		if (changed)
			change(slot);
		t->changed[slot->kind] += changed;
		t->wrong[slot->kind] += !look_up(slot, &hit);
	}
	return NULL;
}

static void work_in_child(struct slot *slot)
{
	bool hit;
	int status;
	pid_t child;

	CHECK(look_up(slot, &hit));
	child = fork();
	if (!child) {
		for (int i = 0; i < 100; i++) {
			change(slot);
			CHECK(look_up(slot, &hit));
		}
		_exit(0);
	}
	CHECK(waitpid(child, &status, 0) == child && !status);
	change(slot);
	CHECK(look_up(slot, &hit));
}

int ucx_test(int argc, char **argv);

int ucx_test(int argc, char **argv)
{
	unsigned int count = (unsigned int)atoi(argv[1]);
	const char *mode = argc > 3 ? argv[3] : "";
	typeof(ucp_init_version) *init = ucp_init_version;
	ucp_params_t params = {
		.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_MT_WORKERS_SHARED,
		.features = UCP_FEATURE_TAG,
		.mt_workers_shared = 1,
	};
	void *libucs = dlopen(LIBUCS, RTLD_NOW | RTLD_NOLOAD), *libucp = dlopen(LIBUCP, RTLD_NOW | RTLD_NOLOAD);
	struct thread *threads = calloc(count, sizeof *threads);
	unsigned long wrong, changed;

	CHECK(threads && libucs && libucp);
	rounds = strtoul(argv[2], NULL, 10);
	get = (typeof(ucs_rcache_get) *)dlsym(libucs, "ucs_rcache_get");
	if (!strcmp(mode, "dlsym"))
		init = (typeof(ucp_init_version) *)dlsym(libucp, "ucp_init_version");
	CHECK(init(UCP_API_MAJOR, UCP_API_MINOR, &params, NULL, &context) == UCS_OK);
	fails = !strcmp(mode, "fail");
	if (!make_cache()) {
		printf("no cache\n");
		return 0;
	}
	if (!strcmp(mode, "fork")) {
		for (int i = 0; i < KINDS; i++) {
			new_slot(&threads->slots[i], i);
			work_in_child(&threads->slots[i]);
		}
	}
	for (unsigned int i = 0; i < count; i++) {
		threads[i].seed = i;
		CHECK(!pthread_create(&threads[i].id, NULL, work, &threads[i]));
	}
	for (unsigned int i = 0; i < count; i++)
		CHECK(!pthread_join(threads[i].id, NULL));
	for (int kind = 0; kind < KINDS; kind++) {
		wrong = changed = 0;
		for (unsigned int i = 0; i < count; i++) {
			wrong += threads[i].wrong[kind];
			changed += threads[i].changed[kind];
		}
		printf("%s: %lu wrong after %lu changes\n", names[kind], wrong, changed);
	}
	ucs_rcache_destroy(cache);
	printf("registered at the end: %ld\n", ucx_verbs_registered());
	ucp_cleanup(context);
	return 0;
}

#ifndef PLUGIN
int main(int argc, char **argv)
{
	return ucx_test(argc, argv);
}
#endif
