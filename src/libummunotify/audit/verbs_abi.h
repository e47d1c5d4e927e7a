/* SPDX-License-Identifier: BSD-3-Clause */
/* What libibverbs's public structures look like, as far as it is needed: so neither its headers nor the library are needed to build this.
 * tests/c/audit_abi.c compares them with the headers. */
#ifndef UMN_AUDIT_VERBS_ABI_H
#define UMN_AUDIT_VERBS_ABI_H

#include <stddef.h>
#include <stdint.h>

struct verbs_sge {
	uint64_t address;
	uint32_t length, lkey;
};

struct verbs_send {
	uint64_t id;
	struct verbs_send *next;
	struct verbs_sge *pieces;
	int count, opcode;
	unsigned int flags, immediate;
	uint64_t remote_address; /* of RDMA and of atomic operations */
	union {
		uint32_t rdma_rkey;
		uint64_t compare;
	};
	uint64_t swap;
	uint32_t atomic_rkey;
};

struct verbs_receive {
	uint64_t id;
	struct verbs_receive *next;
	struct verbs_sge *pieces;
	int count;
};

/* A queue pair or a shared receive queue: both begin with their context. */
struct verbs_device;
struct verbs_queue {
	struct verbs_device *context;
};

struct verbs_device {
	void *device;
	void *before[20];
	int (*post_srq_recv)(struct verbs_queue *, struct verbs_receive *, struct verbs_receive **);
	void *between[4];
	int (*post_send)(struct verbs_queue *, struct verbs_send *, struct verbs_send **);
	int (*post_recv)(struct verbs_queue *, struct verbs_receive *, struct verbs_receive **);
};

struct verbs_domain {
	struct verbs_device *context;
};

struct verbs_region {
	struct verbs_device *context;
	struct verbs_domain *domain;
	void *address;
	size_t length;
	uint32_t handle, lkey, rkey;
};

#endif
