/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * RDMA reads of memory that is changed by system calls: of a registration that is kept, of one with on-demand paging, and of one
 * that is made anew after each change. How many reads are wrong, and how long do they take?
 *
 *	odp DEVICE GID_INDEX LENGTH READS
 *
 * Exits with 3 if the device has no on-demand paging.
 */
#define _GNU_SOURCE
#include <infiniband/verbs.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define CHECK(condition)                                                                                                           \
	do                                                                                                                         \
		if (!(condition)) {                                                                                                \
			fprintf(stderr, "%s:%d: %s: %m\n", __FILE__, __LINE__, #condition);                                        \
			exit(2);                                                                                                   \
		}                                                                                                                  \
	while (0)

enum kind { NOTHING, MUNMAP, MADVISE, MREMAP, MMAP, KINDS };
static const char *const kinds[KINDS] = {"nothing", "munmap", "madvise", "mremap", "mmap"};

enum way { KEPT, ON_DEMAND, ANEW, WAYS };
static const char *const ways[WAYS] = {"kept", "on demand", "anew"};

enum { READING = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ };

static struct ibv_pd *domain;
static struct ibv_cq *completions;
static struct ibv_qp *queue;
static size_t length;

static char *map(char *address, int flags)
{
	char *mapped = mmap(address, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);

	CHECK(mapped != MAP_FAILED);
	return mapped;
}

static void change(enum kind kind, char *memory)
{
	char *other;

	switch (kind) {
	case MUNMAP:
		CHECK(!munmap(memory, length));
		map(memory, MAP_FIXED_NOREPLACE);
		break;
	case MADVISE:
		CHECK(!madvise(memory, length, MADV_DONTNEED));
		break;
	case MREMAP:
		other = map(NULL, 0);
		CHECK(mremap(other, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, memory) == memory);
		break;
	case MMAP:
		map(memory, MAP_FIXED);
		break;
	default:
		break;
	}
}

/* A queue pair that is connected to itself. */
static void connect_queue(struct ibv_context *device, int gid_index)
{
	struct ibv_qp_init_attr wanted = {.qp_type = IBV_QPT_RC,
					  .send_cq = completions,
					  .recv_cq = completions,
					  .cap = {.max_send_wr = 4, .max_recv_wr = 4, .max_send_sge = 1, .max_recv_sge = 1}};
	struct ibv_qp_attr attributes = {.qp_state = IBV_QPS_INIT, .port_num = 1, .qp_access_flags = IBV_ACCESS_REMOTE_READ};

	CHECK(queue = ibv_create_qp(domain, &wanted));
	CHECK(!ibv_modify_qp(queue, &attributes, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS));
	attributes.qp_state = IBV_QPS_RTR;
	attributes.path_mtu = IBV_MTU_4096;
	attributes.dest_qp_num = queue->qp_num;
	attributes.max_dest_rd_atomic = attributes.max_rd_atomic = 1;
	attributes.min_rnr_timer = 12;
	attributes.ah_attr.is_global = attributes.ah_attr.port_num = 1;
	attributes.ah_attr.grh.sgid_index = (uint8_t)gid_index;
	attributes.ah_attr.grh.hop_limit = 1;
	CHECK(!ibv_query_gid(device, 1, gid_index, &attributes.ah_attr.grh.dgid));
	CHECK(!ibv_modify_qp(queue, &attributes,
			     IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
				     IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER));
	attributes.qp_state = IBV_QPS_RTS;
	attributes.timeout = 18;
	attributes.retry_cnt = attributes.rnr_retry = 7;
	CHECK(!ibv_modify_qp(queue, &attributes,
			     IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
				     IBV_QP_MAX_QP_RD_ATOMIC));
}

static void read_memory(char *target, struct ibv_mr *into, char *memory, struct ibv_mr *from)
{
	struct ibv_sge piece = {(uintptr_t)target, (uint32_t)length, into->lkey};
	struct ibv_send_wr *bad, request = {.sg_list = &piece,
					    .num_sge = 1,
					    .opcode = IBV_WR_RDMA_READ,
					    .send_flags = IBV_SEND_SIGNALED,
					    .wr.rdma = {(uintptr_t)memory, from->rkey}};
	struct ibv_wc done = {0};

	CHECK(!ibv_post_send(queue, &request, &bad));
	while (!ibv_poll_cq(completions, 1, &done))
		sched_yield();
	if (done.status != IBV_WC_SUCCESS)
		fprintf(stderr, "the read fails: %s\n", ibv_wc_status_str(done.status));
	CHECK(done.status == IBV_WC_SUCCESS);
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static void try(enum way way, enum kind kind, long reads, char *target, struct ibv_mr *into)
{
	char *memory = map(map(NULL, 0), MAP_FIXED);
	struct ibv_mr *from;
	long wrong = 0;
	double took = 0;

	memset(memory, 1, length);
	CHECK(from = ibv_reg_mr(domain, memory, length, READING | (way == ON_DEMAND ? IBV_ACCESS_ON_DEMAND : 0)));
	for (long i = 0; i < reads; i++) {
		double start;

		change(kind, memory);
		memset(memory, (int)(i % 250) + 2, length);
		start = now();
		if (way == ANEW && kind != NOTHING) {
			CHECK(!ibv_dereg_mr(from));
			CHECK(from = ibv_reg_mr(domain, memory, length, READING));
		}
		read_memory(target, into, memory, from);
		took += now() - start;
		wrong += memcmp(target, memory, length) != 0;
	}
	printf("%s, %s: %ld of %ld wrong, %.1f us\n", ways[way], kinds[kind], wrong, reads, took / (double)reads * 1e6);
	fflush(stdout);
	ibv_dereg_mr(from);
	munmap(memory, length);
}

int main(int argc, char **argv)
{
	struct ibv_device_attr_ex offered = {0};
	struct ibv_context *device = NULL;
	struct ibv_device **list = ibv_get_device_list(NULL);
	struct ibv_mr *into;
	char *target;

	if (argc != 5)
		return 2;
	for (; list && *list && !device; list++)
		if (!strcmp(ibv_get_device_name(*list), argv[1]))
			device = ibv_open_device(*list);
	CHECK(device);
	CHECK(!ibv_query_device_ex(device, NULL, &offered));
	if (!(offered.odp_caps.general_caps & IBV_ODP_SUPPORT) ||
	    !(offered.odp_caps.per_transport_caps.rc_odp_caps & IBV_ODP_SUPPORT_READ)) {
		printf("%s has no on-demand paging\n", argv[1]);
		return 3;
	}
	length = strtoul(argv[3], NULL, 0);
	CHECK(domain = ibv_alloc_pd(device));
	CHECK(completions = ibv_create_cq(device, 16, NULL, NULL, 0));
	connect_queue(device, atoi(argv[2]));
	target = map(NULL, 0);
	CHECK(into = ibv_reg_mr(domain, target, length, IBV_ACCESS_LOCAL_WRITE));
	for (enum way way = 0; way < WAYS; way++)
		for (enum kind kind = 0; kind < KINDS; kind++)
			try(way, kind, atol(argv[4]), target, into);
	return 0;
}
