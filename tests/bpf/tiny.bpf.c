/* Small programs for the tests of the libbpf binding. They include nothing, so that any compiler for the
 * BPF target can build them. The compiled object needs type information (-g).
 */
typedef unsigned int u32;
typedef unsigned long long u64;

#define SECTION(name) __attribute__((section(name), used))
#define MAP_NUMBER(name, number) int (*name)[number]

char terms[] SECTION("license") = "GPL";

/* Set before loading: which system call is counted. */
const volatile u64 counted_syscall = ~0ULL;
volatile u64 step = 1;
u64 probe_hits;

/* libbpf says that it ignores this section, though nothing is wrong. */
int not_used SECTION("ignored") = 1;

struct {
	MAP_NUMBER(type, 2); /* array */
	MAP_NUMBER(map_flags, 1 << 10); /* mmapable */
	MAP_NUMBER(max_entries, 1);
	u32 *key;
	u64 *value;
} counters SECTION(".maps");

static void *(*lookup)(void *map, const void *key) = (void *)1;
static long (*probe_read_user)(void *to, u32 size, const void *from) = (void *)112;

SECTION("raw_tp/sys_enter")
int count_syscall(u64 *arguments)
{
	u32 key = 0;
	u64 *counter;

	if (arguments[1] != counted_syscall)
		return 0;
	counter = lookup(&counters, &key);
	if (counter)
		__sync_fetch_and_add(counter, step);
	return 0;
}

/* Reading address 16 faults, and the fault hits the same tracepoint: the kernel skips that nested run. */
SECTION("raw_tp/page_fault_kernel")
int nest(u64 *arguments)
{
	u64 value;

	return probe_read_user(&value, sizeof(value), (void *)16) == 0;
}

/* A perf event, like a kprobe, but one that kernels without kprobes have too. */
SECTION("uprobe/libc.so.6:l64a")
int probe(void *context)
{
	__sync_fetch_and_add(&probe_hits, 1);
	return 0;
}

SECTION("kprobe")
int probe_kernel(void *context)
{
	__sync_fetch_and_add(&probe_hits, 1);
	return 0;
}

/* The verifier refuses this one: an argument of the tracepoint is a number, not a pointer it knows. */
SECTION("?raw_tp/sys_enter")
int refused(u64 *arguments)
{
	return *(volatile u64 *)arguments[0] != 0;
}
