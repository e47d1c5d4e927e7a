/* SPDX-License-Identifier: BSD-3-Clause */
/* What others use to notice that memory was unmapped: which of the watched ranges does it report?
 *
 * With UCX this is a library. Debian's libfabric exports nothing of its monitors but has them in libfabric.a, which cannot
 * be linked into a library: so there it is a Python interpreter with the monitors inside. The monitors then call
 * ofi_mr_cache_notify() in the place of their cache: linked with --wrap, it is the function below.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define REGIONS 64 /* watched at once */

static struct {
	uintptr_t start, end; /* end 0: free */
	atomic_bool changed;
} regions[REGIONS];

static void changed(const void *address, size_t length)
{
	uintptr_t start = (uintptr_t)address, end = start + length;

	for (int i = 0; i < REGIONS; i++)
		if (regions[i].start < end && start < regions[i].end)
			regions[i].changed = 1;
}

#ifdef WITH_UCX
#include <ucm/api/ucm.h>

static void event(ucm_event_type_t type, ucm_event_t *event, void *argument)
{
	(void)type, (void)argument;
	changed(event->vm_unmapped.address, event->vm_unmapped.size);
}

/* The events that UCX's registration cache listens to. */
int peer_open(const char *name)
{
	(void)name;
	return ucm_set_event_handler(UCM_EVENT_VM_UNMAPPED, 1000, event, NULL);
}

static int subscribe(const void *address, size_t length)
{
	(void)address, (void)length;
	return 0;
}

static void unsubscribe(const void *address, size_t length)
{
	(void)address, (void)length;
}

static void settle(void)
{
}
#else
struct ofi_mem_monitor;
struct ofi_mr_cache;
extern struct ofi_mem_monitor *memhooks_monitor, *uffd_monitor;
extern pthread_mutex_t mm_lock;
void ofi_mem_init(void);
void ofi_monitors_init(void);
int ofi_monitors_add_cache(struct ofi_mem_monitor **monitors, struct ofi_mr_cache *cache);
int ofi_monitor_subscribe(struct ofi_mem_monitor *monitor, const void *address, size_t length, void *info);
void ofi_monitor_unsubscribe(struct ofi_mem_monitor *monitor, const void *address, size_t length, void *info);
int Py_BytesMain(int argc, char **argv);

static struct ofi_mem_monitor *monitor;

void __wrap_ofi_mr_cache_notify(struct ofi_mr_cache *cache, const void *address, size_t length)
{
	(void)cache;
	changed(address, length);
}

int peer_open(const char *name)
{
	static uint64_t cache[1024];		       /* nobody looks into it but for a list of caches */
	struct ofi_mem_monitor *monitors[64] = {NULL}; /* the first: for ordinary memory */

	monitors[0] = monitor = strcmp(name, "uffd") ? memhooks_monitor : uffd_monitor;
	ofi_mem_init();
	ofi_monitors_init();
	return ofi_monitors_add_cache(monitors, (struct ofi_mr_cache *)cache);
}

static int subscribe(const void *address, size_t length)
{
	return ofi_monitor_subscribe(monitor, address, length, NULL);
}

static void unsubscribe(const void *address, size_t length)
{
	ofi_monitor_unsubscribe(monitor, address, length, NULL);
}

/* The thread that reads events holds this from reading to telling; the cache takes it before it looks. */
static void settle(void)
{
	pthread_mutex_lock(&mm_lock);
	pthread_mutex_unlock(&mm_lock);
}

int main(int argc, char **argv)
{
	return Py_BytesMain(argc, argv);
}
#endif

/* The region's number; negative: an error number, or -1 for "too many". */
int peer_watch(const void *address, size_t length)
{
	int i, error = subscribe(address, length);

	if (error)
		return error < 0 ? error : -error;
	for (i = 0; i < REGIONS && regions[i].end; i++)
		;
	if (i == REGIONS)
		return -1;
	regions[i].changed = 0;
	regions[i].start = (uintptr_t)address;
	regions[i].end = (uintptr_t)address + length;
	return i;
}

void peer_unwatch(int i)
{
	unsubscribe((const void *)regions[i].start, regions[i].end - regions[i].start);
	regions[i].end = 0;
}

int peer_changed(int i)
{
	settle();
	return regions[i].changed;
}
