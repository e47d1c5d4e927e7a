/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The source `uffd`: userfaultfd tells this process what happens to its own private anonymous memory. It needs no privileges.
 *
 * All tables of the process share one userfaultfd, since a page can be registered with one only, and one thread that reads
 * it. Both exist while something is watched. uffd.c argues why no change is missed and no deadlock is possible.
 */
#ifndef UMN_UFFD_H
#define UMN_UFFD_H

#include <stddef.h>
#include <stdint.h>

#include "table/table.h"

/* What watching memory fails with (umn_source.watch), beside the errnos of the system calls behind it. */
#define UMN_UFFD_UNMAPPED ENXIO	 /* some of it is not mapped */
#define UMN_UFFD_KIND EOPNOTSUPP /* some of it is of a kind whose changes cannot all be seen */
#define UMN_UFFD_OTHER EBUSY	 /* some of it is registered with another userfaultfd */
#define UMN_UFFD_OWN EDEADLK	 /* some of it is what the source itself works with */
#define UMN_UFFD_MAPPINGS ENOMEM /* the process may not have so many mappings, or the kernel no memory */
#define UMN_UFFD_NO_PROC ENOSYS	 /* it is huge pages, and without /proc their kind cannot be told */
#define UMN_UFFD_CLOSED EBADFD	 /* the program has closed or replaced a descriptor of the source: invalid for good */
#define UMN_UFFD_START ENODEV	 /* watching cannot begin: umn_uffd_start_failure says why */

/* Why the source does not work here. */
enum umn_uffd_step {
	UMN_UFFD_OPEN,	   /* neither the system call nor (device_error) /dev/userfaultfd gives a userfaultfd */
	UMN_UFFD_IOCTL,	   /* an ioctl of it is refused, for instance by seccomp */
	UMN_UFFD_FEATURES, /* the kernel's cannot do what is needed */
	UMN_UFFD_PROOF,	   /* it did not tell of a change as expected */
	UMN_UFFD_TABLES,   /* too many tables */
	UMN_UFFD_MEMORY,   /* no memory: RLIMIT_AS, or RLIMIT_MEMLOCK after mlockall(MCL_FUTURE) */
	UMN_UFFD_THREAD,   /* no thread: RLIMIT_NPROC, the cgroup's pids.max, or seccomp */
	UMN_UFFD_READER,   /* the thread did not get the userfaultfd into a descriptor table of its own */
};
struct umn_uffd_failure {
	enum umn_uffd_step step;
	int error, device_error;
};

#define UMN_UFFD_TABLES_MAX 64

struct umn_uffd; /* what feeds one table */

/* Has umn_uffd_in_child called in children (process.h). umn_uffd_new does this too: for callers whose own modules come after. */
void umn_uffd_start(void);

/* Resets the module in the child of a fork, however it was made: frees what the child inherited, and closes the descriptors that are
 * still the source's. To be called before anything else here, by one thread; may be called again. Not in a child that shares
 * the parent's memory. */
void umn_uffd_in_child(void);

/* NULL: *failure says why. */
struct umn_uffd *umn_uffd_new(struct umn_uffd_failure *failure);
struct umn_source *umn_uffd_source(struct umn_uffd *uffd);

/* Why watching last failed with UMN_UFFD_START. */
void umn_uffd_start_failure(struct umn_uffd_failure *failure);

/* The program has closed or replaced one of the source's descriptors: nothing of this table is valid any more, for good. */
bool umn_uffd_is_broken(const struct umn_uffd *uffd);

/* Memory for the table's next segment. NULL: errno. */
void *umn_uffd_add_segment(struct umn_uffd *uffd, uint32_t pages);

/* The descriptor that is readable after a wake-up, made when first asked for; or -errno (-UMN_UFFD_CLOSED). */
int umn_uffd_wake_fd(struct umn_uffd *uffd);
void umn_uffd_acknowledge(struct umn_uffd *uffd);

/* `counter` goes up by one for each change that hits the table, before the call that makes it returns. (The generation may go up
 * only later.) It may go up for a change that hits nothing, too. Until umn_uffd_close has returned. */
void umn_uffd_set_counter(struct umn_uffd *uffd, uint64_t *counter);

/* After the table was closed, or abandoned in the child of a fork. The source can still be asked, and may be closed again. */
void umn_uffd_close(struct umn_uffd *uffd);
void umn_uffd_delete(struct umn_uffd *uffd);

#endif
