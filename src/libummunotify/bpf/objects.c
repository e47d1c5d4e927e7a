/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "bpf/objects.h"

#include <errno.h>
#include <linux/bpf.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "process/process.h"

#define ENOTSUPP 524 /* the kernel's own */

/* What is not set is 0 in every byte: an initialiser would leave the padding of the unions that newer headers have undefined. */
static void clear(union bpf_attr *attr)
{
	memset(attr, 0, sizeof *attr);
}

/* -errno instead of errno. After EINTR nothing was done. */
static int bpf(enum bpf_cmd command, union bpf_attr *attr)
{
	long result;

	do
		result = syscall(SYS_bpf, command, attr, sizeof *attr);
	while (result < 0 && errno == EINTR);
	return result < 0 ? -errno : (int)result;
}

static uint64_t pointer(const void *p)
{
	return (uintptr_t)p;
}

int umn_bpf_create_map(uint32_t type, const char *name, uint32_t key_size, uint32_t value_size, uint32_t max_entries,
		       uint32_t flags)
{
	union bpf_attr attr;

	clear(&attr);
	attr.map_type = type;
	attr.key_size = key_size;
	attr.value_size = value_size;
	attr.max_entries = max_entries;
	attr.map_flags = flags;
	strncpy(attr.map_name, name, sizeof attr.map_name - 1);
	return bpf(BPF_MAP_CREATE, &attr);
}

static int element(enum bpf_cmd command, int map, const void *key, const void *value)
{
	union bpf_attr attr;

	clear(&attr);
	attr.map_fd = (uint32_t)map;
	attr.key = pointer(key);
	attr.value = pointer(value);
	return bpf(command, &attr);
}

int umn_bpf_update(int map, const void *key, const void *value)
{
	return element(BPF_MAP_UPDATE_ELEM, map, key, value);
}

int umn_bpf_lookup(int map, const void *key, void *value)
{
	return element(BPF_MAP_LOOKUP_ELEM, map, key, value);
}

int umn_bpf_delete(int map, const void *key)
{
	return element(BPF_MAP_DELETE_ELEM, map, key, NULL);
}

int umn_bpf_put_maps(int map, const uint32_t *keys, const uint32_t *fds, uint32_t count)
{
	union bpf_attr attr;
	int error;

	clear(&attr);
	attr.batch.map_fd = (uint32_t)map;
	attr.batch.keys = pointer(keys);
	attr.batch.values = pointer(fds);
	attr.batch.count = count;
	error = bpf(BPF_MAP_UPDATE_BATCH, &attr);
	/* Maps of maps can do this since Linux 5.19 (commit 9263dddc7b6f). */
	for (uint32_t i = 0; error == -ENOTSUPP && i < count; i++) {
		int each = umn_bpf_update(map, &keys[i], &fds[i]);

		if (each || i == count - 1)
			return each;
	}
	return error;
}

void *umn_bpf_share(int map, size_t size)
{
	void *shared = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, map, 0);

	if (shared == MAP_FAILED)
		return NULL;
	madvise(shared, size, MADV_DONTFORK);
	return shared;
}

void umn_bpf_read_words(void *to, const void *shared, size_t size)
{
	const uint64_t *words = shared;
	uint64_t *read = to;

	for (size_t i = 0; i < size / sizeof *words; i++)
		read[i] = __atomic_load_n(&words[i], __ATOMIC_ACQUIRE);
}

void umn_bpf_write_words(void *shared, const void *from, size_t size)
{
	const uint64_t *written = from;
	uint64_t *words = shared;

	for (size_t i = 0; i < size / sizeof *words; i++)
		__atomic_store_n(&words[i], written[i], __ATOMIC_RELEASE);
}

int umn_bpf_run(int program, const void *arguments, uint32_t size)
{
	union bpf_attr attr;

	clear(&attr);
	attr.test.prog_fd = (uint32_t)program;
	attr.test.ctx_in = pointer(arguments);
	attr.test.ctx_size_in = size;
	return bpf(BPF_PROG_TEST_RUN, &attr);
}

/* ---- Descriptors. ---- */

/* Added and removed under the callers' lock, but a thread that holds it may be in the middle of that when another one forks. So the
 * chain of `next` is sound at every moment, by single stores; the child looks at nothing else. */
static struct umn_bpf_object *all;

/* `fd`'s, for whatever object it is. */
static int identify(int fd, struct umn_bpf_identity *identity)
{
	union bpf_attr attr;

	memset(identity, 0, sizeof *identity);
	clear(&attr);
	attr.info.bpf_fd = (uint32_t)fd;
	attr.info.info_len = sizeof *identity; /* the kernel fills in no more than this */
	attr.info.info = pointer(identity);
	return bpf(BPF_OBJ_GET_INFO_BY_FD, &attr);
}

static bool intact(const struct umn_bpf_object *object)
{
	struct umn_bpf_identity now;

	return object->fd >= 0 && !identify(object->fd, &now) && !memcmp(&now, &object->identity, sizeof now);
}

static int reopen(struct umn_bpf_object *object)
{
	static const enum bpf_cmd commands[] = {BPF_MAP_GET_FD_BY_ID, BPF_PROG_GET_FD_BY_ID, BPF_LINK_GET_FD_BY_ID};
	union bpf_attr attr;
	int fd;

	clear(&attr);
	attr.map_id = object->identity.id; /* at the same place for all three */
	fd = bpf(commands[object->kind], &attr);
	if (fd < 0)
		return -ESTALE;
	object->fd = fd;
	if (intact(object))
		return fd;
	/* A number is not given to another object before 2^31 others were made. */
	object->fd = -1;
	close(fd);
	return -ESTALE;
}

/* In the child of a fork: its copies would keep the parent's program attached when the parent has ended. */
static void close_in_child(void)
{
	for (struct umn_bpf_object *object = all; object; object = __atomic_load_n(&object->next, __ATOMIC_RELAXED)) {
		if (intact(object) && !umn_process_shares_descriptors())
			close(object->fd);
		object->fd = -1;
	}
	all = NULL;
}

int umn_bpf_objects_start(void)
{
	static bool started;
	int error = umn_process_start();

	if (error || started)
		return error;
	started = true;
	umn_process_add_child(close_in_child);
	return 0;
}

int umn_bpf_object_take(struct umn_bpf_object *object, enum umn_bpf_kind kind, int fd)
{
	struct umn_bpf_identity identity;
	int error = identify(fd, &identity);

	if (error)
		return error;
	*object = (struct umn_bpf_object){
		.fd = fd, .kind = kind, .epoch = umn_process_current(), .identity = identity, .next = all, .previous = &all};
	if (all)
		all->previous = &object->next;
	/* Release: the child of another thread's fork that finds the object finds it complete. */
	__atomic_store_n(&all, object, __ATOMIC_RELEASE);
	return 0;
}

int umn_bpf_object_fd(struct umn_bpf_object *object)
{
	if (!umn_process_is(object->epoch))
		return -ECHILD;
	if (object->fd < 0 && !object->previous)
		return -EBADF; /* closed by umn_bpf_object_close, or never open */
	return intact(object) ? object->fd : reopen(object);
}

void umn_bpf_object_close(struct umn_bpf_object *object)
{
	/* In a child the chain is not the one that it was in, and its descriptor is closed. */
	if (umn_process_current() == object->epoch && object->previous) {
		__atomic_store_n(object->previous, object->next, __ATOMIC_RELEASE);
		if (object->next)
			object->next->previous = object->previous;
		if (intact(object))
			close(object->fd);
	}
	object->fd = -1;
	object->next = NULL;
	object->previous = NULL;
}
