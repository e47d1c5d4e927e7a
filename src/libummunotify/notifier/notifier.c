/* SPDX-License-Identifier: BSD-3-Clause */
/* A watch table, what feeds it, and waiting. */
#define _GNU_SOURCE
#include "notifier/notifier.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <unistd.h>

#include "notifier/prove.h"
#include "notifier/wakeup.h"
#include "process/error.h"
#include "process/process.h"
#include "sources/connection.h"
#include "sources/platform.h"
#include "sources/uffd.h"
#include "table/table.h"

#define PIECE 64   /* events drained at a time */
#define SLICE 1000 /* milliseconds that are waited at a time */

struct ummunotify {
	uint32_t epoch; /* of the process that it belongs to */
	/*
	 * Calls count themselves in, then look whether it is closed; closing sets that, then looks whether a call is in.
	 * Sequentially consistent, so one of the two sees the other, and the last to leave releases what the others were using.
	 */
	uint32_t inside;
	uint32_t closed;
	uint32_t released;

	struct umn_table *table;
	struct umn_connection *connection;
	const struct umn_candidate *candidate;
	uint64_t max_regions;
	/* While this or `dispatching` is held, code of the program's may run, and come back here from a signal handler: both are of
	 * the kind that fails (EDEADLK) where the thread has it already. */
	pthread_mutex_t growing;

	bool blind; /* the source could not say what has changed, and so everything was invalidated */

	pthread_mutex_t lock; /* reading against unwatching: what is unwatched is not reported; and of the next four */
	bool wakes;	      /* changes send wake-ups */
	struct umn_wakeup wakeup;
	struct ummunotify_event taken; /* by dispatch */
	enum { NONE, CALLING, REFUSED } taken_is;

	uint32_t delivering;	     /* callbacks that are not done, are about to be called, or have refused `taken` */
	pthread_mutex_t dispatching; /* held while they run */

	struct ummunotify *next;
};

/* ---- Forks ---- */

/* Changed by single stores, so that a child of a fork finds a sound list whenever it was made. */
static struct ummunotify *notifiers;
static pthread_mutex_t list_lock = PTHREAD_MUTEX_INITIALIZER;

static void close_inherited(struct ummunotify *umn)
{
	umn->connection->in_child(umn->connection);
	umn_wakeup_close(&umn->wakeup);
}

static void in_child(void)
{
	for (struct ummunotify *umn = notifiers; umn; umn = umn->next)
		close_inherited(umn);
	notifiers = NULL;
	pthread_mutex_init(&list_lock, NULL);
}

static void start(void)
{
	umn_uffd_start(); /* in a child it comes before the connections that it serves */
	umn_process_add_child(in_child);
}

static int start_once(void)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	int error = umn_process_start();

	if (error)
		return umn_fail_errno(UMMUNOTIFY_UNAVAILABLE, -error,
				      "a page that forks do not inherit cannot be made (MADV_WIPEONFORK, Linux 4.14)");
	/* In a child that has made no call yet, the list is the parent's. */
	umn_process_current();
	pthread_once(&once, start);
	return 0;
}

static void list_add(struct ummunotify *umn)
{
	pthread_mutex_lock(&list_lock);
	umn->next = notifiers;
	__atomic_store_n(&notifiers, umn, __ATOMIC_RELEASE);
	pthread_mutex_unlock(&list_lock);
}

static void list_remove(struct ummunotify *umn)
{
	struct ummunotify **link = &notifiers;

	pthread_mutex_lock(&list_lock);
	for (; *link; link = &(*link)->next)
		if (*link == umn) {
			__atomic_store_n(link, umn->next, __ATOMIC_RELEASE);
			break;
		}
	pthread_mutex_unlock(&list_lock);
}

/* Has this process a notifier of this source? */
static bool has_another(enum umn_source_kind kind)
{
	bool found = false;

	pthread_mutex_lock(&list_lock);
	for (struct ummunotify *umn = notifiers; umn; umn = umn->next)
		found |= umn->candidate->kind == kind;
	pthread_mutex_unlock(&list_lock);
	return found;
}

/* ---- Calls ---- */

static void release(struct ummunotify *umn)
{
	if (__atomic_exchange_n(&umn->released, 1, __ATOMIC_ACQ_REL))
		return;
	list_remove(umn);
	umn->connection->release(umn->connection);
	umn_wakeup_close(&umn->wakeup);
}

static void leave(struct ummunotify *umn)
{
	if (!__atomic_sub_fetch(&umn->inside, 1, __ATOMIC_SEQ_CST) && __atomic_load_n(&umn->closed, __ATOMIC_SEQ_CST))
		release(umn);
}

static int fail_forked(void)
{
	return umn_fail(UMMUNOTIFY_FORKED, EBADF, "open another one in the child",
			"this notifier was opened before a fork and watches the parent process");
}

static int fail_closed(void)
{
	return umn_fail(UMMUNOTIFY_CLOSED, ESHUTDOWN, "", "this notifier is closed");
}

/* 0: nothing that the call needs is released before `leave`. Each side stores first and then loads, sequentially consistent: this counts
 * itself in and then looks at `closed`; ummunotify_shutdown, which is counted in itself, closes and then looks at the count. So either
 * this sees that it is closed, or the last to leave does. */
static int enter(struct ummunotify *umn)
{
	if (!umn_process_is(umn->epoch)) {
		umn_process_current(); /* lets go of what the child inherited */
		return fail_forked();
	}
	__atomic_add_fetch(&umn->inside, 1, __ATOMIC_SEQ_CST);
	if (!__atomic_load_n(&umn->closed, __ATOMIC_SEQ_CST))
		return 0;
	leave(umn);
	return fail_closed();
}

int ummunotify_check(struct ummunotify *umn)
{
	int error = enter(umn);

	if (!error)
		leave(umn);
	return error;
}

/* ---- Opening ---- */

/* 0, or it has been said why. */
static int grow(struct ummunotify *umn)
{
	uint32_t pages;
	void *memory;
	int error;

	/* The feeder may run Python code, and that a signal handler or a finaliser which watches something itself. */
	if (pthread_mutex_lock(&umn->growing) == EDEADLK)
		return umn_fail(UMMUNOTIFY_LIMIT, EDEADLK, "do this outside of signal handlers and finalisers",
				"the code that this call has interrupted is making the table larger");
	pages = umn_table_next_pages(umn->table);
	if (!pages) {
		error = umn_fail(UMMUNOTIFY_LIMIT, ENOMEM, "", "the table is as large as it can be");
	} else {
		error = umn->connection->add_segment(umn->connection, pages, &memory);
		/* The feeder has run code that has forked, and this is the child. */
		if (!umn_process_is(umn->epoch))
			return fail_forked();
		if (!error && (error = umn_table_add_segment(umn->table, memory, pages))) {
			munmap(memory, (size_t)pages * UMN_PAGE);
			umn_fail_errno(UMMUNOTIFY_NO_MEMORY, -error, "the table cannot grow");
		}
	}
	pthread_mutex_unlock(&umn->growing);
	return error;
}

static void free_notifier(struct ummunotify *umn)
{
	if (umn->connection)
		umn->connection->free(umn->connection);
	if (umn->table)
		umn_table_delete(umn->table);
	free(umn);
}

/* `epoll` is a device's, or -1. NULL: it has been said why. */
static struct ummunotify *try_source(const struct umn_candidate *candidate, const struct ummunotify_options *options, int epoll)
{
	struct ummunotify *umn = calloc(1, sizeof *umn);
	pthread_mutexattr_t checked;

	if (umn) {
		umn->wakeup = (struct umn_wakeup)UMN_NO_WAKEUP;
		umn->max_regions = options->max_regions ? options->max_regions : UINT64_MAX;
		umn->table = umn_table_new(UINT64_MAX);
	}
	if (!umn || !umn->table) {
		umn_fail_errno(UMMUNOTIFY_NO_MEMORY, ENOMEM, "no memory");
		free(umn);
		return NULL;
	}
	umn->epoch = umn_process_current();
	umn->candidate = candidate;
	pthread_mutex_init(&umn->lock, NULL);
	pthread_mutexattr_init(&checked);
	pthread_mutexattr_settype(&checked, PTHREAD_MUTEX_ERRORCHECK);
	pthread_mutex_init(&umn->growing, &checked);
	pthread_mutex_init(&umn->dispatching, &checked);
	pthread_mutexattr_destroy(&checked);
	umn->connection = umn_connect(candidate, options->feeder, epoll >= 0);
	if (umn->connection) {
		if (umn->connection->source)
			umn_table_set_source(umn->table, umn->connection->source);
		/* The wake-up before the test: after it, no descriptor is left that seeing a change could depend on. */
		if (!grow(umn) && !umn_wakeup_open(&umn->wakeup, umn->connection, epoll) &&
		    !umn->connection->bind(umn->connection) && !umn_prove(umn->table, umn->connection) &&
		    umn_process_is(umn->epoch)) {
			list_add(umn);
			return umn;
		}
		if (umn_process_is(umn->epoch)) {
			umn_table_close(umn->table);
			release(umn);
		} else {
			close_inherited(umn);
		}
	}
	/* The feeder, or a signal handler, has forked, and this is the child. */
	if (!umn_process_is(umn->epoch))
		fail_forked();
	free_notifier(umn);
	return NULL;
}

/* Adds to a text that was allocated, if there is memory for it. */
__attribute__((format(printf, 2, 3))) static void append(char **text, const char *format, ...)
{
	char *added = NULL, *longer = NULL;
	va_list arguments;
	int length;

	va_start(arguments, format);
	length = vasprintf(&added, format, arguments);
	va_end(arguments);
	if (length < 0)
		return;
	length = asprintf(&longer, "%s%s", *text ? *text : "", added);
	free(added);
	if (length < 0)
		return;
	free(*text);
	*text = longer;
}

static bool same_reason(const struct ummunotify_tried *a, const struct ummunotify_tried *b)
{
	return !strcmp(a->why, b->why) && !strcmp(a->remedy, b->remedy);
}

/* "source, source: why; remedy. source: why" of all that were tried: each reason once. NULL without memory. */
static char *reasons(void)
{
	const struct ummunotify_tried *first, *other;
	char *text = NULL;

	for (size_t i = 0; (first = ummunotify_tried(i)); i++) {
		size_t j = 0;

		while (j < i && !same_reason(ummunotify_tried(j), first))
			j++;
		if (j < i)
			continue;
		append(&text, "%s%s", i ? ". " : "", first->source);
		while ((other = ummunotify_tried(++j)))
			if (same_reason(first, other))
				append(&text, ", %s", other->source);
		append(&text, ": %s%s%s", first->why, *first->remedy ? "; " : "", first->remedy);
	}
	return text;
}

static int open_notifier(struct ummunotify **result, const struct ummunotify_options *options, int epoll)
{
	const struct umn_candidate *candidates[UMN_CANDIDATES_MAX];
	int error = start_once(), count = error ? error : umn_candidates(options->source, candidates);

	*result = NULL;
	umn_forget_tried();
	if (count < 0)
		return count;
	for (int i = 0; i < count; i++) {
		/* All of them for the same reason. */
		if (i && candidates[i]->kind == UMN_BPF && candidates[i - 1]->kind == UMN_BPF && !options->feeder)
			continue;
		*result = try_source(candidates[i], options, epoll);
		if (*result)
			break;
		umn_note_tried(candidates[i]->name);
		/* What the process has is never followed by something weaker without a word. */
		if (count == 1 || ummunotify_failure()->code == UMMUNOTIFY_FORKED ||
		    (ummunotify_failure()->code == UMMUNOTIFY_LIMIT && has_another(candidates[i]->kind))) {
			error = -ummunotify_failure()->error;
			umn_fail_what("%s", candidates[i]->name);
			break;
		}
	}
	if (!*result && !error) {
		char *why = reasons();

		error = umn_fail(UMMUNOTIFY_UNAVAILABLE, ENODEV, "", "no source of invalidations is available (%s)",
				 why ? why : "no memory");
		free(why);
	}
	return error;
}

int ummunotify_open_with(struct ummunotify **umn, const struct ummunotify_options *options)
{
	struct ummunotify_options known = {0};

	memcpy(&known, options, options->size < sizeof known ? options->size : sizeof known);
	return open_notifier(umn, &known, -1);
}

int ummunotify_open(struct ummunotify **umn, const char *wanted)
{
	const struct ummunotify_options options = {.size = sizeof options, .source = wanted};

	return open_notifier(umn, &options, -1);
}

int umn_open_device(struct ummunotify **umn, const char *source, bool cloexec, int *fd, int *counter_fd)
{
	const struct ummunotify_options options = {.size = sizeof options, .source = source};
	int error;

	*fd = epoll_create1(cloexec ? EPOLL_CLOEXEC : 0);
	if (*fd < 0)
		return umn_fail_errno(UMMUNOTIFY_LIMIT, errno, "a descriptor cannot be made");
	error = open_notifier(umn, &options, *fd);
	if (!error) {
		*counter_fd = (*umn)->connection->open_counter((*umn)->connection);
		if (*counter_fd >= 0) {
			(*umn)->wakes = true;
			umn_table_arm((*umn)->table);
			return 0;
		}
		error = *counter_fd;
		ummunotify_close(*umn);
	}
	umn_close(fd);
	return error;
}

/* ---- Closing ---- */

void ummunotify_shutdown(struct ummunotify *umn)
{
	if (enter(umn))
		return;
	umn_table_close(umn->table);
	__atomic_store_n(&umn->closed, 1, __ATOMIC_SEQ_CST);
	pthread_mutex_lock(&umn->lock);
	umn_wakeup_set(&umn->wakeup, true); /* for the threads that wait */
	pthread_mutex_unlock(&umn->lock);
	leave(umn);
}

void ummunotify_close(struct ummunotify *umn)
{
	if (!umn)
		return;
	ummunotify_shutdown(umn);
	free_notifier(umn);
}

const char *ummunotify_source(const struct ummunotify *umn)
{
	return umn->connection->name;
}

const char *ummunotify_version(void)
{
	return UMN_VERSION;
}

/* ---- Watching ---- */

static int fail_to_watch(struct ummunotify *umn, int error, uint64_t start, uint64_t length)
{
	if (error > 0)
		umn->connection->refused(umn->connection, error, start, start + length);
	else if (error == -EDQUOT)
		umn_fail(UMMUNOTIFY_LIMIT, ENOSPC, "", "the index of the regions is as deep as it can be");
	else if (error == -EBADF)
		return fail_closed();
	else
		umn_fail_errno(UMMUNOTIFY_NO_MEMORY, -error, "no memory");
	return umn_fail_what("cannot watch %llu bytes at %#llx", (unsigned long long)length, (unsigned long long)start);
}

static int check_range(uint64_t start, uint64_t length)
{
	static uint64_t limit;
	const char *why = NULL;

	if (!__atomic_load_n(&limit, __ATOMIC_RELAXED))
		__atomic_store_n(&limit, umn_user_limit(), __ATOMIC_RELAXED);
	if (!length)
		why = "it is empty";
	else if (start + length < start)
		why = "it wraps round the end of the address space";
	else if (!start || start + length > limit)
		why = "it is not in user space";
	if (!why)
		return 0;
	umn_fail(UMMUNOTIFY_RANGE, EINVAL, "", "%s", why);
	return umn_fail_what("cannot watch %llu bytes at %#llx", (unsigned long long)length, (unsigned long long)start);
}

static int watch(struct ummunotify *umn, uint64_t start, uint64_t length, uint64_t cookie, struct umn_region **region)
{
	int error = check_range(start, length);

	if (error)
		return error;
	if (umn_table_regions(umn->table) >= umn->max_regions) /* to within the threads that watch at the same time */
		return umn_fail(UMMUNOTIFY_LIMIT, ENOSPC, "unwatch some, or raise max_regions",
				"%llu regions are watched, and max_regions allows for no more",
				(unsigned long long)umn_table_regions(umn->table));
	while ((error = umn_table_watch(umn->table, start, start + length, cookie, NULL, region)) == -ENOSPC)
		if ((error = grow(umn)))
			return __atomic_load_n(&umn->closed, __ATOMIC_SEQ_CST) ? fail_closed()
									       : umn_fail_what("the table cannot grow");
	return error ? fail_to_watch(umn, error, start, length) : 0;
}

int ummunotify_watch(struct ummunotify *umn, const void *address, size_t length, uint64_t cookie, struct ummunotify_region **region)
{
	int error = enter(umn);

	if (error)
		return error;
	error = watch(umn, (uint64_t)address, length, cookie, (struct umn_region **)region);
	leave(umn);
	return error;
}

/* The lock is held. What is being called stays counted until the callback returns. */
static void forget_taken(struct ummunotify *umn)
{
	if (umn->taken_is == REFUSED)
		__atomic_sub_fetch(&umn->delivering, 1, __ATOMIC_SEQ_CST);
	umn->taken_is = NONE;
}

int ummunotify_unwatch(struct ummunotify *umn, struct ummunotify_region *region)
{
	int error = enter(umn);

	if (error)
		return error;
	pthread_mutex_lock(&umn->lock);
	umn_table_unwatch(umn->table, (struct umn_region *)region);
	if (umn->taken_is != NONE && umn->taken.region == region)
		forget_taken(umn);
	pthread_mutex_unlock(&umn->lock);
	leave(umn);
	return 0;
}

bool ummunotify_valid(const struct ummunotify_region *region)
{
	return umn_region_valid((const struct umn_region *)region);
}

int ummunotify_valid_now(const struct ummunotify_region *region)
{
	const struct umn_region *r = (const struct umn_region *)region;

	if (!umn_region_untouched(r))
		return 0;
	if (!r->source)
		return 1;
	/* In this order: see umn_region_valid. */
	return r->source->delivered(r->source) ? umn_region_untouched(r) : -EAGAIN;
}

int ummunotify_renew(struct ummunotify *umn, struct ummunotify_region *region)
{
	struct umn_region *r = (struct umn_region *)region;
	int error = enter(umn);

	if (error)
		return error;
	error = umn_table_renew(umn->table, r);
	if (error)
		error = fail_to_watch(umn, error, r->start, r->end - r->start);
	leave(umn);
	return error;
}

bool ummunotify_changed(const struct ummunotify *umn)
{
	/* In this order: dispatch counts itself in before it takes an event off the list, which is what makes the first say no. */
	return umn_table_changed(umn->table) || __atomic_load_n(&umn->delivering, __ATOMIC_ACQUIRE);
}

uint64_t ummunotify_generation(struct ummunotify *umn)
{
	return umn_table_generation(umn->table);
}

const uint64_t *umn_generation_of(const struct ummunotify *umn)
{
	return &umn_table_header(umn->table)->generation;
}

void umn_begin_at_one(struct ummunotify *umn)
{
	umn_table_restart(umn->table, 1);
}

uint64_t umn_dispatched(const struct ummunotify *umn)
{
	/* In this order, as dispatch counts itself in before it takes an event off the list: if nothing is being delivered now, all that
	 * the table counted as reported before was delivered. */
	uint64_t seen = umn_table_seen(umn->table);

	return __atomic_load_n(&umn->delivering, __ATOMIC_ACQUIRE) ? 0 : seen;
}

bool umn_counts_in_time(const struct ummunotify *umn)
{
	return !umn->connection->source;
}

int ummunotify_stats(struct ummunotify *umn, struct ummunotify_stats *stats)
{
	struct umn_table_stats of_table;
	int error = enter(umn);

	if (error)
		return error;
	umn_table_stats(umn->table, &of_table);
	*stats = (struct ummunotify_stats){.regions = of_table.regions,
					   .bytes = of_table.bytes,
					   .free_bytes = of_table.free_bytes,
					   .segments = of_table.segments,
					   .levels = of_table.levels,
					   .overflows = of_table.overflows};
	leave(umn);
	return 0;
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

/* Something has changed that sent no wake-up, or the wake-up was cleared. */
static bool is_unseen(const struct ummunotify *umn)
{
	return umn_generation(umn_table_header(umn->table)) != umn_table_seen(umn->table);
}

/* Sees to it that what has changed by now is in the table. Negative: that is not known, and it has been said why. Then everything is
 * reported once; if each call did that, a caller that reads until there is nothing would never end. */
static int catch_up(struct ummunotify *umn)
{
	int missed = umn->connection->may_have_missed(umn->connection);

	/* As in grow. */
	if (!umn_process_is(umn->epoch))
		return fail_forked();
	if (missed > 0 || (missed < 0 && !__atomic_exchange_n(&umn->blind, true, __ATOMIC_RELAXED)))
		umn_table_invalidate_all(umn->table);
	if (missed >= 0 && __atomic_load_n(&umn->blind, __ATOMIC_RELAXED))
		__atomic_store_n(&umn->blind, false, __ATOMIC_RELAXED);
	return missed < 0 ? missed : 0;
}

/* `counter`: what the connection's was before catch_up. `dispatching`: there is room for one, and a callback will decide whether it is
 * delivered. */
static ptrdiff_t read_events(struct ummunotify *umn, struct ummunotify_event *events, size_t room, struct umn_reading *reading,
			     uint64_t counter, bool dispatching)
{
	size_t n = 0;

	pthread_mutex_lock(&umn->lock);
	if (umn->wakes) {
		/* In this order no wake-up is lost: what hits after arming sends one again. */
		umn->connection->acknowledge(umn->connection);
		umn_table_arm(umn->table);
	}
	if (umn->taken_is == REFUSED && room) {
		events[n++] = umn->taken;
		forget_taken(umn);
	}
	/* With no room too: it finds out whether there is anything. */
	if (n < room || !room)
		n += drain(umn, events ? &events[n] : NULL, room - n);
	if (dispatching && n) {
		umn->taken = *events;
		umn->taken_is = CALLING;
	}
	reading->seen = umn->connection->counter ? counter : umn_table_seen(umn->table);
	/* Else there was no room to see that the list is empty, or to say so. */
	reading->unfinished |= n > 0;
	reading->finished = n < room && reading->unfinished;
	if (n < room)
		reading->unfinished = false;
	if (umn->wakes && !__atomic_load_n(&umn->closed, __ATOMIC_SEQ_CST))
		umn_wakeup_set(&umn->wakeup, reading->unfinished || is_unseen(umn));
	pthread_mutex_unlock(&umn->lock);
	return (ptrdiff_t)n;
}

ptrdiff_t umn_read(struct ummunotify *umn, struct ummunotify_event *events, size_t room, struct umn_reading *reading)
{
	ptrdiff_t result = enter(umn);
	uint64_t counter = 0;
	int error;

	if (result)
		return result;
	if (umn->connection->counter)
		counter = __atomic_load_n(umn->connection->counter, __ATOMIC_ACQUIRE);
	error = catch_up(umn);
	if (!umn_process_is(umn->epoch))
		return error;
	result = read_events(umn, events, room, reading, counter, false);
	leave(umn);
	return result ? result : error;
}

ptrdiff_t ummunotify_read(struct ummunotify *umn, struct ummunotify_event *events, size_t room)
{
	struct umn_reading reading = {0};

	return umn_read(umn, events, room, &reading);
}

/* After the callback. What it has refused counts as not delivered and is the first to come again, unless it was unwatched meanwhile. */
static void settle_taken(struct ummunotify *umn, bool refused)
{
	pthread_mutex_lock(&umn->lock);
	if (refused && umn->taken_is == CALLING) {
		umn->taken_is = REFUSED;
		if (umn->wakes && !__atomic_load_n(&umn->closed, __ATOMIC_SEQ_CST))
			umn_wakeup_set(&umn->wakeup, true);
	} else {
		umn->taken_is = NONE;
		__atomic_sub_fetch(&umn->delivering, 1, __ATOMIC_SEQ_CST);
	}
	pthread_mutex_unlock(&umn->lock);
}

ptrdiff_t ummunotify_dispatch(struct ummunotify *umn, int (*callback)(const struct ummunotify_event *event, void *context),
			      void *context)
{
	struct umn_reading reading = {0};
	struct ummunotify_event event;
	ptrdiff_t result = enter(umn), n;
	bool stopped = false;
	int error;

	if (result)
		return result;
	if (pthread_mutex_lock(&umn->dispatching) == EDEADLK) {
		leave(umn);
		return 0;
	}
	error = catch_up(umn);
	if (!umn_process_is(umn->epoch))
		return error;
	/* One by one: what was not delivered, because a callback stops, stays in the table. */
	do {
		__atomic_add_fetch(&umn->delivering, 1, __ATOMIC_SEQ_CST);
		n = read_events(umn, &event, 1, &reading, 0, true);
		if (n > 0) {
			stopped = callback(&event, context);
			/* The callback has forked, and this is the child: other threads of the parent may hold the locks for ever. */
			if (!umn_process_is(umn->epoch))
				return fail_forked();
			result += !stopped;
			settle_taken(umn, stopped);
		} else {
			__atomic_sub_fetch(&umn->delivering, 1, __ATOMIC_SEQ_CST);
		}
	} while (n > 0 && !stopped && !__atomic_load_n(&umn->closed, __ATOMIC_SEQ_CST));
	pthread_mutex_unlock(&umn->dispatching);
	leave(umn);
	if (stopped)
		return -ECANCELED;
	return result ? result : error;
}

/* ---- Waiting ---- */

/* From now on changes send wake-ups. */
static void begin_wakeups(struct ummunotify *umn)
{
	pthread_mutex_lock(&umn->lock);
	if (!umn->wakes) {
		umn->wakes = true;
		umn_table_arm(umn->table);
		/* What has been hit by now sent none. */
		umn_wakeup_set(&umn->wakeup, umn->wakeup.is_set || is_unseen(umn) || umn->taken_is == REFUSED);
	}
	pthread_mutex_unlock(&umn->lock);
}

int ummunotify_fd(struct ummunotify *umn)
{
	int result = enter(umn);

	if (result)
		return result;
	begin_wakeups(umn);
	result = umn_wakeup_intact(&umn->wakeup) ? umn->wakeup.epoll : -EBADF;
	leave(umn);
	return result;
}

static int wait_slice(struct ummunotify *umn, int milliseconds)
{
	struct pollfd polled = {.fd = umn->wakeup.epoll, .events = POLLIN};
	int result;

	if (__atomic_load_n(&umn->closed, __ATOMIC_SEQ_CST))
		return fail_closed();
	if (!umn_wakeup_intact(&umn->wakeup))
		return -EBADF;
	result = poll(&polled, 1, milliseconds);
	if (result < 0)
		return umn_fail_errno(UMMUNOTIFY_DESCRIPTOR, errno, "waiting was interrupted");
	return __atomic_load_n(&umn->closed, __ATOMIC_SEQ_CST) ? fail_closed() : result;
}

int ummunotify_wait(struct ummunotify *umn, int milliseconds)
{
	int result = enter(umn);
	bool blind;

	if (result)
		return result;
	begin_wakeups(umn);
	/* In slices: where the program has closed the pipe, nothing wakes this thread when the notifier is closed. */
	do {
		blind = __atomic_load_n(&umn->blind, __ATOMIC_RELAXED);
		result = wait_slice(umn, blind ? 0 : milliseconds < 0 || milliseconds > SLICE ? SLICE : milliseconds);
		if (!result && blind) /* nothing may come any more */
			result = catch_up(umn);
		if (milliseconds >= 0)
			milliseconds -= milliseconds > SLICE ? SLICE : milliseconds;
	} while (!result && milliseconds);
	leave(umn);
	return result;
}

/* ---- For the device ---- */

bool umn_must_renew(const struct ummunotify *umn)
{
	return umn->connection->source != NULL;
}

size_t umn_device_fds(struct ummunotify *umn, int *fds)
{
	const struct umn_wakeup *w = &umn->wakeup;
	size_t count = 0;

	fds[count++] = w->source;
	fds[count++] = w->out.fd;
	fds[count++] = w->in.fd;
	if (umn->connection->wake_fd >= 0)
		fds[count++] = umn->connection->wake_fd;
	return count;
}

int umn_device_wake(struct ummunotify *umn)
{
	return umn->wakeup.source;
}

void umn_device_next_wakeup(struct ummunotify *umn)
{
	struct umn_source *source = umn->connection->source;
	bool was_set;

	if (source)
		source->wait_delivered(source, UMN_DELIVERY_MILLISECONDS);
	pthread_mutex_lock(&umn->lock);
	was_set = umn->wakeup.is_set;
	/* It is readable all the time: the thread that made the change may be looking. */
	umn_wakeup_set(&umn->wakeup, true);
	umn->connection->acknowledge(umn->connection);
	umn_table_arm(umn->table);
	umn_wakeup_set(&umn->wakeup, was_set || is_unseen(umn) || (source && !source->delivered(source)));
	pthread_mutex_unlock(&umn->lock);
}
