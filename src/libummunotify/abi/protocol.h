/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * What a client and whatever feeds it say to each other, in fixed sizes: a SOCK_SEQPACKET Unix socket to the daemon, or a function
 * call to the process's own feeder (ummunotify_feeder.h).
 *
 *	client                         feeder
 *	HELLO                   ->
 *				<-     OK with a secret, and descriptors: the wake-up, segment 0, what `gives` says, links
 *	(shows the secret to the BPF program)
 *	SETTLE                  ->
 *				<-     OK: the table is fed from now on; UNSEEN: the client may show the secret again
 *	GROW                    ->     whenever the table is full
 *				<-     OK, and descriptors: the next segments
 *
 * A client sends its next request when it has read the answer to the last. Whatever else it sends ends the connection. Closing the
 * socket gives everything back. Descriptors come with the answer as SCM_RIGHTS; those that a client sends are never received.
 */
#ifndef UMN_PROTOCOL_H
#define UMN_PROTOCOL_H

#include <stdint.h>

/* Another one where anything in abi/ gets another meaning. */
#define UMN_PROTOCOL_VERSION 5
/* Stands in the BPF program's object, which is read from the disk: that may be of a later installation than the process that loads it. */
#define UMN_OBJECT_VERSION UMN_OBJECT_VERSION_OF(UMN_PROTOCOL_VERSION)
#define UMN_OBJECT_VERSION_OF(version) UMN_OBJECT_VERSION_TEXT(version)
#define UMN_OBJECT_VERSION_TEXT(version) "ummunotify protocol " #version
#define UMN_SOCKET_PATH "/run/ummunotify/socket"
#define UMN_SOCKET_ENVIRONMENT "UMMUNOTIFY_SOCKET"

#define UMN_FDS_MAX 64 /* in an answer; the kernel passes up to 253 with a message */

enum umn_op {
	UMN_OP_HELLO = 1,
	UMN_OP_SETTLE = 2,
	UMN_OP_GROW = 3,
	/* A umn_summary, then for each `argument` the umn_record of the first client with at least that table's number. */
	UMN_OP_STATUS = 4,
};
#define UMN_STATUS_SUMMARY UINT32_MAX /* the `argument` that asks for the summary */

struct umn_request {
	uint16_t op, version;
	uint32_t argument;
};

/* `value` is the limit that was reached, or an errno. */
enum umn_status {
	UMN_STATUS_OK,
	UMN_STATUS_END,	    /* there are no more records */
	UMN_STATUS_VERSION, /* the daemon speaks version `value` */
	UMN_STATUS_CLIENTS, /* of all users */
	UMN_STATUS_USER_CLIENTS,
	UMN_STATUS_USER_MEMORY, /* in bytes */
	UMN_STATUS_PROCESS_CLIENTS,
	UMN_STATUS_FAILED, /* with the errno `value` */
	UMN_STATUS_UNSEEN, /* the secret was not shown */
	UMN_STATUS_MEMORY, /* of all users, in bytes */
	UMN_STATUSES
};

/* Numbers on the wire. The order of preference is in sources/candidates.c. */
enum umn_probe { UMN_PROBE_KVM, UMN_PROBE_MMU_NOTIFIER, UMN_PROBE_ZAP, UMN_PROBES };

/* What comes after segment 0, in this order. The rest is what keeps the program attached. */
enum umn_gives {
	UMN_GIVES_KVM = 1,	  /* /dev/kvm, for a virtual machine, which subscribes the process (sources/subscription.h) */
	UMN_GIVES_PROBE_GAPS = 2, /* a map (struct umn_probe_gaps), for probes that the kernel may skip */
};

struct umn_reply {
	uint16_t status, fds;  /* how many descriptors come with it */
	uint16_t gives, probe; /* to HELLO */
	uint64_t value;
};

/* The daemon. */
struct umn_summary {
	uint32_t pid, clients; /* of all users */
	uint32_t ready;	       /* tables that wait for clients */
	uint32_t tables;       /* as many clients as there can be */
	uint64_t seconds;      /* since it started */
	uint64_t memory;       /* of all tables, in bytes; the ready ones too */
	uint64_t run_time_ns;  /* of the BPF program, with the next; both 0 while the kernel's statistics are off */
	uint64_t runs;
	uint64_t skipped; /* runs that the kernel skipped */
};

/* One client. */
struct umn_record {
	uint32_t table, pid, uid, regions;
	uint64_t generation, memory, overflows;
	char command[16];
};

#ifdef __cplusplus
#define UMN_PROTOCOL_ASSERT static_assert
#else
#define UMN_PROTOCOL_ASSERT _Static_assert
#endif
UMN_PROTOCOL_ASSERT(sizeof(struct umn_request) == 8, "request");
UMN_PROTOCOL_ASSERT(sizeof(struct umn_reply) == 16, "reply");
UMN_PROTOCOL_ASSERT(sizeof(struct umn_summary) == 56, "summary");
UMN_PROTOCOL_ASSERT(sizeof(struct umn_record) == 56, "record");

#endif
