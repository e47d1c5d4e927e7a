/* SPDX-License-Identifier: BSD-3-Clause */
/* The owner's side of a watch table: its interface, its segments, and what it asks of a source. See internal.h for the rest. */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "table/internal.h"

static bool lock(struct umn_table *t)
{
	/* In a child the lock may be held by a thread that does not exist there. */
	if (!umn_process_is(t->epoch))
		return false;
	pthread_mutex_lock(&t->lock);
	if (!t->closed)
		return true;
	pthread_mutex_unlock(&t->lock);
	return false;
}

static void unlock(struct umn_table *t)
{
	pthread_mutex_unlock(&t->lock);
}

struct umn_table *umn_table_new(uint64_t max_regions)
{
	struct umn_table *t = umn_process_start() ? NULL : calloc(1, sizeof *t);

	if (!t)
		return NULL;
	t->epoch = umn_process_current();
	pthread_mutex_init(&t->lock, NULL);
	t->max_regions = max_regions;
	t->queue.next = t->queue.previous = &t->queue;
	return t;
}

/* The region is invalid from now on, for all that its holder can know. */
static void hit(struct umn_table *t, struct umn_region *region)
{
	if (!lock(t))
		return;
	/* As in umn_invalidate, but that the slot goes to the queue, which is behind the lock already. Not if all was delivered
	 * meanwhile: a source that sends its wake-ups by itself does so after that, and no wake-up would follow this. */
	if (region->place == WATCHED && !t->source->delivered(t->source)) {
		if (!(__sync_fetch_and_or(&slot_of(region)->state, UMN_INVALID | UMN_PENDING | UMN_MULTIPLE) & UMN_PENDING)) {
			store(&slot_of(region)->thread, 0);
			store(&slot_of(region)->syscall, -1);
			queue_insert(t->queue.previous, region);
		}
		__sync_fetch_and_add(&t->header->generation, 1);
		/* With the lock held: so not while it is being closed. */
		if (t->source->wake && load(&t->header->armed) && __sync_lock_test_and_set(&t->header->armed, 0))
			t->source->wake(t->source);
	}
	unlock(t);
}

/* The slot was untouched a moment ago. That says nothing yet: the change may be complete, its event not even queued. Once all is
 * delivered, the slot is the answer. What is under way need not be of this region, so wait a little; it mostly takes
 * microseconds. After that the answer is no, and the region stays invalid, as the caller may act on the answer. */
static bool confirm(const struct umn_region *region)
{
	struct umn_source *source = region->source;

	if (!source->delivered(source) && !source->wait_delivered(source, UMN_DELIVERY_MILLISECONDS))
		hit(source->table, (struct umn_region *)region);
	return umn_region_untouched(region);
}

void umn_table_set_source(struct umn_table *t, struct umn_source *source)
{
	t->source = source;
	source->confirm = confirm;
	source->table = t;
}

uint32_t umn_table_next_pages(struct umn_table *t)
{
	uint32_t pages;

	if (!lock(t))
		return 0;
	pages = t->segment_count < UMN_SEGMENTS ? UMN_SEGMENT_PAGES : 0;
	unlock(t);
	return pages;
}

int umn_table_add_segment(struct umn_table *t, void *memory, uint32_t pages)
{
	struct chunk *chunks;
	uint32_t segment, i;

	if (pages != UMN_SEGMENT_PAGES)
		return -EINVAL;
	chunks = calloc((size_t)pages * UMN_CHUNKS_PER_PAGE, sizeof *chunks);
	if (!chunks)
		return -ENOMEM;
	if (!lock(t)) {
		free(chunks);
		return -EBADF;
	}
	segment = t->segment_count;
	if (segment == UMN_SEGMENTS) {
		unlock(t);
		free(chunks);
		return -EINVAL;
	}
	t->segments[segment] = (struct segment){memory, pages, chunks};
	if (!segment)
		t->header = memory;
	/* Descending, so that the lowest is taken first. Page 0 of segment 0 is the header. */
	for (i = pages * UMN_CHUNKS_PER_PAGE; i-- > (segment ? 0 : UMN_CHUNKS_PER_PAGE);)
		free_chunk(t, segment * UMN_CELLS_PER_SEGMENT + i * UMN_CELLS_PER_CHUNK);
	t->segment_count++;
	unlock(t);
	return 0;
}

const struct umn_header *umn_table_header(const struct umn_table *t)
{
	return t->header;
}

/* Takes the region out of the index. A feeder that has loaded its ref may still hit it, so the slot is reused after a grace
 * period. */
static void forget(struct umn_table *t, struct umn_region *region)
{
	umn_index_remove(t, region);
	store(&t->regions, t->regions - 1); /* read without the lock */
	store(&t->header->regions, (uint32_t)t->regions);
	__sync_fetch_and_and(&slot_of(region)->state, ~UMN_LIVE);
	if (region->queued) {
		queue_remove(region);
		__sync_fetch_and_and(&slot_of(region)->state, ~(UMN_PENDING | UMN_MULTIPLE));
	}
	umn_grace_retire_region(t, region);
	umn_grace_reclaim(t);
	umn_index_tidy(t);
}

/* Adds a chunk of slots to the free regions. */
static int add_slots(struct umn_table *t)
{
	struct umn_region *regions = calloc(UMN_CELLS_PER_CHUNK, sizeof *regions);
	uint32_t i, ref;

	if (!regions)
		return -ENOMEM;
	ref = take_chunk(t);
	memset(cell_at(t, ref), 0, UMN_CHUNK);
	chunk_at(t, ref)->regions = regions;
	for (i = UMN_CELLS_PER_CHUNK; i-- > 0;) {
		regions[i].ref = ref + i;
		regions[i].slot = cell_at(t, ref + i);
		regions[i].header = t->header;
		regions[i].source = t->source;
		regions[i].epoch = t->epoch;
		regions[i].next = t->free_regions;
		t->free_regions = &regions[i];
	}
	return 0;
}

/* Makes sure that a region can be inserted, and that there is a free one. 0 or an error of umn_table_watch. */
static int make_room(struct umn_table *t, uint64_t start)
{
	if (t->regions >= t->max_regions || t->levels == UMN_LEVELS)
		return -EDQUOT;
	if (t->free_chunk_count < CHUNKS_NEEDED || !t->free_regions) {
		umn_grace_reclaim(t);
		umn_grace_reclaim(t); /* the first call may only have ended a period that began before */
	}
	if (t->free_chunk_count < CHUNKS_NEEDED && !umn_index_has_room(t, start))
		return -ENOSPC;
	if (!umn_index_reserve(t))
		return -ENOMEM;
	return t->free_regions ? 0 : add_slots(t);
}

int umn_table_watch(struct umn_table *t, uint64_t start, uint64_t end, uint64_t cookie, void *user, struct umn_region **result)
{
	struct umn_region *region;
	int error;

	if (start >= end || end > UMN_ADDRESS_MAX)
		return -EINVAL;
	if (!lock(t))
		return -EBADF;
	error = make_room(t, start);
	if (error)
		goto out;
	region = t->free_regions;
	t->free_regions = region->next;
	region->start = start;
	region->end = end;
	region->cookie = cookie;
	region->user = user;
	region->place = WATCHED;
	region->overflow = load_overflow(t);
	store(&slot_of(region)->state, UMN_LIVE);
	umn_index_insert(t, region);
	store(&t->regions, t->regions + 1);
	store(&t->header->regions, (uint32_t)t->regions);
	/* After it can be hit: what changes as soon as the source feeds it is not missed. */
	if (t->source && (error = t->source->watch(t->source, start, end))) {
		forget(t, region);
		goto out;
	}
	umn_grace_reclaim(t);
	umn_index_tidy(t);
	*result = region;
	full_barrier(); /* see umn_table_renew */
out:
	unlock(t);
	return error;
}

void umn_table_unwatch(struct umn_table *t, struct umn_region *region)
{
	if (!lock(t))
		return;
	forget(t, region);
	/* `region` is not in use, but not reused before the lock is released. */
	if (t->source)
		t->source->unwatch(t->source, region->start, region->end);
	unlock(t);
}

int umn_table_renew(struct umn_table *t, struct umn_region *region)
{
	struct umn_source *source = t->source;
	uint32_t overflow;
	int error = 0;

	if (!lock(t))
		return 0;
	overflow = load_overflow(t);
	/* The source may be feeding nothing of what is at these addresses now. So first the slot is made ready to be hit, then the
	 * source told, and only then is the region valid again: until then its overflow is one that never was. */
	store(&region->overflow, source ? overflow - 1 : overflow);
	__sync_fetch_and_and(&slot_of(region)->state, ~UMN_INVALID);
	if (source) {
		error = source->watch(source, region->start, region->end);
		if (error)
			__sync_fetch_and_or(&slot_of(region)->state, UMN_INVALID);
		else
			source->unwatch(source, region->start, region->end); /* for the time before */
		store(&region->overflow, overflow);
	}
	/* From here on every feeder finds the region. The caller pins the memory next, and reads what is mapped there. Without the
	 * barrier it might read that while the stores are still on their way, and a change that begins meanwhile on another CPU would
	 * pass the region by. On x86 unlocking is such a barrier; on Arm what comes later may overtake it. */
	full_barrier();
	unlock(t);
	return error;
}

size_t umn_table_drain(struct umn_table *t, struct umn_event *events, size_t room)
{
	size_t n;

	if (!lock(t))
		return 0;
	n = umn_pending_report(t, events, room);
	unlock(t);
	return n;
}

bool umn_table_changed(const struct umn_table *t)
{
	if (!umn_process_is(t->epoch))
		return true; /* the memory is the parent's; the caller's next call says so */
	/* First `seen`, an acquire. A generation that was loaded before it could equal what a later drain leaves in `seen` for "not
	 * all of it was reported": a change would be pending, and this would be false. */
	uint64_t seen = load(&t->seen);

	return umn_generation(t->header) != seen ||
	       (t->source && (!t->source->delivered(t->source) || umn_generation(t->header) != seen));
}

uint64_t umn_table_generation(struct umn_table *t)
{
	if (!umn_process_is(t->epoch))
		return 0;
	if (t->source && !t->source->delivered(t->source) && lock(t)) {
		__sync_fetch_and_add(&t->header->generation, 1);
		unlock(t);
	}
	return umn_generation(t->header);
}

uint64_t umn_table_seen(const struct umn_table *t)
{
	return load(&t->seen);
}

void umn_table_restart(struct umn_table *t, uint64_t generation)
{
	if (!lock(t))
		return;
	umn_grace_wait(t); /* a feeder of the self-test's changes may still count up */
	load_overflow(t);
	store(&t->header->generation, generation);
	store(&t->seen, generation);
	t->settled = generation;
	unlock(t);
}

void umn_table_arm(struct umn_table *t)
{
	/* A full barrier follows: armed before the drain loads the generation. A feeder counts the generation up before it loads
	 * `armed`. One of the two sees the other's store. Without the barrier, on x86 and Arm, both loads may come first: the drain
	 * misses the change, the feeder sends no wake-up, and the client sleeps. */
	if (lock(t)) {
		__sync_fetch_and_or(&t->header->armed, 1);
		unlock(t);
	}
}

void umn_table_invalidate_all(struct umn_table *t)
{
	if (!lock(t))
		return;
	__sync_fetch_and_add(&t->header->overflow, 1);
	__sync_fetch_and_add(&t->header->generation, 1);
	unlock(t);
}

uint64_t umn_table_regions(const struct umn_table *t)
{
	return __atomic_load_n(&t->regions, __ATOMIC_RELAXED);
}

void umn_table_stats(struct umn_table *t, struct umn_table_stats *stats)
{
	uint32_t i;

	*stats = (struct umn_table_stats){0};
	if (!lock(t))
		return;
	*stats = (struct umn_table_stats){.regions = t->regions,
					  .segments = t->segment_count,
					  .levels = t->levels,
					  .free_bytes = (uint64_t)t->free_chunk_count * UMN_CHUNK,
					  .overflows = t->overflow_seen};
	for (i = 0; i < t->segment_count; i++)
		stats->bytes += (uint64_t)t->segments[i].pages * UMN_PAGE;
	unlock(t);
}

/* Replaces the shared memory by pages of zeros. MAP_FIXED: another thread that checks a region finds the old pages or the new ones,
 * never a hole. Where mmap fails (vm.max_map_count, RLIMIT_MEMLOCK after mlockall) the old pages stay until umn_table_delete. In
 * neither is a region valid. By the system call itself: to ThreadSanitizer libc's mmap writes to the pages, one after the other. */
static void drop_memory(struct umn_table *t)
{
	uint32_t i;

	t->closed = true;
	for (i = 0; i < t->segment_count; i++)
		syscall(SYS_mmap, t->segments[i].memory, (size_t)t->segments[i].pages * UMN_PAGE, PROT_READ,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
	/* umn_table_changed is true from now on; the caller's next call says why. */
	__atomic_store_n(&t->seen, UINT64_MAX, __ATOMIC_RELEASE);
}

/* Nothing feeds the table any more, nor writes to it. */
static void stop_source(struct umn_table *t)
{
	struct umn_region *region;
	uint32_t s, c, i;

	t->source->stop(t->source);
	for (s = 0; s < t->segment_count; s++)
		for (c = 0; c < t->segments[s].pages * UMN_CHUNKS_PER_PAGE; c++)
			for (i = 0; t->segments[s].chunks[c].regions && i < UMN_CELLS_PER_CHUNK; i++) {
				region = &t->segments[s].chunks[c].regions[i];
				if (region->place == WATCHED)
					t->source->unwatch(t->source, region->start, region->end);
			}
}

void umn_table_close(struct umn_table *t)
{
	if (!lock(t))
		return;
	if (t->header) {
		/* Nothing is valid from here on, before the feeding ends. */
		__sync_fetch_and_add(&t->header->overflow, 1);
		if (t->source)
			stop_source(t);
	}
	drop_memory(t);
	unlock(t);
}

void umn_table_delete(struct umn_table *t)
{
	struct own_node *node;
	uint32_t s, c;

	while ((node = t->spare_nodes)) {
		t->spare_nodes = node->next;
		free(node);
	}
	for (s = 0; s < t->segment_count; s++) {
		for (c = 0; c < t->segments[s].pages * UMN_CHUNKS_PER_PAGE; c++) {
			free(t->segments[s].chunks[c].regions);
			free(t->segments[s].chunks[c].node);
		}
		free(t->segments[s].chunks);
		/* In a child something else may be at the addresses. */
		if (umn_process_is(t->epoch))
			munmap(t->segments[s].memory, (size_t)t->segments[s].pages * UMN_PAGE);
	}
	free(t);
}
