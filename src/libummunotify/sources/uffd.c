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
 * The range is known only after b, so c cannot come before 4. And whoever wants to know whether a region is valid:
 *
 *	i. ask the kernel whether `mmap_changing` is 0
 *	ii. look whether `cycle` is even
 *	iii. look at the slot; it is the answer if i and ii were true (`confirm` and umn_table_changed in table.c)
 *
 * Then every change has been fed that anybody can know of: because the call that made it has returned, or because the addresses
 * were handed out again. Either way 1 came before i. i found the count at 0, so 4 came before i; so did b, which A had waited
 * for; so a came before ii; ii found `cycle` even, so d came before ii, and c before iii.
 *
 * Each "came before" is one in memory too. 1 before i: A returned and told, or both were under the mmap lock. b before 4: both
 * are under the lock of the event queue. a before b and c before d: `cycle` changes by atomic operations that are full barriers.
 * i before ii: a load does not overtake a system call whose result decides whether it is made.
 *
 * i is one system call: UFFDIO_WRITEPROTECT fails with EAGAIN while the count is not 0, before it looks at its argument. Ours is
 * never valid, so the call takes no lock and changes nothing. That it does so is promised nowhere: `prove` tries it.
 *
 * Why nobody can deadlock
 *
 * A may hold any lock while it waits for b: malloc's, the GIL, one of ours. The reader takes none, allocates nothing, calls
 * nothing that might (the module is linked with `-z now`, or the dynamic linker would, at the first call of each function),
 * blocks all signals, and its stack is memory that is never watched. It may wait for the mmap lock (UFFDIO_UNREGISTER), which
 * the kernel never holds while it waits for a reader. `lock` below is for owners only; who holds it may allocate, and wait for
 * the mmap lock or for the reader to end.
 *
 * Forks
 *
 * The child's copies of registered mappings are not registered (EVENT_FORK is not asked for), so nothing in the child waits for
 * a reader, which it does not have. But it inherits the descriptors, and while any process has the userfaultfd open, closing it
 * here would not end its registrations: so the child closes them before anything else happens in it (in_child).
 */
#define _GNU_SOURCE
#include "sources/uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "table/user_feeder.h"

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

#define FEATURES                                                                                                               \
	(UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_PAGEFAULT_FLAG_WP)
/* Not used, but it came after `mmap_changing` became a count (Linux 5.15, "userfaultfd: change mmap_changing to atomic"). Before, the
 * first of two changes to complete cleared it, and nothing tells that apart from here. */
#define FEATURE_AFTER_COUNT UFFD_FEATURE_EXACT_ADDRESS

#define STACK_SIZE ((size_t)1 << 20) /* thread-local variables are in it too; only what is touched takes memory */
#define EVENTS 16u		     /* read at a time */
#define GRANULE_MAX 34		     /* the largest huge pages there are: 16 GiB */
#define TRIES 100

#define load(p) __atomic_load_n(p, __ATOMIC_ACQUIRE)
#define store(p, v) __atomic_store_n(p, v, __ATOMIC_RELEASE)

struct umn_uffd {
	struct umn_source source; /* first: one is cast to the other */
	struct umn_memory memory;
	int wake_fd; /* -1: not made yet */
	uint64_t *counter; /* see announce; or NULL */
	uint64_t fed;	   /* the generation after what was fed so far; the reader's */
	bool announced;	   /* the reader's */
	uint32_t forks;
	bool closed;
};

/* How many regions cover the pages from `at` to the next boundary. */
struct boundary {
	uint64_t at;
	uint64_t regions;
};

static struct {
	/* The reader's and everybody's. */
	uint32_t cycle;
	uint32_t stopping;
	int fd;	     /* the userfaultfd; -1: nothing is watched */
	bool broken; /* something has closed it under us */
	struct umn_uffd *tables[UMN_UFFD_TABLES_MAX];

	pthread_mutex_t lock; /* of the rest */
	int device_fd;	      /* /dev/userfaultfd, if that is what works */
	int maps_fd;	      /* /proc/self/maps */
	bool proven;
	bool no_query; /* the kernel cannot be asked about single mappings */
	pthread_t thread;
	uint8_t *stack; /* of the thread, and above it the bell */
	uint8_t page;	/* log2 of its size */
	uint32_t table_count;
	uint32_t forks; /* between the first process and this one */

	/* What is registered, ordered; neighbours have different counts. At most two for each region. */
	struct boundary *boundaries;
	size_t count, capacity;
	uint64_t regions;
} the = {.fd = -1, .lock = PTHREAD_MUTEX_INITIALIZER, .device_fd = -1, .maps_fd = -1};

static size_t page_size(void)
{
	return (size_t)1 << the.page;
}

/* A page that is registered, so that changing it wakes the reader. */
static uint8_t *bell(void)
{
	return the.stack + STACK_SIZE;
}

/* ---- The userfaultfd ---- */

static int open_uffd(struct umn_uffd_failure *failure)
{
	const int flags = O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY;
	struct uffdio_api api = {.api = UFFD_API, .features = FEATURES};
	int fd;

	/* With UFFD_USER_MODE_ONLY it is open to everybody, whatever vm.unprivileged_userfaultfd says. */
	fd = the.device_fd < 0 ? (int)syscall(SYS_userfaultfd, flags) : -1;
	if (fd < 0) {
		if (the.device_fd < 0) {
			failure->step = UMN_UFFD_OPEN;
			failure->error = errno;
			the.device_fd = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
		}
		fd = the.device_fd < 0 ? -1 : ioctl(the.device_fd, USERFAULTFD_IOC_NEW, flags);
		if (fd < 0) {
			failure->device_error = errno;
			if (!failure->error)
				failure->error = errno;
			return -1;
		}
	}
	failure->step = UMN_UFFD_FEATURES;
	failure->error = 0;
	if (ioctl(fd, UFFDIO_API, &api))
		failure->error = errno;
	else if (!(api.features & FEATURE_AFTER_COUNT))
		failure->error = EOPNOTSUPP;
	if (!failure->error)
		return fd;
	close(fd);
	return -1;
}

static int register_range(int fd, uint64_t start, uint64_t end)
{
	struct uffdio_register range = {.range = {start, end - start}, .mode = UFFDIO_REGISTER_MODE_WP};

	return ioctl(fd, UFFDIO_REGISTER, &range) ? errno : 0;
}

static int unregister_range(int fd, uint64_t start, uint64_t end)
{
	struct uffdio_range range = {start, end - start};

	return ioctl(fd, UFFDIO_UNREGISTER, &range) ? errno : 0;
}

/* Is all of [start, end) in one mapping, and that registered? UFFDIO_CONTINUE looks at this first and at once, under the mmap lock;
 * then it fails, as it is not for private anonymous memory. Changes nothing. */
static bool registered(int fd, uint64_t start, uint64_t end)
{
	struct uffdio_continue range = {.range = {start, end - start}, .mode = UFFDIO_CONTINUE_MODE_DONTWAKE};

	while (ioctl(fd, UFFDIO_CONTINUE, &range)) {
		if (errno != EAGAIN)
			return errno != ENOENT;
		sched_yield(); /* some change is under way somewhere */
	}
	return false; /* it cannot be */
}

/* Is nothing under way? See the top of this file, i. */
static bool quiet(int fd)
{
	struct uffdio_writeprotect nonsense = {.mode = ~UINT64_C(0)};
	int kept = errno;
	bool result;

	result = ioctl(fd, UFFDIO_WRITEPROTECT, &nonsense) && errno == EINVAL;
	errno = kept;
	return result;
}

/* ---- The reader ---- */

static void wake(struct umn_source *source)
{
	struct umn_uffd *u = (struct umn_uffd *)source;
	const uint64_t one = 1;
	int fd = load(&u->wake_fd);

	if (fd >= 0 && write(fd, &one, sizeof one) < 0)
		return; /* it is readable already */
}

static void feed(uint64_t start, uint64_t end, int32_t syscall)
{
	struct umn_uffd *u;

	for (uint32_t i = 0; i < UMN_UFFD_TABLES_MAX; i++) {
		u = load(&the.tables[i]);
		if (u && umn_feed(&u->memory, start, end, 0, syscall))
			wake(&u->source);
	}
}

static void feed_event(int fd, const struct uffd_msg *event)
{
	uint64_t from, to, length;

	switch (event->event) {
	case UFFD_EVENT_REMOVE:
		feed(event->arg.remove.start, event->arg.remove.end, SYS_madvise);
		break;
	case UFFD_EVENT_UNMAP: /* by munmap, mmap, brk or mremap */
		feed(event->arg.remove.start, event->arg.remove.end, -1);
		break;
	case UFFD_EVENT_REMAP:
		from = event->arg.remap.from;
		to = event->arg.remap.to;
		length = event->arg.remap.len;
		/* The mapping took its registration along. But somebody may have watched or renewed a region there already, which
		 * must not be left valid: so first undo, then feed, all in this cycle. */
		unregister_range(fd, to, to + length);
		feed(from, from + length, SYS_mremap);
		feed(to, to + length, SYS_mremap);
		break;
	default:
		feed(0, UINT64_MAX, -1);
	}
}

/* For who looks at nothing but a counter, or whether a descriptor is readable, and asks no kernel whether all has arrived. Before the
 * event is read, which lets the thread go on that has changed something, each counter goes up, and whoever armed his table is woken:
 * then he drains, and waits for the event to be fed. An event that hits is taken for the one that was announced, so each is counted
 * once. Only an event that hits nothing of a table is counted for nothing.
 *
 * With a counter one event is read at a time: the kernel lets the thread go on before it looks for another event, and the same
 * thread's next change would be read along with its last, unannounced (13 times in 2.9 million changes, more on a busy machine).
 *
 * That is as good as it gets, not good enough to rely on: what is read may be an event that was queued after this (the kernel hands
 * out the latest first), and its thread may have looked at the counter after this. docs/c.md says so.
 *
 * Returns how many events may be read now. */
static size_t announce(void)
{
	size_t events = EVENTS;

	for (uint32_t i = 0; i < UMN_UFFD_TABLES_MAX; i++) {
		struct umn_uffd *u = load(&the.tables[i]);
		struct umn_header *header = u ? (struct umn_header *)u->memory.segment[0] : NULL;
		uint64_t *counter = u ? load(&u->counter) : NULL;

		if (!counter)
			continue;
		events = 1;
		u->announced = true;
		u->fed = load(&header->generation);
		store(counter, *counter + 1); /* nobody else writes it */
		/* If he clears the wake-up before the event was fed, he has armed after that, and is woken once more. */
		if (load(&header->armed) && __sync_lock_test_and_set(&header->armed, 0))
			wake(&u->source);
	}
	return events;
}

/* After each event. */
static void count_event(void)
{
	for (uint32_t i = 0; i < UMN_UFFD_TABLES_MAX; i++) {
		struct umn_uffd *u = load(&the.tables[i]);
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

static void *reader(void *fd)
{
	struct pollfd polled = {.fd = (int)(intptr_t)fd, .events = POLLIN};
	struct uffd_msg events[EVENTS];
	size_t room;
	ssize_t length;

	prctl(PR_SET_NAME, "ummunotify");
	while (!load(&the.stopping)) {
		poll(&polled, 1, polled.fd < 0 ? 10 : -1);
		if (!polled.revents)
			continue;
		__sync_fetch_and_add(&the.cycle, 1); /* a */
		room = load(&the.stopping) ? EVENTS : announce(); /* then it is the bell, and nothing is watched */
		length = read(polled.fd, events, room * sizeof *events);
		if (length < 0 && errno != EAGAIN && errno != EINTR) {
			/* Somebody has closed it. Nothing will be told any more: everything is invalid, and remains so. */
			store(&the.broken, true);
			polled.fd = -1;
			feed(0, UINT64_MAX, -1);
		}
		for (ssize_t i = 0; i < length / (ssize_t)sizeof *events; i++) {
			feed_event(polled.fd, &events[i]);
			count_event();
		}
		__sync_fetch_and_add(&the.cycle, 1); /* d */
	}
	/* Ends all registrations, also of mappings that grew or moved, and lets go whoever waits. Here, since whatever the thread
	 * that stops this one did first, free() for one, might itself be told to wait for a reader. */
	close(polled.fd);
	return NULL;
}

/* Waits until the reader has finished the cycle that it is in. */
static void pass_cycle(void)
{
	uint32_t cycle = __sync_fetch_and_add(&the.cycle, 0); /* full barrier: after what the caller has stored */

	while ((cycle & 1) && load(&the.cycle) == cycle)
		sched_yield();
}

/* ---- Has everything arrived? ---- */

static bool arrived(struct umn_source *source)
{
	int fd = load(&the.fd);

	(void)source;
	if (fd < 0)
		return true; /* nothing is watched */
	return quiet(fd) && !(load(&the.cycle) & 1) && !load(&the.broken);
}

static uint64_t nanoseconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Both what it waits for take microseconds, unless the other threads do not get a CPU; or gigabytes are being unmapped; or so many
 * threads unmap watched memory all the time that there is never a moment without. */
static bool settle(struct umn_source *source, unsigned int milliseconds)
{
	const struct timespec interval = {.tv_nsec = 20000};
	const uint64_t deadline = nanoseconds() + milliseconds * UINT64_C(1000000);
	uint32_t cycle = 0;
	bool is_quiet = false;
	int fd;

	(void)source;
	for (uint32_t tries = 0; !load(&the.broken); tries++) {
		fd = load(&the.fd);
		if (fd < 0)
			return true;
		if (!is_quiet && (is_quiet = quiet(fd)))
			cycle = load(&the.cycle);
		/* What was read before that moment is fed by the end of that cycle; later ones do not matter. */
		if (is_quiet && (!(cycle & 1) || load(&the.cycle) != cycle))
			return true;
		if (nanoseconds() > deadline)
			return false;
		if (tries < 100)
			sched_yield();
		else
			nanosleep(&interval, NULL);
	}
	return false;
}

/* ---- What is registered ---- */

/* The first boundary at or above. */
static size_t find(uint64_t at)
{
	size_t low = 0, high = the.count, middle;

	while (low < high) {
		middle = (low + high) / 2;
		if (the.boundaries[middle].at < at)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

static uint64_t below(size_t i)
{
	return i ? the.boundaries[i - 1].regions : 0;
}

/* Makes sure that there is a boundary. */
static size_t split(uint64_t at)
{
	size_t i = find(at);

	if (i == the.count || the.boundaries[i].at != at) {
		memmove(&the.boundaries[i + 1], &the.boundaries[i], (the.count++ - i) * sizeof *the.boundaries);
		the.boundaries[i] = (struct boundary){at, below(i)};
	}
	return i;
}

/* ... or that there is none without need. */
static void join(size_t i)
{
	if (the.boundaries[i].regions == below(i))
		memmove(&the.boundaries[i], &the.boundaries[i + 1], (--the.count - i) * sizeof *the.boundaries);
}

static int count_up(uint64_t start, uint64_t end)
{
	size_t capacity = the.capacity, first, last;
	struct boundary *grown;

	/* For all that the regions can ever have, so that counting down need not allocate. */
	if (capacity < 2 * (the.regions + 1)) {
		capacity = capacity ? 2 * capacity : 64;
		grown = realloc(the.boundaries, capacity * sizeof *grown);
		if (!grown)
			return ENOMEM;
		the.boundaries = grown;
		the.capacity = capacity;
	}
	the.regions++;
	first = split(start);
	last = split(end);
	for (size_t i = first; i < last; i++)
		the.boundaries[i].regions++;
	join(last);
	join(first);
	return 0;
}

/* Unregisters what no other region covers. */
static void count_down(uint64_t start, uint64_t end, bool invalid)
{
	size_t first = split(start), last = split(end), i, next;

	the.regions--;
	for (i = first; i < last; i++)
		the.boundaries[i].regions--;
	for (i = first; i < last; i = next) {
		next = i + 1;
		if (the.boundaries[i].regions)
			continue;
		while (next < last && !the.boundaries[next].regions)
			next++;
		start = the.boundaries[i].at;
		end = the.boundaries[next].at;
		/* There may be memory by now that is another userfaultfd's, which kernels before 6.17 would unregister just as well
		 * ("userfaultfd: prevent unregistering VMAs through a different userfaultfd"). That is EBUSY. What stays registered,
		 * if this fails or memory has grown, costs time when it is unmapped, until the last region is unwatched. */
		if (!invalid || !register_range(the.fd, start, end))
			unregister_range(the.fd, start, end);
	}
	join(last);
	join(first);
}

/* ---- What can be watched ---- */

struct mapping {
	uint64_t start, end;
	bool shared, file;
	bool huge; /* private huge pages of no file that anybody could open */
};

static const char anonymous_huge[] = "/anon_hugepage"; /* (deleted) */

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
static int query_mapping(uint64_t address, struct mapping *mapping)
{
	char name[64] = "";
	struct query query = {.size = sizeof query, .flags = QUERY_COVERING_OR_NEXT, .address = address};
	struct query named = query;

	if (ioctl(the.maps_fd, QUERY, &query))
		return errno == ENOENT ? UMN_UFFD_UNMAPPED : errno;
	*mapping = (struct mapping){query.start, query.end, query.mapping_flags & QUERY_SHARED, query.inode != 0, false};
	if (mapping->file) {
		named.name = (uint64_t)name;
		named.name_size = sizeof name;
		/* ENAMETOOLONG: it is another's */
		if (!ioctl(the.maps_fd, QUERY, &named) && !mapping->shared)
			mapping->huge = !strncmp(name, anonymous_huge, strlen(anonymous_huge));
	}
	return 0;
}

/* The same without it: slow. */
static int search_mapping(uint64_t address, struct mapping *mapping)
{
	FILE *maps = fopen("/proc/self/maps", "re");
	int error = UMN_UFFD_UNMAPPED, at;
	char *line = NULL, permissions[5];
	uint64_t inode;
	size_t size = 0;

	if (!maps)
		return errno;
	while (getline(&line, &size, maps) > 0) {
		if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %4s %*x %*x:%*x %" SCNu64 " %n", &mapping->start, &mapping->end,
			   permissions, &inode, &at) != 4 ||
		    mapping->end <= address)
			continue;
		mapping->shared = permissions[3] == 's';
		mapping->file = inode != 0;
		mapping->huge = !mapping->shared && !strncmp(line + at, anonymous_huge, strlen(anonymous_huge));
		error = 0;
		break;
	}
	free(line);
	fclose(maps);
	return error;
}

/* Is all of [start, end) memory whose changes userfaultfd tells? It tells only of those that this process makes of its mappings, so
 * the memory must not be anybody else's too. 0, or why not; EAGAIN: `is_registered` turns out not to be so.
 *
 * Registering skips holes, and another thread can fill one as soon as that is done: then the kernel would tell nothing of what is there.
 * So each mapping is asked about. From the moment at which a page is found to be registered, its changes are told. */
static int inspect(uint64_t start, uint64_t end, bool is_registered, bool *huge)
{
	struct mapping mapping;
	int error;

	*huge = false;
	for (; start < end; start = mapping.end) {
		error = the.no_query ? ENOTTY : query_mapping(start, &mapping);
		if (error == ENOTTY) {
			the.no_query = true;
			error = search_mapping(start, &mapping);
		}
		if (error)
			return error;
		if (mapping.start > start)
			return UMN_UFFD_UNMAPPED;
		if (mapping.shared || (mapping.file && !mapping.huge))
			return UMN_UFFD_KIND;
		*huge |= mapping.huge;
		if (is_registered && !registered(the.fd, start, mapping.end < end ? mapping.end : end))
			return EAGAIN;
	}
	return 0;
}

static bool overlaps(uint64_t start, uint64_t end, const void *memory, size_t length)
{
	return memory && start < (uint64_t)memory + length && end > (uint64_t)memory;
}

/* What the reader works with, and what is unmapped where nobody can be waited for. */
static bool is_own(uint64_t start, uint64_t end)
{
	const struct umn_uffd *u;

	if (overlaps(start, end, the.stack, STACK_SIZE + page_size()))
		return true;
	for (uint32_t i = 0; i < UMN_UFFD_TABLES_MAX; i++) {
		u = load(&the.tables[i]);
		for (uint32_t s = 0; u && s < UMN_SEGMENTS && u->memory.pages[s]; s++)
			if (overlaps(start, end, u->memory.segment[s], (size_t)u->memory.pages[s] * UMN_PAGE))
				return true;
	}
	return false;
}

static uint64_t round_down(uint64_t address, uint8_t granule)
{
	return address >> granule << granule;
}

static uint64_t round_up(uint64_t address, uint8_t granule)
{
	return round_down(address + (UINT64_C(1) << granule) - 1, granule);
}

static int cover(uint64_t start, uint64_t end, uint8_t *granule)
{
	uint64_t first, last;
	bool huge = false;
	int error, why, tries = 0;

	if (is_own(start, end))
		return UMN_UFFD_OWN;
	/* Huge pages can only be registered whole, and their size is not told: it is the first that works. */
	for (*granule = the.page; *granule <= GRANULE_MAX; ++*granule) {
		first = round_down(start, *granule);
		last = round_up(end, *granule);
		if ((error = count_up(first, last)))
			return error;
		/* Also if it is covered already: the region that covers it may not know yet that the memory has been replaced. */
		error = register_range(the.fd, first, last);
		/* The kernel skips holes, and also registers memory whose changes it does not tell all of. Only now can nobody
		 * exchange it unnoticed: that would be an event, and the region invalid. */
		why = inspect(first, last, !error, &huge);
		if (!error && !why)
			return 0;
		count_down(first, last, error == EBUSY || error == EINVAL);
		if (why == EAGAIN && tries < TRIES)
			why = 0;
		else if (why || error != EINVAL)
			return why ? why == EAGAIN ? UMN_UFFD_UNMAPPED : why : error;
		else if (huge)
			continue;
		/* What is now seen to be as it should was not when it was registered. */
		if (++tries > TRIES)
			break;
		--*granule;
	}
	return UMN_UFFD_KIND;
}

/* ---- While something is watched ---- */

/* A thread on a stack of ours, which no signal handler ever runs on; with a bell if there is a userfaultfd for it. 0 or an errno. */
static int start_thread(int fd, void *(*run)(void *), void *argument)
{
	const int protection = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK;
	pthread_attr_t attributes;
	sigset_t all, before;
	int error;

	the.stack = mmap(NULL, STACK_SIZE + page_size(), protection, flags, -1, 0);
	if (the.stack == MAP_FAILED) {
		the.stack = NULL;
		return errno;
	}
	mprotect(the.stack, page_size(), PROT_NONE);
	error = fd < 0 ? 0 : register_range(fd, (uint64_t)bell(), (uint64_t)bell() + page_size());
	if (!error) {
		sigfillset(&all);
		pthread_attr_init(&attributes);
		pthread_attr_setstack(&attributes, the.stack, STACK_SIZE);
		pthread_sigmask(SIG_BLOCK, &all, &before);
		error = pthread_create(&the.thread, &attributes, run, argument);
		pthread_sigmask(SIG_SETMASK, &before, NULL);
		pthread_attr_destroy(&attributes);
	}
	if (error) {
		if (fd >= 0)
			close(fd); /* nobody would tell us to go on with the next line */
		munmap(the.stack, STACK_SIZE + page_size());
		the.stack = NULL;
	}
	return error;
}

static void join_thread(void)
{
	pthread_join(the.thread, NULL);
	munmap(the.stack, STACK_SIZE + page_size());
	the.stack = NULL;
}

static void stop(void)
{
	store(&the.fd, -1);
	store(&the.stopping, 1);
	madvise(bell(), page_size(), MADV_DONTNEED);
	join_thread();
}

/* 0 or an errno. */
static int start(void)
{
	struct umn_uffd_failure failure = {0};
	int fd = open_uffd(&failure);

	if (fd < 0)
		return failure.error;
	store(&the.stopping, 0);
	store(&the.broken, false);
	store(&the.fd, fd);
	failure.error = start_thread(fd, reader, (void *)(intptr_t)fd);
	if (failure.error)
		store(&the.fd, -1);
	return failure.error;
}

static int watch(struct umn_source *source, uint64_t start_address, uint64_t end, uint8_t *granule)
{
	int error = 0;

	(void)source;
	pthread_mutex_lock(&the.lock);
	if (!the.regions)
		error = start();
	if (!error) {
		error = cover(start_address, end, granule);
		if (!the.regions)
			stop();
	}
	pthread_mutex_unlock(&the.lock);
	return error;
}

static void unwatch(struct umn_source *source, uint64_t start_address, uint64_t end, uint8_t granule, bool invalid)
{
	(void)source;
	pthread_mutex_lock(&the.lock);
	count_down(round_down(start_address, granule), round_up(end, granule), invalid);
	if (!the.regions)
		stop();
	pthread_mutex_unlock(&the.lock);
}

static void detach(struct umn_source *source)
{
	for (uint32_t i = 0; i < UMN_UFFD_TABLES_MAX; i++)
		if (load(&the.tables[i]) == (struct umn_uffd *)source)
			store(&the.tables[i], NULL);
	pass_cycle();
}

/* ---- Opening and closing ---- */

static void *unmap_page(void *page)
{
	munmap(page, page_size());
	return NULL;
}

/* Trusts nothing: while a thread is inside munmap it has to be said that a change is under way, and no longer once its event was
 * read. Closes `fd`. */
static bool prove(int fd)
{
	struct pollfd polled = {.fd = fd, .events = POLLIN};
	struct uffd_msg event = {0};
	uint64_t page;
	bool proven;

	page = (uint64_t)mmap(NULL, page_size(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	proven = page != (uint64_t)MAP_FAILED && !register_range(fd, page, page + page_size()) && quiet(fd);
	if (proven && !start_thread(-1, unmap_page, (void *)page)) {
		/* Without a limit: it takes as long as it takes the thread to get a CPU. */
		while (poll(&polled, 1, -1) < 0 && errno == EINTR)
			;
		proven = !quiet(fd);
		if (read(fd, &event, sizeof event) == sizeof event) {
			join_thread();
			proven &= quiet(fd) && event.event == UFFD_EVENT_UNMAP && event.arg.remove.start == page &&
				  event.arg.remove.end == page + page_size();
			close(fd);
			return proven;
		}
		close(fd); /* lets the thread go */
		join_thread();
		return false;
	}
	close(fd);
	if (page != (uint64_t)MAP_FAILED)
		munmap((void *)page, page_size());
	return false;
}

static bool try_out(struct umn_uffd_failure *failure)
{
	int fd;

	if (the.proven)
		return true;
	fd = open_uffd(failure);
	if (fd < 0)
		return false;
	the.proven = prove(fd);
	failure->step = UMN_UFFD_PROOF;
	return the.proven;
}

/* In the child of a fork there is nothing of the parent's source. Locks may be held by threads that do not exist here, and memory be
 * in the middle of a change: forget both. */
static void in_child(void)
{
	const int fds[] = {the.fd, the.device_fd, the.maps_fd};

	for (size_t i = 0; i < sizeof fds / sizeof *fds; i++)
		if (fds[i] >= 0)
			close(fds[i]);
	if (the.stack)
		munmap(the.stack, STACK_SIZE + page_size());
	memset(the.tables, 0, sizeof the.tables);
	pthread_mutex_init(&the.lock, NULL);
	the.fd = the.device_fd = the.maps_fd = -1;
	the.stack = NULL;
	the.boundaries = NULL;
	the.count = the.capacity = 0;
	the.regions = the.cycle = the.table_count = 0;
	the.forks++;
}

static void once(void)
{
	the.page = (uint8_t)__builtin_ctzl((unsigned long)sysconf(_SC_PAGESIZE));
	pthread_atfork(NULL, NULL, in_child);
}

static void close_if_unused(void)
{
	if (the.table_count)
		return;
	if (the.maps_fd >= 0)
		close(the.maps_fd);
	if (the.device_fd >= 0)
		close(the.device_fd);
	the.maps_fd = the.device_fd = -1;
	free(the.boundaries);
	the.boundaries = NULL;
	the.capacity = 0;
}

static bool set_up(struct umn_uffd_failure *failure)
{
	if (the.table_count == UMN_UFFD_TABLES_MAX) {
		*failure = (struct umn_uffd_failure){.step = UMN_UFFD_TABLES};
		return false;
	}
	if (!try_out(failure))
		return false;
	if (the.maps_fd < 0 && (the.maps_fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC)) < 0) {
		*failure = (struct umn_uffd_failure){.step = UMN_UFFD_MAPS, .error = errno};
		return false;
	}
	return true;
}

void umn_uffd_at_fork(void)
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
	umn_uffd_at_fork();
	u->source = (struct umn_source){
		.watch = watch, .unwatch = unwatch, .arrived = arrived, .settle = settle, .wake = wake, .stop = detach};
	u->wake_fd = -1;
	pthread_mutex_lock(&the.lock);
	u->forks = the.forks;
	if (set_up(failure)) {
		the.table_count++;
	} else {
		close_if_unused();
		free(u);
		u = NULL;
	}
	pthread_mutex_unlock(&the.lock);
	return u;
}

struct umn_source *umn_uffd_source(struct umn_uffd *u)
{
	return &u->source;
}

void *umn_uffd_add_segment(struct umn_uffd *u, uint32_t pages)
{
	void *memory = mmap(NULL, (size_t)pages * UMN_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	bool first;

	if (memory == MAP_FAILED)
		return NULL;
	pthread_mutex_lock(&the.lock);
	first = !u->memory.pages[0];
	umn_memory_add(&u->memory, memory, pages);
	for (uint32_t i = 0; first && i < UMN_UFFD_TABLES_MAX; i++)
		if (!load(&the.tables[i])) {
			store(&the.tables[i], u);
			break;
		}
	pthread_mutex_unlock(&the.lock);
	return memory;
}

int umn_uffd_wake_fd(struct umn_uffd *u)
{
	int fd;

	if (u->wake_fd < 0) {
		fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		if (fd < 0)
			return -errno;
		store(&u->wake_fd, fd);
	}
	return u->wake_fd;
}

void umn_uffd_acknowledge(struct umn_uffd *u)
{
	uint64_t count;

	if (u->wake_fd >= 0 && read(u->wake_fd, &count, sizeof count) < 0)
		return; /* it was not readable */
}

void umn_uffd_set_counter(struct umn_uffd *u, uint64_t *counter)
{
	store(&u->counter, counter);
	pass_cycle(); /* whatever is read from now on is announced to it */
}

void umn_uffd_close(struct umn_uffd *u)
{
	int fd = u->wake_fd;

	if (u->closed)
		return;
	u->closed = true;
	if (u->forks == the.forks) {
		pthread_mutex_lock(&the.lock);
		detach(&u->source); /* in case that its table never knew of it */
		the.table_count--;
		close_if_unused();
		pthread_mutex_unlock(&the.lock);
	}
	store(&u->wake_fd, -1);
	if (fd >= 0)
		close(fd);
}

void umn_uffd_delete(struct umn_uffd *u)
{
	umn_uffd_close(u);
	free(u);
}
