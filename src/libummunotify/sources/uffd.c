/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * How a change becomes visible in time
 *
 * What the kernel does in a thread A that unmaps registered memory (fs/userfaultfd.c, mm/vma.c):
 *
 *	1. hold the mmap lock; count the userfaultfd's `mmap_changing` up; unmap
 *	2. release the mmap lock: from here on another thread's mmap can be given the addresses
 *	3. queue the event; wait until it has been read
 *	4. count `mmap_changing` down; return
 *
 * mremap does the same; madvise does 1 without the change, 3, 4, and then changes. What the reader thread does with an event:
 *
 *	a. count `cycle` up: it is odd
 *	b. read the event, which lets A go on
 *	c. feed it: the regions are invalid
 *	d. count `cycle` up: it is even
 *
 * The range is known only after b, so c cannot come before 4. A thread that asks whether a region is valid:
 *
 *	i. asks the kernel whether `mmap_changing` is 0
 *	ii. looks whether `cycle` is even
 *	iii. looks at the slot; it is the answer if i and ii were true (`confirm` and umn_table_changed in table.c)
 *
 * Then every change has been fed that the thread can know of: because the call that made it has returned, or because the addresses
 * were handed out again. Either way 1 came before i. i found the count at 0, so 4 came before i; so did b, which A had waited
 * for; so a came before ii; ii found `cycle` even, so d came before ii, and c before iii.
 *
 * Each "came before" is one in memory too. 1 before i: A returned and told, or both were under the mmap lock. b before 4: both
 * are under the lock of the event queue. a before b and c before d: `cycle` changes by atomic operations that are full barriers.
 * i before ii: `barrier` ends with an acquire fence. On Arm neither a system call's end nor a branch on its result keeps a later load
 * from being made before what the kernel loaded. These hold on Arm too.
 *
 * i is one system call: UFFDIO_WRITEPROTECT fails with EAGAIN while the count is not 0, before it looks at its argument. Ours is
 * never valid, so the call takes no lock and changes nothing. That it does so is promised nowhere: `prove` tries it.
 *
 * Whole mappings
 *
 * Registering a part of a mapping would split it, and mremap refuses a range of several mappings. So `cover` registers the mappings that
 * a region lies in as a whole, and `release` unregisters a mapping once no region lies in it. Which mapping that is, is asked
 * anew each time: mappings merge, split, grow and move. A mapping that mremap moves stays registered; the reader notes where it went.
 *
 * Memory that is mapped next to a registered mapping is not registered, and does not merge with it.
 *
 * Why no deadlock is possible
 *
 * A may hold any lock while it waits for b: malloc's, the GIL, one of ours. The reader takes none, allocates nothing, calls
 * nothing that might (the module is linked with `-z now`, or the dynamic linker would, at the first call of each function),
 * blocks all signals, and its stack is memory that is never registered. It may wait for the mmap lock (UFFDIO_UNREGISTER), which
 * the kernel never holds while it waits for a reader. `lock` below is for owners only; its holder may allocate, and wait for
 * the mmap lock or for the reader to end.
 *
 * The reader unregisters everything before it ends. Closing the userfaultfd would do that too, but not while a child, made
 * by clone() without any handler, has a copy: then the next change of what is still registered would wait for ever.
 *
 * Descriptors
 *
 * The program may close any descriptor at any time, and its next file gets the number. So the reader has a descriptor table of
 * its own, with its own copy of the userfaultfd and of what it wakes tables through: it goes on reading and feeding. It gets
 * the copies by pidfd_getfd; unshare(CLONE_FILES) would copy and close all files of the program, and closing has effects (mq_notify ends,
 * NFS writes back). Where a seccomp filter refuses pidfd_getfd or close_range, the reader shares the program's table.
 *
 * In the program's table a descriptor is known by its inode, which each userfaultfd and socket has to itself. It is compared before each
 * use but that of i. There the errno tells: another file does not know the ioctl. Another userfaultfd does. If the program closes ours
 * and gets the same number for one of its own, i says nothing about ours until the next watch, unwatch, renew or read. Till then a change
 * is still seen by the time the call that makes it has returned (b was before that, so ii and iii do not need i); that
 * the addresses are handed out earlier is not.
 *
 * Where i fails, a region is invalid, by itself: the thread that asked may have a descriptor table of its own. Once watch, renew or unwatch
 * finds a descriptor gone, the `instance` (one userfaultfd with its reader) is over: all that was watched with it is invalid for
 * good. The next region of another table begins a new one.
 *
 * Forks
 *
 * The child's copies of registered mappings are not registered (EVENT_FORK is not asked for), so nothing in the child waits for
 * a reader, which it does not have. But it inherits the descriptors: umn_uffd_in_child closes them.
 */
#define _GNU_SOURCE
#include "sources/uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "process/descriptor.h"
#include "process/process.h"
#include "table/user_feeder.h"

/* The system call itself, as in process/descriptor.c. */
#define close(fd) syscall(SYS_close, fd)

/* Linux 5.11, 6.1 and 5.18; not in all headers yet. */
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif
#ifndef UFFD_FEATURE_EXACT_ADDRESS
#define UFFD_FEATURE_EXACT_ADDRESS (1 << 11)
#endif
/* Linux 5.3, 5.6 and 5.9; the same on all architectures. */
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_pidfd_getfd
#define SYS_pidfd_getfd 438
#endif
#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#define UNSHARE 2u	 /* CLOSE_RANGE_UNSHARE */
#define OF_THREAD O_EXCL /* PIDFD_THREAD, Linux 6.9 */

#define FEATURES (UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_PAGEFAULT_FLAG_WP)
/* Not used, but it came after `mmap_changing` became a count (Linux 5.15, "userfaultfd: change mmap_changing to atomic"). Before, the
 * first of two changes to complete cleared it, and nothing tells that apart from here. */
#define FEATURE_AFTER_COUNT UFFD_FEATURE_EXACT_ADDRESS

#define STACK_SIZE ((size_t)1 << 20) /* thread-local variables are in it too; only what is touched takes memory */
#define EVENTS 16u		     /* read at a time */
#define MOVED 16u		     /* mappings that were moved since the last watch or unwatch */
#define TRIES 100
#define END_TRIES 20000 /* of 50 us at least: 1 s */

#define load(p) __atomic_load_n(p, __ATOMIC_ACQUIRE)
#define store(p, v) __atomic_store_n(p, v, __ATOMIC_RELEASE)
/* Ordered after all that the thread did before, system calls too. */
#define load_after(p) __sync_fetch_and_add(p, 0)

struct umn_uffd {
	struct umn_source source; /* first: one is cast to the other */
	struct umn_memory memory;
	struct umn_descriptor woken, wake; /* a pair of sockets: readable after a wake-up, and where the wake-up is sent */
	uint64_t *counter;		   /* see announce; or NULL */
	uint64_t fed;			   /* the generation after what was fed so far; the reader's */
	bool announced;			   /* the reader's */
	bool broken;			   /* a socket is gone */
	uint64_t regions;
	uint32_t instance; /* that watches them */
	uint32_t forks;
	bool closed;
};

/* How many regions cover the pages from `at` to the next boundary. */
struct boundary {
	uint64_t at;
	uint64_t regions;
};

static struct {
	/* Read by any thread. */
	struct umn_descriptor uffd; /* -1: nothing is watched */
	uint32_t instance;	    /* counted up when one ends */
	uint32_t over;		    /* the instance whose userfaultfd was found closed */
	uint32_t cycle;
	uint32_t stopping;
	struct umn_uffd *tables[UMN_UFFD_TABLES_MAX];
	/* Where mremap has moved registered mappings. The reader adds, the holder of the lock takes. */
	uint64_t moved[MOVED];
	uint32_t moved_in, moved_out;

	pthread_mutex_t lock;	      /* of the rest */
	struct umn_descriptor device; /* /dev/userfaultfd, if that is what works */
	struct umn_descriptor maps;   /* see mapping_at */
	bool no_query;		      /* the kernel cannot be asked about single mappings */
	bool proven;
	bool lends; /* the reader can have a descriptor table of its own */
	uint8_t page_shift;
	struct umn_uffd_failure start_failure;
	uint32_t table_count;
	uint32_t forks; /* between the first process and this one */

	/* The reader's thread. The reader looks at these before `ready`, and after the next watch or unwatch has made it pass a cycle. */
	pthread_t thread;
	uint8_t *stack; /* the lowest page and the one above the bell cannot be accessed, so neither merges with anything */
	uint8_t *bell;	/* the page above the stack, registered by itself: unmapping it wakes the reader; NULL: done */
	sem_t ready;
	bool has_own_table;
	int reader_error;
	pid_t lender; /* the thread whose descriptor table has what the reader is to have */

	/* What is watched, ordered; neighbours have different counts. At most two for each region. */
	struct boundary *boundaries;
	size_t count, capacity;
	uint64_t regions;
	uint64_t low, high; /* all that the instance has registered lies between */
} uffd_state = {.uffd = {.fd = -1}, .instance = 1, .lock = PTHREAD_MUTEX_INITIALIZER, .device = {.fd = -1}, .maps = {.fd = -1}};

static size_t page_size(void)
{
	return (size_t)1 << uffd_state.page_shift;
}

/* ---- Descriptors ---- */

/* A copy of what `fd` is in the descriptor table of `thread`, in the caller's table; or -1. */
static int borrow(pid_t thread, int fd)
{
	int pidfd = (int)syscall(SYS_pidfd_open, thread, OF_THREAD), copy;

	if (pidfd < 0) /* before Linux 6.9: the main thread's, which is the same table but for oddities; so the caller compares */
		pidfd = (int)syscall(SYS_pidfd_open, getpid(), 0);
	if (pidfd < 0)
		return -1;
	copy = (int)syscall(SYS_pidfd_getfd, pidfd, fd, 0);
	close(pidfd);
	return copy;
}

static bool borrow_ours(const struct umn_descriptor *lent, struct umn_descriptor *copy)
{
	int fd = borrow(load(&uffd_state.lender), lent->fd);

	copy->fd = -1;
	if (fd < 0)
		return false;
	umn_descriptor_set(copy, fd);
	if (copy->device == lent->device && copy->inode == lent->inode)
		return true;
	close(fd);
	copy->fd = -1;
	return false;
}

/* ---- The userfaultfd ---- */

static int open_uffd(struct umn_uffd_failure *failure)
{
	const int flags = O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY;
	struct uffdio_api api = {.api = UFFD_API, .features = FEATURES};
	int fd, device;

	*failure = (struct umn_uffd_failure){.step = UMN_UFFD_OPEN};
	/* With UFFD_USER_MODE_ONLY it is open to everybody, whatever vm.unprivileged_userfaultfd says. */
	fd = umn_descriptor_intact(&uffd_state.device) ? -1 : (int)syscall(SYS_userfaultfd, flags);
	if (fd < 0) {
		if (!umn_descriptor_intact(&uffd_state.device)) {
			failure->error = errno;
			device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
			if (device >= 0)
				umn_descriptor_set(&uffd_state.device, device);
			else
				uffd_state.device.fd = -1;
		}
		fd = uffd_state.device.fd < 0 ? -1 : ioctl(uffd_state.device.fd, USERFAULTFD_IOC_NEW, flags);
		if (fd < 0) {
			failure->device_error = errno;
			if (!failure->error)
				failure->error = errno;
			return -1;
		}
	}
	failure->error = 0;
	if (ioctl(fd, UFFDIO_API, &api))
		failure->error = errno;
	else if (!(api.features & FEATURE_AFTER_COUNT))
		failure->error = EOPNOTSUPP;
	if (!failure->error)
		return fd;
	failure->step = failure->error == EINVAL || failure->error == EOPNOTSUPP ? UMN_UFFD_FEATURES : UMN_UFFD_IOCTL;
	close(fd);
	return -1;
}

/* 0 or an errno. *huge: there are hugetlb pages in the range. */
static int register_range(int fd, uint64_t start, uint64_t end, bool *huge)
{
	struct uffdio_register range = {.range = {start, end - start}, .mode = UFFDIO_REGISTER_MODE_WP};

	*huge = false;
	if (ioctl(fd, UFFDIO_REGISTER, &range))
		return errno;
	*huge = !(range.ioctls & (UINT64_C(1) << _UFFDIO_ZEROPAGE));
	return 0;
}

static int unregister_range(int fd, uint64_t start, uint64_t end)
{
	struct uffdio_range range = {start, end - start};

	return ioctl(fd, UFFDIO_UNREGISTER, &range) ? errno : 0;
}

/* Unregisters it if it is ours: kernels before 6.17 would unregister another userfaultfd's memory just as well ("userfaultfd: prevent
 * unregistering VMAs through a different userfaultfd"). Registering that is EBUSY. */
static bool unregister_ours(int fd, uint64_t start, uint64_t end)
{
	bool huge;

	return !register_range(fd, start, end, &huge) && !unregister_range(fd, start, end);
}

enum coverage {
	NOT_REGISTERED, /* not all of it, or it is not one mapping */
	ANONYMOUS,	/* all of it, with some userfaultfd, and it is private anonymous memory; or hugetlb memory of any kind */
	OTHER_KIND,	/* all of it, with some userfaultfd */
	CHANGING,	/* some change is under way somewhere */
};

/* UFFDIO_CONTINUE looks at this first and at once, under the mmap lock. Then it fails with EINVAL for private anonymous memory, as that has no
 * page cache to take pages from. Changes nothing there. `prove` tries all this. */
static enum coverage coverage_of(int fd, uint64_t start, uint64_t end)
{
	struct uffdio_continue range = {.range = {start, end - start}, .mode = UFFDIO_CONTINUE_MODE_DONTWAKE};

	if (!ioctl(fd, UFFDIO_CONTINUE, &range))
		return OTHER_KIND;
	switch (errno) {
	case EAGAIN:
		return CHANGING;
	case EINVAL:
		return ANONYMOUS;
	case EFAULT: /* there is no such page in the page cache */
	case EEXIST: /* it is mapped already */
		return OTHER_KIND;
	}
	return NOT_REGISTERED; /* ENOENT */
}

/* The same, for an owner: the reader would wait for itself. */
static enum coverage wait_coverage_of(uint64_t start, uint64_t end)
{
	enum coverage coverage;

	while ((coverage = coverage_of(uffd_state.uffd.fd, start, end)) == CHANGING)
		sched_yield();
	return coverage;
}

enum barrier {
	PASSED, /* no change is under way: i at the top of this file */
	NOT_YET,
	NO_UFFD, /* the descriptor is not a userfaultfd */
};

static enum barrier barrier(int fd)
{
	struct uffdio_writeprotect nonsense = {.mode = ~UINT64_C(0)};
	int kept = errno;
	enum barrier result = NO_UFFD;

	if (ioctl(fd, UFFDIO_WRITEPROTECT, &nonsense)) {
		if (errno == EINVAL)
			result = PASSED;
		else if (errno == EAGAIN)
			result = NOT_YET;
	}
	errno = kept;
	__atomic_thread_fence(__ATOMIC_ACQUIRE); /* i before ii */
	return result;
}

/* ---- Mappings ---- */

struct mapping {
	uint64_t start, end;
	bool shared, file;
	bool huge; /* private huge pages of no file that a process could open */
};

static bool is_private_anonymous(const struct mapping *mapping)
{
	return !mapping->shared && (!mapping->file || mapping->huge);
}

static const char anonymous_huge[] = "/anon_hugepage"; /* (deleted) */

static bool is_anonymous_huge(const char *name)
{
	return !strncmp(name, anonymous_huge, strlen(anonymous_huge));
}

/* PROCMAP_QUERY, Linux 6.11. */
struct query {
	uint64_t size, flags, address;
	uint64_t start, end, mapping_flags, page_size, offset, inode;
	uint32_t major, minor, name_size, build_id_size;
	uint64_t name, build_id;
};
#define QUERY _IOWR('f', 17, struct query)
#define QUERY_SHARED 8
#define QUERY_COVERING_OR_NEXT 0x10

/* The first mapping that ends above `address`. 0 or an errno. */
static int query_mapping(int fd, uint64_t address, struct mapping *mapping)
{
	char name[64] = "";
	struct query query = {.size = sizeof query, .flags = QUERY_COVERING_OR_NEXT, .address = address};
	struct query named = query;

	if (ioctl(fd, QUERY, &query))
		return errno == ENOENT ? UMN_UFFD_UNMAPPED : errno;
	*mapping = (struct mapping){query.start, query.end, query.mapping_flags & QUERY_SHARED, query.inode != 0, false};
	if (mapping->file) {
		named.name = (uint64_t)name;
		named.name_size = sizeof name;
		/* ENAMETOOLONG: it is another's */
		if (!ioctl(fd, QUERY, &named) && !mapping->shared)
			mapping->huge = is_anonymous_huge(name);
	}
	return 0;
}

/* /proc/self/maps as text, read without allocating anything. */
struct text {
	int fd;
	bool no_query;
	size_t at, filled;
	char bytes[8192]; /* more than the longest line */
};

static char *next_line(struct text *text)
{
	char *line = text->bytes + text->at, *end;
	ssize_t length;

	while (!(end = memchr(line, '\n', text->filled - text->at))) {
		memmove(text->bytes, line, text->filled -= text->at);
		text->at = 0;
		line = text->bytes;
		length = read(text->fd, text->bytes + text->filled, sizeof text->bytes - text->filled);
		if (length <= 0)
			return NULL;
		text->filled += (size_t)length;
	}
	*end = '\0';
	text->at = (size_t)(end + 1 - text->bytes);
	return line;
}

static uint64_t number(char **at, uint32_t base)
{
	uint64_t result = 0;

	for (uint32_t digit;; ++*at) {
		digit = (uint32_t)(**at >= 'a' ? **at - 'a' + 10 : **at - '0');
		if (digit >= base)
			return result;
		result = result * base + digit;
	}
}

static void skip_field(char **at)
{
	*at += strcspn(*at, " ");
	*at += strspn(*at, " ");
}

/* As query_mapping; the addresses have to rise from call to call. */
static int search_mapping(struct text *text, uint64_t address, struct mapping *mapping)
{
	char *at;

	while ((at = next_line(text))) {
		mapping->start = number(&at, 16);
		at++;
		mapping->end = number(&at, 16);
		if (mapping->end <= address)
			continue;
		at++;
		mapping->shared = at[3] == 's';
		skip_field(&at); /* permissions */
		skip_field(&at); /* offset */
		skip_field(&at); /* device */
		mapping->file = number(&at, 10);
		skip_field(&at);
		mapping->huge = mapping->file && !mapping->shared && is_anonymous_huge(at);
		return 0;
	}
	return UMN_UFFD_UNMAPPED;
}

static bool open_text(struct text *text)
{
	*text = (struct text){.fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC)};
	return text->fd >= 0;
}

static int next_mapping(struct text *text, uint64_t address, struct mapping *mapping)
{
	int error = text->no_query ? ENOTTY : query_mapping(text->fd, address, mapping);

	if (!error || error == UMN_UFFD_UNMAPPED)
		return error;
	text->no_query = true;
	return search_mapping(text, address, mapping);
}

/* The file is kept open, as opening it takes longer than asking. It is the one of this thread, whose inode no program is likely to open. */
static bool open_maps(void)
{
	int fd;

	if (uffd_state.no_query)
		return false;
	if (!umn_descriptor_intact(&uffd_state.maps)) {
		uffd_state.maps.fd = -1;
		if ((fd = open("/proc/thread-self/maps", O_RDONLY | O_CLOEXEC)) >= 0)
			umn_descriptor_set(&uffd_state.maps, fd);
	}
	return uffd_state.maps.fd >= 0;
}

/* For owners. 0, UMN_UFFD_UNMAPPED, UMN_UFFD_NO_PROC or an errno. */
static int mapping_at(uint64_t address, struct mapping *mapping)
{
	struct text text;
	int error;

	if (open_maps()) {
		error = query_mapping(uffd_state.maps.fd, address, mapping);
		if (!error || error == UMN_UFFD_UNMAPPED)
			return error;
		umn_descriptor_close(&uffd_state.maps);
		uffd_state.no_query = true;
	}
	if (!open_text(&text))
		return UMN_UFFD_NO_PROC;
	error = search_mapping(&text, address, mapping);
	close(text.fd);
	return error;
}

/* Up to where the mapping may grow in place. What is to be (un)registered ends there, as the mapping may grow before that is done: to
 * end inside it would split it. Holes are skipped. */
static uint64_t end_of_room(const struct mapping *mapping)
{
	uint64_t end = mapping->end;
	struct mapping next;

	while (!mapping_at(end, &next)) {
		if (next.start >= end)
			return next.start;
		end = next.end; /* it has grown already */
	}
	return end;
}

/* ---- The reader ---- */

struct reader {
	uint32_t instance; /* the one that it reads for */
	bool has_own_table;
	struct umn_descriptor uffd, maps;
	struct umn_descriptor wake[UMN_UFFD_TABLES_MAX]; /* copies of the tables', by their place in uffd_state.tables */
	uint64_t low, high;				 /* all that events were about lies between */
};

/* The descriptors of the wake-up are sockets, and not an eventfd, as these have an inode to themselves and send() raises no SIGPIPE. */
static void send_wake_up(const struct umn_descriptor *wake)
{
	if (umn_descriptor_intact(wake) && send(wake->fd, "", 1, MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
		return; /* it is readable already */
}

/* For owners. */
static void wake(struct umn_source *source)
{
	send_wake_up(&((struct umn_uffd *)source)->wake);
}

static void wake_table(const struct reader *r, uint32_t place, const struct umn_uffd *u)
{
	send_wake_up(r->has_own_table ? &r->wake[place] : &u->wake);
}

static void feed(const struct reader *r, uint64_t start, uint64_t end, int32_t syscall)
{
	struct umn_uffd *u;

	for (uint32_t i = 0; i < UMN_UFFD_TABLES_MAX; i++) {
		u = load(&uffd_state.tables[i]);
		if (u && umn_feed(&u->memory, start, end, 0, syscall))
			wake_table(r, i, u);
	}
}

/* For the next watch or unwatch to unregister. If there is no room, it stays registered until it is unmapped or the reader ends. */
static void note_moved(uint64_t to)
{
	uint32_t in = uffd_state.moved_in;

	if (in - load(&uffd_state.moved_out) == MOVED)
		return;
	store(&uffd_state.moved[in % MOVED], to);
	store(&uffd_state.moved_in, in + 1);
}

static void widen(uint64_t *low, uint64_t *high, uint64_t start, uint64_t end)
{
	if (start < *low)
		*low = start;
	if (end > *high)
		*high = end;
}

static void feed_event(struct reader *r, const struct uffd_msg *event)
{
	uint64_t from, to, length;

	switch (event->event) {
	case UFFD_EVENT_REMOVE:
		feed(r, event->arg.remove.start, event->arg.remove.end, SYS_madvise);
		break;
	case UFFD_EVENT_UNMAP: /* by munmap, mmap, brk or mremap */
		widen(&r->low, &r->high, event->arg.remove.start, event->arg.remove.end);
		feed(r, event->arg.remove.start, event->arg.remove.end, -1);
		break;
	case UFFD_EVENT_REMAP:
		from = event->arg.remap.from;
		to = event->arg.remap.to;
		length = event->arg.remap.len;
		/* The mapping took its registration along. It is not undone here: of a mapping that has grown only the old length is told, and
		 * undoing a part would split it. */
		note_moved(to);
		widen(&r->low, &r->high, to, to + length);
		feed(r, from, from + length, SYS_mremap);
		feed(r, to, to + length, SYS_mremap);
		break;
	default:
		feed(r, 0, UINT64_MAX, -1);
	}
}

/* Clients that poll only a mapped counter, or a descriptor, never ask the kernel whether all is delivered. So bump each counter and
 * send each wake-up that is armed before the event is read, which lets the thread go on that has changed something: the client then
 * drains, and waits for the event to be fed. An event that hits is taken for the one that was announced, so each is counted
 * once. Only an event that hits nothing of a table is counted for nothing.
 *
 * With a counter one event is read at a time: the kernel lets the thread go on before it looks for another event, and the same
 * thread's next change would be read along with its last, unannounced (13 times in 2.9 million changes, more on a busy machine).
 *
 * That is as good as it gets, not good enough to rely on: what is read may be an event that was queued after this (the kernel hands
 * out the latest first), and its thread may have looked at the counter after this. docs/c.md says so.
 *
 * Returns how many events may be read now. */
static size_t announce(const struct reader *r)
{
	size_t events = EVENTS;

	for (uint32_t i = 0; i < UMN_UFFD_TABLES_MAX; i++) {
		struct umn_uffd *u = load(&uffd_state.tables[i]);
		struct umn_header *header = u ? (struct umn_header *)u->memory.segment[0] : NULL;
		uint64_t *counter = u ? load(&u->counter) : NULL;

		if (!counter)
			continue;
		events = 1;
		u->announced = true;
		u->fed = load(&header->generation);
		store(counter, *counter + 1); /* only this thread writes it */
		/* A client that clears the wake-up before the event was fed has armed after that, and is woken once more. */
		if (load(&header->armed) && __sync_lock_test_and_set(&header->armed, 0))
			wake_table(r, i, u);
	}
	return events;
}

/* After each event. */
static void count_event(void)
{
	for (uint32_t i = 0; i < UMN_UFFD_TABLES_MAX; i++) {
		struct umn_uffd *u = load(&uffd_state.tables[i]);
		uint64_t *counter = u ? load(&u->counter) : NULL;
		uint64_t generation = counter ? load(&((struct umn_header *)u->memory.segment[0])->generation) : 0;

		if (!counter || generation == u->fed)
			continue;
		u->fed = generation;
		if (!u->announced)
			store(counter, *counter + 1);
		u->announced = false;
	}
}

/* Gets copies of the sockets that tables have by now, and lets go of others'. In each cycle: umn_uffd_wake_fd sees to it that there is one
 * before it returns. */
static void borrow_wakes(struct reader *r)
{
	const struct umn_descriptor none = UMN_NO_DESCRIPTOR;

	for (uint32_t i = 0; i < UMN_UFFD_TABLES_MAX; i++) {
		struct umn_uffd *u = load(&uffd_state.tables[i]);
		const struct umn_descriptor *wake = u && load(&u->wake.fd) >= 0 ? &u->wake : &none;

		if (r->wake[i].inode == wake->inode)
			continue;
		umn_descriptor_close(&r->wake[i]);
		if (u && wake->inode && !borrow_ours(wake, &r->wake[i])) {
			/* The program has closed it. Without wake-ups a change could go unnoticed. */
			store(&u->broken, true);
			umn_feed(&u->memory, 0, UINT64_MAX, 0, -1);
		}
		r->wake[i].inode = wake->inode; /* do not try again */
	}
}

/* Returns how many events were read; -1: the descriptor is not the userfaultfd. */
static int take_events(struct reader *r)
{
	struct uffd_msg events[EVENTS];
	ssize_t length, count = -1;
	size_t room;

	__sync_fetch_and_add(&uffd_state.cycle, 1); /* a */
	if (r->has_own_table || umn_descriptor_intact(&r->uffd)) {
		room = load(&uffd_state.stopping) ? EVENTS : announce(r); /* then it is the bell, and nothing is watched */
		length = read(r->uffd.fd, events, room * sizeof *events);
		count = length > 0 ? length / (ssize_t)sizeof *events : length < 0 && errno != EAGAIN && errno != EINTR ? -1 : 0;
	}
	for (ssize_t i = 0; i < count; i++) {
		feed_event(r, &events[i]);
		count_event();
	}
	if (r->has_own_table)
		borrow_wakes(r);
	__sync_fetch_and_add(&uffd_state.cycle, 1); /* d */
	return (int)count;
}

/* Unregisters each mapping that is registered with ours, from `low` to `high`. What has grown beyond that follows without a gap, as only events
 * make gaps. While a change is under way it cannot be told what is registered. There may always be one, of threads that change registered
 * memory all the time. With `force` a mapping is unregistered then too. Returns whether there was one, or there is an event to be read first. */
static bool unregister_all(const struct reader *r, struct text *maps, bool force)
{
	uint64_t low = uffd_state.low, high = uffd_state.high;
	bool was_registered = false, found = false;
	struct mapping mapping, next;
	enum coverage coverage;
	uint64_t end = 0;
	int error;

	widen(&low, &high, r->low, r->high);
	lseek(maps->fd, 0, SEEK_SET);
	maps->at = maps->filled = 0;
	error = next_mapping(maps, low, &next);
	while (!error) {
		mapping = next;
		error = next_mapping(maps, mapping.end, &next);
		if (!error && next.start < mapping.end)
			continue; /* it has grown already */
		if (mapping.start >= high && (mapping.start > end || !was_registered))
			break;
		end = mapping.end;
		coverage = coverage_of(r->uffd.fd, mapping.start, end);
		if (coverage == CHANGING && !force)
			return true;
		was_registered = coverage != NOT_REGISTERED;
		if (was_registered) /* with the room that it may grow into: see end_of_room */
			found |= unregister_ours(r->uffd.fd, mapping.start, error ? end : next.start);
	}
	return found;
}

/* Nothing is registered when this returns, nor what grew or moved meanwhile: the last search found nothing, read no event, and
 * no change is under way after it. Without /proc this leaves what grew or moved to the closing of the userfaultfd. */
static void end_registrations(struct reader *r)
{
	const struct timespec interval = {.tv_nsec = 50000};
	struct text maps = {.fd = r->maps.fd};
	bool again = true;

	if (maps.fd < 0 && !open_text(&maps))
		return;
	/* A thread whose event was read has to run before its change is over. So this takes microseconds, or milliseconds if all is busy. */
	for (uint32_t tries = 0; again && tries < END_TRIES; tries++) {
		again = unregister_all(r, &maps, tries >= TRIES);
		again |= take_events(r) > 0;
		again |= barrier(r->uffd.fd) != PASSED;
		if (again && tries < 100)
			sched_yield();
		else if (again)
			nanosleep(&interval, NULL);
	}
	close(maps.fd);
}

/* The reader's part of `start`. 0 or an errno. */
static int set_up_reader(struct reader *r)
{
	*r = (struct reader){
		.uffd = uffd_state.uffd, .maps = {.fd = -1}, .low = UINT64_MAX, .instance = load(&uffd_state.instance)};
	for (uint32_t i = 0; i < UMN_UFFD_TABLES_MAX; i++)
		r->wake[i].fd = -1;
	/* It empties the table without closing anything. */
	r->has_own_table = uffd_state.lends && !syscall(SYS_close_range, 0, UINT32_MAX, UNSHARE);
	uffd_state.has_own_table = r->has_own_table;
	if (!r->has_own_table)
		return 0;
	if (!borrow_ours(&uffd_state.uffd, &r->uffd))
		return EBADF;
	borrow_ours(&uffd_state.maps, &r->maps);
	borrow_wakes(r);
	return 0;
}

static void *reader(void *unused)
{
	struct reader r;
	struct pollfd polled = {.events = POLLIN};

	prctl(PR_SET_NAME, "ummunotify");
	uffd_state.reader_error = set_up_reader(&r);
	polled.fd = uffd_state.reader_error ? -1 : r.uffd.fd;
	sem_post(&uffd_state.ready);
	while (!load(&uffd_state.stopping)) {
		poll(&polled, 1, polled.fd < 0 ? 10 : -1);
		if (!polled.revents || take_events(&r) >= 0)
			continue;
		/* The program has closed the userfaultfd, in the descriptor table that it shares with this reader: no event comes any
		 * more. Not uffd_state.instance: the thread that stops this reader may have set that to the next instance. */
		store(&uffd_state.over, r.instance);
		polled.fd = -1;
		feed(&r, 0, UINT64_MAX, -1);
	}
	/* Here, since whatever the thread that stops this one did after it, free() for one, might itself wait for a reader. */
	if (polled.fd >= 0)
		end_registrations(&r);
	umn_descriptor_close(&r.uffd);
	return unused;
}

/* Waits until the reader has finished the cycle that it is in. */
static void pass_cycle(void)
{
	uint32_t cycle = load_after(&uffd_state.cycle);

	while ((cycle & 1) && load(&uffd_state.cycle) == cycle)
		sched_yield();
}

/* ---- Is everything delivered? ---- */

static bool has_ended(const struct umn_uffd *u, uint32_t instance)
{
	return load(&u->instance) != instance || load(&uffd_state.over) == instance || load(&u->broken);
}

static bool delivered(struct umn_source *source)
{
	const struct umn_uffd *u = (const struct umn_uffd *)source;
	uint32_t instance = load(&uffd_state.instance);

	if (!load(&u->regions))
		return true;
	if (has_ended(u, instance))
		return false;
	return barrier(load(&uffd_state.uffd.fd)) == PASSED && !(load(&uffd_state.cycle) & 1);
}

static uint64_t nanoseconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Both what it waits for take microseconds, unless the other threads do not get a CPU; or gigabytes are being unmapped; or so many
 * threads unmap watched memory all the time that there is never a moment without. */
static bool wait_delivered(struct umn_source *source, unsigned int milliseconds)
{
	const struct umn_uffd *u = (const struct umn_uffd *)source;
	const struct timespec interval = {.tv_nsec = 20000};
	const uint64_t deadline = nanoseconds() + milliseconds * UINT64_C(1000000);
	uint32_t cycle = 0;
	bool is_quiet = false;
	enum barrier result;

	for (uint32_t tries = 0; load(&u->regions); tries++) {
		if (has_ended(u, load(&uffd_state.instance)))
			return false;
		if (!is_quiet) {
			result = tries || umn_descriptor_intact(&uffd_state.uffd) ? barrier(load(&uffd_state.uffd.fd)) : NO_UFFD;
			if (result == NO_UFFD) {
				/* The program has closed it; or this thread has a descriptor table of its own; or the last region was
				 * just unwatched. What woke this thread is fed by the end of that cycle. */
				pass_cycle();
				return !load(&u->regions);
			}
			is_quiet = result == PASSED;
			if (is_quiet)
				cycle = load(&uffd_state.cycle);
		}
		/* What was read before that moment is fed by the end of that cycle; later ones do not matter. */
		if (is_quiet && (!(cycle & 1) || load(&uffd_state.cycle) != cycle))
			return true;
		if (nanoseconds() > deadline)
			return false;
		if (tries < 100)
			sched_yield();
		else
			nanosleep(&interval, NULL);
	}
	return true;
}

/* ---- What is watched ---- */

/* The first boundary at or above. */
static size_t find(uint64_t at)
{
	size_t low = 0, high = uffd_state.count, middle;

	while (low < high) {
		middle = (low + high) / 2;
		if (uffd_state.boundaries[middle].at < at)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

static uint64_t below(size_t i)
{
	return i ? uffd_state.boundaries[i - 1].regions : 0;
}

static bool is_any_watched(uint64_t start, uint64_t end)
{
	size_t i = find(start + 1);

	if (below(i))
		return true;
	for (; i < uffd_state.count && uffd_state.boundaries[i].at < end; i++)
		if (uffd_state.boundaries[i].regions)
			return true;
	return false;
}

/* Makes sure that there is a boundary. */
static size_t split(uint64_t at)
{
	size_t i = find(at);

	if (i == uffd_state.count || uffd_state.boundaries[i].at != at) {
		memmove(&uffd_state.boundaries[i + 1], &uffd_state.boundaries[i],
			(uffd_state.count++ - i) * sizeof *uffd_state.boundaries);
		uffd_state.boundaries[i] = (struct boundary){at, below(i)};
	}
	return i;
}

/* ... or that there is none without need. */
static void join(size_t i)
{
	if (uffd_state.boundaries[i].regions == below(i))
		memmove(&uffd_state.boundaries[i], &uffd_state.boundaries[i + 1],
			(--uffd_state.count - i) * sizeof *uffd_state.boundaries);
}

static int count_up(uint64_t start, uint64_t end)
{
	size_t capacity = uffd_state.capacity, first, last;
	struct boundary *grown;

	/* For all that the regions can ever have, so that counting down need not allocate. */
	if (capacity < 2 * (uffd_state.regions + 1)) {
		capacity = capacity ? 2 * capacity : 64;
		grown = realloc(uffd_state.boundaries, capacity * sizeof *grown);
		if (!grown)
			return ENOMEM;
		uffd_state.boundaries = grown;
		uffd_state.capacity = capacity;
	}
	uffd_state.regions++;
	first = split(start);
	last = split(end);
	for (size_t i = first; i < last; i++)
		uffd_state.boundaries[i].regions++;
	join(last);
	join(first);
	return 0;
}

/* Unregisters the mappings of [start, end) that no region lies in. What stays registered, as its mapping was split or moved since,
 * costs time when it is unmapped, until the last region is unwatched. */
static void release(uint64_t start, uint64_t end)
{
	int fd = uffd_state.uffd.fd, error;
	struct mapping mapping;

	for (; start < end; start = mapping.end) {
		error = mapping_at(start, &mapping);
		if (error == UMN_UFFD_NO_PROC) { /* then no more than this was registered */
			unregister_ours(fd, start, end);
			return;
		}
		if (error || mapping.start >= end)
			return;
		if (!is_any_watched(mapping.start, mapping.end) && wait_coverage_of(mapping.start, mapping.end) != NOT_REGISTERED)
			unregister_ours(fd, mapping.start, end_of_room(&mapping));
	}
}

static void release_moved(void)
{
	uint64_t to;

	for (uint32_t out = uffd_state.moved_out; out != load(&uffd_state.moved_in); store(&uffd_state.moved_out, ++out)) {
		to = load(&uffd_state.moved[out % MOVED]);
		if (!is_any_watched(to, to + page_size()))
			release(to, to + page_size());
	}
}

static void count_down(uint64_t start, uint64_t end)
{
	size_t first = split(start), last = split(end), i, next;

	uffd_state.regions--;
	for (i = first; i < last; i++)
		uffd_state.boundaries[i].regions--;
	for (i = first; i < last; i = next) {
		next = i + 1;
		if (uffd_state.boundaries[i].regions)
			continue;
		while (next < last && !uffd_state.boundaries[next].regions)
			next++;
		release(uffd_state.boundaries[i].at, uffd_state.boundaries[next].at);
	}
	join(last);
	join(first);
}

/* ---- What can be watched ---- */

/* Registers the mapping of `*at`, so that from now on all changes of its part below `end` are told, and moves `*at` to the end of that part. 0 or
 * why not; EAGAIN: it changed meanwhile.
 *
 * userfaultfd tells only of changes that this process makes of its mappings, so the memory must not be another's too. Registering skips
 * holes, and also registers memory whose changes are not all told; and another thread can exchange the memory at any time. So what is
 * there is asked after it was registered: from the moment at which a page is found to be registered, exchanging it is an event. */
static int register_mapping(uint64_t *at, uint64_t end)
{
	int fd = uffd_state.uffd.fd, error;
	struct mapping mapping = {*at, end, false, false, false};
	bool huge, has_proc;
	uint64_t room;

	/* Most regions lie in a mapping that is registered already; with ours, or this fails. */
	if (wait_coverage_of(*at, end) == ANONYMOUS) {
		error = register_range(fd, *at, end, &huge);
		if (!error && !huge)
			*at = end;
		/* EINVAL: it was exchanged meanwhile, for memory that cannot be registered or none. */
		if (error || !huge)
			return error == EINVAL ? EAGAIN : error;
	}
	error = mapping_at(*at, &mapping);
	has_proc = error != UMN_UFFD_NO_PROC; /* else just the region is registered, and mremap of its mapping may fail */
	if (has_proc && error)
		return error;
	if (mapping.start > *at)
		return UMN_UFFD_UNMAPPED;
	if (!is_private_anonymous(&mapping))
		return UMN_UFFD_KIND;
	room = has_proc ? end_of_room(&mapping) : end;
	widen(&uffd_state.low, &uffd_state.high, mapping.start, room);
	error = register_range(fd, mapping.start, room, &huge);
	if (error)
		return error == EINVAL ? EAGAIN : error;
	if (mapping.end < end)
		end = mapping.end;
	if (huge) {
		if (!has_proc)
			return UMN_UFFD_NO_PROC;
		if (mapping_at(*at, &mapping) || !mapping.huge || mapping.start > *at || mapping.end < end ||
		    wait_coverage_of(*at, end) == NOT_REGISTERED)
			return EAGAIN;
	} else {
		while (!has_proc && wait_coverage_of(*at, end) == NOT_REGISTERED && end - *at > page_size())
			end = *at + ((end - *at) >> (uffd_state.page_shift + 1) << uffd_state.page_shift);
		switch (wait_coverage_of(*at, end)) {
		case ANONYMOUS:
			break;
		case OTHER_KIND:
			return UMN_UFFD_KIND;
		default:
			return EAGAIN;
		}
	}
	*at = end;
	return 0;
}

/* Registered, or nothing has changed. */
static int cover(uint64_t start, uint64_t end)
{
	uint64_t at = start;
	int error = count_up(start, end);

	if (error)
		return error;
	for (int tries = 0; at < end; tries += error == EAGAIN) {
		error = register_mapping(&at, end);
		if (error && (error != EAGAIN || tries == TRIES))
			break;
	}
	if (at < end)
		count_down(start, end);
	return at == end ? 0 : error == EAGAIN ? UMN_UFFD_KIND : error;
}

static bool overlaps(uint64_t start, uint64_t end, const void *memory, size_t length)
{
	return memory && start < (uint64_t)memory + length && end > (uint64_t)memory;
}

/* What the reader works with. */
static bool is_own(uint64_t start, uint64_t end)
{
	const struct umn_uffd *u;

	if (overlaps(start, end, uffd_state.stack, STACK_SIZE + 2 * page_size()))
		return true;
	for (uint32_t i = 0; i < UMN_UFFD_TABLES_MAX; i++) {
		u = load(&uffd_state.tables[i]);
		for (uint32_t s = 0; u && s < UMN_SEGMENTS && u->memory.pages[s]; s++)
			if (overlaps(start, end, u->memory.segment[s], (size_t)u->memory.pages[s] * UMN_PAGE))
				return true;
	}
	return false;
}

static uint64_t round_down(uint64_t address)
{
	return address >> uffd_state.page_shift << uffd_state.page_shift;
}

static uint64_t round_up(uint64_t address)
{
	return round_down(address + page_size() - 1);
}

/* ---- While something is watched ---- */

static bool map_stack(void)
{
	const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK;
	uint8_t *stack = mmap(NULL, STACK_SIZE + 2 * page_size(), PROT_NONE, flags, -1, 0);
	int error;

	if (stack == MAP_FAILED)
		return false;
	uffd_state.stack = stack;
	uffd_state.bell = NULL;
	if (!mprotect(stack + page_size(), STACK_SIZE, PROT_READ | PROT_WRITE))
		return true;
	error = errno;
	munmap(stack, STACK_SIZE + 2 * page_size());
	uffd_state.stack = NULL;
	errno = error;
	return false;
}

/* Not MADV_DONTNEED: that fails for memory that mlockall has locked. Forgotten first: a child that another thread makes after the unmapping
 * may have other memory there by the time that it lets go of what it inherited. */
static void ring_bell(void)
{
	uint8_t *bell = uffd_state.bell;

	store(&uffd_state.bell, NULL);
	if (bell)
		munmap(bell, page_size());
}

/* Nothing of it is registered. Where the bell was there may be other memory. */
static void unmap_stack(void)
{
	uint8_t *stack = uffd_state.stack;

	ring_bell();
	store(&uffd_state.stack, NULL);
	munmap(stack, STACK_SIZE);
	munmap(stack + STACK_SIZE + page_size(), page_size());
}

/* A thread on that stack, which no signal handler ever runs on. */
static int start_thread(void *(*run)(void *), void *argument)
{
	pthread_attr_t attributes;
	sigset_t all, before;
	int error;

	sigfillset(&all);
	pthread_attr_init(&attributes);
	pthread_attr_setstack(&attributes, uffd_state.stack, STACK_SIZE);
	pthread_sigmask(SIG_BLOCK, &all, &before);
	error = pthread_create(&uffd_state.thread, &attributes, run, argument);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_attr_destroy(&attributes);
	return error;
}

/* Begins an instance. */
static bool start(struct umn_uffd_failure *failure)
{
	uint64_t bell;
	bool huge;
	int fd = open_uffd(failure);

	if (fd < 0)
		return false;
	*failure = (struct umn_uffd_failure){.step = UMN_UFFD_MEMORY};
	if (!map_stack()) {
		failure->error = errno;
		close(fd);
		return false;
	}
	bell = (uint64_t)uffd_state.stack + STACK_SIZE;
	uffd_state.bell = (uint8_t *)bell;
	if (!(failure->error = register_range(fd, bell, bell + page_size(), &huge))) {
		store(&uffd_state.stopping, 0);
		uffd_state.moved_in = uffd_state.moved_out = 0;
		uffd_state.low = UINT64_MAX;
		uffd_state.high = 0;
		store(&uffd_state.lender, (pid_t)syscall(SYS_gettid));
		sem_init(&uffd_state.ready, 0, 0);
		umn_descriptor_set(&uffd_state.uffd, fd);
		failure->step = UMN_UFFD_THREAD;
		failure->error = start_thread(reader, NULL);
		if (!failure->error) {
			while (sem_wait(&uffd_state.ready))
				;
			failure->step = UMN_UFFD_READER;
			failure->error = uffd_state.reader_error;
			if (!failure->error)
				return true;
			store(&uffd_state.stopping, 1);
			pthread_join(uffd_state.thread, NULL);
		}
		store(&uffd_state.uffd.fd, -1);
		unregister_range(fd, bell, bell + page_size());
	}
	close(fd);
	unmap_stack();
	return false;
}

/* Ends the instance. */
static void stop(void)
{
	struct umn_descriptor uffd = uffd_state.uffd;

	store(&uffd_state.uffd.fd, -1);
	__sync_fetch_and_add(&uffd_state.instance, 1);
	store(&uffd_state.stopping, 1);
	/* Before the reader ends, as it unregisters what it cannot find by closing. If both have one, it is the reader's to close. */
	if (uffd_state.has_own_table)
		umn_descriptor_close(&uffd);
	ring_bell();
	pthread_join(uffd_state.thread, NULL);
	unmap_stack();
}

/* If the program has closed the userfaultfd, nothing that was watched with it is valid any more. */
static void end_if_closed(void)
{
	struct umn_uffd *u;

	if (load(&uffd_state.uffd.fd) < 0 ||
	    (load(&uffd_state.over) != uffd_state.instance && umn_descriptor_intact(&uffd_state.uffd)))
		return;
	store(&uffd_state.over, uffd_state.instance);
	for (uint32_t i = 0; i < UMN_UFFD_TABLES_MAX; i++) {
		u = load(&uffd_state.tables[i]);
		if (u && umn_feed(&u->memory, 0, UINT64_MAX, 0, -1))
			wake(&u->source);
	}
	uffd_state.count = uffd_state.regions = 0;
	stop();
}

/* Regions that were watched with an instance that has ended are not watched any more; nor is anything fed to a table of the parent's. */
static bool is_over(const struct umn_uffd *u)
{
	return load(&u->broken) || u->forks != uffd_state.forks || (u->regions && u->instance != uffd_state.instance);
}

static int watch_in(struct umn_uffd *u, uint64_t start_address, uint64_t end)
{
	int error;

	end_if_closed();
	if (!is_over(u) && load(&u->wake.fd) >= 0 && !(umn_descriptor_intact(&u->wake) && umn_descriptor_intact(&u->woken)))
		store(&u->broken, true);
	if (is_over(u))
		return UMN_UFFD_CLOSED;
	if (is_own(start_address, end))
		return UMN_UFFD_OWN;
	if (!uffd_state.regions && !start(&uffd_state.start_failure))
		return UMN_UFFD_START;
	store(&u->instance, uffd_state.instance);
	release_moved();
	error = cover(round_down(start_address), round_up(end));
	/* What was registered was so with ours. */
	end_if_closed();
	if (load(&uffd_state.uffd.fd) < 0)
		return UMN_UFFD_CLOSED;
	if (!error)
		store(&u->regions, u->regions + 1);
	if (!uffd_state.regions)
		stop();
	return error;
}

static int watch(struct umn_source *source, uint64_t start_address, uint64_t end)
{
	int error;

	pthread_mutex_lock(&uffd_state.lock);
	error = watch_in((struct umn_uffd *)source, start_address, end);
	pthread_mutex_unlock(&uffd_state.lock);
	return error;
}

static void unwatch(struct umn_source *source, uint64_t start_address, uint64_t end)
{
	struct umn_uffd *u = (struct umn_uffd *)source;

	pthread_mutex_lock(&uffd_state.lock);
	end_if_closed();
	if (!(u->regions && u->instance != uffd_state.instance)) {
		release_moved();
		count_down(round_down(start_address), round_up(end));
		store(&u->regions, u->regions - 1);
		if (!uffd_state.regions)
			stop();
	}
	pthread_mutex_unlock(&uffd_state.lock);
}

static void detach(struct umn_source *source)
{
	for (uint32_t i = 0; i < UMN_UFFD_TABLES_MAX; i++)
		if (load(&uffd_state.tables[i]) == (struct umn_uffd *)source)
			store(&uffd_state.tables[i], NULL);
	pass_cycle();
}

/* ---- Opening and closing ---- */

static void *unmap_page(void *page)
{
	munmap(page, page_size());
	return NULL;
}

/* What the barrier and coverage_of rest on: while a thread is inside munmap it has to be told that a change is under way, and no longer once its
 * event was read. Unmaps the page. */
static bool prove_barrier(int *fd, uint64_t page)
{
	struct pollfd polled = {.fd = *fd, .events = POLLIN};
	struct uffd_msg event = {0};
	bool proven;

	/* Without a limit: it takes as long as it takes the thread to get a CPU. */
	while (poll(&polled, 1, -1) < 0 && errno == EINTR)
		;
	proven = barrier(*fd) == NOT_YET && coverage_of(*fd, page, page + page_size()) == CHANGING;
	if (read(*fd, &event, sizeof event) != sizeof event) {
		close(*fd); /* lets the thread go */
		*fd = -1;
	}
	pthread_join(uffd_state.thread, NULL);
	return proven && event.event == UFFD_EVENT_UNMAP && event.arg.remove.start == page &&
	       event.arg.remove.end == page + page_size() && barrier(*fd) == PASSED;
}

static bool prove_coverage(int fd, uint64_t page, uint64_t shared)
{
	bool huge;
	bool proven = coverage_of(fd, page, page + page_size()) == NOT_REGISTERED &&
		      !register_range(fd, shared, shared + page_size(), &huge) && !huge &&
		      coverage_of(fd, shared, shared + page_size()) == OTHER_KIND &&
		      !register_range(fd, page, page + page_size(), &huge) && !huge &&
		      coverage_of(fd, page, page + page_size()) == ANONYMOUS && barrier(fd) == PASSED;

	unregister_range(fd, shared, shared + page_size());
	return proven;
}

/* Trusts nothing. */
static bool prove(int *fd, struct umn_uffd_failure *failure)
{
	const int protection = PROT_READ | PROT_WRITE, flags = MAP_ANONYMOUS | MAP_POPULATE;
	uint8_t *page = mmap(NULL, page_size(), protection, MAP_PRIVATE | flags, -1, 0);
	uint8_t *shared = page == MAP_FAILED ? page : mmap(NULL, page_size(), protection, MAP_SHARED | flags, -1, 0);
	bool proven = false;

	*failure = (struct umn_uffd_failure){.step = UMN_UFFD_MEMORY};
	if (page == MAP_FAILED || shared == MAP_FAILED || !map_stack()) {
		failure->error = errno;
	} else {
		failure->step = UMN_UFFD_PROOF;
		if (prove_coverage(*fd, (uint64_t)page, (uint64_t)shared)) {
			failure->error = start_thread(unmap_page, page);
			if (failure->error)
				failure->step = UMN_UFFD_THREAD;
			else
				proven = prove_barrier(fd, (uint64_t)page);
		}
		if (!proven && *fd >= 0)
			unregister_range(*fd, (uint64_t)page, (uint64_t)page + page_size());
		unmap_stack();
	}
	if (shared != MAP_FAILED)
		munmap(shared, page_size());
	if (page != MAP_FAILED && (failure->step != UMN_UFFD_PROOF))
		munmap(page, page_size());
	return proven;
}

static bool try_out(struct umn_uffd_failure *failure)
{
	int fd, copy;

	if (uffd_state.proven)
		return true;
	fd = open_uffd(failure);
	if (fd < 0)
		return false;
	copy = borrow((pid_t)syscall(SYS_gettid), fd);
	uffd_state.lends = copy >= 0;
	if (copy >= 0)
		close(copy);
	uffd_state.proven = prove(&fd, failure);
	if (fd >= 0)
		close(fd);
	return uffd_state.proven;
}

void umn_uffd_in_child(void)
{
	/* Locks may be held by threads that do not exist here, and memory be in the middle of a change: forget both. */
	umn_descriptor_close(&uffd_state.uffd);
	umn_descriptor_close(&uffd_state.device);
	umn_descriptor_close(&uffd_state.maps);
	/* Left where it is: unless C's fork has made this child, libc still has the reader in its list of threads, whose links are on the
	 * stack, and follows them in setuid and, from glibc 2.41, in fork. */
	store(&uffd_state.stack, NULL);
	store(&uffd_state.bell, NULL);
	memset(uffd_state.tables, 0, sizeof uffd_state.tables);
	pthread_mutex_init(&uffd_state.lock, NULL);
	uffd_state.boundaries = NULL;
	uffd_state.count = uffd_state.capacity = 0;
	uffd_state.regions = 0;
	uffd_state.cycle = uffd_state.table_count = 0;
	uffd_state.instance++;
	uffd_state.forks++;
}

static void once(void)
{
	uffd_state.page_shift = (uint8_t)__builtin_ctzl((unsigned long)sysconf(_SC_PAGESIZE));
	umn_process_add_child(umn_uffd_in_child);
}

static void close_if_unused(void)
{
	if (uffd_state.table_count)
		return;
	umn_descriptor_close(&uffd_state.maps);
	umn_descriptor_close(&uffd_state.device);
	free(uffd_state.boundaries);
	uffd_state.boundaries = NULL;
	uffd_state.capacity = 0;
}

void umn_uffd_start(void)
{
	static pthread_once_t first = PTHREAD_ONCE_INIT;

	pthread_once(&first, once);
}

struct umn_uffd *umn_uffd_new(struct umn_uffd_failure *failure)
{
	struct umn_uffd *u = calloc(1, sizeof *u);

	*failure = (struct umn_uffd_failure){.step = UMN_UFFD_MEMORY, .error = ENOMEM};
	if (!u)
		return NULL;
	umn_uffd_start();
	u->source = (struct umn_source){.watch = watch,
					.unwatch = unwatch,
					.delivered = delivered,
					.wait_delivered = wait_delivered,
					.wake = wake,
					.stop = detach};
	u->woken.fd = u->wake.fd = -1;
	pthread_mutex_lock(&uffd_state.lock);
	u->forks = uffd_state.forks;
	if (uffd_state.table_count == UMN_UFFD_TABLES_MAX) {
		*failure = (struct umn_uffd_failure){.step = UMN_UFFD_TABLES};
	} else if (try_out(failure)) {
		uffd_state.table_count++;
		open_maps();
		pthread_mutex_unlock(&uffd_state.lock);
		return u;
	}
	close_if_unused();
	pthread_mutex_unlock(&uffd_state.lock);
	free(u);
	return NULL;
}

struct umn_source *umn_uffd_source(struct umn_uffd *u)
{
	return &u->source;
}

void umn_uffd_start_failure(struct umn_uffd_failure *failure)
{
	pthread_mutex_lock(&uffd_state.lock);
	*failure = uffd_state.start_failure;
	pthread_mutex_unlock(&uffd_state.lock);
}

bool umn_uffd_is_broken(const struct umn_uffd *u)
{
	if (load(&u->broken))
		return true;
	if (!load(&u->regions))
		return false;
	/* If another thread unwatches the last region, it counts that before it closes the descriptor. */
	return has_ended(u, load(&uffd_state.instance)) || (!umn_descriptor_intact(&uffd_state.uffd) && load(&u->regions));
}

void *umn_uffd_add_segment(struct umn_uffd *u, uint32_t pages)
{
	void *memory = mmap(NULL, (size_t)pages * UMN_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	bool first;

	if (memory == MAP_FAILED)
		return NULL;
	pthread_mutex_lock(&uffd_state.lock);
	first = !u->memory.pages[0];
	umn_memory_add(&u->memory, memory, pages);
	for (uint32_t i = 0; first && i < UMN_UFFD_TABLES_MAX; i++)
		if (!load(&uffd_state.tables[i])) {
			store(&uffd_state.tables[i], u);
			break;
		}
	pthread_mutex_unlock(&uffd_state.lock);
	return memory;
}

/* Makes the reader pass a cycle. 0 or an errno. */
static int ring(void)
{
	uint8_t *page = mmap(NULL, page_size(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	bool huge;
	int error;

	if (page == MAP_FAILED)
		return errno;
	error = register_range(uffd_state.uffd.fd, (uint64_t)page, (uint64_t)page + page_size(), &huge);
	munmap(page, page_size());
	pass_cycle();
	return error;
}

/* Makes the pair, and gives the reader its copy. 0 or an errno. */
static int make_wake_fd(struct umn_uffd *u)
{
	int pair[2], error = 0;

	if (!u->memory.pages[0])
		return EINVAL; /* the reader does not know it yet */
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair))
		return errno;
	umn_descriptor_set(&u->woken, pair[0]);
	umn_descriptor_set(&u->wake, pair[1]);
	end_if_closed();
	if (load(&uffd_state.uffd.fd) >= 0 && uffd_state.has_own_table) {
		store(&uffd_state.lender, (pid_t)syscall(SYS_gettid));
		error = ring();
	}
	if (error) {
		umn_descriptor_close(&u->wake);
		umn_descriptor_close(&u->woken);
	}
	return error;
}

int umn_uffd_wake_fd(struct umn_uffd *u)
{
	int error = 0;

	pthread_mutex_lock(&uffd_state.lock);
	if (load(&u->woken.fd) < 0)
		error = make_wake_fd(u);
	else if (!umn_descriptor_intact(&u->woken) || !umn_descriptor_intact(&u->wake))
		error = UMN_UFFD_CLOSED;
	pthread_mutex_unlock(&uffd_state.lock);
	return error ? -error : u->woken.fd;
}

void umn_uffd_acknowledge(struct umn_uffd *u)
{
	char bytes[64];

	if (umn_descriptor_intact(&u->woken))
		while (recv(u->woken.fd, bytes, sizeof bytes, MSG_DONTWAIT) == sizeof bytes)
			;
}

void umn_uffd_set_counter(struct umn_uffd *u, uint64_t *counter)
{
	store(&u->counter, counter);
	pass_cycle(); /* whatever is read from now on is announced to it */
}

void umn_uffd_close(struct umn_uffd *u)
{
	if (u->closed)
		return;
	u->closed = true;
	if (u->forks == uffd_state.forks) {
		pthread_mutex_lock(&uffd_state.lock);
		detach(&u->source); /* in case that its table never knew of it */
		uffd_state.table_count--;
		close_if_unused();
		pthread_mutex_unlock(&uffd_state.lock);
	}
	umn_descriptor_close(&u->wake);
	umn_descriptor_close(&u->woken);
}

void umn_uffd_delete(struct umn_uffd *u)
{
	umn_uffd_close(u);
	free(u);
}
