// SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only
/*
 * Records the thread and the stack of each change that the feeder (watch.bpf.c) has found to hit a region.
 *
 * Attached behind the feeder, at the same place, while a notifier has stacks. It has the feeder's maps and only reads them. Nothing
 * depends on it: where it is skipped, or its ring buffer is full, a change has no stack.
 *
 * The feeder counts a table's `generation` up for each change that hits. So the change that is being made has hit if the number is
 * not the one that was there when this program last ran on this CPU. If a change on another CPU has counted it up meanwhile, a
 * change that hit nothing gets a stack, too. The reader compares addresses and threads.
 */
#include "bpf/types.h"
#define BPF_MAP_TYPE_ARRAY 2
#define BPF_MAP_TYPE_PERCPU_ARRAY 6
#define BPF_MAP_TYPE_ARRAY_OF_MAPS 12
#define BPF_MAP_TYPE_RINGBUF 27
#define BPF_F_MMAPABLE (1u << 10)
#define BPF_F_USER_STACK (1u << 8)
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#include "abi/maps.h"
#include "abi/protocol.h"
#include "abi/stacks.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";
const char version[] SEC("ummunotify") = UMN_OBJECT_VERSION;

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
/* x86-64's. arm64's has a field sp, too. */
struct pt_regs {
	unsigned long orig_ax, sp;
};
struct pt_regs___arm64 {
	unsigned long regs[31];
};
struct task_struct {
	struct task_struct *group_leader;
	char comm[16];
};
struct mmu_notifier_range {
	unsigned long start, end;
};
#pragma clang attribute pop

/* ---- The feeder's maps. ---- */

struct segment {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, UMN_SEGMENT_PAGES);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(key_size, sizeof(uint32_t));
	__uint(value_size, UMN_PAGE);
};
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, UMN_SEGMENTS);
	__type(key, uint32_t);
	__array(values, struct segment);
} segments SEC(".maps");
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, uint32_t);
	__type(value, struct umn_fed_table);
} tables SEC(".maps");
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, uint32_t);
	__type(value, struct umn_control);
} control SEC(".maps");

/* ---- This program's own. ---- */

/* The generation of each table when this last ran on this CPU. As many as there are tables. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, uint32_t);
	__type(value, uint64_t);
} seen SEC(".maps");
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, UMN_STACK_RING_BYTES);
} stacks SEC(".maps");

/* Instead of 1: a notifier's self-test counts to 1, and then it begins at 0 again. So the first change is the second of this
 * number. */
#define FIRST UINT64_MAX

struct look {
	uint64_t start, end;
	uint32_t hit; /* the first table that was hit, plus 1 */
};

static long look_at(uint32_t id, struct look *look)
{
	struct umn_fed_table *table = bpf_map_lookup_elem(&tables, &id);
	uint64_t *before = bpf_map_lookup_elem(&seen, &id), generation;
	uint32_t segment = id * UMN_SEGMENTS, page = 0;
	struct umn_header *header;
	void *map;

	if (!table || !table->space || !before)
		return 0;
	map = bpf_map_lookup_elem(&segments, &segment);
	header = map ? bpf_map_lookup_elem(map, &page) : 0;
	if (!header || look->start >= header->high || look->end <= header->low)
		return 0;
	generation = *(volatile uint64_t *)&header->generation;
	if (*before == generation)
		return 0;
	if (!look->hit)
		look->hit = id + 1;
	*before = generation == 1 && *before != FIRST ? FIRST : generation;
	return 0;
}

#define PID_NAMESPACE_INITIAL 0xeffffffcu /* its inode number, on every machine */

struct bpf_pidns_info {
	uint32_t pid, tgid;
};

/* As the owner of the table numbers them. */
static __always_inline void number(struct umn_stack *stack, uint32_t id)
{
	struct umn_fed_table *table = bpf_map_lookup_elem(&tables, &id);
	struct bpf_pidns_info numbers = {};

	if (!table)
		return;
	if (table->pid_namespace == PID_NAMESPACE_INITIAL) {
		numbers.pid = bpf_get_current_pid_tgid();
		numbers.tgid = bpf_get_current_pid_tgid() >> 32;
	} else if (bpf_get_ns_current_pid_tgid(table->pid_namespace_device, table->pid_namespace, &numbers, sizeof numbers)) {
		return;
	}
	stack->thread = numbers.pid;
	stack->process = numbers.tgid;
}

static __always_inline uint64_t caller_of(struct task_struct *task)
{
	struct pt_regs *regs = (struct pt_regs *)bpf_task_pt_regs(task);
	uint64_t caller = 0;

	if (bpf_core_field_exists(regs->orig_ax))
		bpf_probe_read_user(&caller, sizeof caller, (void *)regs->sp);
	else if (bpf_core_field_exists(((struct pt_regs___arm64 *)regs)->regs))
		caller = ((struct pt_regs___arm64 *)regs)->regs[30];
	return caller;
}

static __always_inline int take(void *context, uint64_t start, uint64_t end)
{
	struct look look = {.start = start, .end = end};
	uint32_t zero = 0;
	struct umn_control *ctl = bpf_map_lookup_elem(&control, &zero);
	struct task_struct *task;
	struct umn_stack *stack;
	long length;

	if (!ctl)
		return 0;
	bpf_loop(ctl->tables, look_at, &look, 0);
	if (!look.hit)
		return 0;
	stack = bpf_ringbuf_reserve(&stacks, sizeof *stack, 0);
	if (!stack)
		return 0;
	task = bpf_get_current_task_btf();
	stack->time = bpf_ktime_get_ns();
	stack->start = start;
	stack->end = end;
	stack->process = stack->thread = 0;
	number(stack, look.hit - 1);
	bpf_get_current_comm(stack->thread_name, sizeof stack->thread_name);
	if (bpf_probe_read_kernel(stack->process_name, sizeof stack->process_name, task->group_leader->comm))
		stack->process_name[0] = 0;
	stack->caller = caller_of(task);
	length = bpf_get_stack(context, stack->user, sizeof stack->user, BPF_F_USER_STACK);
	stack->user_frames = length > 0 ? length / sizeof *stack->user : 0;
	length = bpf_get_stack(context, stack->kernel, sizeof stack->kernel, 0);
	stack->kernel_frames = length > 0 ? length / sizeof *stack->kernel : 0;
	bpf_ringbuf_submit(stack, 0);
	return 0;
}

/* Behind the probe kvm: what is attached later runs later. */
SEC("raw_tp/kvm_unmap_hva_range")
int stacks_kvm(uint64_t *args)
{
	return take(args, args[0], args[1]);
}

/* Behind the probe mmu_notifier, which is at the function's beginning. */
SEC("fexit/__mmu_notifier_invalidate_range_start")
int stacks_mmu(uint64_t *args)
{
	struct mmu_notifier_range *range = (void *)args[0];

	return take(args, range->start, range->end);
}
