/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */
/*
 * What the BPF program and its loader share, beside the watch tables themselves (layout.h): the maps by which the loader says which
 * tables are fed for which address space, and how the probe `zap` is told what it is attached to.
 *
 * Only the loader and the program write these maps; no client ever gets them.
 */
#ifndef UMN_MAPS_H
#define UMN_MAPS_H

#include "abi/layout.h"

/* Tables of one address space that a change looks at. */
#define UMN_TABLES_PER_MM_MAX 256

/* A wake-up's ring buffer, of which each wake-up takes 16 bytes; more where the kernel's pages, of which it wants one, are larger. */
#define UMN_RING_BYTES UMN_PAGE

/* bpf_loop's own limit. */
#define UMN_STEPS_MAX (1u << 23)

/* In the map `tables`, by the table's number. */
struct umn_fed_table {
	uint64_t space; /* the address space's number (space_of in watch.bpf.c); 0: the table is not fed */
	uint64_t mm;	/* where that one's mm_struct was when the owner showed itself */
	uint32_t uid;	/* the owner's then */
	uint32_t next;	/* the next table of the same address space, plus 1 */
	uint32_t cells; /* in all its segments: no walk of a sound index takes more steps */
	/* Its owner's pid namespace, by the inode number and device of /proc/PID/ns/pid; 0: not known. Written at the handshake. */
	uint32_t pid_namespace, pid_namespace_device;
	uint32_t unused;
	uint64_t secret; /* that the owner is to show; the program clears it when it is shown, ... */
	uint64_t shown;	 /* ... and writes here which address space that was, last */
};

/* The one value in the map `control`. */
struct umn_control {
	uint32_t tables;     /* tables with this number and above have never been used */
	uint32_t handshakes; /* how many are open */
	uint64_t space;	     /* if just one table is being fed: its address space, ... */
	uint32_t sole_table; /* ... and its number plus 1; both are 0 otherwise */
	/* The most that a change may take ... */
	uint32_t steps_own;	/* in all tables of the address space that makes it */
	uint32_t steps_foreign; /* in all tables that may be others' ... */
	uint32_t steps_share;	/* ... and in each of them */
	/* For how many that wait a change may send wake-ups, to each as above; UINT32_MAX: they are not counted. And a run of the daemon's. */
	uint32_t waiters_own, waiters_foreign, waiters_relay;
	uint32_t page_shift; /* the kernel's pages have 1 << page_shift bytes */
};

/* What is added for each wake-up to the number of those that wait for it. */
#define UMN_WAKEUP_COST 8

/*
 * How a function is called to which the probe `zap` is attached: the attachment's cookie. Arguments are numbered from 0, members in
 * units of 8 bytes.
 *
 * Members are not left to CO-RE, as not every kernel has each of these structures: libbpf then searches the modules, which needs
 * CAP_SYS_ADMIN.
 */
#define UMN_CALL_MEMBERS 3
#define UMN_CALL_ARGUMENTS 8 /* the first, as long as all are numbers or pointers. A power of two. */
struct umn_call {
	uint8_t whose;	/* the argument that says whose address space it is ... */
	uint8_t type;	/* ... and what that is (UMN_OF_*) */
	uint8_t start;	/* the argument with the first address */
	uint8_t last;	/* the argument that says how far it goes ... */
	uint8_t extent; /* ... and how (UMN_TO_*) */
	uint8_t members[UMN_CALL_MEMBERS];
};
/* mm_struct; what has a pointer to one, members[0]; what has a pointer to a vm_area_struct, members[0] */
enum { UMN_OF_MM, UMN_OF_HOLDER, UMN_OF_SPAN };
/* SPAN: the addresses are members of `whose`, from members[1] to members[2]. */
enum { UMN_TO_END, UMN_TO_LENGTH, UMN_TO_PAGE, UMN_TO_PMD, UMN_TO_PUD, UMN_TO_FOLIO, UMN_TO_SPAN };

UMN_STATIC_ASSERT(sizeof(struct umn_fed_table) == 56, "a table");
UMN_STATIC_ASSERT(sizeof(struct umn_control) == 48, "control");
UMN_STATIC_ASSERT(sizeof(struct umn_call) == 8, "a cookie has 64 bits");

#endif
