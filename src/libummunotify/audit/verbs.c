/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * libibverbs: ibv_reg_mr and its kin, ibv_dereg_mr; and uses, by ibv_post_send, ibv_post_recv and ibv_post_srq_recv. The last three are inline
 * functions that call through the context's table, so there the table's entries are replaced, when memory is registered in that context.
 * Queue pairs of the extended interface (ibv_wr_*) and drivers' own interfaces (mlx5dv) do not pass there.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>

#include "audit/interpose.h"
#include "audit/pins.h"
#include "audit/verbs_abi.h"

#define ON_DEMAND (1 << 6) /* IBV_ACCESS_ON_DEMAND: the device follows changes itself */
#define INLINE (1 << 3)	   /* IBV_SEND_INLINE: the data is copied, no key is looked at */
#define WRITE_LAST 1
#define RDMA_READ 4
#define ATOMIC_FIRST 5
#define ATOMIC_LAST 6

/* ---- Uses ---- */

/* Never removed: contexts are few, and where one is freed and another takes its place, the functions are the driver's, mostly the same. */
struct table {
	const struct verbs_device *context;
	__typeof__(((struct verbs_device *)0)->post_send) post_send;
	__typeof__(((struct verbs_device *)0)->post_recv) post_recv;
	__typeof__(((struct verbs_device *)0)->post_srq_recv) post_srq_recv;
	struct table *next;
};
static struct table *tables;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* The newest of this context. `replace` adds it before it puts its functions in, so the caller of one of these has to find it. The fence
 * is for Arm: the program loads the function's address as ordinary data, and without the fence the load of `tables` may come first. */
static const struct table *table_of(const struct verbs_device *context)
{
	const struct table *table;

	__atomic_thread_fence(__ATOMIC_ACQUIRE);
	table = __atomic_load_n(&tables, __ATOMIC_ACQUIRE);
	while (table && table->context != context)
		table = table->next;
	return table;
}

static uint64_t local_key(const struct verbs_device *context, uint32_t lkey)
{
	return pins_key("lkey", (uint64_t)(uintptr_t)context, lkey);
}

static uint64_t remote_key(uint32_t rkey)
{
	return pins_key("rkey", rkey, 0);
}

static void use_pieces(const struct verbs_device *context, const struct verbs_sge *pieces, int count, const char *call)
{
	for (int i = 0; i < count; i++)
		pins_use(KEY_LOCAL, local_key(context, pieces[i].lkey), pieces[i].address, pieces[i].length, call);
}

/* By the operation's number. */
static const char *const sends[] = {
	"ibv_post_send (RDMA write)",
	"ibv_post_send (RDMA write, immediate)",
	"ibv_post_send (send)",
	"ibv_post_send (send, immediate)",
	"ibv_post_send (RDMA read)",
	"ibv_post_send (atomic compare and swap)",
	"ibv_post_send (atomic fetch and add)",
};

static int post_send(struct verbs_queue *queue, struct verbs_send *requests, struct verbs_send **bad)
{
	for (const struct verbs_send *each = requests; each; each = each->next) {
		bool known = each->opcode >= 0 && each->opcode <= ATOMIC_LAST;
		const char *call = known ? sends[each->opcode] : "ibv_post_send";
		uint64_t length = 0;

		if (!(each->flags & INLINE))
			use_pieces(queue->context, each->pieces, each->count, call);
		for (int i = 0; i < each->count; i++)
			length += each->pieces[i].length;
		/* The other side may be this process, too. */
		if (known && (each->opcode <= WRITE_LAST || each->opcode == RDMA_READ))
			pins_use(KEY_REMOTE, remote_key(each->rdma_rkey), each->remote_address, length, call);
		else if (known && each->opcode >= ATOMIC_FIRST)
			pins_use(KEY_REMOTE, remote_key(each->atomic_rkey), each->remote_address, 8, call);
	}
	return table_of(queue->context)->post_send(queue, requests, bad);
}

static int post_recv(struct verbs_queue *queue, struct verbs_receive *requests, struct verbs_receive **bad)
{
	for (const struct verbs_receive *each = requests; each; each = each->next)
		use_pieces(queue->context, each->pieces, each->count, "ibv_post_recv");
	return table_of(queue->context)->post_recv(queue, requests, bad);
}

static int post_srq_recv(struct verbs_queue *queue, struct verbs_receive *requests, struct verbs_receive **bad)
{
	for (const struct verbs_receive *each = requests; each; each = each->next)
		use_pieces(queue->context, each->pieces, each->count, "ibv_post_srq_recv");
	return table_of(queue->context)->post_srq_recv(queue, requests, bad);
}

static void replace(struct verbs_device *context)
{
	sigset_t before = pins_hold_signals();
	struct table *table;

	pthread_mutex_lock(&lock);
	if (context->post_send != post_send && (table = malloc(sizeof *table))) {
		*table = (struct table){context, context->post_send, context->post_recv, context->post_srq_recv, tables};
		__atomic_store_n(&tables, table, __ATOMIC_RELEASE);
		__atomic_store_n(&context->post_send, post_send, __ATOMIC_RELEASE);
		__atomic_store_n(&context->post_recv, post_recv, __ATOMIC_RELEASE);
		__atomic_store_n(&context->post_srq_recv, post_srq_recv, __ATOMIC_RELEASE);
	}
	pthread_mutex_unlock(&lock);
	pins_let_signals(before);
}

/* ---- Registrations ---- */

static uint64_t region_key(const struct verbs_region *region)
{
	return pins_key("mr", (uint64_t)(uintptr_t)region, 0);
}

static void end(struct pin *pin, const struct verbs_region *region)
{
	if (!region || !pin) {
		pins_drop(pin);
		return;
	}
	pins_add(pin, (const uint64_t[KEYS]){
			      [KEY_PIN] = region_key(region),
			      [KEY_LOCAL] = local_key(region->context, region->lkey),
			      [KEY_REMOTE] = remote_key(region->rkey),
		      });
}

/* libibverbs may call one of these functions in another: only the first pins. */
#define REGISTERS(name, parameters, ...)                                                                                           \
	EXPORT struct verbs_region *name parameters;                                                                               \
	struct verbs_region *name parameters                                                                                       \
	{                                                                                                                          \
		struct verbs_region *(*next)parameters = (struct verbs_region * (*)parameters) NEXT(name);                         \
		struct verbs_region *region;                                                                                       \
		bool outer = pins_inside;                                                                                          \
		struct pin *pin;                                                                                                   \
                                                                                                                                   \
		if (!next) {                                                                                                       \
			errno = ENOSYS;                                                                                            \
			return NULL;                                                                                               \
		}                                                                                                                  \
		pin = (int)access & ON_DEMAND ? NULL : pins_begin("verbs", #name, address, length);                                \
		if (pin)                                                                                                           \
			replace(domain->context);                                                                                  \
		pins_inside = true;                                                                                                \
		region = next(__VA_ARGS__);                                                                                        \
		pins_inside = outer;                                                                                               \
		end(pin, region);                                                                                                  \
		return region;                                                                                                     \
	}

REGISTERS(ibv_reg_mr, (struct verbs_domain * domain, void *address, size_t length, int access), domain, address, length, access)
REGISTERS(ibv_reg_mr_iova, (struct verbs_domain * domain, void *address, size_t length, uint64_t iova, int access), domain, address,
	  length, iova, access)
REGISTERS(ibv_reg_mr_iova2, (struct verbs_domain * domain, void *address, size_t length, uint64_t iova, unsigned int access),
	  domain, address, length, iova, access)

EXPORT int ibv_dereg_mr(struct verbs_region *region);
int ibv_dereg_mr(struct verbs_region *region)
{
	int (*next)(struct verbs_region *) = (int (*)(struct verbs_region *))NEXT(ibv_dereg_mr);
	struct pin *pin;
	int result;

	if (!next)
		return ENOSYS;
	pin = pins_take(region_key(region), "ibv_dereg_mr");
	result = next(region);
	if (result)
		pins_restore(pin);
	else
		pins_drop(pin);
	return result;
}
