/* SPDX-License-Identifier: BSD-3-Clause */
/* The audit's own declarations of libibverbs's structures are as in its headers: it compiles. */
#include <infiniband/verbs.h>

#include "audit/verbs_abi.h"

#define SAME(ours, member, theirs, their_member)                                                                                   \
	_Static_assert(offsetof(struct ours, member) == offsetof(struct theirs, their_member), #theirs "." #their_member)

SAME(verbs_sge, address, ibv_sge, addr);
SAME(verbs_sge, length, ibv_sge, length);
SAME(verbs_sge, lkey, ibv_sge, lkey);
_Static_assert(sizeof(struct verbs_sge) == sizeof(struct ibv_sge), "a list's stride");
SAME(verbs_send, next, ibv_send_wr, next);
SAME(verbs_send, pieces, ibv_send_wr, sg_list);
SAME(verbs_send, count, ibv_send_wr, num_sge);
SAME(verbs_send, opcode, ibv_send_wr, opcode);
SAME(verbs_send, flags, ibv_send_wr, send_flags);
SAME(verbs_send, remote_address, ibv_send_wr, wr.rdma.remote_addr);
SAME(verbs_send, remote_address, ibv_send_wr, wr.atomic.remote_addr);
SAME(verbs_send, rdma_rkey, ibv_send_wr, wr.rdma.rkey);
SAME(verbs_send, atomic_rkey, ibv_send_wr, wr.atomic.rkey);
SAME(verbs_receive, next, ibv_recv_wr, next);
SAME(verbs_receive, pieces, ibv_recv_wr, sg_list);
SAME(verbs_receive, count, ibv_recv_wr, num_sge);
SAME(verbs_queue, context, ibv_qp, context);
SAME(verbs_queue, context, ibv_srq, context);
SAME(verbs_domain, context, ibv_pd, context);
SAME(verbs_device, post_srq_recv, ibv_context, ops.post_srq_recv);
SAME(verbs_device, post_send, ibv_context, ops.post_send);
SAME(verbs_device, post_recv, ibv_context, ops.post_recv);
SAME(verbs_region, context, ibv_mr, context);
SAME(verbs_region, lkey, ibv_mr, lkey);
SAME(verbs_region, rkey, ibv_mr, rkey);
_Static_assert(IBV_WR_RDMA_WRITE_WITH_IMM == 1 && IBV_WR_RDMA_READ == 4 && IBV_WR_ATOMIC_FETCH_AND_ADD == 6, "operations");
_Static_assert(IBV_SEND_INLINE == 8 && IBV_ACCESS_ON_DEMAND == 64, "flags");

int main(void)
{
	return 0;
}
