/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Each page of the arena has numbers: of its last change that has begun, of the last one that was completed (`done`), and of the last
 * that is over, even if it failed. A page belongs to one thread, which alone changes it; all threads watch all pages, and take over
 * what others have unmapped.
 *
 * A region remembers which changes of its pages had begun when `watch` returned. A later one that is complete must have made it
 * invalid; also one that is not, if it has given the address away.
 */
#define _GNU_SOURCE
#include "changes.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE ((unsigned long)sysconf(_SC_PAGESIZE))
/* Far below what the kernel places itself, or something else's memory would come to lie in the holes. */
#ifdef __SANITIZE_THREAD__ /* It lets only some addresses be mapped. */
#define ARENA ((uint8_t *)0x7e9000000000)
#else
#define ARENA ((uint8_t *)0x2a0000000000)
#endif
#define GROUP 8u /* pages of a thread, in each half of the arena */
#define PAGES_MAX (2 * CHANGES_THREADS_MAX * GROUP)
#define REGIONS 24u /* watched by a thread at a time */
#define REGION_PAGES (3 * GROUP)
#define load(p) __atomic_load_n(p, __ATOMIC_ACQUIRE)
#define store(p, v) __atomic_store_n(p, v, __ATOMIC_RELEASE)

struct watched {
	changes_region *region;
	uint64_t start, end;	      /* bytes */
	uint32_t first, last;	      /* pages */
	uint64_t since[REGION_PAGES]; /* which change had begun when it was watched */
	bool disturbed;		      /* a change was under way then, which could or could not hit it */
	uint64_t reports;	      /* since then; under draining */
};

struct worker {
	pthread_t thread;
	uint32_t number;
	uint64_t state;
	bool mapped[2][GROUP]; /* false: perhaps not */
	struct watched watched[REGIONS];
	struct changes_totals totals;
};

static struct changes_options options;
static changes_target *target;
static uint8_t *arena;
static uint32_t half; /* of the arena, in pages */
static int file;
static uint64_t begun[PAGES_MAX], done[PAGES_MAX], over[PAGES_MAX];
static uint64_t changes;
static bool stopping;
static double deadline;
/* Held to read events and to unwatch, since an event points to its region. */
static pthread_mutex_t draining = PTHREAD_MUTEX_INITIALIZER;

static char failure[200];

static void changes_fail(const char *format, ...)
{
	static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
	va_list args;

	pthread_mutex_lock(&lock);
	va_start(args, format);
	if (!failure[0])
		vsnprintf(failure, sizeof failure, format, args);
	va_end(args);
	pthread_mutex_unlock(&lock);
	store(&stopping, true);
}

/* ---- What is tested ---- */

struct report {
	struct watched *watched;
	uint64_t start, end;
};

#ifdef CHANGES_NOTIFIER

static int start_watching(struct watched *r)
{
	return ummunotify_watch(target, (void *)r->start, r->end - r->start, (uint64_t)r, &r->region);
}

static void stop_watching(struct watched *r)
{
	ummunotify_unwatch(target, r->region);
}

static int make_valid(struct watched *r)
{
	return ummunotify_renew(target, r->region);
}

static bool is_valid(const struct watched *r)
{
	return ummunotify_valid(r->region);
}

static bool is_changed(void)
{
	return ummunotify_changed(target);
}

static size_t take(struct report *reports, size_t room)
{
	struct ummunotify_event events[16];
	ptrdiff_t n = ummunotify_read(target, events, room);

	for (ptrdiff_t i = 0; i < n; i++)
		reports[i] = (struct report){(struct watched *)events[i].cookie, events[i].start, events[i].end};
	return n < 0 ? 0 : (size_t)n;
}

/* A source whose news come late counts the generation up as long as something may be on its way. It may be a task of lower priority that
 * has to go on, so this thread sleeps. */
static void settle(void)
{
	const struct timespec step = {.tv_nsec = 1000000};
	uint64_t before = ummunotify_generation(target), now;

	for (; (now = ummunotify_generation(target)) != before; before = now)
		nanosleep(&step, NULL);
}

static const char *check_soundness(void)
{
	struct ummunotify_stats stats;

	return ummunotify_stats(target, &stats) || stats.regions ? "regions are left in the table" : NULL;
}

#else

static int start_watching(struct watched *r)
{
	return umn_table_watch(target, r->start, r->end, 0, r, &r->region);
}

static void stop_watching(struct watched *r)
{
	umn_table_unwatch(target, r->region);
}

static int make_valid(struct watched *r)
{
	return umn_table_renew(target, r->region);
}

static bool is_valid(const struct watched *r)
{
	return umn_region_valid(r->region);
}

static bool is_changed(void)
{
	return umn_table_changed(target);
}

static size_t take(struct report *reports, size_t room)
{
	struct umn_event events[16];
	size_t n = umn_table_drain(target, events, room);

	for (size_t i = 0; i < n; i++)
		reports[i] = (struct report){events[i].region->user, events[i].start, events[i].end};
	return n;
}

static void settle(void)
{
	if (options.source && !options.source->wait_delivered(options.source, 100000))
		changes_fail("the source does not settle");
}

static const char *check_soundness(void)
{
	return umn_table_check(target);
}

#endif

static double seconds(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static uint32_t pick(struct worker *w, uint32_t below)
{
	w->state ^= w->state >> 12;
	w->state ^= w->state << 25;
	w->state ^= w->state >> 27;
	return (uint32_t)((w->state * 2685821657736338717u >> 32) % below);
}

static void *place(uint32_t page)
{
	return arena + page * PAGE;
}

static bool map_pages(uint32_t page, uint32_t pages, int flags)
{
	return mmap(place(page), pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0) != MAP_FAILED;
}

/* ---- Checks ---- */

/* Has a change been completed since it was watched, as far as is known? */
static bool must_be_invalid(const struct watched *r)
{
	for (uint32_t i = r->first; i < r->last; i++)
		if (load(&done[i]) > r->since[i - r->first])
			return true;
	return false;
}

/* Can a change have hit it? */
static bool may_be_invalid(const struct watched *r)
{
	for (uint32_t i = r->first; i < r->last; i++)
		if (load(&begun[i]) > r->since[i - r->first])
			return true;
	return r->disturbed;
}

static void drain(struct worker *w, bool all)
{
	struct report reports[16];
	size_t n;

	do {
		n = take(reports, 16);
		w->totals.events += n;
		for (size_t i = 0; i < n; i++) {
			struct watched *r = reports[i].watched;

			r->reports++;
			if (reports[i].start < r->start || reports[i].end > r->end || reports[i].start >= reports[i].end)
				changes_fail("an event's range is not in its region");
		}
	} while (all && n == 16);
}

/* It was hit, so there is or was an event. */
static void check_report(struct worker *w, struct watched *r)
{
	pthread_mutex_lock(&draining);
	if (!r->reports && !is_changed())
		changes_fail("a region was changed and not reported, but `changed` is false");
	settle();
	drain(w, true);
	if (!r->reports)
		changes_fail("a region was changed and not reported");
	pthread_mutex_unlock(&draining);
}

static void remember(struct watched *r)
{
	r->disturbed = false;
	for (uint32_t i = r->first; i < r->last; i++) {
		r->since[i - r->first] = load(&begun[i]);
		r->disturbed |= load(&over[i]) < r->since[i - r->first];
	}
}

static void unwatch(struct watched *r)
{
	pthread_mutex_lock(&draining);
	stop_watching(r);
	pthread_mutex_unlock(&draining);
	r->region = NULL;
}

static void watch(struct worker *w, struct watched *r)
{
	uint32_t length = 1 + pick(w, REGION_PAGES - 1), from = pick(w, PAGE), less = pick(w, PAGE - 1);
	uint64_t start;
	int error;

	r->first = pick(w, 2 * half - length);
	r->last = r->first + length;
	if (length == 1)
		from = less = 0;
	start = (uint64_t)place(r->first);
	r->start = start + from;
	r->end = start + length * PAGE - less;
	r->reports = 0;
	error = start_watching(r);
	if (error) {
		/* A source may refuse a hole; and a table does not grow here. */
		if (error < 0 && error != -ENOSPC && error != -ENXIO)
			changes_fail("watch: %s", strerror(-error));
		r->region = NULL;
		w->totals.refused++;
		return;
	}
	remember(r);
	w->totals.watched++;
}

static void check(struct worker *w, struct watched *r)
{
	bool hit = must_be_invalid(r), valid = is_valid(r);

	w->totals.checks++;
	w->totals.valid += valid;
	w->totals.hit += hit;
	if (valid && hit)
		changes_fail("missed: a region of pages %u to %u is valid that was changed", r->first, r->last);
	if (valid) {
		/* Or those would remain that are not hit. */
		if (!pick(w, 4))
			unwatch(r);
		return;
	}
	if (is_valid(r))
		changes_fail("a region is valid again by itself");
	w->totals.false_alarms += !may_be_invalid(r);
	if (hit && !pick(w, 8))
		check_report(w, r);
	if (pick(w, 2)) {
		pthread_mutex_lock(&draining);
		drain(w, true);
		r->reports = 0;
		if (make_valid(r)) {
			if (is_valid(r))
				changes_fail("a region is valid that was not renewed");
		} else {
			remember(r);
			w->totals.renewed++;
			pthread_mutex_unlock(&draining);
			return;
		}
		pthread_mutex_unlock(&draining);
	}
	unwatch(r);
}

/* At once: regions that pages [first, last) hit with change `number` at least. */
static void check_overlapping(struct worker *w, uint32_t first, uint32_t last, uint64_t number)
{
	for (uint32_t i = 0; i < REGIONS; i++) {
		struct watched *r = &w->watched[i];

		if (!r->region || r->first >= last || r->last <= first)
			continue;
		for (uint32_t page = first > r->first ? first : r->first; page < last && page < r->last; page++)
			if (r->since[page - r->first] < number) {
				w->totals.hit++;
				w->totals.checks++;
				if (is_valid(r))
					changes_fail("missed: page %u was changed or given away, and a region of it is valid",
						     page);
				break;
			}
	}
}

/* ---- Changes ---- */

static void begin(uint32_t first, uint32_t last)
{
	for (uint32_t i = first; i < last; i++)
		store(&begun[i], begun[i] + 1);
}

static void end(struct worker *w, uint32_t first, uint32_t last, bool failed)
{
	uint64_t number = UINT64_MAX;

	for (uint32_t i = first; i < last; i++) {
		store(&over[i], begun[i]);
		if (failed)
			continue;
		store(&done[i], begun[i]);
		number = begun[i] < number ? begun[i] : number;
	}
	if (!failed) {
		check_overlapping(w, first, last, number);
		w->totals.changes++;
	}
}

/* So that the change is one, and that a page which is not mapped lets conclude that it has happened. */
static void fill(bool *mapped, uint32_t page, uint32_t pages, bool populate)
{
	for (uint32_t i = 0; i < pages; i++)
		if (!mapped[i]) {
			/* EEXIST: others took it. */
			map_pages(page + i, 1, MAP_FIXED_NOREPLACE | (populate ? MAP_POPULATE : 0));
			mapped[i] = true;
		}
}

static void mark(bool *mapped, uint32_t pages, bool value)
{
	memset(mapped, value, pages * sizeof *mapped);
}

static void change(struct worker *w)
{
	uint32_t upper = pick(w, 2), offset = pick(w, GROUP), pages = 1 + pick(w, GROUP - offset);
	uint32_t first = w->number * GROUP + offset + upper * half, last = first + pages;
	uint32_t other = w->number * GROUP + offset + !upper * half;
	bool *mapped = &w->mapped[upper][offset], *other_mapped = &w->mapped[!upper][offset], failed = false, populate = pick(w, 2);
	size_t length = pages * PAGE;
	void *moved;

	fill(mapped, first, pages, populate);
	begin(first, last);
	switch (pick(w, options.files ? 9 : 8)) {
	case 0:
	case 1:
		failed = munmap(place(first), length);
		mark(mapped, pages, failed);
		break;
	case 2:
		failed = madvise(place(first), length, MADV_DONTNEED);
		break;
	case 3:
		/* Where there never was a page it is no change. Not written to by us, as ThreadSanitizer takes mmap for a write. */
		failed = madvise(place(first), PAGE, MADV_POPULATE_WRITE);
		if (failed) {
			changes_fail("populate: %s", strerror(errno));
			break;
		}
		failed = madvise(place(first), length, MADV_FREE); /* not of shared memory */
		break;
	case 4:
	case 5:
		failed = !map_pages(first, pages, MAP_FIXED | (populate ? MAP_POPULATE : 0));
		break;
	case 6:
		fill(other_mapped, other, pages, populate);
		begin(other, other + pages);
		failed = mremap(place(first), length, length, MREMAP_MAYMOVE | MREMAP_FIXED, place(other)) == MAP_FAILED;
		mark(mapped, pages, false);
		mark(other_mapped, pages, !failed);
		end(w, other, other + pages, failed);
		break;
	case 7:
		moved = mremap(place(first), length, length, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
		failed = moved == MAP_FAILED;
		if (!failed)
			munmap(moved, length);
		break;
	case 8:
		failed = mmap(place(first), length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | (populate ? MAP_POPULATE : 0),
			      file, first * PAGE) == MAP_FAILED;
		if (!failed) {
			end(w, first, last, false);
			begin(first, last);
			fill(other_mapped, other, pages, populate);
			begin(other, other + pages); /* these parts of the file may have been moved there */
			failed = fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, first * PAGE, length);
			end(w, other, other + pages, true);
		}
		break;
	}
	end(w, first, last, failed);
	/* Mostly there is other memory at once, and some stays unmapped for a while. */
	if (pick(w, 4))
		fill(mapped, first, pages, populate);
}

/* Take what others have unmapped, perhaps before munmap has returned to them. */
static void take_over(struct worker *w)
{
	uint32_t page = pick(w, 2 * half);
	uint64_t number = load(&begun[page]); /* when it began it was mapped */

	if (map_pages(page, 1, MAP_FIXED_NOREPLACE)) {
		check_overlapping(w, page, page + 1, number);
		w->totals.taken++;
	}
}

static void *work(void *worker)
{
	struct worker *w = worker;

	while (!load(&stopping)) {
		uint64_t before = w->totals.changes;

		for (uint32_t i = 0; i < 8; i++) {
			struct watched *r = &w->watched[pick(w, REGIONS)];

			if (r->region)
				check(w, r);
			else
				watch(w, r);
		}
		change(w);
		if (!pick(w, 2))
			take_over(w);
		if (!pick(w, 8)) {
			pthread_mutex_lock(&draining);
			drain(w, false);
			pthread_mutex_unlock(&draining);
		}
		if (__atomic_add_fetch(&changes, w->totals.changes - before, __ATOMIC_RELAXED) >= options.changes ||
		    seconds() > deadline)
			store(&stopping, true);
	}
	for (uint32_t i = 0; i < REGIONS; i++)
		if (w->watched[i].region) {
			check(w, &w->watched[i]);
			if (w->watched[i].region)
				unwatch(&w->watched[i]);
		}
	return NULL;
}

static void add(struct changes_totals *totals, const struct changes_totals *more)
{
	uint64_t *sum = (uint64_t *)totals;
	const uint64_t *term = (const uint64_t *)more;

	for (size_t i = 0; i < sizeof *totals / sizeof *sum; i++)
		sum[i] += term[i];
}

const char *changes_run(changes_target *of, const struct changes_options *how, struct changes_totals *totals)
{
	struct worker *workers = calloc(how->threads, sizeof *workers);

	*totals = (struct changes_totals){0};
	if (!workers || how->threads < 1 || how->threads > CHANGES_THREADS_MAX)
		return "cannot begin";
	options = *how;
	target = of;
	memset(begun, 0, sizeof begun);
	memset(done, 0, sizeof done);
	memset(over, 0, sizeof over);
	memset(failure, 0, sizeof failure);
	half = (options.threads < 2 ? 2 : options.threads) * GROUP;
	arena = ARENA;
	file = options.files ? memfd_create("changes", MFD_CLOEXEC) : -1;
	if (!map_pages(0, 2 * half, MAP_FIXED_NOREPLACE) || (options.files && (file < 0 || ftruncate(file, 2 * half * PAGE))))
		return "cannot begin";
	changes = 0;
	stopping = false;
	deadline = seconds() + options.seconds;
	for (uint32_t i = 0; i < options.threads; i++) {
		workers[i].number = i;
		workers[i].state = 88172645463325252u + options.seed * 1000 + i;
		mark(workers[i].mapped[0], 2 * GROUP, true);
		if (pthread_create(&workers[i].thread, NULL, work, &workers[i]))
			abort();
	}
	for (uint32_t i = 0; i < options.threads; i++) {
		pthread_join(workers[i].thread, NULL);
		add(totals, &workers[i].totals);
	}
	settle();
	drain(&workers[0], true);
	if (is_changed())
		changes_fail("everything was read, but `changed` is true");
	if (check_soundness())
		changes_fail("%s", check_soundness());
	munmap(arena, 2 * half * PAGE);
	if (file >= 0)
		close(file);
	free(workers);
	return failure[0] ? failure : NULL;
}
