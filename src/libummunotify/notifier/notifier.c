/* SPDX-License-Identifier: BSD-3-Clause */
/* What notifier.py is in Python: a watch table, what feeds it, and waiting. */
#define _GNU_SOURCE
#include "notifier/notifier.h"

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "sources/platform.h"
#include "table/table.h"
#include "sources/uffd.h"
#include "sources/connection.h"

#define PIECE 64 /* events drained at a time */

struct ummunotify {
	struct umn_table *table;
	struct feed *feed;
	bool dead;  /* inherited through a fork */
	bool wakes; /* changes send wake-ups */
	int fd;	    /* an epoll of the next one and of the feed's; -1: not made yet, or a device's */
	int more;   /* an eventfd: readable while something is left although the feed's wake-up was acknowledged */
	bool is_more;
	pthread_mutex_t lock; /* between reading and unwatching: what is unwatched is not reported; and of `wakes` and `is_more` */
	struct ummunotify *next;
};

/* Held where descriptors and mappings are made or released, so that there is no fork meanwhile: a child could not know them. */
static pthread_mutex_t making = PTHREAD_MUTEX_INITIALIZER;
static struct ummunotify *notifiers;

static __thread char said[400];

const char *ummunotify_error(void)
{
	return said;
}

int fail(int error, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(said, sizeof said, format, arguments);
	va_end(arguments);
	return -error;
}

static int dead(void)
{
	return fail(EBADF, "this notifier was inherited through a fork: it is the parent's; open one here");
}

/* ---- Forks ---- */

static void before_fork(void)
{
	pthread_mutex_lock(&making);
}

static void in_parent(void)
{
	pthread_mutex_unlock(&making);
}

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

static void in_child(void)
{
	for (struct ummunotify *umn = notifiers; umn; umn = umn->next) {
		umn->dead = true;
		umn_table_abandon(umn->table);
		umn->feed->release(umn->feed);
		close_fd(&umn->fd);
		close_fd(&umn->more);
	}
	notifiers = NULL;
	pthread_mutex_init(&making, NULL);
}

static void once(void)
{
	umn_uffd_at_fork(); /* what it does has to be done before `release` */
	pthread_atfork(before_fork, in_parent, in_child);
}

/* ---- Opening and closing ---- */

/* `making` is held. */
static int add_segment(struct ummunotify *umn)
{
	uint32_t pages = umn_table_next_pages(umn->table);
	void *memory;
	int error;

	if (!pages)
		return fail(ENOMEM, "the table is as large as it can be");
	memory = umn->feed->add_segment(umn->feed, pages);
	if (!memory)
		return -ENOMEM;
	error = umn_table_add_segment(umn->table, memory, pages);
	if (error) {
		munmap(memory, (size_t)pages * UMN_PAGE);
		return fail(-error, "%s", strerror(-error));
	}
	return 0;
}

/* -EAGAIN: a source that cannot always tell, and says so, could not just now. */
static int prove_once(struct ummunotify *umn)
{
	struct umn_region *region;
	struct umn_event events[2];
	void *page = umn_test_page();
	bool seen, good;
	int error;

	if (!page)
		return fail(ENOMEM, "%s", strerror(ENOMEM));
	error = umn_table_watch(umn->table, (uint64_t)page, (uint64_t)page + UMN_PAGE, 0, NULL, &region);
	if (error) {
		munmap(page, UMN_PAGE);
		return fail(ENODEV, "a page cannot be watched (%s)", strerror(abs(error)));
	}
	good = umn_region_valid(region);
	munmap(page, UMN_PAGE);
	seen = !umn_region_valid(region) && umn_table_changed(umn->table);
	good &= seen;
	good &= umn_table_drain(umn->table, events, 2) == 1 && events[0].region == region;
	umn_table_unwatch(umn->table, region);
	umn_table_restart(umn->table);
	if (!good && seen && umn->feed->source)
		return -EAGAIN;
	return good ? 0 : fail(ENODEV, "it failed its self-test: a page was unmapped and the event did not arrive as it should; "
				       "please report this with the kernel's version");
}

/* Nothing is trusted until a change of our own was seen. */
static int prove(struct ummunotify *umn)
{
	const struct timespec step = {.tv_nsec = 1000000};
	int error = -EAGAIN;

	for (int i = 0; i < 10000 && error == -EAGAIN; i++) {
		if (i)
			nanosleep(&step, NULL);
		error = prove_once(umn);
	}
	return error == -EAGAIN ? fail(ENODEV, "so much else was changing that its self-test showed nothing; try again") : error;
}

static struct {
	const char *name;
	struct feed *(*open)(bool counter);
} const sources[] = {{"daemon", feed_open_daemon}, {"uffd", feed_open_uffd}};

static void free_notifier(struct ummunotify *umn)
{
	if (umn->feed && !umn->dead)
		umn->feed->release(umn->feed);
	if (umn->feed)
		umn->feed->free(umn->feed);
	umn_table_delete(umn->table);
	close_fd(&umn->fd);
	close_fd(&umn->more);
	free(umn);
}

/* `making` is held. NULL: it has been said why. */
static struct ummunotify *try_source(struct feed *(*open_feed)(bool counter), bool counter)
{
	struct ummunotify *umn = calloc(1, sizeof *umn);

	if (!umn || !(umn->table = umn_table_new(UINT64_MAX))) {
		fail(ENOMEM, "%s", strerror(ENOMEM));
		free(umn);
		return NULL;
	}
	umn->fd = umn->more = -1;
	pthread_mutex_init(&umn->lock, NULL);
	umn->feed = open_feed(counter);
	if (!umn->feed) {
		free_notifier(umn);
		return NULL;
	}
	if (umn->feed->source)
		umn_table_set_source(umn->table, umn->feed->source);
	if (add_segment(umn) || umn->feed->bind(umn->feed) || prove(umn)) {
		umn_table_close(umn->table);
		free_notifier(umn);
		return NULL;
	}
	return umn;
}

/* The wake-up's descriptor, and through it the caller's. `making` and the notifier's lock are held. */
static int make_fd(struct ummunotify *umn, int epoll)
{
	struct epoll_event event = {.events = EPOLLIN};
	int wake = umn->feed->wake_fd(umn->feed);

	if (wake < 0)
		return wake;
	umn->more = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (epoll < 0 || umn->more < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, wake, &event) ||
	    epoll_ctl(epoll, EPOLL_CTL_ADD, umn->more, &event)) {
		int error = errno;

		close_fd(&umn->more);
		return fail(error, "a descriptor cannot be made (%s)", strerror(error));
	}
	umn->wakes = true;
	return 0;
}

/* What a device has from the start. As make_fd. */
static int make_device(struct ummunotify *umn, int epoll)
{
	int error = make_fd(umn, epoll);

	if (!error && umn->feed->make_counter)
		error = umn->feed->make_counter(umn->feed);
	return error;
}

static void set_more(struct ummunotify *umn, bool is_more)
{
	const uint64_t one = 1;
	uint64_t count;

	if (umn->is_more == is_more)
		return;
	umn->is_more = is_more;
	/* Neither can fail: nobody else uses it. */
	if ((is_more ? write(umn->more, &one, sizeof one) : read(umn->more, &count, sizeof count)) < 0)
		return;
}

/* `epoll` is a device's, or -1. */
static int open_notifier(struct ummunotify **result, const char *source, int epoll)
{
	static pthread_once_t first = PTHREAD_ONCE_INIT;
	char reasons[2 * sizeof said + 32] = "";
	struct ummunotify *umn = NULL;
	bool known = false;
	size_t length;

	if (!source)
		source = secure_getenv("UMMUNOTIFY_SOURCE");
	if (source && !*source)
		source = NULL;
	pthread_once(&first, once);
	pthread_mutex_lock(&making);
	for (size_t i = 0; i < sizeof sources / sizeof *sources && !umn; i++) {
		if (source && strcmp(source, sources[i].name))
			continue;
		known = true;
		umn = try_source(sources[i].open, epoll >= 0);
		if (umn && epoll >= 0 && make_device(umn, epoll)) {
			umn_table_close(umn->table);
			free_notifier(umn);
			umn = NULL;
		}
		length = strlen(reasons);
		if (!umn)
			snprintf(reasons + length, sizeof reasons - length, "%s%s: %s", length ? ". " : "", sources[i].name, said);
	}
	if (umn) {
		umn->next = notifiers;
		notifiers = umn;
	}
	pthread_mutex_unlock(&making);
	*result = umn;
	if (umn)
		return 0;
	if (!known)
		return fail(EINVAL, "there is no source %s for C programs; there are daemon and uffd (`ummunotify run` provides a daemon "
				    "to whoever may load BPF programs)", source);
	return fail(ENODEV, "%s", reasons);
}

int ummunotify_open(struct ummunotify **umn, const char *source)
{
	return open_notifier(umn, source, -1);
}

int notifier_open_device(struct ummunotify **umn, const char *source, bool cloexec, int *fd, int *counter_fd)
{
	int error;

	*fd = epoll_create1(cloexec ? EPOLL_CLOEXEC : 0);
	if (*fd < 0)
		return fail(errno, "%s", strerror(errno));
	error = open_notifier(umn, source, *fd);
	if (error) {
		close_fd(fd);
		return error;
	}
	*counter_fd = (*umn)->feed->counter_fd;
	(*umn)->feed->counter_fd = -1;
	umn_table_arm((*umn)->table);
	return 0;
}

void ummunotify_close(struct ummunotify *umn)
{
	struct ummunotify **link = &notifiers;

	if (!umn)
		return;
	pthread_mutex_lock(&making);
	for (; *link; link = &(*link)->next)
		if (*link == umn) {
			*link = umn->next;
			break;
		}
	if (!umn->dead)
		umn_table_close(umn->table);
	free_notifier(umn);
	pthread_mutex_unlock(&making);
}

const char *ummunotify_source(const struct ummunotify *umn)
{
	return umn->feed->name;
}

/* ---- Watching ---- */

static int explain(int error)
{
	switch (error) {
	case UMN_UFFD_UNMAPPED:
		return fail(error, "some of it is not mapped, and userfaultfd cannot watch that");
	case UMN_UFFD_KIND:
		return fail(error, "userfaultfd tells only of private anonymous memory; use the daemon");
	case UMN_UFFD_OTHER:
		return fail(error, "another userfaultfd of this process has registered some of it, and memory can have only one");
	case UMN_UFFD_OWN:
		return fail(error, "some of it is what ummunotify itself works with");
	case UMN_UFFD_MAPPINGS:
		return fail(error, "the kernel has no memory for it, or the process too many mappings; raise the sysctl "
				   "vm.max_map_count");
	case UMN_UFFD_NO_PROC:
		return fail(error, "it is huge pages, and without /proc it cannot be told of which kind; mount /proc");
	case UMN_UFFD_CLOSED:
		return fail(error, "the program has closed or replaced a descriptor of the source uffd: it sees no more changes, and all is "
				   "invalid; close it, and open another after descriptors were closed");
	case UMN_UFFD_START:
		return feed_explain_uffd_start();
	}
	return fail(error, "%s", strerror(error));
}

int ummunotify_watch(struct ummunotify *umn, const void *address, size_t length, uint64_t cookie,
		     struct ummunotify_region **region)
{
	static uint64_t limit;
	const uint64_t start = (uint64_t)address, end = start + length;
	int error;

	if (umn->dead)
		return dead();
	if (!__atomic_load_n(&limit, __ATOMIC_RELAXED))
		__atomic_store_n(&limit, umn_user_limit(), __ATOMIC_RELAXED);
	if (end <= start || end > limit)
		return fail(EINVAL, "%s", length ? "it is not in user space" : "it is empty");
	while ((error = umn_table_watch(umn->table, start, end, cookie, NULL, (struct umn_region **)region)) == -ENOSPC) {
		pthread_mutex_lock(&making);
		error = add_segment(umn);
		pthread_mutex_unlock(&making);
		if (error)
			return error;
	}
	if (error == -EDQUOT)
		return fail(ENOMEM, "the index of the regions is as deep as it can be");
	return error ? explain(abs(error)) : 0;
}

int ummunotify_unwatch(struct ummunotify *umn, struct ummunotify_region *region)
{
	if (umn->dead)
		return dead();
	pthread_mutex_lock(&umn->lock);
	umn_table_unwatch(umn->table, (struct umn_region *)region);
	pthread_mutex_unlock(&umn->lock);
	return 0;
}

bool ummunotify_valid(const struct ummunotify_region *region)
{
	return umn_region_valid((const struct umn_region *)region);
}

int ummunotify_renew(struct ummunotify *umn, struct ummunotify_region *region)
{
	int error = umn->dead ? dead() : umn_table_renew(umn->table, (struct umn_region *)region);

	return error > 0 ? explain(error) : error;
}

bool ummunotify_changed(const struct ummunotify *umn)
{
	return umn_table_changed(umn->table);
}

uint64_t ummunotify_generation(struct ummunotify *umn)
{
	return umn->dead ? 0 : umn_table_generation(umn->table);
}

/* ---- Reading ---- */

/* Returns how many. The lock is held: no region can be unwatched before its event has been copied. */
static size_t drain(struct ummunotify *umn, struct ummunotify_event *events, size_t room)
{
	struct umn_event piece[PIECE];
	size_t count = 0, wanted, n, i;

	do {
		wanted = room - count < PIECE ? room - count : PIECE;
		n = umn_table_drain(umn->table, piece, wanted);
		for (i = 0; i < n; i++)
			events[count++] = (struct ummunotify_event){.region = (struct ummunotify_region *)piece[i].region,
								    .cookie = piece[i].region->cookie,
								    .start = piece[i].start,
								    .end = piece[i].end,
								    .exact = piece[i].exact,
								    .thread = piece[i].thread,
								    .syscall = piece[i].syscall};
	} while (n == wanted && count < room);
	return count;
}

/* Whatever it was that has changed, it sent no wake-up or it was cleared. */
static bool is_unseen(const struct ummunotify *umn)
{
	return umn_generation(umn_table_header(umn->table)) != umn_table_seen(umn->table);
}

ptrdiff_t notifier_read(struct ummunotify *umn, struct ummunotify_event *events, size_t room, struct drain *state)
{
	uint64_t counter = 0;
	size_t n;

	if (umn->dead)
		return dead();
	/* Before it is seen to that all changes which it has counted are in the table. */
	if (umn->feed->counter)
		counter = __atomic_load_n(umn->feed->counter, __ATOMIC_ACQUIRE);
	if (umn->feed->doubtful(umn->feed))
		umn_table_doubt(umn->table);
	pthread_mutex_lock(&umn->lock);
	if (umn->wakes) {
		/* In this order no wake-up is lost: what hits after arming sends one again. */
		umn->feed->acknowledge(umn->feed);
		umn_table_arm(umn->table);
	}
	n = drain(umn, events, room);
	state->seen = umn->feed->counter ? counter : umn_table_seen(umn->table);
	/* Else there was no room to see that the list is empty, or to say so. */
	state->unfinished |= n > 0;
	state->finished = n < room && state->unfinished;
	if (n < room)
		state->unfinished = false;
	if (umn->wakes)
		set_more(umn, state->unfinished || is_unseen(umn));
	pthread_mutex_unlock(&umn->lock);
	return (ptrdiff_t)n;
}

ptrdiff_t ummunotify_read(struct ummunotify *umn, struct ummunotify_event *events, size_t room)
{
	struct drain state = {0};

	return notifier_read(umn, events, room, &state);
}

int ummunotify_fd(struct ummunotify *umn)
{
	int error = 0;

	if (umn->dead)
		return dead();
	pthread_mutex_lock(&making);
	pthread_mutex_lock(&umn->lock);
	if (umn->fd < 0) {
		umn->fd = epoll_create1(EPOLL_CLOEXEC);
		error = make_fd(umn, umn->fd);
		if (error)
			close_fd(&umn->fd);
	}
	if (!error) {
		umn_table_arm(umn->table);
		/* What has been hit by now sent no wake-up. */
		set_more(umn, umn->is_more || is_unseen(umn));
	}
	pthread_mutex_unlock(&umn->lock);
	pthread_mutex_unlock(&making);
	return error ? error : umn->fd;
}

bool notifier_must_renew(const struct ummunotify *umn)
{
	return umn->feed->source != NULL;
}

_Static_assert(NOTIFIER_FDS == FEED_FDS + 1, "the feed's, and one of ours");

int notifier_fds(struct ummunotify *umn, int *fds)
{
	int count;

	pthread_mutex_lock(&making);
	count = umn->feed->fds ? umn->feed->fds(umn->feed, fds) : 0;
	fds[count++] = umn->more;
	pthread_mutex_unlock(&making);
	return count;
}

void notifier_wakeups(struct ummunotify *umn, int *wake, int *more)
{
	pthread_mutex_lock(&making);
	*wake = umn->feed->wake_fd(umn->feed); /* made with the device */
	*more = umn->more;
	pthread_mutex_unlock(&making);
}

void notifier_next_wakeup(struct ummunotify *umn)
{
	struct umn_source *source = umn->feed->source;
	bool was_more;

	if (source)
		source->wait_delivered(source, UMN_DELIVERY_MILLISECONDS);
	pthread_mutex_lock(&umn->lock);
	was_more = umn->is_more;
	/* It is readable all the time: whoever made the change may be looking. */
	set_more(umn, true);
	umn->feed->acknowledge(umn->feed);
	umn_table_arm(umn->table);
	set_more(umn, was_more || is_unseen(umn) || (source && !source->delivered(source)));
	pthread_mutex_unlock(&umn->lock);
}
