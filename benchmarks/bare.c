/* SPDX-License-Identifier: BSD-3-Clause */
/* The loops that are timed, without Python in them. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/bpf.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "table/table.h"

/* What the library has in a page of its own. */
static const uint32_t epoch = 1;
const uint32_t *umn_process_epoch = &epoch;

struct timing {
	uint64_t cpu, wall; /* in ns */
	uint64_t switches;  /* how often the thread was made to wait for others meanwhile */
};

static uint64_t now(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static uint64_t switches(void)
{
	struct rusage usage;

	getrusage(RUSAGE_THREAD, &usage);
	return (uint64_t)usage.ru_nivcsw + (uint64_t)usage.ru_nvcsw;
}

static void begin(struct timing *timing)
{
	timing->switches = switches();
	timing->wall = now(CLOCK_MONOTONIC);
	timing->cpu = now(CLOCK_THREAD_CPUTIME_ID);
}

static void end(struct timing *timing)
{
	timing->cpu = now(CLOCK_THREAD_CPUTIME_ID) - timing->cpu;
	timing->wall = now(CLOCK_MONOTONIC) - timing->wall;
	timing->switches = switches() - timing->switches;
}

/* Maps a page at each of the addresses, writes to it and unmaps it. 0, or -1: an address is not free. */
int bench_churn(const uint64_t *addresses, uint32_t n, struct timing *timing)
{
	volatile char *page;
	uint32_t i;

	begin(timing);
	for (i = 0; i < n; i++) {
		page = mmap((void *)addresses[i], 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE,
			    -1, 0);
		if (page == MAP_FAILED)
			return -1;
		*page = 1;
		munmap((void *)page, 4096);
	}
	end(timing);
	return 0;
}

/* Maps a page at each of the addresses and writes to it. 0, or -1: an address is not free. */
int bench_map_each(const uint64_t *addresses, uint32_t n)
{
	volatile char *page;
	uint32_t i;

	for (i = 0; i < n; i++) {
		page = mmap((void *)addresses[i], 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE,
			    -1, 0);
		if (page == MAP_FAILED)
			return -1;
		*page = 1;
	}
	return 0;
}

/* Unmaps them one by one. */
void bench_unmap_each(const uint64_t *addresses, uint32_t n, struct timing *timing)
{
	uint32_t i;

	begin(timing);
	for (i = 0; i < n; i++)
		munmap((void *)addresses[i], 4096);
	end(timing);
}

/* Address space of which no page is used: at `address`. 0 or -1. */
int bench_reserve(uint64_t address, uint64_t length)
{
	return mmap((void *)address, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0) ==
			       MAP_FAILED
		       ? -1
		       : 0;
}

int bench_unmap(uint64_t address, uint64_t length, struct timing *timing)
{
	int result;

	begin(timing);
	result = munmap((void *)address, length);
	end(timing);
	return result;
}

#define CHECKED 1024u

/* `rounds` times the inline check of each of 1024 regions. How many were valid: all, or something is wrong here. */
uint64_t bench_check(uint32_t rounds, struct timing *timing)
{
	static struct umn_region regions[CHECKED];
	static struct umn_slot slots[CHECKED];
	static struct umn_header header;
	uint64_t valid = 0;
	uint32_t i, round;

	for (i = 0; i < CHECKED; i++) {
		slots[i].state = UMN_LIVE;
		regions[i].slot = &slots[i];
		regions[i].header = &header;
		regions[i].epoch = epoch;
	}
	begin(timing);
	for (round = 0; round < rounds; round++)
		for (i = 0; i < CHECKED; i++)
			valid += umn_region_valid(&regions[i]);
	end(timing);
	return valid / CHECKED;
}

/* How many BPF programs are attached to the tracepoint, on the whole machine; -1: it cannot be told. */
int bench_probes(void)
{
	union bpf_attr next, open, query; /* cleared by memset: an initialiser may leave the rest of a union as it is */
	struct bpf_link_info info;
	char name[32];
	int fd, count = 0;

	memset(&next, 0, sizeof next);
	for (; !syscall(SYS_bpf, BPF_LINK_GET_NEXT_ID, &next, sizeof next); next.start_id = next.next_id) {
		memset(&open, 0, sizeof open);
		open.link_id = next.next_id;
		fd = (int)syscall(SYS_bpf, BPF_LINK_GET_FD_BY_ID, &open, sizeof open);
		if (fd < 0)
			continue; /* just closed */
		memset(&info, 0, sizeof info);
		info.raw_tracepoint.tp_name = (uint64_t)name;
		info.raw_tracepoint.tp_name_len = sizeof name;
		memset(&query, 0, sizeof query);
		query.info.bpf_fd = (uint32_t)fd;
		query.info.info_len = sizeof info;
		query.info.info = (uint64_t)&info;
		if (!syscall(SYS_bpf, BPF_OBJ_GET_INFO_BY_FD, &query, sizeof query) && info.type == BPF_LINK_TYPE_RAW_TRACEPOINT &&
		    !strcmp(name, "kvm_unmap_hva_range"))
			count++;
		close(fd);
	}
	return errno == ENOENT ? count : -1;
}
