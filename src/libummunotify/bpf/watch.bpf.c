// SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only
/*
 * The feeder in the kernel: from an MMU notification to invalidated slots.
 *
 * Kernel structures are declared here with just the fields that are used; CO-RE finds their offsets in the running kernel.
 */
#include <stdint.h>

typedef uint8_t __u8;
typedef int8_t __s8;
typedef uint16_t __u16, __be16;
typedef int16_t __s16;
typedef uint32_t __u32, __be32, __wsum;
typedef int32_t __s32;
typedef uint64_t __u64;
typedef int64_t __s64;
#define BPF_MAP_TYPE_HASH 1
#define BPF_MAP_TYPE_ARRAY 2
#define BPF_MAP_TYPE_PERCPU_ARRAY 6
#define BPF_MAP_TYPE_ARRAY_OF_MAPS 12
#define BPF_MAP_TYPE_RINGBUF 27
#define BPF_F_MMAPABLE (1u << 10)
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>

#include "abi/maps.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct pt_regs {
	unsigned long r10, r9, r8, ax, cx, dx, si, di, orig_ax;
};
struct thread_info {
	unsigned long syscall_work;
	unsigned int status;
};
enum syscall_work_bit { SYSCALL_WORK_BIT_SECCOMP = 0, SYSCALL_WORK_BIT_SYSCALL_TRACE = 2, SYSCALL_WORK_BIT_SYSCALL_EMU = 3 };
struct atomic_long {
	long counter;
};
struct task_struct;
struct rw_semaphore {
	struct atomic_long owner;
};
/* PREEMPT_RT's */
struct rt_mutex_base {
	struct task_struct *owner;
};
struct rwbase_rt {
	struct rt_mutex_base rtmutex;
};
struct rw_semaphore___rt {
	struct rwbase_rt rwbase;
};
struct maple_tree {
	void *ma_root;
};
struct mm_struct {
	struct maple_tree mm_mt;
	struct rw_semaphore mmap_lock;
	unsigned long locked_vm;
};
struct pid {
	unsigned int level;
};
struct ns_common {
	unsigned int inum;
};
struct pid_namespace {
	struct ns_common ns;
};
struct nsproxy {
	struct pid_namespace *pid_ns_for_children;
};
struct task_struct {
	struct thread_info thread_info;
	unsigned int flags;
	unsigned int ptrace;
	struct mm_struct *mm;
	struct pid *thread_pid;
	struct nsproxy *nsproxy;
};
enum maple_type { maple_leaf_64 = 1, maple_range_64 = 2, maple_arange_64 = 3 };
struct maple_range_64 {
	unsigned long pivot[15];
	void *slot[16];
};
struct maple_arange_64 {
	unsigned long pivot[9];
	void *slot[10];
};
enum mmu_notifier_event { MMU_NOTIFY_CLEAR = 1, MMU_NOTIFY_PROTECTION_VMA = 2, MMU_NOTIFY_PROTECTION_PAGE = 3, MMU_NOTIFY_SOFT_DIRTY = 4 };
struct mmu_notifier_range {
	struct mm_struct *mm;
	unsigned long start, end;
	enum mmu_notifier_event event;
};
struct inode {
	unsigned char i_blkbits;
};
struct file {
	struct inode *f_inode;
};
struct vm_area_struct {
	unsigned long vm_start, vm_end;
	struct mm_struct *vm_mm;
	unsigned long vm_flags;
	void *vm_ops;
	struct file *vm_file;
};
enum pageflags { PG_head = 6 };
struct folio {
	unsigned long _flags_1;
	unsigned char _folio_order;
};
struct folio___memdesc {
	struct {
		unsigned long f;
	} _flags_1;
};
#pragma clang attribute pop

/* ---- The maps. Of these only segments and rings are ever in a client's hands; what the others say can be trusted. ---- */

/* All of one size: then the verifier turns look-ups in them into a few instructions (array_map_gen_lookup). */
struct segment {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, UMN_SEGMENT_PAGES);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(key_size, sizeof(uint32_t));
	__uint(value_size, UMN_PAGE);
};
struct ring {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, UMN_RING_BYTES);
};

/* The loader sets these maps' max_entries for the number of tables that it wants. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, UMN_SEGMENTS);
	__type(key, uint32_t);
	__array(values, struct segment);
} segments SEC(".maps");
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, uint32_t);
	__array(values, struct ring);
} rings SEC(".maps");
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, uint32_t);
	__type(value, struct umn_fed_table);
} tables SEC(".maps");
/* An address space's first table, plus 1. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, uint64_t);
	__type(value, uint32_t);
} owners SEC(".maps");
/* The tables whose owners have not shown themselves yet, by the secret that they will show. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, uint64_t);
	__type(value, uint32_t);
} handshakes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, uint32_t);
	__type(value, struct umn_control);
} control SEC(".maps");

/* See `doubt` below. The daemon's clients can map it, too: it is frozen, so nobody but programs can write it. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, uint32_t);
	__type(value, struct umn_doubts);
} doubts SEC(".maps");
/* Is this CPU one of those that `doubts` counts? */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, uint32_t);
	__type(value, uint32_t);
} doubted SEC(".maps");

/* ---- The feeder. ---- */

#define UMN_WALK_FIELDS uint32_t segments_at;/* the table's first entry in `segments` */
#define UMN_INLINE __always_inline
#define UMN_LOAD(p) (*(volatile __typeof__(*(p)) *)(p))
#define UMN_STORE(p, v) (*(volatile __typeof__(*(p)) *)(p) = (v))
#define UMN_OPAQUE(v) asm volatile("" : "+r"(v))
#define UMN_UNROLL _Pragma("clang loop unroll(full)")
#define UMN_REPEAT(n, f, w) bpf_loop(n, f, w, 0)
struct umn_walk;
static __always_inline struct umn_node *umn_node_at(struct umn_walk *w, uint32_t ref);
static __always_inline struct umn_slot *umn_slot_at(struct umn_walk *w, uint32_t ref);
#include "table/invalidate.h"

static __always_inline uint8_t *page_at(uint32_t segments_at, uint32_t ref)
{
	uint32_t segment = segments_at + ref / UMN_CELLS_PER_SEGMENT;
	uint32_t page = ref / UMN_CELLS_PER_PAGE % UMN_SEGMENT_PAGES;
	void *map = ref < UMN_SEGMENTS * UMN_CELLS_PER_SEGMENT ? bpf_map_lookup_elem(&segments, &segment) : 0;

	return map ? bpf_map_lookup_elem(map, &page) : 0;
}

static __always_inline struct umn_node *umn_node_at(struct umn_walk *w, uint32_t ref)
{
	uint8_t *page = page_at(w->segments_at, ref);
	uint64_t cell = ref & (UMN_CELLS_PER_PAGE - UMN_CELLS_PER_CHUNK);

	return page ? (struct umn_node *)(page + cell * UMN_CELL) : 0;
}

static __always_inline struct umn_slot *umn_slot_at(struct umn_walk *w, uint32_t ref)
{
	uint8_t *page = page_at(w->segments_at, ref);
	uint64_t cell = ref & (UMN_CELLS_PER_PAGE - 1);

	return page ? (struct umn_slot *)(page + cell * UMN_CELL) : 0;
}

static __always_inline struct umn_header *header_of(uint32_t id)
{
	return (struct umn_header *)page_at(id * UMN_SEGMENTS, 0);
}

#define PID_NAMESPACE_INITIAL 0xeffffffcu /* its inode number, on every machine */
#define PID_NAMESPACE_DEVICES 256 /* the kernel numbers such devices in the order of their making; this one is made as it boots */

struct bpf_pidns_info {
	uint32_t pid, tgid;
};
struct pid_namespace_name {
	uint64_t inode, device;
};

static long try_device(uint32_t device, struct pid_namespace_name *name)
{
	struct bpf_pidns_info numbers;

	if (bpf_get_ns_current_pid_tgid(device, name->inode, &numbers, sizeof numbers))
		return 0;
	name->device = device;
	return 1;
}

/*
 * Notes the current task's pid namespace in its table. It has the inode number 0, "not known", where it is not the one that the
 * task's children get. Reads nothing but what the verifier understands.
 */
static __always_inline void note_pid_namespace(struct umn_fed_table *table)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct pid_namespace_name name = {.inode = task->nsproxy->pid_ns_for_children->ns.inum};

	if (task->thread_pid->level)
		bpf_loop(PID_NAMESPACE_DEVICES, try_device, &name, 0);
	else
		name.inode = PID_NAMESPACE_INITIAL;
	table->pid_namespace = name.device || name.inode == PID_NAMESPACE_INITIAL ? name.inode : 0;
	table->pid_namespace_device = name.device;
}

/*
 * The current thread's number in the pid namespace of the table's owner, which is the one that the owner knows. 0: not known.
 * In the initial namespace every thread has a number. In another one the helper knows only those of that very namespace.
 */
static __always_inline uint32_t thread_for(struct umn_fed_table *table)
{
	struct bpf_pidns_info numbers;

	if (table->pid_namespace == PID_NAMESPACE_INITIAL)
		return bpf_get_current_pid_tgid();
	if (bpf_get_ns_current_pid_tgid(table->pid_namespace_device, table->pid_namespace, &numbers, sizeof numbers))
		return 0;
	return numbers.pid;
}

/* One table's share of a change. A global function, so that the verifier looks at it once. */
__attribute__((noinline)) int feed(uint32_t id, uint64_t start, uint64_t end, int32_t syscall, uint32_t steps)
{
	struct umn_fed_table *table = bpf_map_lookup_elem(&tables, &id);
	struct umn_walk w = {.segments_at = id * UMN_SEGMENTS, .start = start, .end = end, .syscall = syscall};
	uint64_t wake = 1;
	void *ring;

	if (!table || !table->mm)
		return 0;
	w.header = header_of(id);
	if (!w.header || !umn_in_hull(w.header, start, end))
		return 0;
	w.thread = thread_for(table);
	if (steps > table->cells)
		steps = table->cells;
	if (umn_invalidate(&w, steps)) {
		ring = bpf_map_lookup_elem(&rings, &id);
		if (ring)
			bpf_ringbuf_output(ring, &wake, sizeof wake, 0);
	}
	return 0;
}

struct change {
	uint64_t start, end;
	int32_t syscall;
	uint32_t steps;
	uint32_t table; /* plus 1 */
};

static long feed_next(uint32_t unused, struct change *change)
{
	uint32_t id = change->table - 1;
	struct umn_fed_table *table;

	feed(id, change->start, change->end, change->syscall, UMN_STEPS_MAX);
	table = bpf_map_lookup_elem(&tables, &id);
	change->table = table ? table->next : 0;
	return !change->table;
}

static long feed_foreign(uint32_t id, struct change *change)
{
	feed(id, change->start, change->end, change->syscall, change->steps);
	return 0;
}

static __always_inline void feed_mm(uint64_t mm, struct change *change)
{
	uint32_t *first = bpf_map_lookup_elem(&owners, &mm);

	if (!first)
		return;
	change->table = *first;
	bpf_loop(UMN_TABLES_PER_MM_MAX, feed_next, change, 0);
}

/* ---- Whose change is it? The kvm probe does not say, so it has to follow from what the current task is doing. ---- */

enum scope { OWN, ANYBODY };

#define PF_IO_WORKER 0x00000010
#define PF_MEMALLOC 0x00000800 /* reclaiming or compacting memory, anybody's, to get some for itself */
#define PF_USER_WORKER 0x00004000
#define PF_KTHREAD 0x00200000
#define TS_COMPAT 0x0002 /* in a 32-bit system call: other numbers */
#define ENOSYS 38

enum {
	NR_mmap = 9,
	NR_mprotect = 10,
	NR_munmap = 11,
	NR_brk = 12,
	NR_mremap = 25,
	NR_madvise = 28,
	NR_clone = 56,
	NR_fork = 57,
	NR_mlock = 149,
	NR_munlock = 150,
	NR_mlock2 = 325,
	NR_pkey_mprotect = 329,
	NR_clone3 = 435
};
#define PROT_WRITE 2
#define MAP_FIXED 0x10
#define MAP_ANONYMOUS 0x20
#define MREMAP_FIXED 2
#define MADV_SEQUENTIAL 2 /* 0 to 2, and 10 to 19, change nothing but how a mapping is treated */
#define MADV_DONTNEED 4
#define MADV_FREE 8
#define MADV_DONTFORK 10
#define MADV_KEEPONFORK 19
#define MADV_DONTNEED_LOCKED 24

static __always_inline int within(struct change *change, uint64_t address, uint64_t length)
{
	return change->start >= (address & -4096ull) && change->end <= ((address + length + 4095) & -4096ull);
}

/* ---- What leaves all pages where they are. ---- */

#define PMD_SIZE (UINT64_C(1) << 21)
#define VM_WRITE 0x2
#define VM_LOCKED 0x2000

/* Does the current task hold its address space's mmap lock for writing? Only the writer is its owner without a flag. */
static __always_inline int writes_mappings(struct task_struct *task)
{
	struct rw_semaphore *lock = &task->mm->mmap_lock;
	struct rw_semaphore___rt *rt = (void *)lock;

	if (bpf_core_field_exists(lock->owner))
		return lock->owner.counter == (long)task;
	if (bpf_core_field_exists(rt->rwbase)) /* bit 0: the lock has waiters */
		return (unsigned long)rt->rwbase.rtmutex.owner - (unsigned long)task <= 1;
	return 0;
}

/* The way down a maple tree, which is where an address space's mappings are. */
struct descent {
	uint64_t address;
	uint64_t entry; /* the next node, its type in bits 3 to 6; in the end the mapping */
	int found;
};
#define MAPLE_DEPTH_MAX 12 /* 10 entries in each of its nodes, at least */
#define MAPLE_PIVOTS 15

/* Entry i of a node is for addresses up to pivot i. A pivot of 0 behind others says that entry i is the last. */
static long descend(uint32_t unused, struct descent *way)
{
	uint64_t node = way->entry & ~0xffull, type = way->entry >> 3 & 0xf;
	uint32_t pivots_at, slots_at, last, i, at;
	uint64_t pivots[MAPLE_PIVOTS] = {};

	if (type == bpf_core_enum_value(enum maple_type, maple_arange_64)) {
		pivots_at = bpf_core_field_offset(struct maple_arange_64, pivot);
		slots_at = bpf_core_field_offset(struct maple_arange_64, slot);
		last = bpf_core_field_size(struct maple_arange_64, pivot) / sizeof *pivots;
	} else if (type == bpf_core_enum_value(enum maple_type, maple_range_64) ||
		   type == bpf_core_enum_value(enum maple_type, maple_leaf_64)) {
		pivots_at = bpf_core_field_offset(struct maple_range_64, pivot);
		slots_at = bpf_core_field_offset(struct maple_range_64, slot);
		last = bpf_core_field_size(struct maple_range_64, pivot) / sizeof *pivots;
	} else {
		return 1;
	}
	if (last > MAPLE_PIVOTS || bpf_probe_read_kernel(pivots, sizeof pivots, (void *)(node + pivots_at)))
		return 1;
	at = last;
	UMN_UNROLL
	for (i = MAPLE_PIVOTS; i-- > 0;)
		if (i < last && (way->address <= pivots[i] || (i && !pivots[i])))
			at = i;
	if (bpf_probe_read_kernel(&way->entry, sizeof way->entry, (void *)(node + slots_at + at * sizeof *pivots)))
		return 1;
	way->found = type == bpf_core_enum_value(enum maple_type, maple_leaf_64);
	return way->found || !way->entry;
}

/*
 * The mapping at an address of the current task's. The task holds the mmap lock for writing, so the tree and the mapping stand
 * still. Needs kernels with maple trees, since Linux 6.1.
 */
static __always_inline struct vm_area_struct *mapping_at(struct task_struct *task, uint64_t address)
{
	struct descent way = {.address = address};

	if (!bpf_core_field_exists(task->mm->mm_mt) || !bpf_core_enum_value_exists(enum maple_type, maple_arange_64) ||
	    !bpf_core_type_exists(struct maple_arange_64))
		return 0;
	way.entry = (uint64_t)task->mm->mm_mt.ma_root;
	if ((way.entry & 3) != 2) /* not a node: there is at most one mapping */
		return 0;
	bpf_loop(MAPLE_DEPTH_MAX, descend, &way, 0);
	return way.found ? (void *)way.entry : 0;
}

/* Is an end of the pages that contain [address, address + length) strictly inside the change? */
static __always_inline int cut(struct change *change, uint64_t address, uint64_t length)
{
	uint64_t start = address & -4096ull, end = (address + length + 4095) & -4096ull;

	return (change->start < start && start < change->end) || (change->start < end && end < change->end);
}

/* mprotect makes locked memory writable, and then breaks copy-on-write at once. */
static __always_inline int populates(struct task_struct *task, struct pt_regs *regs)
{
	return (regs->dx & PROT_WRITE) && task->mm->locked_vm;
}

/*
 * Is the change just the split of a huge page, which leaves all pages where they are? Where a system call cuts a mapping within an
 * aligned 2 MiB, the kernel reports these 2 MiB, whether there is a huge page or not.
 *
 * The current task is inside the 64-bit system call `change->syscall`, holds the mmap lock for writing, and does not reclaim memory.
 * When in doubt: no. docs/architecture.md, "Splits of huge pages", says why nothing else that these calls do passes all tests.
 */
static __always_inline int splits(struct task_struct *task, struct pt_regs *regs, struct change *change)
{
	uint64_t a = regs->di, b = regs->si, c = regs->dx;
	struct vm_area_struct *mapping;
	int populated = 0;

	if (change->end - change->start != PMD_SIZE || change->start & (PMD_SIZE - 1))
		return 0;
	switch (change->syscall) {
	case NR_mmap:
		if (!(regs->r10 & MAP_ANONYMOUS) || !(regs->r10 & MAP_FIXED))
			return 0;
		break;
	case NR_brk:
		b = 0;
		break;
	case NR_mremap:
		if (cut(change, a, c)) /* it shrinks */
			b = c;
		else if ((regs->r10 & MREMAP_FIXED) && !cut(change, a, b))
			a = regs->r8, b = c;
		break;
	case NR_madvise: /* only how the mapping is to be treated */
		if (c > MADV_SEQUENTIAL && (c < MADV_DONTFORK || c > MADV_KEEPONFORK))
			return 0;
		break;
	case NR_mprotect:
	case NR_pkey_mprotect:
		populated = populates(task, regs);
		break;
	case NR_munmap:
	case NR_mlock:
	case NR_munlock:
	case NR_mlock2:
		break;
	default:
		return 0;
	}
	if (!cut(change, a, b))
		return 0;
	mapping = mapping_at(task, change->start);
	if (!mapping || BPF_CORE_READ(mapping, vm_start) > change->start || BPF_CORE_READ(mapping, vm_end) < change->end ||
	    BPF_CORE_READ(mapping, vm_ops)) /* not anonymous: the split takes a file's pages out */
		return 0;
	if (!populated)
		return 1;
	/* Once it is both, its pages may be copied. */
	return bpf_core_field_exists(mapping->vm_flags) &&
	       (BPF_CORE_READ(mapping, vm_flags) & (VM_LOCKED | VM_WRITE)) != (VM_LOCKED | VM_WRITE);
}

/*
 * Does the change leave all pages where they are? A fork write-protects the parent's, and mprotect changes how they may be used. Both do
 * that with the mmap lock held for writing. What else may happen in these calls, or on the way out of them, does not have it: faults
 * of the kernel's own accesses to user memory, which break copy-on-write (a fork stores the child's number, a signal its frame).
 *
 * The current task is inside the 64-bit system call `change->syscall`. `blind`: memory must not be read but what the verifier
 * understands.
 */
static __always_inline int leaves_pages(struct task_struct *task, struct pt_regs *regs, struct change *change, int blind)
{
	if (!writes_mappings(task) || (task->flags & PF_MEMALLOC))
		return 0;
	switch (change->syscall) {
	case NR_fork:
	case NR_clone:
	case NR_clone3:
		return 1;
	case NR_mprotect:
	case NR_pkey_mprotect:
		if (within(change, regs->di, regs->si))
			return !populates(task, regs);
	}
	return !blind && splits(task, regs, change);
}

/*
 * Could the result be -ENOSYS already? Only if something has put it there instead of the system call: a seccomp filter or its supervisor,
 * or a debugger. See docs/architecture.md, "Inside a system call".
 */
static __always_inline int may_be_forged(struct task_struct *task)
{
	unsigned long forging;

	if (!bpf_core_field_exists(task->thread_info.syscall_work) ||
	    !bpf_core_enum_value_exists(enum syscall_work_bit, SYSCALL_WORK_BIT_SYSCALL_EMU))
		return 1;
	forging = 1ul << bpf_core_enum_value(enum syscall_work_bit, SYSCALL_WORK_BIT_SECCOMP) |
		  1ul << bpf_core_enum_value(enum syscall_work_bit, SYSCALL_WORK_BIT_SYSCALL_TRACE) |
		  1ul << bpf_core_enum_value(enum syscall_work_bit, SYSCALL_WORK_BIT_SYSCALL_EMU);
	return task->ptrace || (task->thread_info.syscall_work & forging);
}

/*
 * OWN must never be wrong; ANYBODY always is right, and only costs time. So the answer is ANYBODY unless the current task is an
 * ordinary one, inside a 64-bit system call that can change no other address space, and the change lies in what that system call was
 * told to change.
 *
 * The last condition is for what the kernel does on the side: work that other system calls left behind for this task. Any
 * system call may also reclaim memory for its own needs, from any process: PF_MEMALLOC says so. "Inside" is
 * pt_regs.ax == -ENOSYS: the entry code writes it, and the result replaces it before any such work is done on the way out.
 */
static __always_inline enum scope scope_of(struct task_struct *task, struct pt_regs *regs, struct change *change)
{
	uint64_t a = regs->di, b = regs->si, c = regs->dx;
	int own = 0;

	switch (change->syscall) {
	case NR_munmap:
		own = within(change, a, b);
		break;
	case NR_madvise:
		own = (c == MADV_DONTNEED || c == MADV_FREE || c == MADV_DONTNEED_LOCKED) && within(change, a, b);
		break;
	case NR_brk:
		own = change->start >= (a & -4096ull);
		break;
	case NR_mremap:
		own = within(change, a, b) || ((regs->r10 & MREMAP_FIXED) && within(change, regs->r8, c));
		break;
	case NR_mmap: /* of a file: its filesystem may drop cached pages that others map */
		own = (regs->r10 & MAP_ANONYMOUS) && within(change, a, b) && writes_mappings(task);
		break;
	case NR_mprotect:
	case NR_pkey_mprotect:
		own = within(change, a, b) && writes_mappings(task);
		break;
	}
	return own ? OWN : ANYBODY;
}

/* A new owner shows that it is in this address space: it zaps a page of its own with the secret it was given in an argument
 * register that the system call does not use. */
static __always_inline void shake_hands(uint64_t mm, uint64_t secret)
{
	uint32_t *id = bpf_map_lookup_elem(&handshakes, &secret);
	struct umn_fed_table *table = id ? bpf_map_lookup_elem(&tables, id) : 0;

	if (table && !table->mm) {
		note_pid_namespace(table);
		table->mm = mm;
	}
}

static __always_inline int kvm_change(uint64_t *args, int blind)
{
	struct change change = {.start = args[0], .end = args[1], .syscall = -1};
	struct umn_header *header;
	enum scope scope = ANYBODY;
	struct task_struct *task;
	struct pt_regs *regs;
	struct umn_control *ctl;
	uint32_t zero = 0;
	uint64_t mm;

	ctl = bpf_map_lookup_elem(&control, &zero);
	if (!ctl)
		return 0;
	/* The usual case, a process that feeds just itself: most changes are none of its regions', so ask that first. */
	if (ctl->sole_table && !ctl->handshakes) {
		header = header_of(ctl->sole_table - 1);
		if (header && !umn_in_hull(header, change.start, change.end))
			return 0;
	}
	task = bpf_get_current_task_btf();
	regs = (struct pt_regs *)bpf_task_pt_regs(task);
	mm = (uint64_t)task->mm;
	change.steps = ctl->steps_foreign;
	if (regs->ax == (unsigned long)-ENOSYS && !(task->flags & (PF_KTHREAD | PF_IO_WORKER | PF_MEMALLOC | PF_USER_WORKER)) &&
	    !(task->thread_info.status & TS_COMPAT)) {
		change.syscall = regs->orig_ax;
		if (leaves_pages(task, regs, &change, blind))
			return 0;
		scope = scope_of(task, regs, &change);
		if (scope == OWN && ctl->handshakes && change.syscall == NR_madvise)
			shake_hands(mm, regs->r8);
		if (scope == OWN && !writes_mappings(task) && may_be_forged(task))
			scope = ANYBODY;
	}
	if (ctl->sole_table && ctl->mm == mm)
		return feed(ctl->sole_table - 1, change.start, change.end, change.syscall, UMN_STEPS_MAX);
	if (scope == OWN)
		feed_mm(mm, &change);
	else
		bpf_loop(ctl->tables, feed_foreign, &change, 0);
	return 0;
}

SEC("raw_tp/kvm_unmap_hva_range")
int kvm(uint64_t *args)
{
	return kvm_change(args, 0);
}

/* For kernels that are locked down, where nothing may be read but what the verifier understands: the splits of huge pages count. */
SEC("raw_tp/kvm_unmap_hva_range")
int kvm_blind(uint64_t *args)
{
	return kvm_change(args, 1);
}

/* ---- What the probes below need: the kernel may skip programs at kprobes. ---- */

/*
 * The kernel does not run programs at kprobes on a CPU whose bpf_prog_active is not 0 (trace_call_bpf). Programs at kprobes
 * raise it while they run, and cannot be preempted; but so do system calls on maps (bpf_disable_instrumentation), and those
 * can. Whoever runs on that CPU then changes his memory unseen, until the other one is back and done.
 *
 * Programs at raw tracepoints run all the same. So this one looks whenever a CPU goes over to another task (and on each CPU
 * once in the beginning). While a CPU's count is raised behind the back of the task that runs there, it is counted in `doubts`,
 * and owners take no region for valid (sources/probe_gap.c). When it no longer is, everything may be invalid, and only then
 * (full barriers between) is the CPU not counted any more: an owner who finds no doubt, and after that no overflow, has
 * missed nothing. Last come the wake-ups, for whoever found out by himself that there was doubt.
 */
extern int bpf_prog_active __ksym __weak;

static long give_up_on(uint32_t id, void *unused)
{
	struct umn_fed_table *table = bpf_map_lookup_elem(&tables, &id);
	struct umn_header *header = header_of(id);

	/* As in umn_invalidate; using the results makes these ordered operations. */
	if (table && table->mm && header && __sync_fetch_and_add(&header->overflow, 1) != UINT32_MAX)
		return __sync_fetch_and_add(&header->generation, 1) == UINT64_MAX;
	return 0;
}

static long wake(uint32_t id, void *unused)
{
	struct umn_header *header = header_of(id);
	uint64_t one = 1;
	void *ring;

	if (header && UMN_LOAD(&header->armed) && __sync_lock_test_and_set(&header->armed, 0)) {
		ring = bpf_map_lookup_elem(&rings, &id);
		if (ring)
			bpf_ringbuf_output(ring, &one, sizeof one, 0);
	}
	return 0;
}

/* Returns 1 if it can do its work. */
SEC("raw_tp/sched_switch")
int doubt(void *unused)
{
	uint32_t zero = 0;
	struct umn_doubts *all = bpf_map_lookup_elem(&doubts, &zero);
	struct umn_control *ctl = bpf_map_lookup_elem(&control, &zero);
	uint32_t *doubted_here = bpf_map_lookup_elem(&doubted, &zero);
	int *active;

	if (!all || !ctl || !doubted_here || !&bpf_prog_active)
		return 0;
	active = bpf_this_cpu_ptr(&bpf_prog_active);
	if (!*active == !*doubted_here)
		return 1;
	if (*active) {
		__sync_fetch_and_add(&all->times, 1); /* ordered by the next: using the result makes it a full barrier */
		*doubted_here = __sync_fetch_and_add(&all->cpus, 1) != UINT32_MAX;
	} else {
		bpf_loop(ctl->tables, give_up_on, 0, 0);
		*doubted_here = !__sync_fetch_and_sub(&all->cpus, 1);
		bpf_loop(ctl->tables, wake, 0, 0);
	}
	return 1;
}

/* ---- The probe mmu_notifier: the function that calls all notifiers. It says whose change it is, and of what kind. ---- */

/* The current task's change of [start, end) in the address space `mm`. `may_stay`: it may leave the pages where they are. */
static __always_inline int feed_traced(struct umn_control *ctl, uint64_t mm, uint64_t start, uint64_t end, int may_stay)
{
	struct change change = {.start = start, .end = end, .syscall = -1};
	struct task_struct *task;
	struct pt_regs *regs;

	if (ctl->sole_table && !ctl->handshakes && ctl->mm != mm)
		return 0;
	task = bpf_get_current_task_btf();
	regs = (struct pt_regs *)bpf_task_pt_regs(task);
	if (mm == (uint64_t)task->mm && regs->ax == (unsigned long)-ENOSYS &&
	    !(task->flags & (PF_KTHREAD | PF_IO_WORKER | PF_USER_WORKER)) && !(task->thread_info.status & TS_COMPAT)) {
		change.syscall = regs->orig_ax;
		if (ctl->handshakes && change.syscall == NR_madvise)
			shake_hands(mm, regs->r8);
		if (may_stay && leaves_pages(task, regs, &change, 0))
			return 0;
	}
	if (ctl->sole_table && ctl->mm == mm)
		return feed(ctl->sole_table - 1, start, end, change.syscall, UMN_STEPS_MAX);
	feed_mm(mm, &change);
	return 0;
}

SEC("kprobe")
int mmu_notifier(struct pt_regs *ctx)
{
	struct mmu_notifier_range *range = (void *)ctx->di;
	uint32_t zero = 0;
	struct umn_control *ctl = bpf_map_lookup_elem(&control, &zero);
	unsigned int event = BPF_CORE_READ(range, event);

	/* The pages stay where they are: mprotect and its like; what writes protect them, as fork does; and soft-dirty. */
	if (!ctl || event == bpf_core_enum_value(enum mmu_notifier_event, MMU_NOTIFY_PROTECTION_VMA) ||
	    event == bpf_core_enum_value(enum mmu_notifier_event, MMU_NOTIFY_PROTECTION_PAGE) ||
	    event == bpf_core_enum_value(enum mmu_notifier_event, MMU_NOTIFY_SOFT_DIRTY))
		return 0;
	return feed_traced(ctl, (uint64_t)BPF_CORE_READ(range, mm), BPF_CORE_READ(range, start), BPF_CORE_READ(range, end),
			   event == bpf_core_enum_value(enum mmu_notifier_event, MMU_NOTIFY_CLEAR));
}

/* ---- The probe zap: the functions that take pages away. bpf/zap.py of the Python package says which, and how they are called. ---- */

#define ARGUMENTS 8 /* a power of two; 6 are in registers */
#define PUD_SIZE (UINT64_C(1) << 30)
#define VM_HUGETLB 0x00400000

static __always_inline uint64_t member(uint64_t structure, uint8_t number)
{
	uint64_t value = 0;

	bpf_probe_read_kernel(&value, sizeof value, (void *)(structure + 8 * number));
	return value;
}

/* A hugetlb file's blocks are its pages. */
static __always_inline uint64_t page_size_in(struct vm_area_struct *vma)
{
	unsigned int bits = BPF_CORE_READ(vma, vm_flags) & VM_HUGETLB ? BPF_CORE_READ(vma, vm_file, f_inode, i_blkbits) : 0;

	return bits > 12 && bits < 63 ? UINT64_C(1) << bits : 4096;
}

/* No less than the folio has; whoever unmaps it has it locked, so that it will not be split meanwhile. */
static __always_inline uint64_t size_of(struct folio *folio)
{
	struct folio___memdesc *newer = (void *)folio;
	uint64_t flags = 0, order;

	if (!bpf_core_enum_value_exists(enum pageflags, PG_head))
		return PUD_SIZE;
	/* The first word of each page, whatever its type is called. */
	bpf_probe_read_kernel(&flags, sizeof flags, folio);
	if (!(flags >> (bpf_core_enum_value(enum pageflags, PG_head) & 63) & 1))
		return 4096;
	if (bpf_core_field_exists(folio->_folio_order)) /* before Linux 6.6 */
		order = BPF_CORE_READ(folio, _folio_order);
	else if (bpf_core_field_exists(newer->_flags_1.f)) /* since Linux 6.18 */
		order = BPF_CORE_READ(newer, _flags_1.f) & 0xff;
	else if (bpf_core_field_exists(folio->_flags_1))
		order = BPF_CORE_READ(folio, _flags_1) & 0xff;
	else
		return PUD_SIZE;
	return order < 18 ? 4096ull << order : PUD_SIZE;
}

SEC("kprobe")
int zap(struct pt_regs *ctx)
{
	uint64_t arguments[ARGUMENTS] = {ctx->di, ctx->si, ctx->dx, ctx->cx, ctx->r8, ctx->r9};
	union {
		uint64_t cookie;
		struct umn_call call;
	} how = {.cookie = bpf_get_attach_cookie(ctx)};
	uint64_t mm, whose, start, end, last, size;
	uint32_t zero = 0;
	struct umn_control *ctl = bpf_map_lookup_elem(&control, &zero);

	if (!ctl)
		return 0;
	whose = arguments[how.call.whose % ARGUMENTS];
	if (how.call.type == UMN_OF_MM)
		mm = whose;
	else
		mm = member(whose, how.call.members[0]);
	if (how.call.type == UMN_OF_MOVE) /* that was a vm_area_struct */
		mm = (uint64_t)BPF_CORE_READ((struct vm_area_struct *)mm, vm_mm);
	if (ctl->sole_table && !ctl->handshakes && ctl->mm != mm)
		return 0;
	start = arguments[how.call.start % ARGUMENTS];
	last = arguments[how.call.last % ARGUMENTS];
	switch (how.call.extent) {
	case UMN_TO_END:
		end = last;
		break;
	case UMN_TO_LENGTH:
		end = start + last;
		break;
	case UMN_TO_PAGE:
		size = page_size_in((struct vm_area_struct *)whose);
		start &= -size;
		end = start + size;
		break;
	case UMN_TO_PMD:
		start &= -PMD_SIZE;
		end = start + PMD_SIZE;
		break;
	case UMN_TO_PUD:
		start &= -PUD_SIZE;
		end = start + PUD_SIZE;
		break;
	case UMN_TO_FOLIO:
		end = start + size_of((struct folio *)last);
		break;
	case UMN_TO_MOVED:
		start = member(whose, how.call.members[1]);
		end = member(whose, how.call.members[2]);
		break;
	default: /* nothing that the loader says */
		start = 0;
		end = UINT64_MAX;
	}
	return feed_traced(ctl, mm, start, end, 0);
}
