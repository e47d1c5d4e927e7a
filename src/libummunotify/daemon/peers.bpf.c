// SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only
/*
 * To whom a connection of the daemon's counts.
 *
 * A user that makes a user namespace gets many uids in it (/etc/subuid and newuidmap). They all count as that user. The
 * kernel has the client's uid and user namespace at the time of the connection (sk_peer_cred), and the namespace's owner. To
 * read these through descriptors of the namespace takes ptrace permissions; a BPF program can read them with the daemon's
 * capabilities. The daemon runs this program for each connection (BPF_PROG_TEST_RUN). It is attached nowhere.
 */
#include "bpf/types.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define LEVELS_MAX 33	/* of nested namespaces, in the kernel */
#define EXTENTS_MAX 340 /* of a map, in the kernel */
#define EXTENTS_INLINE 5

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
typedef struct {
	uint32_t val;
} kuid_t;
struct uid_gid_extent {
	uint32_t first, lower_first, count;
};
struct uid_gid_map {
	union {
		struct {
			struct uid_gid_extent extent[EXTENTS_INLINE];
			uint32_t nr_extents;
		};
		struct {
			struct uid_gid_extent *forward;
		};
	};
};
struct user_namespace {
	struct uid_gid_map uid_map;
	struct user_namespace *parent;
	int level;
	kuid_t owner;
};
struct cred {
	kuid_t euid;
	struct user_namespace *user_ns;
};
struct sock {
	const struct cred *sk_peer_cred;
};
struct socket {
	struct sock *sk;
};
struct file {
	void *private_data;
};
struct fdtable {
	struct file **fd;
};
struct files_struct {
	struct fdtable *fdt;
};
struct task_struct {
	struct files_struct *files;
};
#pragma clang attribute pop

/* In a namespace that root made, uids are what root mapped. Those of one range count as its first, as to root in the namespace they
 * are one. A range that maps uids to themselves makes no users: there each counts as itself. */
static uint32_t in_roots_namespace(struct user_namespace *ns, uint32_t uid)
{
	uint32_t count = BPF_CORE_READ(ns, uid_map.nr_extents);
	struct uid_gid_extent *extents = (void *)ns + bpf_core_field_offset(ns->uid_map.extent), extent;

	if (count > EXTENTS_INLINE)
		extents = BPF_CORE_READ(ns, uid_map.forward);
	for (uint32_t i = 0; i < EXTENTS_MAX && i < count; i++) {
		if (bpf_probe_read_kernel(&extent, sizeof extent, &extents[i]))
			break;
		if (uid - extent.lower_first < extent.count)
			return extent.first == extent.lower_first ? uid : extent.lower_first;
	}
	return uid;
}

/* Argument: a descriptor of this process, a Unix socket. */
SEC("raw_tp")
int user(uint64_t *context)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	struct file **files = BPF_CORE_READ(task, files, fdt, fd), *file = NULL;
	const struct cred *cred;
	struct user_namespace *ns;
	struct socket *socket;
	uint32_t owner;
	int level;

	if (bpf_probe_read_kernel(&file, sizeof file, &files[(uint32_t)context[0]]) || !file)
		return -1;
	socket = BPF_CORE_READ(file, private_data);
	cred = BPF_CORE_READ(socket, sk, sk_peer_cred);
	ns = BPF_CORE_READ(cred, user_ns);
	level = BPF_CORE_READ(ns, level);
	/* A user's namespace may have others in it, made by its users. */
	for (int i = 0; i < LEVELS_MAX && level > 1; i++) {
		ns = BPF_CORE_READ(ns, parent);
		level = BPF_CORE_READ(ns, level);
	}
	if (!level)
		return BPF_CORE_READ(cred, euid.val);
	owner = BPF_CORE_READ(ns, owner.val);
	return owner ? owner : in_roots_namespace(ns, BPF_CORE_READ(cred, euid.val));
}
