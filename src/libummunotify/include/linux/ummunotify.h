/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The interface of /dev/ummunotify, as programs know it since 2009. `ummunotify run` provides the device; docs/c.md says how.
 *
 * May be included together with <ummunotify.h>, libummunotify's own interface, in any order: struct ummunotify_event is then that
 * one's, and this one's has only its other name, struct ummunotify_device_event.
 */
#ifndef _LINUX_UMMUNOTIFY_H
#define _LINUX_UMMUNOTIFY_H

#include <linux/ioctl.h>
#include <linux/types.h>

/* Watch [start, end); `user_cookie` is what its events carry, and no other region's of the same descriptor. */
struct ummunotify_register_ioctl {
	__u64 start;
	__u64 end;
	__u64 user_cookie;
	__u32 flags;	/* 0 */
	__u32 reserved; /* 0 */
};

#define UMMUNOTIFY_MAGIC 'U'

/* Features wanted, and back those granted: there are none, so 0. Only before anything else. */
#define UMMUNOTIFY_EXCHANGE_FEATURES _IOWR(UMMUNOTIFY_MAGIC, 1, __u32)
#define UMMUNOTIFY_REGISTER_REGION _IOW(UMMUNOTIFY_MAGIC, 2, struct ummunotify_register_ioctl)
/* By its cookie. After this nothing is reported for the region. */
#define UMMUNOTIFY_UNREGISTER_REGION _IOW(UMMUNOTIFY_MAGIC, 3, __u64)

enum {
	UMMUNOTIFY_EVENT_TYPE_INVAL = 0, /* a region was hit, by one change or by many */
	UMMUNOTIFY_EVENT_TYPE_LAST = 1,	 /* no more to read for now */
};

enum {
	UMMUNOTIFY_EVENT_FLAG_HINT = 1 << 0, /* just one change hit the region; the hint says which part */
};

/* What read() gives. */
#ifndef UMMUNOTIFY_H
#define ummunotify_event ummunotify_device_event
#endif
struct ummunotify_device_event {
	__u32 type;
	__u32 flags;
	__u64 hint_start; /* without the flag: the whole region */
	__u64 hint_end;
	__u64 user_cookie_counter; /* INVAL: the region's cookie. LAST: the counter, as in the page that can be mapped */
};

#endif
