/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Each pin is watched from before its memory is pinned until after it was given up. Changes are read by a thread, so that they are recorded
 * if the program never calls again; and by every call that pins, gives up or uses, before it goes on. `changed` stays true until the
 * callbacks are done, so a use of what has changed before is found in any case.
 *
 * The stack of a change. An event names the thread that made it, and its stack can be taken only by that thread. So each function that
 * may change memory looks before and after the real call whether something has changed: before, so that what is found afterwards was this
 * call's; after, so that the thread finds its own change, or that another thread has read it (`wanted`).
 *
 * Locks. dispatch's lock, then `lock`, then that of a record. None is held while the program's functions run, nor while a stack is taken:
 * Python's functions may collect garbage, and so run the program's code. A thread that is in here has `pins_inside` set, so a
 * signal handler's calls pass by, and so do the library's.
 */
#define _GNU_SOURCE
#include "audit/pins.h"

#include <errno.h>
#include <execinfo.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "audit/records.h"
#include "audit/stack.h"
#include "include/ummunotify.h"
#include "notifier/notifier.h"
#include "process/process.h"

#define BUCKETS 8192	    /* a power of two */
#define WANTED 16	    /* threads whose stack is waited for */
#define CHANGES_RECORDED 4  /* of a pin */
#define USES_RECORDED 4	    /* of a pin */
#define REFUSALS_RECORDED 8 /* of a process */

struct pin {
	uint64_t id;
	const char *interface, *call;
	uint64_t address, length;
	struct ummunotify_region *region; /* NULL: not watched */
	uint64_t keys[KEYS];
	struct pin *next[KEYS];
	uint64_t changes, uses; /* uses: after a change */
	double time;
	pid_t thread;
	char thread_name[16];
	struct stack stack;
};

struct wanted {
	pid_t thread;
	uint64_t batch; /* of changes, which have one stack */
};

static struct {
	struct ummunotify *umn; /* set once in each process */
	struct counts *counts;
	pthread_mutex_t lock; /* of what follows, and for changing what is above */
	bool tried;
	uint64_t last_id, last_batch, refused;
	struct pin *pins[KEYS][BUCKETS];
	struct wanted wanted[WANTED];
} the = {.lock = PTHREAD_MUTEX_INITIALIZER};

struct pins_state pins_state;
__thread bool pins_inside __attribute__((tls_model("initial-exec")));

/* While a lock is held. A thread is not cancelled meanwhile: free and munmap are no points for that, but reading /proc is. Signals are
 * blocked: a handler may jump away for good. */
struct entry {
	int kept, cancelling;
	sigset_t signals;
};

/* False: this thread is inside already. */
static bool enter(struct entry *entry)
{
	if (pins_inside)
		return false;
	entry->kept = errno;
	entry->signals = pins_hold_signals();
	pins_inside = true;
	pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &entry->cancelling);
	return true;
}

static void leave(const struct entry *entry)
{
	pins_inside = false;
	pthread_setcancelstate(entry->cancelling, NULL);
	pins_let_signals(entry->signals);
	errno = entry->kept;
}

static pid_t this_thread(void)
{
	return (pid_t)syscall(SYS_gettid);
}

/* ---- The table ---- */

uint64_t pins_key(const char *what, uint64_t first, uint64_t second)
{
	uint64_t key = 0xcbf29ce484222325;

	for (; *what; what++)
		key = (key ^ (unsigned char)*what) * 0x100000001b3;
	key = (key ^ first) * UINT64_C(0x9e3779b97f4a7c15);
	key = ((key ^ (key >> 29)) + second) * UINT64_C(0xbf58476d1ce4e5b9);
	key ^= key >> 32;
	return key ? key : 1;
}

static struct pin **bucket(enum key kind, uint64_t key)
{
	return &the.pins[kind][key % BUCKETS];
}

/* The lock is held. */
static struct pin *find(enum key kind, uint64_t key)
{
	struct pin *pin = *bucket(kind, key);

	while (pin && pin->keys[kind] != key)
		pin = pin->next[kind];
	return pin;
}

/* The lock is held. */
static void link_key(struct pin *pin, enum key kind)
{
	struct pin **first = bucket(kind, pin->keys[kind]);

	if (!pin->keys[kind])
		return;
	pin->next[kind] = *first;
	*first = pin;
}

/* The lock is held. */
static void unlink_key(struct pin *pin, enum key kind)
{
	struct pin **link = bucket(kind, pin->keys[kind]);

	while (*link && *link != pin)
		link = &(*link)->next[kind];
	if (*link)
		*link = pin->next[kind];
}

/* ---- Changes ---- */

/* "nothing", "memory", or a part of each. */
static const char *mapped(uint64_t address, uint64_t length)
{
	const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), end = address + length;
	bool some = false, none = false;
	unsigned char resident;

	/* Up to 64 of the pages. */
	for (uint64_t at = address & ~(page - 1), step = ((end - at) / 64 + page) & ~(page - 1); at < end; at += step) {
		if (!mincore((void *)at, page, &resident)) /* NOLINT(performance-no-int-to-ptr) */
			some = true;
		else
			none = true;
	}
	return some && none ? "a part" : some ? "memory" : "nothing";
}

static void record_pin(const struct pin *pin)
{
	record_number("pin", pin->id);
	record_text("interface", pin->interface);
	record_text("pinned_call", pin->call);
	record_number("address", pin->address);
	record_number("length", pin->length);
	record_time("pinned_time", pin->time);
	record_number("pinned_thread", (uint64_t)pin->thread);
	record_text("pinned_thread_name", pin->thread_name);
	stack_record("pinned_", &pin->stack);
}

static void read_line(const char *path, char *line, size_t room)
{
	FILE *file = fopen(path, "re");

	*line = 0;
	if (!file)
		return;
	if (fgets(line, (int)room, file))
		line[strcspn(line, "\n")] = 0;
	fclose(file);
}

/* The thread that made a change, its name and its process. */
static void record_thread(uint32_t thread)
{
	char path[64], text[256];
	FILE *file;
	int process = 0;

	if (!thread)
		return;
	record_number("thread", thread);
	snprintf(path, sizeof path, "/proc/%u/comm", thread);
	read_line(path, text, sizeof text);
	if (*text)
		record_text("thread_name", text);
	snprintf(path, sizeof path, "/proc/%u/status", thread);
	file = fopen(path, "re");
	while (file && fgets(text, sizeof text, file))
		if (sscanf(text, "Tgid: %d", &process) == 1)
			break;
	if (file)
		fclose(file);
	if (!process)
		return;
	record_number("process", (uint64_t)process);
	snprintf(path, sizeof path, "/proc/%d/comm", process);
	read_line(path, text, sizeof text);
	record_text("process_name", text);
}

static bool is_ours(uint32_t thread)
{
	char path[64];

	snprintf(path, sizeof path, "/proc/self/task/%u", thread);
	return thread && !access(path, F_OK);
}

/* The batch of the changes by this thread since it last called; the lock is held. */
static uint64_t want(pid_t thread)
{
	struct wanted *free = NULL;

	for (unsigned int i = 0; i < WANTED; i++) {
		if (the.wanted[i].thread == thread)
			return the.wanted[i].batch;
		if (!the.wanted[i].thread)
			free = &the.wanted[i];
	}
	if (!free)
		return ++the.last_batch; /* it will have no stack */
	*free = (struct wanted){thread, ++the.last_batch};
	__atomic_add_fetch(&pins_state.wanted, 1, __ATOMIC_RELEASE);
	return the.last_batch;
}

static uint64_t take_wanted(pid_t thread)
{
	uint64_t batch = 0;

	pthread_mutex_lock(&the.lock);
	for (unsigned int i = 0; i < WANTED; i++)
		if (the.wanted[i].thread == thread) {
			batch = the.wanted[i].batch;
			the.wanted[i].thread = 0;
			__atomic_sub_fetch(&pins_state.wanted, 1, __ATOMIC_RELEASE);
		}
	pthread_mutex_unlock(&the.lock);
	return batch;
}

static int record_change(const struct ummunotify_event *event, void *context)
{
	struct pin *pin;

	(void)context;
	pthread_mutex_lock(&the.lock);
	pin = find(KEY_ID, event->cookie);
	if (pin) {
		if (!pin->changes++)
			__atomic_add_fetch(&the.counts->changed, 1, __ATOMIC_RELAXED);
		if (pin->changes <= CHANGES_RECORDED) {
			record_begin("change");
			record_pin(pin);
			record_time("time", records_now());
			record_number("batch", is_ours(event->thread) ? want((pid_t)event->thread) : ++the.last_batch);
			record_number("start", event->start);
			record_number("end", event->end);
			record_number("exact", event->exact);
			if (event->syscall >= 0)
				record_number("syscall", (uint64_t)event->syscall);
			record_thread(event->thread);
			record_text("now", mapped(event->start, event->end - event->start));
			record_end();
		}
	}
	pthread_mutex_unlock(&the.lock);
	return 0;
}

/* This process's notifier: none in a child that has pinned nothing. */
static struct ummunotify *notifier(void)
{
	if (__atomic_load_n(&the.umn, __ATOMIC_ACQUIRE))
		umn_process_current();
	return __atomic_load_n(&the.umn, __ATOMIC_ACQUIRE);
}

static void drain(struct ummunotify *umn)
{
	uint64_t generation;

	if (!umn || !ummunotify_changed(umn))
		return;
	generation = pins_state.generation ? __atomic_load_n(pins_state.generation, __ATOMIC_ACQUIRE) : 0;
	if (ummunotify_dispatch(umn, record_change, NULL) >= 0)
		__atomic_store_n(&pins_state.seen, generation, __ATOMIC_RELEASE);
}

static void *read_changes(void *umn)
{
	pins_inside = true;
	while (true) {
		/* Where the program has closed the descriptor: by looking. */
		if (ummunotify_wait(umn, -1) < 0)
			clock_nanosleep(CLOCK_MONOTONIC, 0, &(struct timespec){.tv_nsec = 20000000}, NULL);
		drain(umn);
	}
	return NULL;
}

void pins_before(const void *caller)
{
	struct entry entry;

	if (stack_is_own(caller) || !enter(&entry))
		return;
	drain(notifier());
	take_wanted(this_thread()); /* by a system call, which has no stack */
	leave(&entry);
}

void pins_after(const char *call, const void *caller)
{
	struct stack stack;
	struct entry entry;
	uint64_t batch;

	if (stack_is_own(caller) || !enter(&entry))
		return;
	drain(notifier());
	batch = take_wanted(this_thread());
	if (batch) {
		stack_take(&stack);
		record_begin("stack");
		record_number("batch", batch);
		record_text("call", call);
		stack_record("", &stack);
		record_end();
		stack_free(&stack);
	}
	leave(&entry);
}

/* ---- Opening ---- */

/* A child has none of these pins: its memory is another. Pins stay allocated, as another thread may have been changing them. */
static void in_child(void)
{
	pthread_mutex_init(&the.lock, NULL);
	memset(the.pins, 0, sizeof the.pins);
	memset(the.wanted, 0, sizeof the.wanted);
	pins_state = (struct pins_state){0};
	the.tried = false;
	the.counts = NULL;
	__atomic_store_n(&the.umn, NULL, __ATOMIC_RELEASE);
}

static void start_reader(struct ummunotify *umn)
{
	pthread_attr_t attributes;
	pthread_t reader;

	/* It is started by a thread that holds signals back, and so holds them back itself. */
	pthread_attr_init(&attributes);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	if (!pthread_create(&reader, &attributes, read_changes, umn))
		pthread_setname_np(reader, "ummunotify");
	pthread_attr_destroy(&attributes);
}

/* What may be executed is where: for stacks that the kernel has taken, should nobody look before this process has ended. */
static void record_code(void)
{
	static char line[4096], path[4096], escaped[4096]; /* under the record's lock */
	unsigned long long start, end, offset;
	FILE *file = fopen("/proc/self/maps", "re");

	record_begin("code");
	record_list("mappings");
	while (file && fgets(line, sizeof line, file)) {
		*path = 0;
		if (sscanf(line, "%llx-%llx %*2cx%*c %llx %*s %*s %4000[^\n]", &start, &end, &offset, path) < 3)
			continue;
		record_escape(escaped, sizeof escaped, path);
		record_item("[%llu,%llu,%llu,\"%s\"]", start, end, offset, escaped);
	}
	record_list_end();
	record_end();
	if (file)
		fclose(file);
}

/* The lock is held. */
static void open_once(void)
{
	static bool added;
	struct ummunotify *umn;
	void *frame;

	if (the.tried)
		return;
	the.tried = true;
	the.counts = records_open();
	if (!the.counts)
		return;
	if (!added && !umn_process_start())
		umn_process_add_child(in_child);
	added = true;
	backtrace(&frame, 1); /* loads the unwinder */
	record_begin("source");
	if (ummunotify_open(&umn, NULL)) {
		record_text("error", ummunotify_error());
	} else {
		record_text("source", ummunotify_source(umn));
		start_reader(umn);
		__atomic_store_n(&the.umn, umn, __ATOMIC_RELEASE);
		if (stacks_wanted() && strncmp(ummunotify_source(umn), "uffd", 4) != 0) {
			pins_state.epoch = umn_process_current();
			__atomic_store_n(&pins_state.generation, umn_generation_of(umn), __ATOMIC_RELEASE);
		}
	}
	record_end();
	if (stacks_wanted())
		record_code();
}

/* ---- Pins ---- */

static void record_refusal(const struct pin *pin)
{
	record_begin("unwatched");
	record_pin(pin);
	record_text("error", ummunotify_error());
	record_end();
}

static struct pin *begin(const char *interface, const char *call, const void *address, size_t length)
{
	struct ummunotify *umn;
	struct pin *pin;
	bool refused = false;

	notifier(); /* a child drops what is its parent's */
	pthread_mutex_lock(&the.lock);
	open_once();
	pthread_mutex_unlock(&the.lock);
	umn = __atomic_load_n(&the.umn, __ATOMIC_ACQUIRE);
	pin = umn ? calloc(1, sizeof *pin) : NULL;
	if (!pin)
		return NULL;
	drain(umn);
	*pin = (struct pin){
		.id = __atomic_add_fetch(&the.last_id, 1, __ATOMIC_RELAXED),
		.interface = interface,
		.call = call,
		.address = (uint64_t)(uintptr_t)address,
		.length = length,
		.time = records_now(),
		.thread = this_thread(),
	};
	pthread_getname_np(pthread_self(), pin->thread_name, sizeof pin->thread_name);
	stack_take(&pin->stack);
	pin->keys[KEY_ID] = pin->id;
	pthread_mutex_lock(&the.lock);
	link_key(pin, KEY_ID); /* a change may be read as soon as it is watched */
	pthread_mutex_unlock(&the.lock);
	__atomic_add_fetch(&the.counts->pins, 1, __ATOMIC_RELAXED);
	if (length && ummunotify_watch(umn, address, length, pin->id, &pin->region)) {
		pin->region = NULL;
		__atomic_add_fetch(&the.counts->unwatched, 1, __ATOMIC_RELAXED);
		refused = __atomic_add_fetch(&the.refused, 1, __ATOMIC_RELAXED) <= REFUSALS_RECORDED;
	}
	if (refused)
		record_refusal(pin);
	return pin;
}

struct pin *pins_begin(const char *interface, const char *call, const void *address, size_t length)
{
	struct entry entry;
	struct pin *pin;

	if (!enter(&entry))
		return NULL;
	pin = begin(interface, call, address, length);
	leave(&entry);
	return pin;
}

static void link_others(struct pin *pin)
{
	struct entry entry;
	bool entered = enter(&entry);

	pthread_mutex_lock(&the.lock);
	for (enum key kind = KEY_PIN; kind < KEYS; kind++)
		link_key(pin, kind);
	pthread_mutex_unlock(&the.lock);
	if (entered)
		leave(&entry);
}

void pins_add(struct pin *pin, const uint64_t keys[KEYS])
{
	struct pin *old;

	if (!pin)
		return;
	/* It was given up by a call that is not known here. */
	old = pins_take(keys[KEY_PIN], "(not seen)");
	if (old)
		pins_drop(old);
	for (enum key kind = KEY_PIN; kind < KEYS; kind++)
		pin->keys[kind] = keys[kind];
	link_others(pin);
}

void pins_restore(struct pin *pin)
{
	if (pin)
		link_others(pin);
}

void pins_drop(struct pin *pin)
{
	struct entry entry;
	bool entered;

	if (!pin)
		return;
	entered = enter(&entry);
	if (pin->region && notifier())
		ummunotify_unwatch(the.umn, pin->region);
	pthread_mutex_lock(&the.lock);
	unlink_key(pin, KEY_ID);
	pthread_mutex_unlock(&the.lock);
	stack_free(&pin->stack);
	free(pin);
	if (entered)
		leave(&entry);
}

static void record_unpin(const struct pin *pin, const char *call)
{
	struct stack stack;

	stack_take(&stack);
	record_begin("unpin");
	record_number("pin", pin->id);
	record_text("call", call);
	record_time("time", records_now());
	record_number("uses", pin->uses);
	record_number("changes", pin->changes);
	record_number("thread", (uint64_t)this_thread());
	stack_record("", &stack);
	record_end();
	stack_free(&stack);
}

struct pin *pins_take(uint64_t key, const char *call)
{
	struct ummunotify *umn;
	struct pin *pin = NULL;
	struct entry entry;

	if (!__atomic_load_n(&the.umn, __ATOMIC_ACQUIRE) || !enter(&entry))
		return NULL;
	umn = notifier();
	if (umn) {
		drain(umn);
		pthread_mutex_lock(&the.lock);
		pin = find(KEY_PIN, key);
		for (enum key kind = KEY_PIN; pin && kind < KEYS; kind++)
			unlink_key(pin, kind);
		pthread_mutex_unlock(&the.lock);
		if (pin && pin->changes)
			record_unpin(pin, call);
	}
	leave(&entry);
	return pin;
}

static void record_use(uint64_t id, uint64_t address, uint64_t length, const char *call)
{
	char name[16] = "";
	struct stack stack;

	pthread_getname_np(pthread_self(), name, sizeof name);
	stack_take(&stack);
	record_begin("use");
	record_number("pin", id);
	record_text("call", call);
	record_time("time", records_now());
	record_number("address", address);
	record_number("length", length);
	record_number("thread", (uint64_t)this_thread());
	record_text("thread_name", name);
	record_text("now", mapped(address, length ? length : 1));
	stack_record("", &stack);
	record_end();
	stack_free(&stack);
}

void pins_use(enum key kind, uint64_t key, uint64_t address, uint64_t length, const char *call)
{
	struct ummunotify *umn = notifier();
	struct entry entry;
	struct pin *pin;
	uint64_t id = 0;

	/* Mostly nothing has ever changed. In this order: what changed before is counted before `changed` is false. */
	if (!umn || (!ummunotify_changed(umn) && !__atomic_load_n(&the.counts->changed, __ATOMIC_ACQUIRE)) || !enter(&entry))
		return;
	drain(notifier());
	pthread_mutex_lock(&the.lock);
	pin = the.umn ? find(kind, key) : NULL;
	if (pin && pin->changes && (kind != KEY_REMOTE || (address >= pin->address && address < pin->address + pin->length))) {
		__atomic_add_fetch(&the.counts->used, 1, __ATOMIC_RELAXED);
		if (pin->uses++ < USES_RECORDED)
			id = pin->id;
	}
	pthread_mutex_unlock(&the.lock);
	if (id)
		record_use(id, address, length, call);
	leave(&entry);
}

/* ---- The beginning and the end ---- */

__attribute__((constructor)) static void at_start(void)
{
	the.counts = records_open();
}

__attribute__((destructor)) static void at_exit(void)
{
	struct entry entry;

	/* A signal handler that calls exit may have come while this thread held a lock. */
	if (enter(&entry)) {
		drain(notifier());
		if (the.umn && stacks_wanted() && __atomic_load_n(&the.counts->changed, __ATOMIC_ACQUIRE))
			record_code(); /* with what was loaded since */
		leave(&entry);
	}
	if (the.counts)
		__atomic_store_n(&the.counts->ended, 1, __ATOMIC_RELEASE);
}
