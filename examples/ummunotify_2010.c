/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * A registration cache as an MPI library of 2010 would have had it, over /dev/ummunotify. Nothing in it knows of this package:
 *
 *	cc ummunotify_2010.c -o ummunotify_2010 $(ummunotify config --cflags)
 *	ummunotify run -- ./ummunotify_2010
 *
 * "Registering" is copying here, so that the bug shows without hardware: a registration that outlives its pages has old bytes.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/ummunotify.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define SIZE 65536

struct registration {
	char *address;
	char *pinned; /* NULL: not registered */
};

static int fd;
static volatile const uint64_t *counter;
static uint64_t last_counter;
static struct registration cache;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void init(void)
{
	uint32_t features = 0;
	void *page;

	fd = open("/dev/ummunotify", O_RDONLY | O_NONBLOCK);
	if (fd < 0)
		die("/dev/ummunotify");
	if (ioctl(fd, UMMUNOTIFY_EXCHANGE_FEATURES, &features))
		die("UMMUNOTIFY_EXCHANGE_FEATURES");
	page = mmap(NULL, sizeof *counter, PROT_READ, MAP_SHARED, fd, 0);
	if (page == MAP_FAILED)
		die("mmap");
	counter = page;
}

/* The memory hook: before each look into the cache. */
static void drop_what_changed(void)
{
	struct ummunotify_event events[16];
	uint64_t before;
	ssize_t length;

	while (last_counter != (before = *counter)) { /* no system call while nothing happens */
		length = read(fd, events, sizeof events);
		if (length < 0 && errno != EAGAIN)
			die("read");
		if (length <= 0) {
			last_counter = before; /* not what it is now: something may have changed since the read */
			return;
		}
		for (size_t i = 0; i < (size_t)length / sizeof *events; i++) {
			if (events[i].type == UMMUNOTIFY_EVENT_TYPE_LAST) {
				last_counter = events[i].user_cookie_counter;
				continue;
			}
			printf("  %#llx was changed: its registration goes\n", (unsigned long long)events[i].hint_start);
			if (ioctl(fd, UMMUNOTIFY_UNREGISTER_REGION, &events[i].user_cookie_counter))
				die("UMMUNOTIFY_UNREGISTER_REGION");
			free(cache.pinned);
			cache.pinned = NULL;
		}
	}
}

static const char *get_registration(char *address)
{
	static uint64_t cookie;
	struct ummunotify_register_ioctl wanted;

	drop_what_changed();
	if (cache.pinned && cache.address == address) {
		printf("  a hit\n");
		return cache.pinned;
	}
	printf("  a miss\n");
	memset(&wanted, 0, sizeof wanted);
	wanted.start = (uintptr_t)address;
	wanted.end = (uintptr_t)address + SIZE;
	wanted.user_cookie = ++cookie;
	if (ioctl(fd, UMMUNOTIFY_REGISTER_REGION, &wanted))
		die("UMMUNOTIFY_REGISTER_REGION");
	cache.address = address;
	cache.pinned = malloc(SIZE);
	if (!cache.pinned)
		die("malloc");
	memcpy(cache.pinned, address, SIZE);
	return cache.pinned;
}

static char *buffer_at(void *address, const char *text)
{
	char *buffer = mmap(address, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | (address ? MAP_FIXED : 0), -1, 0);

	if (buffer == MAP_FAILED)
		die("mmap");
	strcpy(buffer, text);
	return buffer;
}

int main(void)
{
	const char *sent;
	char *buffer;

	init();
	buffer = buffer_at(NULL, "the first buffer");
	printf("sending \"%s\"\n", buffer);
	printf("  sent: \"%s\"\n", get_registration(buffer));
	printf("sending it again\n");
	printf("  sent: \"%s\"\n", get_registration(buffer));
	munmap(buffer, SIZE);
	buffer = buffer_at(buffer, "another, at the same address");
	printf("sending \"%s\"\n", buffer);
	sent = get_registration(buffer);
	printf("  sent: \"%s\"\n", sent);
	return strcmp(sent, buffer) != 0;
}
