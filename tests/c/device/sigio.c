/* SPDX-License-Identifier: BSD-3-Clause */
/* O_ASYNC. */
#include "device.h"

static volatile int signal_fd, signal_code;

static void note_signal(int number, siginfo_t *info, void *context)
{
	(void)number, (void)context;
	signal_fd = info->si_fd;
	signal_code = info->si_code;
	signals++;
}

static void wait_signals(int count)
{
	for (int i = 0; signals < count && i < 30000; i++)
		usleep(1000);
	check(signals >= count);
}

static void test_sigio(void)
{
	int fd = open_device();
	char *memory = get_pages(1, NULL);
	struct ummunotify_event events[4];

	signals = 0;
	handle(SIGIO, SA_RESTART);
	watch(fd, memory, PAGE, 1);
	change(memory);
	check(!fcntl(fd, F_SETOWN, getpid()));
	check(!fcntl(fd, F_SETFL, O_ASYNC | O_NONBLOCK));
	check((fcntl(fd, F_GETFL) & (O_ASYNC | O_NONBLOCK | O_ACCMODE)) == (O_ASYNC | O_NONBLOCK));
	check(fcntl(fd, F_GETOWN) == getpid());
	check(get(fd, events, 4) == 2);
	check(signals == 0); /* it was before */
	for (int i = 1; i <= 50; i++) {
		change(memory);
		wait_signals(i);
		check(readable(fd));
		if (i % 2) /* each change sends one, whether or not the last was read */
			check(get(fd, events, 4) == 2);
	}
	check(!fcntl(fd, F_SETFL, O_NONBLOCK));
	check(!(fcntl(fd, F_GETFL) & O_ASYNC));
	signals = 0;
	change(memory);
	wait_readable(fd);
	usleep(20000);
	check(signals == 0);
	close(fd);
	signal(SIGIO, SIG_DFL);
	munmap(memory, PAGE);
}

static void test_sigio_with_another_signal(void)
{
	struct sigaction action = {.sa_sigaction = note_signal, .sa_flags = SA_RESTART | SA_SIGINFO};
	int fd = open_device(), number = SIGRTMIN + 3, on = 1;
	char *memory = get_pages(1, NULL);
	struct ummunotify_event events[4];
	struct f_owner_ex owner = {F_OWNER_TID, gettid()};

	check(!sigaction(number, &action, NULL));
	watch(fd, memory, PAGE, 1);
	check(!ioctl(fd, FIOASYNC, &on));
	check(fcntl(fd, F_GETFL) & O_ASYNC);
	change(memory); /* nobody owns it yet */
	usleep(5000);
	check(get(fd, events, 4) == 2);
	/* With the owner and the signal set after O_ASYNC. */
	check(!fcntl(fd, F_SETSIG, number) && !fcntl(fd, F_SETOWN_EX, &owner));
	check(fcntl(fd, F_GETSIG) == number);
	signals = 0;
	signal_fd = -1;
	change(memory);
	wait_signals(1);
	check(signal_fd == fd && signal_code == POLL_IN);
	check(get(fd, events, 4) == 2);
	on = 0;
	check(!ioctl(fd, FIOASYNC, &on));
	on = 1;
	check(!ioctl(fd, FIOASYNC, &on)); /* and once more */
	change(memory);
	wait_signals(2);
	close(fd); /* while it is on */
	signal(number, SIG_DFL);
	munmap(memory, PAGE);
}

static int handler_fd;
static volatile int handler_events;

static void read_in_handler(int number)
{
	struct ummunotify_event events[4];
	int n, kept = errno;

	(void)number;
	while ((n = get(handler_fd, events, 4)) > 0)
		for (int i = 0; i < n; i++)
			handler_events += events[i].type == UMMUNOTIFY_EVENT_TYPE_INVAL;
	check(n == -EAGAIN);
	errno = kept;
	signals++;
}

/* As after a system call: the handler may read whatever the program was doing. */
static void test_reading_in_a_handler(void)
{
	struct sigaction action = {.sa_handler = read_in_handler, .sa_flags = SA_RESTART};
	int fd = open_device();
	char *memory = get_pages(2, NULL);
	int changes = 0;

	handler_fd = fd;
	handler_events = 0;
	signals = 0;
	check(!sigaction(SIGIO, &action, NULL));
	fcntl(fd, F_SETOWN, getpid());
	fcntl(fd, F_SETFL, O_ASYNC | O_NONBLOCK);
	watch(fd, memory, PAGE, 0);
	for (int i = 0; signals < 300; i++) {
		change(memory);
		changes++;
		watch(fd, memory + PAGE, PAGE, 1 + i % 7);
		unwatch(fd, 1 + i % 7);
	}
	for (int i = 0; readable(fd) && i < 30000; i++)
		usleep(1000);
	check(handler_events > 0 && handler_events <= changes);
	fcntl(fd, F_SETFL, O_NONBLOCK); /* no more signals */
	close(fd);
	signal(SIGIO, SIG_DFL);
	munmap(memory, 2 * PAGE);
}

const struct test sigio_tests[] = {
	{"sigio", test_sigio},
	{"sigio_with_another_signal", test_sigio_with_another_signal},
	{"reading_in_a_handler", test_reading_in_a_handler},
	{0},
};
