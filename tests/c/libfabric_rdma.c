/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Registers memory with libfabric's provider verbs, changes its mapping, registers it again, and reads it by RDMA, over a connection
 * to itself: are these the bytes that are there, or those of the old pages?
 *
 *	libfabric_rdma [import] ADDRESS CHANGE...	ADDRESS of a network interface with an RDMA device
 *
 * "import": it imports the monitor itself. A line for each change: its name, "registered anew" or "from the cache", the bytes.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_eq.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>
#include <sys/syscall.h>
#include <ummunotify.h>
#include <ummunotify_libfabric.h>

#include "check.h"

#define PORT "7471"
#define WAIT 20000 /* milliseconds, for what takes a few */

#define must(call)                                                                                                                 \
	do {                                                                                                                       \
		int64_t status = (call);                                                                                           \
		if (status) {                                                                                                      \
			fprintf(stderr, "%s: %s\n", #call, fi_strerror((int)-status));                                             \
			exit(2);                                                                                                   \
		}                                                                                                                  \
	} while (0)

static struct fid_fabric *fabric;
static struct fid_domain *domain;
static struct fid_eq *eq;
static struct fid_cq *cq;

static struct fi_info *get_info(const char *address, uint64_t flags)
{
	struct fi_info *hints = fi_allocinfo(), *info;

	hints->caps = FI_MSG | FI_RMA;
	hints->addr_format = FI_SOCKADDR_IN;
	hints->ep_attr->type = FI_EP_MSG;
	hints->domain_attr->mr_mode = FI_MR_LOCAL | FI_MR_ALLOCATED | FI_MR_PROV_KEY | FI_MR_VIRT_ADDR;
	hints->fabric_attr->prov_name = strdup("verbs");
	must(fi_getinfo(FI_VERSION(1, 14), address, PORT, flags, hints, &info));
	fi_freeinfo(hints);
	return info;
}

static struct fid_ep *make_endpoint(struct fi_info *info)
{
	struct fid_ep *ep;

	must(fi_endpoint(domain, info, &ep, NULL));
	must(fi_ep_bind(ep, &eq->fid, 0));
	must(fi_ep_bind(ep, &cq->fid, FI_TRANSMIT | FI_RECV));
	must(fi_enable(ep));
	return ep;
}

/* What it brings. */
static struct fi_info *event(uint32_t expected)
{
	struct fi_eq_cm_entry entry;
	struct fi_eq_err_entry error = {0};
	uint32_t got;
	ssize_t length = fi_eq_sread(eq, &got, &entry, sizeof entry, WAIT, 0);

	if (length < 0) {
		fi_eq_readerr(eq, &error, 0);
		fprintf(stderr, "no event %u: %s, %s\n", expected, fi_strerror((int)-length), fi_strerror(error.err));
		exit(2);
	}
	check(got == expected);
	return entry.info;
}

static struct fid_mr *enroll(void *memory, uint64_t access)
{
	struct fid_mr *mr;

	must(fi_mr_reg(domain, memory, PAGE, access, 0, 0, 0, &mr, NULL));
	return mr;
}

static void rdma_read(struct fid_ep *ep, void *to, struct fid_mr *to_mr, void *from, uint64_t key)
{
	struct fi_cq_entry entry;
	struct fi_cq_err_entry error = {0};
	ssize_t got;

	must(fi_read(ep, to, PAGE, fi_mr_desc(to_mr), 0, (uint64_t)from, key, NULL));
	while ((got = fi_cq_read(cq, &entry, 1)) == -FI_EAGAIN)
		;
	if (got != 1) {
		fi_cq_readerr(cq, &error, 0);
		fprintf(stderr, "RDMA read: %s\n", fi_strerror(error.err));
		exit(2);
	}
}

/* ---- The changes: afterwards there are other pages at the address ---- */

static int file = -1;

static char *private_page(void)
{
	return get_pages(1, NULL);
}

static char *file_page(void)
{
	char *page;

	file = memfd_create("page", 0);
	check(file >= 0 && !ftruncate(file, PAGE));
	page = (char *)mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	check(page != MAP_FAILED);
	return page;
}

static void by_munmap(char *page)
{
	check(!munmap(page, PAGE) && get_pages(1, page) == page);
}

static void by_system_call(char *page)
{
	check(!syscall(SYS_munmap, page, PAGE));
	check(syscall(SYS_mmap, page, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == (long)page);
}

static void by_madvise(char *page)
{
	check(!syscall(SYS_madvise, page, PAGE, MADV_DONTNEED));
}

static void by_mremap(char *page)
{
	char *other = get_pages(1, NULL);

	check(syscall(SYS_mremap, other, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, page) == (long)page);
}

static void by_truncation(char *page)
{
	(void)page;
	check(!ftruncate(file, 0) && !ftruncate(file, PAGE));
	close(file);
}

static void by_nothing(char *page)
{
	(void)page;
}

static const struct change {
	const char *name;
	char *(*make)(void);
	void (*change)(char *page);
} changes[] = {
	{"nothing", private_page, by_nothing}, {"munmap", private_page, by_munmap}, {"syscall", private_page, by_system_call},
	{"madvise", private_page, by_madvise}, {"mremap", private_page, by_mremap}, {"truncate", file_page, by_truncation},
};

static void try_change(struct fid_ep *ep, char *buffer, struct fid_mr *buffer_mr, const struct change *change)
{
	char *page = change->make();
	struct fid_mr *mr;
	uint64_t key;

	strcpy(page, "old");
	mr = enroll(page, FI_REMOTE_READ);
	key = fi_mr_key(mr);
	rdma_read(ep, buffer, buffer_mr, page, key);
	check(!strcmp(buffer, "old"));
	must(fi_close(&mr->fid)); /* the cache keeps it */
	change->change(page);
	strcpy(page, "new");
	mr = enroll(page, FI_REMOTE_READ);
	rdma_read(ep, buffer, buffer_mr, page, fi_mr_key(mr));
	printf("%s: %s, %s\n", change->name, fi_mr_key(mr) == key ? "from the cache" : "registered anew", buffer);
	must(fi_close(&mr->fid));
	munmap(page, PAGE);
}

int main(int argc, char **argv)
{
	struct fi_cq_attr cq_attr = {.format = FI_CQ_FORMAT_CONTEXT};
	struct fi_eq_attr eq_attr = {.wait_obj = FI_WAIT_UNSPEC};
	struct fi_info *passive, *active, *request;
	struct fid_ep *ep, *other;
	struct fid_mr *mr;
	struct fid_pep *pep;
	struct fid *monitor;
	char *buffer;
	bool imports = argc > 1 && !strcmp(argv[1], "import");

	argc -= imports;
	argv += imports;
	check(argc > 1);
	setvbuf(stdout, NULL, _IOLBF, 0);
	passive = get_info(argv[1], FI_SOURCE);
	active = get_info(argv[1], 0);
	if (imports && ummunotify_libfabric_import(&monitor)) {
		fprintf(stderr, "%s\n", ummunotify_error());
		return 2;
	}
	must(fi_fabric(passive->fabric_attr, &fabric, NULL));
	must(fi_eq_open(fabric, &eq_attr, &eq, NULL));
	must(fi_passive_ep(fabric, passive, &pep, NULL));
	must(fi_pep_bind(pep, &eq->fid, 0));
	must(fi_listen(pep));
	must(fi_domain(fabric, active, &domain, NULL));
	must(fi_cq_open(domain, &cq_attr, &cq, NULL));
	ep = make_endpoint(active);
	must(fi_connect(ep, active->dest_addr, NULL, 0));
	request = event(FI_CONNREQ);
	other = make_endpoint(request);
	must(fi_accept(other, NULL, 0));
	event(FI_CONNECTED);
	event(FI_CONNECTED);

	buffer = get_pages(1, NULL);
	mr = enroll(buffer, FI_READ);
	for (int i = 2; i < argc; i++)
		for (size_t k = 0; k < sizeof changes / sizeof *changes; k++)
			if (!strcmp(argv[i], changes[k].name))
				try_change(ep, buffer, mr, &changes[k]);
	must(fi_close(&mr->fid));
	must(fi_close(&ep->fid));
	must(fi_close(&other->fid));
	check(!imports || fi_close(monitor) == -FI_EBUSY);
	must(fi_close(&cq->fid));
	must(fi_close(&domain->fid));
	must(fi_close(&pep->fid));
	must(fi_close(&eq->fid));
	must(fi_close(&fabric->fid));
	if (imports)
		must(fi_close(monitor));
	return 0;
}
