/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * BPF maps, programs and links in the process that loads them: the system calls, and descriptors that the program may close.
 *
 * bpf(2) is called directly: libbpf is needed to load an object file, and calls into it from Python would let signal handlers run
 * between a change in the kernel and the note of it. Nothing here allocates, waits (but for the kernel, where it says so) or runs
 * Python code.
 */
#ifndef UMN_OBJECTS_H
#define UMN_OBJECTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Each returns 0, or a descriptor (close-on-exec), or a negative errno. */
int umn_bpf_create_map(uint32_t type, const char *name, uint32_t key_size, uint32_t value_size, uint32_t max_entries,
		       uint32_t flags);
int umn_bpf_update(int map, const void *key, const void *value);
int umn_bpf_lookup(int map, const void *key, void *value);
int umn_bpf_delete(int map, const void *key);
/* `count` maps into a map of maps, by their descriptors. As after an update and a delete, the kernel returns only when no program
 * can be using what was there before (maybe_wait_bpf_programs in kernel/bpf/syscall.c): some 10 ms, for all of them together. */
int umn_bpf_put_maps(int map, const uint32_t *keys, const uint32_t *fds, uint32_t count);
/*
 * An array's values as memory that programs have, too (BPF_F_MMAPABLE), but no child of a fork; NULL with errno.
 *
 * The kernel copies a value that is updated by memcpy, which on x86 may be `rep movsb`: nothing promises a program that it sees a field
 * of it before or after, and not half of each. A write here is made of single stores.
 */
void *umn_bpf_share(int map, size_t size);
/* Word by word, each read or written at once; what is written is not seen before what the caller has written before. `size` is a
 * multiple of 8. */
void umn_bpf_read_words(void *to, const void *shared, size_t size);
void umn_bpf_write_words(void *shared, const void *from, size_t size);
/* Runs a raw tracepoint's program once, as if the tracepoint was hit with these arguments. */
int umn_bpf_run(int program, const void *arguments, uint32_t size);

/*
 * One of our descriptors, in a table that is the program's: the number may lead to another file by now, or to none. So before each
 * use the kernel is asked what is behind it. The cost is one system call, and none of this is on a fast path.
 */
enum umn_bpf_kind { UMN_BPF_MAP, UMN_BPF_PROGRAM, UMN_BPF_LINK };
struct umn_bpf_object {
	int fd; /* -1: none */
	uint32_t kind, epoch;
	/* The beginning of the kernel's bpf_map_info, bpf_prog_info or bpf_link_info: type, number, and then sizes, the hash of the code
	 * or the program's number. No two objects, of whatever kinds, have the same. */
	struct umn_bpf_identity {
		uint32_t type, id;
		uint64_t more;
	} identity;
	struct umn_bpf_object *next, **previous; /* all that are open */
};

/* Before any other use. 0 or a negative errno. */
int umn_bpf_objects_start(void);

/* Takes an open descriptor over. 0, or a negative errno with `fd` still the caller's. The caller holds a lock of all objects. */
int umn_bpf_object_take(struct umn_bpf_object *object, enum umn_bpf_kind kind, int fd);

/* The number, after a look at what is behind it. If the program has closed it, it is opened again where that is permitted
 * (CAP_SYS_ADMIN). -ESTALE: the program has closed it; -ECHILD: it was this process's parent's; or another negative errno. */
int umn_bpf_object_fd(struct umn_bpf_object *object);

/* Closes the number if it still leads to the object. May be called more than once. Under the lock. */
void umn_bpf_object_close(struct umn_bpf_object *object);

#endif
