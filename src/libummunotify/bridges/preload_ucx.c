/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * What `ummunotify run --ucx` preloads. It stands before three kinds of functions:
 *
 * - what makes UCX look into a cache: all of UCP's that take a buffer or map memory, and two inside UCX. They drain, and pass on what they
 *   were given, whatever that is in this version of UCX: integers and pointers, of which no more than 8.
 * - libibverbs' that register memory: UCX's modules call them through the PLT.
 * - ucm_set_event_handler, by which a cache asks to be told what is unmapped. Here it becomes known which UCX has caches. UCX then does
 *   not install hooks of its own (ucm_set_external_event), if it was the program that called ucp_init through the PLT: it
 *   calls the rest in that way too. Otherwise it does, as nothing would drain; and where a module of UCX's is loaded that registers memory
 *   by other means than libibverbs. UCX installs hooks of the kind `bistro`, its default, before there is a cache, in libucs's
 *   constructor; so `ummunotify run --ucx` asks for another kind.
 *
 * Each caller gets the function that it would have got without us: there may be several UCX in a process, also where only
 * some libraries see them.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <link.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "bridges/next.h"
#include "bridges/preload.h"
#include "bridges/ucx.h"

#define EXPORT __attribute__((visibility("default")))

#define UNSUPPORTED (-22)     /* UCS_ERR_UNSUPPORTED */
#define VM_UNMAPPED (1 << 17) /* UCM_EVENT_VM_UNMAPPED */
#define ON_DEMAND (1 << 6)    /* IBV_ACCESS_ON_DEMAND: the device follows changes itself */

#define PARAMETERS long a, long b, long c, long d, long e, long f, long g, long h
#define ARGUMENTS a, b, c, d, e, f, g, h
typedef long function(PARAMETERS);

/* Another function of the library that this one is in. */
static void *beside(const void *address, const char *name)
{
	void *handle = next_keep(address), *found = handle ? dlsym(handle, name) : NULL;

	if (handle)
		dlclose(handle);
	return found;
}

/* ---- What looks into a cache ---- */

static __attribute__((noinline)) long drain_and_pass_on(struct next_route **routes, const void *caller, const char *name,
							PARAMETERS)
{
	function *next = (function *)next_for(routes, caller, name);

	ucx_drain();
	return next ? next(ARGUMENTS) : UNSUPPORTED;
}

/* Mostly there is nothing to do. Then no function is called but the one behind, by a jump, so that the arguments stay where they are. */
#define DRAINS(name)                                                                                                               \
	EXPORT function name;                                                                                                      \
	long name(PARAMETERS)                                                                                                      \
	{                                                                                                                          \
		static struct next_route *routes;                                                                                  \
		function *next = (function *)next_known(&routes, CALLER);                                                          \
                                                                                                                                   \
		if (__builtin_expect(next && ucx_all_told(), 1))                                                                   \
			return next(ARGUMENTS);                                                                                    \
		return drain_and_pass_on(&routes, CALLER, #name, ARGUMENTS);                                                       \
	}

DRAINS(ucp_am_recv_data_nbx)
DRAINS(ucp_am_send_nb)
DRAINS(ucp_am_send_nbx)
DRAINS(ucp_atomic_add32)
DRAINS(ucp_atomic_add64)
DRAINS(ucp_atomic_cswap32)
DRAINS(ucp_atomic_cswap64)
DRAINS(ucp_atomic_fadd32)
DRAINS(ucp_atomic_fadd64)
DRAINS(ucp_atomic_fetch_nb)
DRAINS(ucp_atomic_op_nbx)
DRAINS(ucp_atomic_post)
DRAINS(ucp_atomic_swap32)
DRAINS(ucp_atomic_swap64)
DRAINS(ucp_get)
DRAINS(ucp_get_nb)
DRAINS(ucp_get_nbi)
DRAINS(ucp_get_nbx)
DRAINS(ucp_mem_map)
DRAINS(ucp_put)
DRAINS(ucp_put_nb)
DRAINS(ucp_put_nbi)
DRAINS(ucp_put_nbx)
DRAINS(ucp_stream_recv_nb)
DRAINS(ucp_stream_recv_nbx)
DRAINS(ucp_stream_send_nb)
DRAINS(ucp_stream_send_nbx)
DRAINS(ucp_tag_msg_recv_nb)
DRAINS(ucp_tag_msg_recv_nbx)
DRAINS(ucp_tag_recv_nb)
DRAINS(ucp_tag_recv_nbr)
DRAINS(ucp_tag_recv_nbx)
DRAINS(ucp_tag_send_nb)
DRAINS(ucp_tag_send_nbr)
DRAINS(ucp_tag_send_nbx)
DRAINS(ucp_tag_send_sync_nb)
DRAINS(ucp_tag_send_sync_nbx)
DRAINS(ucs_rcache_get)

EXPORT function uct_mem_alloc;
long uct_mem_alloc(PARAMETERS)
{
	function *next = (function *)NEXT(uct_mem_alloc);
	long result = next ? next(ARGUMENTS) : UNSUPPORTED;

	ucx_drain(); /* what was unmapped before something was mapped there, see ucx.c */
	return result;
}

/* ---- Caches ---- */

static __thread unsigned int initialising; /* calls of ucp_init_version */
static bool initialised;
static unsigned long caches;

EXPORT function ucp_init_version;
long ucp_init_version(PARAMETERS)
{
	function *next = (function *)NEXT(ucp_init_version);
	long result;

	__atomic_store_n(&initialised, true, __ATOMIC_RELAXED);
	initialising++;
	result = next ? next(ARGUMENTS) : UNSUPPORTED;
	initialising--;
	return result;
}

/* Registers by libibverbs, or has no cache of what it pins. The prefix of its name. */
static const char *const known_modules[] = {"libuct_ib", "libuct_rdmacm", "libuct_cma", "libuct_xpmem"};

static int is_unknown_module(struct dl_phdr_info *object, size_t size, void *nothing)
{
	const char *slash = strrchr(object->dlpi_name, '/'), *name = slash ? slash + 1 : object->dlpi_name;

	(void)size, (void)nothing;
	if (strncmp(name, "libuct_", strlen("libuct_")) != 0)
		return 0;
	for (size_t i = 0; i < sizeof known_modules / sizeof *known_modules; i++)
		if (!strncmp(name, known_modules[i], strlen(known_modules[i])))
			return 0;
	return 1;
}

EXPORT function ucm_set_event_handler;
long ucm_set_event_handler(PARAMETERS)
{
	function *next = (function *)NEXT(ucm_set_event_handler);
	void (*vm_munmap)(void *, size_t), (*set_external)(int);
	bool told = false, replaces;
	long result;

	if (!next)
		return UNSUPPORTED;
	if ((int)a & VM_UNMAPPED) {
		vm_munmap = (void (*)(void *, size_t))beside((void *)next, "ucm_vm_munmap");
		replaces = initialising && !dl_iterate_phdr(is_unknown_module, NULL);
		set_external =
			(void (*)(int))beside((void *)next, replaces ? "ucm_set_external_event" : "ucm_unset_external_event");
		told = vm_munmap && set_external && ucx_add_cache(vm_munmap);
	}
	if (told)
		set_external(VM_UNMAPPED);
	result = next(ARGUMENTS);
	if (told && !(signed char)result) /* ucs_status_t may be as short as that */
		__atomic_add_fetch(&caches, 1, __ATOMIC_RELAXED);
	return result;
}

/* ---- Registrations ---- */

struct ibv_pd;
struct ibv_mr;

static bool begin(struct ucx_pin **pin, const void *address, size_t length, int access, const void *next)
{
	*pin = NULL;
	if (!next)
		errno = ENOSYS;
	return next && ((access & ON_DEMAND) || ucx_before_pin(address, length, pin));
}

#define REGISTERS(name, parameters, ...)                                                                                           \
	EXPORT struct ibv_mr *name parameters;                                                                                     \
	struct ibv_mr *name parameters                                                                                             \
	{                                                                                                                          \
		struct ibv_mr *(*next)parameters = (struct ibv_mr * (*)parameters) NEXT(name);                                     \
		struct ibv_mr *registration;                                                                                       \
		struct ucx_pin *pin;                                                                                               \
                                                                                                                                   \
		if (!begin(&pin, address, length, (int)access, (void *)next))                                                      \
			return NULL;                                                                                               \
		registration = next(__VA_ARGS__);                                                                                  \
		ucx_after_pin(pin, registration);                                                                                  \
		return registration;                                                                                               \
	}

REGISTERS(ibv_reg_mr, (struct ibv_pd * pd, void *address, size_t length, int access), pd, address, length, access)
REGISTERS(ibv_reg_mr_iova, (struct ibv_pd * pd, void *address, size_t length, uint64_t iova, int access), pd, address, length, iova,
	  access)
REGISTERS(ibv_reg_mr_iova2, (struct ibv_pd * pd, void *address, size_t length, uint64_t iova, unsigned int access), pd, address,
	  length, iova, access)

EXPORT int ibv_dereg_mr(struct ibv_mr *registration);
int ibv_dereg_mr(struct ibv_mr *registration)
{
	int (*next)(struct ibv_mr *) = (int (*)(struct ibv_mr *))NEXT(ibv_dereg_mr);
	struct ucx_pin *pin;
	int result;

	if (!next)
		return ENOSYS;
	pin = ucx_before_unpin(registration);
	result = next(registration);
	ucx_after_unpin(pin, result != 0);
	return result;
}

/* ---- The end ---- */

static void say_unused(void)
{
	struct bridge_loaded loaded;
	const char *why;

	bridge_look(&loaded, "rcache_mp"); /* a pool's name */
	if (__atomic_load_n(&initialised, __ATOMIC_RELAXED))
		why = "it has no cache (UCX_RCACHE_ENABLE, UCX_MEM_EVENTS), or no source works";
	else if (loaded.is_static)
		why = "the program has UCX linked statically; link it dynamically";
	else if (loaded.ucx)
		why = "the program has loaded UCX, but not called ucp_init, or found that by dlsym";
	else if (bridge_is_the_program())
		why = "the program has not loaded UCX";
	else
		return;
	bridge_say("tells UCX nothing: %s", why);
}

__attribute__((destructor)) static void at_exit(void)
{
	struct ucx_counts counts = ucx_counts();
	unsigned long made = __atomic_load_n(&caches, __ATOMIC_RELAXED);

	if (!made && bridge_says_unused("libummunotify-libfabric.so"))
		say_unused();
	if (made && !__atomic_load_n(&initialised, __ATOMIC_RELAXED) && !bridge_quiet())
		bridge_say("tells UCX only a part: the program has found ucp_init by dlsym; UCX's own hooks stay");
	if (made && bridge_reports())
		bridge_say("tells UCX, source %s: caches %lu, registrations watched %lu, not watched %lu, changes told %lu",
			   counts.source, made, counts.watched, counts.unwatched, counts.told);
}
