/* SPDX-License-Identifier: BSD-3-Clause */
/* What the tests of /dev/ummunotify share. They use nothing but system calls' wrappers and the interface's header. */
#ifndef DEVICE_TESTS_H
#define DEVICE_TESTS_H

#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/ummunotify.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/wait.h>

#include "../check.h"

#define DEVICE "/dev/ummunotify"

/* A file's tests end with one without a name. */
extern const struct test opening_tests[], region_tests[], reading_tests[], waiting_tests[], sigio_tests[], descriptor_tests[],
	fork_tests[], thread_tests[];

/* What programs compiled with _FORTIFY_SOURCE call. */
int __open_2(const char *path, int flags);
int __open64_2(const char *path, int flags);
int __openat_2(int directory, const char *path, int flags);
ssize_t __read_chk(int fd, void *buffer, size_t length, size_t room);

#define nothing(fd) check(read(fd, (char[320]){0}, 320) == -1 && errno == EAGAIN)

/* How often the handler that `handle` installs has run. */
extern _Atomic int signals;

bool is_uffd(void);
int open_device(void);
int try_register(int fd, const void *start, size_t length, uint64_t cookie);
void watch(int fd, const void *start, size_t length, uint64_t cookie);
int try_unregister(int fd, uint64_t cookie);
void unwatch(int fd, uint64_t cookie);
volatile uint64_t *map_counter(int fd);
void change(char *page);
bool readable(int fd);
void wait_readable(int fd);
int get(int fd, struct ummunotify_event *events, int room);
void is_inval(const struct ummunotify_event *event, uint64_t cookie);
void is_last(const struct ummunotify_event *event, uint64_t counter);
void hint_is(const struct ummunotify_event *event, const char *start, const char *end);
void no_hint(const struct ummunotify_event *event, const char *start, const char *end);
void handle(int number, int flags);
int count_fds(void);

#endif
