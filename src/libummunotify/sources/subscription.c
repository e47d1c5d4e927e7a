/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * An address space that was subscribed stays so until it ends: the kernel sets mm->notifier_subscriptions once, and frees it with the
 * mm_struct, whatever is unregistered before. So nothing has to be kept for the probe mmu_notifier. The child of a fork and a program
 * that was exec'ed have an address space of their own, which is not subscribed; their handshakes are not seen.
 */
#define _GNU_SOURCE
#include "sources/subscription.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "include/ummunotify_feeder.h"
#include "process/descriptor.h"
#include "process/error.h"
#include "process/keeper.h"
#include "process/process.h"
#include "sources/platform.h"

/*
 * The machine: one for the process, made for the first connection that needs it, kept until the process ends. An io_uring lets go of its
 * files some time after its ring was unmapped. If a second machine were made meanwhile, the kernel would report each change once for
 * each: no change would have a hint, and counters would count twice.
 */
static struct {
	pthread_mutex_t lock;
	struct umn_keeper *machine;
	const char *by; /* what has subscribed the address space, as far as it is known */
} own = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void forget_in_child(void)
{
	umn_keeper_forget(own.machine);
	own.machine = NULL;
	own.by = NULL;
	pthread_mutex_init(&own.lock, NULL);
}

static void start(void)
{
	umn_process_add_child(forget_in_child);
}

static void lock(void)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	pthread_once(&once, start);
	pthread_mutex_lock(&own.lock);
}

static void unlock(void)
{
	pthread_mutex_unlock(&own.lock);
}

/* ---- An empty virtual machine ---- */

int ummunotify_open_kvm(void)
{
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);

	if (kvm >= 0)
		return kvm;
	if (errno == ENOENT)
		return umn_fail(
			UMMUNOTIFY_UNAVAILABLE, ENODEV,
			"load the module (modprobe kvm-intel or kvm-amd), enable virtualisation in the firmware, or pass the "
			"device into the container",
			"there is no /dev/kvm");
	return umn_fail(UMMUNOTIFY_UNAVAILABLE, ENODEV, "become a member of its group (kvm)", "/dev/kvm cannot be opened (%s)",
			strerror(errno));
}

/* The lock is held. */
static int make_machine(int kvm)
{
	int opened = kvm < 0 ? ummunotify_open_kvm() : -1, vm;

	if (kvm < 0 && opened < 0)
		return opened;
	kvm = kvm < 0 ? opened : kvm;
	/* On arm64 a machine has 40 bits of addresses, which not all processors can do, if it is not asked for fewer: 32 is the least. */
	vm = ioctl(kvm, KVM_CREATE_VM, ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_ARM_VM_IPA_SIZE) > 0 ? 32 : 0);
	if (vm < 0)
		umn_fail(UMMUNOTIFY_UNAVAILABLE, ENODEV, "", "KVM cannot create a virtual machine (%s)", strerror(errno));
	else
		own.machine = umn_keeper_new(&vm, 1);
	umn_close(&opened);
	umn_close(&vm);
	if (!own.machine)
		return -ENODEV;
	own.by = "an empty virtual machine";
	return 0;
}

int umn_need_machine(int kvm)
{
	int error = 0;

	lock();
	if (!own.machine)
		error = make_machine(kvm);
	unlock();
	return error;
}

/* ---- RDMA memory that is paged on demand ---- */

/* From <infiniband/verbs.h>. libibverbs is loaded only here: each device needs its own driver in user space. */
struct verbs {
	void **(*get_device_list)(int *count);
	void (*free_device_list)(void **devices);
	void *(*open_device)(void *device);
	int (*close_device)(void *context);
	void *(*alloc_pd)(void *context);
	int (*dealloc_pd)(void *pd);
	void *(*reg_mr)(void *pd, void *address, size_t length, int access);
	int (*dereg_mr)(void *mr);
};
#define LOCAL_WRITE 1	   /* IBV_ACCESS_LOCAL_WRITE */
#define ON_DEMAND (1 << 6) /* IBV_ACCESS_ON_DEMAND */

/* It stays loaded: others may be using it too. */
static bool load_verbs(struct verbs *verbs)
{
	void *library = dlopen("libibverbs.so.1", RTLD_NOW | RTLD_LOCAL);
	const struct {
		const char *name;
		void *function;
	} all[] = {
		{"ibv_get_device_list", &verbs->get_device_list},
		{"ibv_free_device_list", &verbs->free_device_list},
		{"ibv_open_device", &verbs->open_device},
		{"ibv_close_device", &verbs->close_device},
		{"ibv_alloc_pd", &verbs->alloc_pd},
		{"ibv_dealloc_pd", &verbs->dealloc_pd},
		{"ibv_reg_mr", &verbs->reg_mr},
		{"ibv_dereg_mr", &verbs->dereg_mr},
	};

	for (size_t i = 0; library && i < sizeof all / sizeof *all; i++) {
		void *function = dlsym(library, all[i].name);

		if (!function)
			return false;
		memcpy(all[i].function, &function, sizeof function);
	}
	return library;
}

/* Registering such memory makes the device's driver subscribe the address space. Others refuse to. */
static bool register_on_demand(const struct verbs *verbs, void *device, void *page)
{
	void *context = verbs->open_device(device), *pd = context ? verbs->alloc_pd(context) : NULL;
	void *mr = pd ? verbs->reg_mr(pd, page, (size_t)sysconf(_SC_PAGESIZE), LOCAL_WRITE | ON_DEMAND) : NULL;

	if (mr)
		verbs->dereg_mr(mr);
	if (pd)
		verbs->dealloc_pd(pd);
	if (context)
		verbs->close_device(context);
	return mr;
}

/* NULL: it is done. Or why not. The lock is held. */
static const char *subscribe_by_rdma(void)
{
	struct verbs verbs;
	void **devices, *page;
	bool done = false;

	/* Most machines have none, and need not load the library. */
	if (access("/dev/infiniband", F_OK))
		return "there is no RDMA device";
	if (!load_verbs(&verbs))
		return "libibverbs, which an RDMA device would need, is not installed";
	page = umn_test_page();
	devices = page ? verbs.get_device_list(NULL) : NULL;
	for (size_t i = 0; devices && devices[i] && !done; i++)
		done = register_on_demand(&verbs, devices[i], page);
	if (devices)
		verbs.free_device_list(devices);
	if (page)
		munmap(page, (size_t)sysconf(_SC_PAGESIZE));
	if (!done)
		return "there is no RDMA device here that pages on demand";
	own.by = "RDMA memory that is paged on demand";
	return NULL;
}

/* ---- Either ---- */

int umn_subscribe(int kvm)
{
	char remedy[300]; /* as much as open() passes on */
	const char *why;
	int error = 0;

	lock();
	if (!own.machine && make_machine(kvm) && (why = subscribe_by_rdma())) {
		snprintf(remedy, sizeof remedy,
			 "%s; or open it after a driver has subscribed the process (CUDA, ROCm), or where there is soft-RoCE of "
			 "Linux 6.15 (rdma link add rxe0 type rxe netdev lo)",
			 ummunotify_failure()->remedy);
		error = umn_fail(UMMUNOTIFY_UNAVAILABLE, ENODEV, remedy,
				 "the kernel does not notify of this process's changes, as nothing has subscribed it: %s, and %s",
				 ummunotify_failure()->why, why);
	}
	unlock();
	return error;
}

void umn_note_subscribed(void)
{
	lock();
	if (!own.by)
		own.by = "something else in this process";
	unlock();
}

const char *ummunotify_subscribed_by(void)
{
	const char *by;

	umn_process_current();
	lock();
	by = own.by;
	unlock();
	return by;
}
