// SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only
/*
 * The feeder in the kernel: from an MMU notification to invalidated slots.
 *
 * Kernel structures are declared here with just the fields that are used; CO-RE finds their offsets in the running kernel.
 */
#include "bpf/types.h"
#define BPF_MAP_TYPE_HASH 1
#define BPF_MAP_TYPE_ARRAY 2
#define BPF_MAP_TYPE_PERCPU_ARRAY 6
#define BPF_MAP_TYPE_ARRAY_OF_MAPS 12
#define BPF_MAP_TYPE_RINGBUF 27
#define BPF_F_MMAPABLE (1u << 10)
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#include "abi/maps.h"
#include "abi/protocol.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";
const char version[] SEC("ummunotify") = UMN_OBJECT_VERSION;

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
/* x86-64's */
struct pt_regs {
	unsigned long r10, r9, r8, ax, cx, dx, si, di, orig_ax, sp;
};
struct pt_regs___arm64 {
	unsigned long regs[31], pstate, orig_x0;
	int syscallno;
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
struct atomic {
	int counter;
};
struct mm_context {
	__u64 ctx_id; /* of x86 */
};
struct user_namespace;
struct mm_struct {
	struct atomic mm_users;
	void *pgd;
	struct user_namespace *user_ns;
	unsigned long mmap_base;
	struct mm_context context;
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
struct seccomp {
	int mode;
};
struct task_struct {
	struct thread_info thread_info;
	unsigned int flags;
	unsigned int ptrace;
	struct seccomp seccomp;
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
enum mmu_notifier_event {
	MMU_NOTIFY_CLEAR = 1,
	MMU_NOTIFY_PROTECTION_VMA = 2,
	MMU_NOTIFY_PROTECTION_PAGE = 3,
	MMU_NOTIFY_SOFT_DIRTY = 4
};
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
struct list_head {
	struct list_head *next;
};
struct wait_queue_head {
	struct list_head head;
};
struct wait_queue_entry {
	struct list_head entry;
};
struct bpf_ringbuf {
	struct wait_queue_head waitq;
};
struct bpf_ringbuf_map {
	struct bpf_ringbuf *rb;
};
struct eventpoll {
	struct wait_queue_head poll_wait;
};
struct eppoll_entry;
struct epitem {
	struct eppoll_entry *pwqlist;
	struct eventpoll *ep;
};
struct eppoll_entry {
	struct epitem *base;
	struct wait_queue_entry wait;
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
/* An address space's first table, plus 1, by its number (space_of). */
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

/* The tables whose owners are still to be woken up. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, uint32_t);
	__type(value, uint32_t);
} due SEC(".maps");
/* There are such tables. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, uint32_t);
	__type(value, uint32_t);
} any_due SEC(".maps");
/* By which the daemon learns of them. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, UMN_RING_BYTES);
} relay SEC(".maps");

/* See `probe_gap` below. The daemon's clients can map it, too: it is frozen, so only programs can write it. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, uint32_t);
	__type(value, struct umn_probe_gaps);
} probe_gaps SEC(".maps");
/* Is this CPU one of those that `probe_gaps` counts? */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, uint32_t);
	__type(value, uint32_t);
} gap_on_cpu SEC(".maps");

/* ---- The feeder. ---- */

#define UMN_WALK_FIELDS uint32_t segments_at; /* the table's first entry in `segments` */
#define UMN_INLINE __always_inline
#define UMN_LOAD(p) (*(volatile __typeof__(*(p)) *)(p))
#define UMN_STORE(p, v) (*(volatile __typeof__(*(p)) *)(p) = (v))
/* The address depends on v, which Arm respects; x86 does loads in order anyway. */
#define UMN_AFTER(p, v)                                                                                                            \
	({                                                                                                                         \
		uint64_t none_ = (v);                                                                                              \
		asm volatile("%0 &= 0" : "+r"(none_));                                                                             \
		(__typeof__(p))((uint64_t)(p) + none_);                                                                            \
	})
#define UMN_PREFETCH(p) ((void)UMN_LOAD(p)) /* nothing waits for what is not used */
#define UMN_OPAQUE(v) asm volatile("" : "+r"(v))
#define UMN_UNROLL _Pragma("clang loop unroll(full)")
#define UMN_REPEAT(n, f, w) bpf_loop(n, f, w, 0)
struct umn_walk;
static __always_inline struct umn_node *umn_node_at(struct umn_walk *w, uint32_t ref);
static __always_inline struct umn_slot *umn_slot_at(struct umn_walk *w, uint32_t ref);
static __always_inline uint32_t umn_descend(struct umn_walk *w, uint32_t ref);
static __always_inline uint32_t umn_thread_number(struct umn_walk *w);
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

/* A global function, so that the verifier looks at it once. */
__attribute__((noinline)) uint32_t descend_index(uint32_t segments_at, uint32_t ref, uint64_t start, uint64_t end)
{
	struct umn_walk w = {.segments_at = segments_at, .start = start, .end = end};

	return umn_descend_from(&w, ref);
}

static __always_inline uint32_t umn_descend(struct umn_walk *w, uint32_t ref)
{
	return descend_index(w->segments_at, ref, w->start, w->end);
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

/* A global function, so that the verifier looks at it once. */
__attribute__((noinline)) uint32_t thread_for_table(uint32_t id)
{
	struct umn_fed_table *table = bpf_map_lookup_elem(&tables, &id);

	return table ? thread_for(table) : 0;
}

static __always_inline uint32_t umn_thread_number(struct umn_walk *w)
{
	return thread_for_table(w->segments_at / UMN_SEGMENTS);
}

/* ---- Which address space? ---- */

/*
 * An address space's number: never 0, and the same from exec or fork to the end. The mm_struct's address would not do: the next process may
 * get it, and with that the tables of one that has ended.
 *
 * x86 numbers them for its TLBs, from 1, in 64 bits (init_new_context), when they are made, and no number is used twice. Elsewhere it
 * is made from what stays the same as long as there is the address space: where the mm_struct, its page table and its user
 * namespace are, and the place that exec has chosen at random for its mappings. docs/architecture.md, "Which address space?", says
 * what follows where the number of one that has ended comes again.
 *
 * Differences, as the verifier does not let a pointer be multiplied.
 */
static __always_inline uint64_t space_from(uint64_t page_table, uint64_t user_namespace, uint64_t mmap_base)
{
	return (page_table * UINT64_C(0x9e3779b97f4a7c15) + user_namespace * UINT64_C(0xc2b2ae3d27d4eb4f) +
		mmap_base * UINT64_C(0xd6e8feb86659fd93)) |
	       1;
}

static __always_inline uint64_t space_of(struct mm_struct *mm)
{
	if (!mm)
		return 0;
	if (bpf_core_field_exists(mm->context.ctx_id))
		return mm->context.ctx_id;
	return space_from((uint64_t)mm->pgd - (uint64_t)mm, (uint64_t)mm->user_ns - (uint64_t)mm, mm->mmap_base);
}

/* The same, of an mm_struct that is not the current task's. */
static __always_inline uint64_t space_at(uint64_t address)
{
	struct mm_struct *mm = (struct mm_struct *)address;

	if (bpf_core_field_exists(mm->context.ctx_id))
		return BPF_CORE_READ(mm, context.ctx_id);
	return space_from((uint64_t)BPF_CORE_READ(mm, pgd) - address, (uint64_t)BPF_CORE_READ(mm, user_ns) - address,
			  BPF_CORE_READ(mm, mmap_base));
}

/*
 * The first table, from args[0] on, whose address space has ended, plus 1; 0: there is none. Attached to nothing: the daemon runs it.
 *
 * An address space that has not ended has a user, and its mm_struct is where it was. So what is read there is the truth. Of one that has
 * ended whatever is read will do: at worst a table stays bound to a number that nothing has any more.
 */
struct search {
	uint32_t table; /* the next */
	uint32_t found; /* plus 1 */
	uint32_t left;	/* see try_wakeup */
};

static long find_ended(uint32_t unused, struct search *search)
{
	uint32_t id = search->table++;
	struct umn_fed_table *table = bpf_map_lookup_elem(&tables, &id);
	struct mm_struct *mm;

	if (!table || !table->space)
		return 0;
	mm = (struct mm_struct *)table->mm;
	if (space_at(table->mm) == table->space && BPF_CORE_READ(mm, mm_users.counter) > 0)
		return 0;
	search->found = id + 1;
	return 1;
}

SEC("raw_tp/none")
int ended(uint64_t *args)
{
	struct search search = {.table = args[0]};
	uint32_t zero = 0;
	struct umn_control *ctl = bpf_map_lookup_elem(&control, &zero);

	if (ctl)
		bpf_loop(ctl->tables, find_ended, &search, 0);
	return search.found;
}

/* ---- Waking owners up. ---- */

/*
 * A wake-up runs on this CPU, as soon as interrupts are on, and takes time for each that waits: threads in poll, epolls, and what waits
 * for those, of which a user can make millions. So these are counted before, and a change pays for a limited number. Wake-ups that
 * are over it are noted down. The daemon sends them, and changes that come later do. Between the count and the wake-up there is time
 * for a few more to begin to wait.
 *
 * Nothing keeps the lists from changing meanwhile. A count that goes astray comes to its limit, or to memory that cannot be read.
 */
#define WAIT_LEVELS 8 /* a power of two, and more than the kernel lets epolls be nested */
struct count {
	uint64_t head[WAIT_LEVELS], at[WAIT_LEVELS]; /* the lists that this is in: the first is the wake-up's */
	uint32_t level;
	uint32_t found;
	uint32_t done;
};
/* Not on the stack, which is too small. Should another program use it meanwhile, which can only be where programs can be preempted, both
 * counts are wrong. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, uint32_t);
	__type(value, struct count);
} counts SEC(".maps");

static long count_next(uint32_t unused, void *context)
{
	uint32_t zero = 0, level;
	struct count *count = bpf_map_lookup_elem(&counts, &zero);
	uint64_t at, eppoll, item = 0, list = 0, ep = 0, head;

	if (!count)
		return 1;
	level = count->level & (WAIT_LEVELS - 1);
	at = count->at[level];
	if (at == count->head[level]) {
		count->done = !level;
		count->level = level - 1;
		return !level;
	}
	count->found++;
	if (bpf_probe_read_kernel(&count->at[level], sizeof at, (void *)(at + bpf_core_field_offset(struct list_head, next))))
		return 1;
	/* Is it an epoll's? What an epoll waits with and its item point to each other. */
	eppoll = at - bpf_core_field_offset(struct wait_queue_entry, entry) - bpf_core_field_offset(struct eppoll_entry, wait);
	bpf_probe_read_kernel(&item, sizeof item, (void *)(eppoll + bpf_core_field_offset(struct eppoll_entry, base)));
	bpf_probe_read_kernel(&list, sizeof list, (void *)(item + bpf_core_field_offset(struct epitem, pwqlist)));
	if (list != eppoll)
		return 0;
	if (bpf_probe_read_kernel(&ep, sizeof ep, (void *)(item + bpf_core_field_offset(struct epitem, ep))) ||
	    level == WAIT_LEVELS - 1)
		return 1;
	head = ep + bpf_core_field_offset(struct eventpoll, poll_wait) + bpf_core_field_offset(struct wait_queue_head, head);
	level = (level + 1) & (WAIT_LEVELS - 1);
	count->head[level] = head;
	count->level = level;
	return bpf_probe_read_kernel(&count->at[level], sizeof head,
				     (void *)(head + bpf_core_field_offset(struct list_head, next))) != 0;
}

/* How many wait for the table's ring, or more than `most`. A global function, so that the verifier looks at it once. */
__attribute__((noinline)) int count_waiters(uint32_t id, uint32_t most)
{
	uint32_t zero = 0;
	void *ring = bpf_map_lookup_elem(&rings, &id);
	struct count *count = bpf_map_lookup_elem(&counts, &zero);
	struct bpf_ringbuf *rb;
	uint64_t head;

	if (!ring || !count || !bpf_core_type_exists(struct bpf_ringbuf_map) || !bpf_core_type_exists(struct eppoll_entry) ||
	    !bpf_core_field_exists(((struct epitem *)0)->pwqlist))
		return 0;
	rb = ((struct bpf_ringbuf_map *)ring)->rb;
	head = (uint64_t)rb + bpf_core_field_offset(struct bpf_ringbuf, waitq) +
	       bpf_core_field_offset(struct wait_queue_head, head);
	count->level = count->found = count->done = 0;
	count->head[0] = head;
	if (bpf_probe_read_kernel(&count->at[0], sizeof head, (void *)(head + bpf_core_field_offset(struct list_head, next))))
		return most + 1;
	/* Each takes one step, and one for the end of its list. */
	bpf_loop(2 * most + 1, count_next, 0, 0);
	return count->done ? count->found : most + 1;
}

/* Sends the wake-up if `*left`, what may still be paid for that, is enough. Nothing is counted if that is UINT32_MAX, or if memory must
 * not be read but what the verifier understands (`no_reads`). */
static __always_inline int try_wakeup(uint32_t id, uint32_t *left, int no_reads)
{
	void *ring = bpf_map_lookup_elem(&rings, &id);
	uint32_t cost = UMN_WAKEUP_COST;
	uint64_t wake = 1;

	if (!ring)
		return 1;
	if (*left == UINT32_MAX)
		cost = 0;
	else if (!no_reads)
		cost += (uint32_t)count_waiters(id, *left);
	if (cost > *left) {
		*left -= *left / 4; /* to count takes less than to wake up */
		return 0;
	}
	*left -= cost;
	bpf_ringbuf_output(ring, &wake, sizeof wake, 0);
	return 1;
}

/* Wakes the table's owner up, now or later. */
static __always_inline void send_wakeup(uint32_t id, uint32_t *left, int no_reads)
{
	uint32_t *is_due, *any, zero = 0;
	uint64_t wake = 1;

	if (try_wakeup(id, left, no_reads))
		return;
	is_due = bpf_map_lookup_elem(&due, &id);
	any = bpf_map_lookup_elem(&any_due, &zero);
	/* In this order (full barriers): a search that has cleared the second, and missed the first, is followed by another. */
	if (is_due && any && __sync_lock_test_and_set(is_due, 1) != UINT32_MAX && !__sync_lock_test_and_set(any, 1))
		bpf_ringbuf_output(&relay, &wake, sizeof wake, 0);
}

static __always_inline long wake_due(struct search *search, int no_reads)
{
	uint32_t zero = 0, id = search->table++, *is_due = bpf_map_lookup_elem(&due, &id);
	struct umn_control *ctl = bpf_map_lookup_elem(&control, &zero);
	struct umn_header *header;
	uint32_t before = search->left;

	if (!ctl || !is_due || !UMN_LOAD(is_due) || !__sync_lock_test_and_set(is_due, 0) || try_wakeup(id, &search->left, no_reads))
		return 0;
	if (before == ctl->waiters_relay) {
		/* Too many wait for it. The next change tries again. */
		header = header_of(id);
		if (header)
			UMN_STORE(&header->armed, 1);
		return 0;
	}
	__sync_lock_test_and_set(is_due, 1);
	search->found = id + 1;
	return 1;
}

static long wake_next_due(uint32_t unused, struct search *search)
{
	return wake_due(search, 0);
}

static long wake_next_due_no_reads(uint32_t unused, struct search *search)
{
	return wake_due(search, 1);
}

/* Wakes up owners that were not when they should have been, from table args[0] on. Returns with which to go on, or 0: that was all.
 * Attached to nothing: the daemon runs it. */
static __always_inline int wake_all(uint64_t *args, int no_reads)
{
	struct search search = {.table = args[0]};
	uint32_t zero = 0, *any = bpf_map_lookup_elem(&any_due, &zero);
	struct umn_control *ctl = bpf_map_lookup_elem(&control, &zero);

	if (!ctl || !any)
		return 0;
	/* A full barrier: see send_wakeup. */
	if (!search.table && __sync_lock_test_and_set(any, 0) == UINT32_MAX)
		return 0;
	search.left = ctl->waiters_relay;
	if (no_reads)
		bpf_loop(ctl->tables, wake_next_due_no_reads, &search, 0);
	else
		bpf_loop(ctl->tables, wake_next_due, &search, 0);
	return search.found ? search.found - 1 : 0;
}

SEC("raw_tp/none")
int wake_all_due(uint64_t *args)
{
	return wake_all(args, 0);
}

SEC("raw_tp/none")
int wake_all_due_no_reads(uint64_t *args)
{
	return wake_all(args, 1);
}

/* ---- Feeding tables. ---- */

struct change {
	uint64_t start, end;
	int32_t syscall; /* as it is reported: by the architecture's number */
	int32_t call;	 /* the same as one of NR_*, by which it is judged; -1: any other, or none */
	uint32_t page_shift;
	uint32_t own;	/* the current task changes its own memory */
	uint32_t share; /* the most steps in one table */
	uint32_t left;	/* steps in all tables */
	uint32_t table; /* the next of the address space's, plus 1; or the first of `tables` */
	uint32_t tables;
	uint32_t waiters; /* see send_wakeup */
};

/* Any region may be invalid. As in umn_invalidate; using the results makes these ordered operations. Returns 1. */
static __always_inline int give_up(struct umn_header *header)
{
	uint32_t overflow = __sync_fetch_and_add(&header->overflow, 1) + 1;

	if (__sync_fetch_and_add(&header->generation, 1) != UINT64_MAX)
		UMN_STORE(&header->given_up, overflow);
	return 1;
}

/*
 * May the table's owner know what the current task changes in its own memory? A second wall behind the number of the address space. A
 * process can become another user only with privileges, so its table was mostly opened by root. Of others the table gives up.
 */
static __always_inline int is_for(struct umn_fed_table *table)
{
	return !table->uid || table->uid == (uint32_t)bpf_get_current_uid_gid();
}

/* What the change may take: in the tables of the address space that makes it, or in all. */
static __always_inline void pays(struct change *change, struct umn_control *ctl, int own)
{
	change->share = own ? ctl->steps_own : ctl->steps_share;
	change->left = own ? ctl->steps_own : ctl->steps_foreign;
	change->waiters = own ? ctl->waiters_own : ctl->waiters_foreign;
}

/* What is charged for a table at least: finding it, counting in and out, and telling it. */
#define STEPS_LEAST 8

/* One table's share of a change. */
static __always_inline int feed_table(uint32_t id, struct change *change, int no_reads)
{
	struct umn_fed_table *table = bpf_map_lookup_elem(&tables, &id);
	struct umn_walk w = {.segments_at = id * UMN_SEGMENTS};
	uint32_t steps;
	int wake;

	if (!change || !table || !table->space)
		return 0;
	w.start = change->start;
	w.end = change->end;
	w.syscall = change->syscall;
	w.header = header_of(id);
	if (!w.header || !umn_in_hull(w.header, w.start, w.end))
		return 0;
	steps = change->share < table->cells ? change->share : table->cells;
	if (change->left < steps)
		steps = change->left;
	if (!change->own && umn_all_invalid(w.header)) {
		wake = __sync_fetch_and_add(&w.header->generation, 1) != UINT64_MAX && umn_disarm(w.header);
	} else if (!steps || (change->own && !is_for(table))) {
		wake = give_up(w.header) && umn_disarm(w.header);
	} else {
		wake = umn_invalidate(&w, steps);
		steps = w.taken < STEPS_LEAST ? STEPS_LEAST : w.taken;
		change->left -= steps < change->left ? steps : change->left;
	}
	if (wake)
		send_wakeup(id, &change->waiters, no_reads);
	return 0;
}

/* Global functions, so that the verifier looks at them once. */
__attribute__((noinline)) int feed(uint32_t id, struct change *change)
{
	return feed_table(id, change, 0);
}

__attribute__((noinline)) int feed_no_reads(uint32_t id, struct change *change)
{
	return feed_table(id, change, 1);
}

/* The tables of one address space. They take `left` steps together, and those that come after that give up. */
static __always_inline long go_on(struct change *change, uint32_t id)
{
	struct umn_fed_table *table = bpf_map_lookup_elem(&tables, &id);

	change->table = table ? table->next : 0;
	return !change->table;
}

static long feed_next(uint32_t unused, struct change *change)
{
	uint32_t id = change->table - 1;

	feed(id, change);
	return go_on(change, id);
}

static long feed_next_no_reads(uint32_t unused, struct change *change)
{
	uint32_t id = change->table - 1;

	feed_no_reads(id, change);
	return go_on(change, id);
}

/* All tables, beginning with one at random: if `left` is used up, it is not always the same that give up. */
static __always_inline uint32_t foreign(uint32_t number, struct change *change)
{
	uint32_t id = number + change->table;

	return id < change->tables ? id : id - change->tables;
}

static long feed_foreign(uint32_t number, struct change *change)
{
	feed(foreign(number, change), change);
	return 0;
}

static long feed_foreign_no_reads(uint32_t number, struct change *change)
{
	feed_no_reads(foreign(number, change), change);
	return 0;
}

static __always_inline void feed_all(struct umn_control *ctl, struct change *change, int no_reads)
{
	uint32_t zero = 0, *any = bpf_map_lookup_elem(&any_due, &zero);
	struct search search = {};

	change->tables = ctl->tables;
	if (!change->tables)
		return;
	change->table = bpf_get_prandom_u32() % change->tables;
	if (no_reads)
		bpf_loop(change->tables, feed_foreign_no_reads, change, 0);
	else
		bpf_loop(change->tables, feed_foreign, change, 0);
	/* Should the daemon have ended: what is left of this change's wake-ups is for those that are due. */
	if (!any || !UMN_LOAD(any) || !change->waiters)
		return;
	search.table = change->table;
	search.left = change->waiters;
	if (no_reads)
		bpf_loop(change->tables, wake_next_due_no_reads, &search, 0);
	else
		bpf_loop(change->tables, wake_next_due, &search, 0);
}

/*
 * The tables of an address space. The kernel reuses a hash map's elements at once, so the element that was looked up may be another
 * address space's when it is read. The table itself says whose it is: if it is not this one's, all tables are fed.
 */
static __always_inline void feed_space(struct umn_control *ctl, uint64_t space, struct change *change, int no_reads)
{
	uint32_t *first = bpf_map_lookup_elem(&owners, &space), id;
	struct umn_fed_table *table;

	if (!first)
		return;
	change->table = UMN_LOAD(first);
	id = change->table - 1;
	table = bpf_map_lookup_elem(&tables, &id);
	if (!table || table->space != space) {
		change->own = 0;
		pays(change, ctl, 0);
		feed_all(ctl, change, no_reads);
	} else if (no_reads) {
		bpf_loop(UMN_TABLES_PER_MM_MAX, feed_next_no_reads, change, 0);
	} else {
		bpf_loop(UMN_TABLES_PER_MM_MAX, feed_next, change, 0);
	}
}

/* ---- Whose change is it? The kvm probe does not say, so it has to follow from what the current task is doing. ---- */

enum scope { OWN, ANYBODY };

#define PF_IO_WORKER 0x00000010
#define PF_MEMALLOC 0x00000800 /* reclaiming or compacting memory, anybody's, to get some for itself */
#define PF_USER_WORKER 0x00004000
#define PF_KTHREAD 0x00200000
#define TS_COMPAT 0x0002 /* in a 32-bit system call: other numbers */
#define ENOSYS 38

/* What the program goes by: x86-64's numbers. */
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

/* Of the 64-bit system calls that x86-64 and arm64 have in common; the others are not asked for. */
static __always_inline int32_t call_of_arm64(int32_t number)
{
	switch (number) {
	case 215:
		return NR_munmap;
	case 220:
		return NR_clone;
	case 226:
		return NR_mprotect;
	case 228:
		return NR_mlock;
	case 229:
		return NR_munlock;
	case 233:
		return NR_madvise;
	case 284:
		return NR_mlock2;
	case 288:
		return NR_pkey_mprotect;
	case 435:
		return NR_clone3;
	}
	return -1; /* also of brk, mmap and mremap: see inside_call */
}

/* Argument `number`, a constant, of the system call or of the function. What follows each load keeps the compiler from making one
 * load of all, from an address that the verifier does not know. */
static __always_inline uint64_t argument(struct pt_regs *regs, int number, int of_function)
{
	uint64_t value;

	if (!bpf_core_field_exists(regs->orig_ax)) {
		value = ((struct pt_regs___arm64 *)regs)->regs[number];
		UMN_OPAQUE(value);
		return value;
	}
	if (number == 0)
		value = regs->di;
	else if (number == 1)
		value = regs->si;
	else if (number == 2)
		value = regs->dx;
	else if (number == 3)
		value = of_function ? regs->cx : regs->r10;
	else if (number == 4)
		value = regs->r8;
	else
		value = regs->r9;
	UMN_OPAQUE(value);
	return value;
}

#define PSR_MODE32_BIT 0x10
#define PID_MAX_LIMIT (1u << 22)
#define MAX_ERRNO 4095

/*
 * Is the current task inside a 64-bit system call? Notes which one. docs/architecture.md, "Inside a system call".
 *
 * On x86 that is pt_regs.ax == -ENOSYS: the entry code writes it, and the result replaces it before any work is done on the way out.
 *
 * On arm64 the call's number outlasts the call, but its first argument stays in x0 only until the result replaces it. So the
 * argument says "inside" where it is nothing that the call can return: neither an error, nor 0, nor a process's number. brk, mmap
 * and mremap may return what they were given, so nothing is concluded from them.
 */
static __always_inline int inside_call(struct task_struct *task, struct pt_regs *regs, struct change *change)
{
	struct pt_regs___arm64 *arm64 = (void *)regs;

	if (task->flags & (PF_KTHREAD | PF_IO_WORKER | PF_USER_WORKER))
		return 0;
	if (bpf_core_field_exists(regs->orig_ax)) {
		if (regs->ax != (unsigned long)-ENOSYS || (task->thread_info.status & TS_COMPAT))
			return 0;
		change->syscall = change->call = regs->orig_ax;
		return 1;
	}
	if (!bpf_core_field_exists(arm64->syscallno) || arm64->syscallno < 0 || (arm64->pstate & PSR_MODE32_BIT) ||
	    arm64->regs[0] != arm64->orig_x0 || arm64->regs[0] < PID_MAX_LIMIT || arm64->regs[0] >= (unsigned long)-MAX_ERRNO)
		return 0;
	change->syscall = arm64->syscallno;
	change->call = call_of_arm64(arm64->syscallno);
	return 1;
}

#define PTRS_SHIFT 3 /* an entry of a page table has 8 bytes */

/* What a page, and what an entry of the next two levels of a page table maps. Each table fills a page. */
static __always_inline uint64_t page_size(uint32_t page_shift)
{
	return 1ull << (page_shift & 63);
}

static __always_inline uint64_t pmd_size(uint32_t page_shift)
{
	return page_size(2 * page_shift - PTRS_SHIFT);
}

static __always_inline uint64_t pud_size(uint32_t page_shift)
{
	return page_size(3 * page_shift - 2 * PTRS_SHIFT);
}

/* The pages that contain [address, address + length). */
static __always_inline uint64_t pages_start(struct change *change, uint64_t address)
{
	return address & -page_size(change->page_shift);
}

static __always_inline uint64_t pages_end(struct change *change, uint64_t address, uint64_t length)
{
	return (address + length + page_size(change->page_shift) - 1) & -page_size(change->page_shift);
}

static __always_inline int within(struct change *change, uint64_t address, uint64_t length)
{
	return change->start >= pages_start(change, address) && change->end <= pages_end(change, address, length);
}

/* ---- What leaves all pages where they are. ---- */

#define VM_WRITE 0x2
#define VM_MAYEXEC 0x40
#define VM_MAYSHARE 0x80
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
	uint64_t start = pages_start(change, address), end = pages_end(change, address, length);

	return (change->start < start && start < change->end) || (change->start < end && end < change->end);
}

/* mprotect makes locked memory writable, and then breaks copy-on-write at once. */
static __always_inline int populates(struct task_struct *task, struct pt_regs *regs)
{
	return (argument(regs, 2, 0) & PROT_WRITE) && task->mm->locked_vm;
}

/*
 * Is the change, of an aligned 2 MiB, just the split of a huge page, which leaves all pages where they are? Where a system call cuts a
 * mapping within an aligned 2 MiB, the kernel reports these 2 MiB, whether there is a huge page or not.
 *
 * The current task is inside the 64-bit system call `change->syscall`, holds the mmap lock for writing, and does not reclaim memory.
 * If it is not certain: no. docs/architecture.md, "Splits of huge pages", says why nothing else that these calls do passes all tests.
 */
static __always_inline int splits(struct task_struct *task, struct pt_regs *regs, struct change *change)
{
	uint64_t a = argument(regs, 0, 0), b = argument(regs, 1, 0), c = argument(regs, 2, 0);
	struct vm_area_struct *mapping;
	int populated = 0;

	switch (change->call) {
	case NR_mmap:
		if (!(argument(regs, 3, 0) & MAP_ANONYMOUS) || !(argument(regs, 3, 0) & MAP_FIXED))
			return 0;
		break;
	case NR_brk:
		b = 0;
		break;
	case NR_mremap:
		if (cut(change, a, c)) /* it shrinks */
			b = c;
		else if ((argument(regs, 3, 0) & MREMAP_FIXED) && !cut(change, a, b))
			a = argument(regs, 4, 0), b = c;
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

/* A global function, so that the verifier looks at it once, and at what follows for two results rather than for each way to them. */
__attribute__((noinline)) int is_split(uint64_t start, uint64_t end, int32_t call, uint32_t page_shift)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct change change = {.start = start, .end = end, .call = call, .page_shift = page_shift};

	return splits(task, (struct pt_regs *)bpf_task_pt_regs(task), &change);
}

/*
 * Could the kernel put a uprobe into the page at this address? mprotect makes it do so, with the lock held for writing, where a part
 * of a file becomes part of a mapping that can have one (valid_vma): the page is replaced, and a huge page is split before. A global
 * function, as above.
 */
__attribute__((noinline)) int may_be_probed(uint64_t address)
{
	struct vm_area_struct *mapping = mapping_at(bpf_get_current_task_btf(), address);

	return !mapping || !bpf_core_field_exists(mapping->vm_flags) ||
	       (BPF_CORE_READ(mapping, vm_file) &&
		(BPF_CORE_READ(mapping, vm_flags) & (VM_WRITE | VM_MAYEXEC | VM_MAYSHARE)) == VM_MAYEXEC);
}

/* The change is in what mprotect was told to change. Could it be more than how the pages may be used? */
static __always_inline int replaces_pages(struct task_struct *task, struct pt_regs *regs, struct change *change, int no_reads)
{
	uint64_t size = change->end - change->start;

	return populates(task, regs) || ((size == page_size(change->page_shift) || size == pmd_size(change->page_shift)) &&
					 (no_reads || may_be_probed(change->start)));
}

/*
 * Does the change leave all pages where they are? A fork write-protects the parent's, and mprotect changes how they may be used. Both do
 * that with the mmap lock held for writing. What else may happen in these calls, or on the way out of them, does not have it: faults
 * of the kernel's own accesses to user memory, which break copy-on-write (a fork stores the child's number, a signal its frame). But
 * for uprobes, see above.
 *
 * The current task is inside the 64-bit system call `change->syscall`. `no_reads`: memory must not be read but what the verifier
 * understands. `clears`: it is known that this is no change of how pages may be used.
 */
static __always_inline int leaves_pages(struct task_struct *task, struct pt_regs *regs, struct change *change, int no_reads,
					int clears)
{
	if (!writes_mappings(task) || (task->flags & PF_MEMALLOC))
		return 0;
	switch (change->call) {
	case NR_fork:
	case NR_clone:
	case NR_clone3:
		return 1;
	case NR_mprotect:
	case NR_pkey_mprotect:
		if (!clears && within(change, argument(regs, 0, 0), argument(regs, 1, 0)))
			return !replaces_pages(task, regs, change, no_reads);
	}
	return !no_reads && change->end - change->start == pmd_size(change->page_shift) &&
	       !(change->start & (pmd_size(change->page_shift) - 1)) &&
	       is_split(change->start, change->end, change->call, change->page_shift);
}

/*
 * Could the result be -ENOSYS already? Only if something has put it there instead of the system call: a seccomp filter or its supervisor,
 * or a debugger. See docs/architecture.md, "Inside a system call".
 */
static __always_inline int may_be_forged(struct task_struct *task)
{
	unsigned long forging;

	/* On arm64 the bits have no names in BTF. They are set while there is a filter or a debugger. */
	if (!bpf_core_field_exists(task->thread_info.syscall_work) && bpf_core_field_exists(task->seccomp.mode))
		return task->ptrace || task->seccomp.mode;
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
 * system call may also reclaim memory for its own needs, from any process: PF_MEMALLOC says so. "Inside": see inside_call.
 */
static __always_inline enum scope scope_of(struct task_struct *task, struct pt_regs *regs, struct change *change)
{
	uint64_t a = argument(regs, 0, 0), b = argument(regs, 1, 0), c = argument(regs, 2, 0);
	int own = 0;

	switch (change->call) {
	case NR_munmap:
		own = within(change, a, b);
		break;
	case NR_madvise:
		own = (c == MADV_DONTNEED || c == MADV_FREE || c == MADV_DONTNEED_LOCKED) && within(change, a, b);
		break;
	case NR_brk:
		own = change->start >= pages_start(change, a);
		break;
	case NR_mremap:
		own = within(change, a, b) || ((argument(regs, 3, 0) & MREMAP_FIXED) && within(change, argument(regs, 4, 0), c));
		break;
	case NR_mmap: /* of a file: its filesystem may drop cached pages that others map */
		own = (argument(regs, 3, 0) & MAP_ANONYMOUS) && within(change, a, b) && writes_mappings(task);
		break;
	case NR_mprotect:
	case NR_pkey_mprotect:
		own = within(change, a, b) && writes_mappings(task);
		break;
	}
	return own ? OWN : ANYBODY;
}

/*
 * A new owner shows that it is in this address space: it zaps a page of its own with the secret it was given in an argument
 * register that the system call does not use. The first that shows it takes it; so nothing is written to the table after the owner
 * has been told that it was seen. To take it is also the proof that the table is the secret's: the kernel reuses a hash map's
 * elements at once, so what was looked up may be another handshake's by now.
 */
static __always_inline void shake_hands(struct task_struct *task, uint64_t secret)
{
	uint32_t *id = bpf_map_lookup_elem(&handshakes, &secret);
	struct umn_fed_table *table = id ? bpf_map_lookup_elem(&tables, id) : 0;

	if (!table || __sync_val_compare_and_swap(&table->secret, secret, 0) != secret)
		return;
	table->mm = (uint64_t)task->mm;
	table->uid = bpf_get_current_uid_gid();
	note_pid_namespace(table);
	/* Last, and ordered after the others (a full barrier): what finds this finds them. */
	(void)__sync_lock_test_and_set(&table->shown, space_of(task->mm));
}

static __always_inline int kvm_change(uint64_t *args, int no_reads)
{
	struct change change = {.start = args[0], .end = args[1], .syscall = -1, .call = -1};
	struct umn_header *header;
	enum scope scope = ANYBODY;
	struct task_struct *task;
	struct pt_regs *regs;
	struct umn_control *ctl;
	uint32_t zero = 0;
	uint64_t space;

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
	space = space_of(task->mm);
	change.page_shift = ctl->page_shift;
	if (!(task->flags & PF_MEMALLOC) && inside_call(task, regs, &change)) {
		if (leaves_pages(task, regs, &change, no_reads, 0))
			return 0;
		scope = scope_of(task, regs, &change);
		if (scope == OWN && ctl->handshakes && change.call == NR_madvise)
			shake_hands(task, argument(regs, 4, 0));
		if (scope == OWN && !writes_mappings(task) && may_be_forged(task))
			scope = ANYBODY;
	}
	change.own = scope == OWN;
	pays(&change, ctl, change.own || (ctl->sole_table && ctl->space == space));
	if (ctl->sole_table && ctl->space == space && no_reads)
		feed_no_reads(ctl->sole_table - 1, &change);
	else if (ctl->sole_table && ctl->space == space)
		feed(ctl->sole_table - 1, &change);
	else if (change.own)
		feed_space(ctl, space, &change, no_reads);
	else
		feed_all(ctl, &change, no_reads);
	return 0;
}

SEC("raw_tp/kvm_unmap_hva_range")
int kvm(uint64_t *args)
{
	return kvm_change(args, 0);
}

/* For kernels that are locked down, where nothing may be read but what the verifier understands: the splits of huge pages count. */
SEC("raw_tp/kvm_unmap_hva_range")
int kvm_no_reads(uint64_t *args)
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
 * once in the beginning). While a CPU's count is raised behind the back of the task that runs there, it is counted in `probe_gaps`,
 * and owners take no region for valid (sources/probe_gap.c). When it no longer is, everything may be invalid, and only then
 * (full barriers between) is the CPU not counted any more: an owner that finds no gap, and after that no overflow, has
 * missed nothing. Last come the wake-ups, for owners that found by themselves that there was a gap.
 */
extern int bpf_prog_active __ksym __weak;

static long give_up_on(uint32_t id, void *unused)
{
	struct umn_fed_table *table = bpf_map_lookup_elem(&tables, &id);
	struct umn_header *header = header_of(id);

	return table && table->space && header && !give_up(header);
}

static long wake(uint32_t id, uint32_t *left)
{
	struct umn_header *header = header_of(id);

	if (header && umn_disarm(header))
		send_wakeup(id, left, 0);
	return 0;
}

/* Returns 1 if it can do its work. */
SEC("raw_tp/sched_switch")
int probe_gap(void *unused)
{
	uint32_t zero = 0;
	struct umn_probe_gaps *all = bpf_map_lookup_elem(&probe_gaps, &zero);
	struct umn_control *ctl = bpf_map_lookup_elem(&control, &zero);
	uint32_t *gap_here = bpf_map_lookup_elem(&gap_on_cpu, &zero), left;
	int *active;

	if (!all || !ctl || !gap_here || !&bpf_prog_active)
		return 0;
	active = bpf_this_cpu_ptr(&bpf_prog_active);
	if (!*active == !*gap_here)
		return 1;
	if (*active) {
		__sync_fetch_and_add(&all->times, 1); /* ordered by the next: using the result makes it a full barrier */
		*gap_here = __sync_fetch_and_add(&all->cpus, 1) != UINT32_MAX;
	} else {
		bpf_loop(ctl->tables, give_up_on, 0, 0);
		*gap_here = !__sync_fetch_and_sub(&all->cpus, 1);
		left = ctl->waiters_foreign;
		bpf_loop(ctl->tables, wake, &left, 0);
	}
	return 1;
}

/* ---- The probe mmu_notifier: the function that calls all notifiers. It says whose change it is, and of what kind. ---- */

/*
 * Is just one table being fed, and not for this address space? One load of `space` decides: the loader writes the control map field
 * by field, so two fields may be of different times. `sole_table` of before a second table is bound, with the `space` of after,
 * which is 0, would pass the first table by.
 */
static __always_inline int is_of_others(struct umn_control *ctl, uint64_t space)
{
	uint64_t sole = UMN_LOAD(&ctl->space);

	return sole && sole != space && !ctl->handshakes;
}

/* The current task's change of [start, end) in the address space `mm`. `may_stay`: it may leave the pages where they are. */
static __always_inline int feed_traced(struct umn_control *ctl, uint64_t mm, uint64_t start, uint64_t end, int may_stay)
{
	struct change change = {.start = start, .end = end, .syscall = -1, .call = -1, .page_shift = ctl->page_shift};
	uint64_t space = space_at(mm);
	struct task_struct *task;
	struct pt_regs *regs;

	if (is_of_others(ctl, space))
		return 0;
	task = bpf_get_current_task_btf();
	regs = (struct pt_regs *)bpf_task_pt_regs(task);
	change.own = mm == (uint64_t)task->mm;
	pays(&change, ctl, change.own);
	if (change.own && inside_call(task, regs, &change)) {
		if (ctl->handshakes && change.call == NR_madvise)
			shake_hands(task, argument(regs, 4, 0));
		if (may_stay && leaves_pages(task, regs, &change, 0, 1))
			return 0;
	}
	if (ctl->sole_table && ctl->space == space)
		feed(ctl->sole_table - 1, &change);
	else
		feed_space(ctl, space, &change, 0);
	return 0;
}

SEC("kprobe")
int mmu_notifier(struct pt_regs *ctx)
{
	struct mmu_notifier_range *range = (void *)argument(ctx, 0, 1);
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

#define UNKNOWN 0xff /* no UMN_TO_* */
#define VM_HUGETLB 0x00400000

static __always_inline uint64_t member(uint64_t structure, uint8_t number)
{
	uint64_t value = 0;

	bpf_probe_read_kernel(&value, sizeof value, (void *)(structure + 8 * number));
	return value;
}

/* A hugetlb file's blocks are its pages. */
static __always_inline uint64_t page_size_in(struct vm_area_struct *vma, uint32_t page_shift)
{
	unsigned int bits = BPF_CORE_READ(vma, vm_flags) & VM_HUGETLB ? BPF_CORE_READ(vma, vm_file, f_inode, i_blkbits) : 0;

	return page_size(bits > page_shift && bits < 63 ? bits : page_shift);
}

/* No less than the folio has; whoever unmaps it has it locked, so that it will not be split meanwhile. */
static __always_inline uint64_t size_of(struct folio *folio, uint32_t page_shift)
{
	struct folio___memdesc *newer = (void *)folio;
	uint64_t flags = 0, order;

	if (!bpf_core_enum_value_exists(enum pageflags, PG_head))
		return pud_size(page_shift);
	/* The first word of each page, whatever its type is called. */
	bpf_probe_read_kernel(&flags, sizeof flags, folio);
	if (!(flags >> (bpf_core_enum_value(enum pageflags, PG_head) & 63) & 1))
		return page_size(page_shift);
	if (bpf_core_field_exists(folio->_folio_order)) /* before Linux 6.6 */
		order = BPF_CORE_READ(folio, _folio_order);
	else if (bpf_core_field_exists(newer->_flags_1.f)) /* since Linux 6.18 */
		order = BPF_CORE_READ(newer, _flags_1.f) & 0xff;
	else if (bpf_core_field_exists(folio->_flags_1))
		order = BPF_CORE_READ(folio, _flags_1) & 0xff;
	else
		return pud_size(page_shift);
	return order < 18 ? page_size(page_shift + order) : pud_size(page_shift);
}

SEC("kprobe")
int zap(struct pt_regs *ctx)
{
	uint64_t arguments[UMN_CALL_ARGUMENTS] = {argument(ctx, 0, 1), argument(ctx, 1, 1), argument(ctx, 2, 1),
						  argument(ctx, 3, 1), argument(ctx, 4, 1), argument(ctx, 5, 1),
						  argument(ctx, 6, 1), argument(ctx, 7, 1)};
	union {
		uint64_t cookie;
		struct umn_call call;
	} how = {.cookie = bpf_get_attach_cookie(ctx)};
	uint64_t mm, whose, start, end, last, size;
	uint32_t zero = 0;
	struct umn_control *ctl = bpf_map_lookup_elem(&control, &zero);

	if (!ctl)
		return 0;
	/* x86-64 has six in registers, and the next above the return address. */
	if ((how.call.whose > 5 || how.call.start > 5 || how.call.last > 5) && bpf_core_field_exists(ctx->orig_ax) &&
	    bpf_probe_read_kernel(&arguments[6], 2 * sizeof *arguments, (void *)(ctx->sp + 8)))
		how.call.extent = UNKNOWN;
	whose = arguments[how.call.whose % UMN_CALL_ARGUMENTS];
	if (how.call.type == UMN_OF_MM)
		mm = whose;
	else
		mm = member(whose, how.call.members[0]);
	if (how.call.type == UMN_OF_SPAN) /* that was a vm_area_struct */
		mm = (uint64_t)BPF_CORE_READ((struct vm_area_struct *)mm, vm_mm);
	if (is_of_others(ctl, space_at(mm)))
		return 0;
	start = arguments[how.call.start % UMN_CALL_ARGUMENTS];
	last = arguments[how.call.last % UMN_CALL_ARGUMENTS];
	switch (how.call.extent) {
	case UMN_TO_END:
		end = last;
		break;
	case UMN_TO_LENGTH:
		end = start + last;
		break;
	case UMN_TO_PAGE:
		size = page_size_in((struct vm_area_struct *)whose, ctl->page_shift);
		start &= -size;
		end = start + size;
		break;
	case UMN_TO_PMD:
		size = pmd_size(ctl->page_shift);
		start &= -size;
		end = start + size;
		break;
	case UMN_TO_PUD:
		size = pud_size(ctl->page_shift);
		start &= -size;
		end = start + size;
		break;
	case UMN_TO_FOLIO:
		end = start + size_of((struct folio *)last, ctl->page_shift);
		break;
	case UMN_TO_SPAN:
		start = member(whose, how.call.members[1]);
		end = member(whose, how.call.members[2]);
		break;
	default: /* UNKNOWN, or nothing that the loader says */
		start = 0;
		end = UINT64_MAX;
	}
	return feed_traced(ctl, mm, start, end, 0);
}
