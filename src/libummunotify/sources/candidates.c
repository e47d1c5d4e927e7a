/* SPDX-License-Identifier: BSD-3-Clause */
/* Which sources there are, what they are called, and which is better. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "abi/protocol.h"
#include "process/error.h"
#include "sources/connection.h"

/*
 * Best first.
 *
 * The daemon comes before a program of the process's own, which sees the same: each more program that is attached slows down the changes
 * of all processes on the host that watch (with zap, of all), while the daemon has one for all of them. Of the probes, mmu_notifier
 * knows whose change it is, and of what kind; kvm has to conclude that; zap costs processes that do not watch time too. uffd is
 * last: it refuses memory whose changes it cannot see.
 *
 * The names with a daemon's probe stand for the same daemon: they are tried only where they are asked for.
 */
static const struct umn_candidate all[UMN_CANDIDATES_MAX] = {
	{"daemon", UMN_DAEMON, -1},
	{"bpf:mmu_notifier", UMN_BPF, UMN_PROBE_MMU_NOTIFIER},
	{"bpf:kvm", UMN_BPF, UMN_PROBE_KVM},
	{"bpf:zap", UMN_BPF, UMN_PROBE_ZAP},
	{"daemon:mmu_notifier", UMN_DAEMON, UMN_PROBE_MMU_NOTIFIER},
	{"daemon:kvm", UMN_DAEMON, UMN_PROBE_KVM},
	{"daemon:zap", UMN_DAEMON, UMN_PROBE_ZAP},
	{"uffd", UMN_UFFD, -1},
};

/* Does `wanted`, `source` or `source:probe`, name it? */
static bool is_named(const struct umn_candidate *candidate, const char *wanted)
{
	size_t length = strlen(wanted);

	if (!strcmp(candidate->name, wanted))
		return true;
	return candidate->kind == UMN_BPF && !strncmp(candidate->name, wanted, length) && candidate->name[length] == ':';
}

int umn_candidates(const char *wanted, const struct umn_candidate **candidates)
{
	const char *origin = "";
	int count = 0;

	if (!wanted || !*wanted) {
		wanted = secure_getenv(UMMUNOTIFY_SOURCE_ENVIRONMENT);
		origin = " (from " UMMUNOTIFY_SOURCE_ENVIRONMENT ")";
	}
	for (size_t i = 0; i < UMN_CANDIDATES_MAX; i++)
		if (wanted && *wanted ? is_named(&all[i], wanted) : all[i].kind != UMN_DAEMON || all[i].probe < 0)
			candidates[count++] = &all[i];
	if (count)
		return count;
	return umn_fail(UMMUNOTIFY_UNKNOWN_SOURCE, EINVAL, "",
			"there is no source '%s'%s; there are bpf, daemon and uffd, bpf and daemon "
			"also with a probe: bpf:mmu_notifier, bpf:kvm, bpf:zap, daemon:kvm, ...",
			wanted, origin);
}

int ummunotify_sources(const char *wanted, const char **names, size_t room)
{
	const struct umn_candidate *candidates[UMN_CANDIDATES_MAX];
	int count = umn_candidates(wanted, candidates);

	for (int i = 0; i < count && (size_t)i < room; i++)
		names[i] = candidates[i]->name;
	return count;
}

struct umn_connection *umn_connect(const struct umn_candidate *candidate, const struct ummunotify_feeder *feeder, bool counter)
{
	switch (candidate->kind) {
	case UMN_BPF:
		return umn_connect_feeder(candidate->probe, feeder, counter);
	case UMN_DAEMON:
		return umn_connect_daemon(candidate->probe, counter);
	case UMN_UFFD:
		break;
	}
	return umn_connect_uffd();
}
