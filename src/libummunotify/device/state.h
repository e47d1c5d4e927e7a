/* SPDX-License-Identifier: BSD-3-Clause */
/* An open device, as the parts of its implementation see it. */
#ifndef UMN_DEVICE_STATE_H
#define UMN_DEVICE_STATE_H

#include <pthread.h>
#include <signal.h>

#include "device/cookies.h"
#include "device/device.h"
#include "include/linux/ummunotify.h"
#include "notifier/notifier.h"
#include "process/descriptor.h"

/* What sends SIGIO: sigio.c. */
struct signaller {
	bool on;
	pthread_t thread;
	struct umn_descriptor out, in; /* a pipe: the kernel sends the signal for `out`, when something is written to `in` */
	struct umn_descriptor stop_out, stop_in; /* a pipe that is written to when the thread is to end */
	int fd;					 /* the device's, as it shows in the signal */
};

struct device {
	struct ummunotify *umn;
	int counter_fd;
	/* Under the lock of the account of descriptors (device.c): */
	unsigned int fds;   /* this process's */
	unsigned int users; /* calls under way, and the thread that serves children */
	struct device *next;
	struct umn_descriptor client, server; /* both ends of what children ask through; none before the first fork */
	bool remote;			      /* this is a child: only `client` and `counter_fd` are of use */

	/* Under the device's own lock: */
	pthread_mutex_t lock;
	bool used;
	struct cookies cookies;
	struct umn_reading reading;
	struct signaller signaller;
};

/* ---- Masking (device.c): no lock here is held by a thread that runs a signal handler or is cancelled ---- */

struct masked {
	sigset_t signals;
	int cancel_state;
};
void device_mask_signals(struct masked *before);
void device_restore_signals(const struct masked *before);

/* Descriptors of the library's own are hidden from the program's close and dup2 from when they are made until they are closed. */
void device_hide(int fd);
void device_close_hidden(struct umn_descriptor *descriptor);

/* ---- Requests (request.c) ---- */

#define DEVICE_PIECE 64 /* events read at a time */

enum request_kind { REQUEST_EXCHANGE, REQUEST_REGISTER, REQUEST_UNREGISTER, REQUEST_READ };

struct request {
	enum request_kind kind;
	union {
		uint32_t features;
		struct ummunotify_register_ioctl region;
		uint64_t cookie;
		uint32_t room; /* of events, at most DEVICE_PIECE */
	};
};

struct reply {
	int error;
	uint32_t count;
	struct ummunotify_device_event events[DEVICE_PIECE];
};

/* Carries a request out, in the process that the device belongs to. */
void device_handle_request(struct device *device, const struct request *request, struct reply *reply);

/* Has it carried out by that process, in a child. */
void device_ask_owner(struct device *device, const struct request *request, struct reply *reply);

/* Serves children on `server`, until the last of them has closed its end. */
void device_serve(struct device *device);

/* ---- SIGIO (sigio.c): under the device's lock ---- */

/* Signals are blocked: so they are in the thread that this starts. 0 or an errno. */
int device_start_signals(struct device *device, int fd);
/* False: the program has closed the pipe that ends the thread, which goes on and uses the device. */
bool device_stop_signals(struct device *device);
/* The owner and the signal that were set for `fd`. */
void device_copy_owner(struct device *device, int fd);

#endif
