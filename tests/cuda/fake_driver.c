/* SPDX-License-Identifier: BSD-3-Clause */
/* As much of the CUDA driver's interface as the registrar uses, without a GPU. It is as strict as the real one, or more. */
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum {
	SUCCESS = 0,
	INVALID_VALUE = 1,
	OUT_OF_MEMORY = 2,
	NOT_INITIALIZED = 3,
	INVALID_DEVICE = 101,
	INVALID_CONTEXT = 201,
	ALREADY_REGISTERED = 712,
	NOT_REGISTERED = 713,
};

#define MAX 1024
#define CONTEXT ((void *)0x1234)
#define DEVICE_OFFSET (UINT64_C(1) << 60)

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct {
	uint64_t start, end;
} ranges[MAX];
static int count, initialized, retained;
static const char *failing_name;
static int failing_code;
static __thread int pushed;

/* For the test. */

void fake_fail(const char *name, int code)
{
	failing_name = name;
	failing_code = code;
}

int fake_registered(void)
{
	return count;
}

int fake_retained(void)
{
	return retained;
}

int fake_pushed(void)
{
	return pushed;
}

#define maybe_fail()                                                                                                               \
	do {                                                                                                                       \
		if (failing_name && !strcmp(failing_name, __func__)) {                                                             \
			failing_name = NULL;                                                                                       \
			return failing_code;                                                                                       \
		}                                                                                                                  \
	} while (0)

/* The driver's. */

int cuInit(unsigned int flags)
{
	maybe_fail();
	initialized = 1;
	return flags ? INVALID_VALUE : SUCCESS;
}

int cuDeviceGet(int *device, int ordinal)
{
	if (!initialized)
		return NOT_INITIALIZED;
	*device = ordinal;
	return ordinal ? INVALID_DEVICE : SUCCESS;
}

int cuDevicePrimaryCtxRetain(void **context, int device)
{
	if (device)
		return INVALID_DEVICE;
	*context = CONTEXT;
	retained++;
	return SUCCESS;
}

int cuDevicePrimaryCtxRelease_v2(int device)
{
	if (device || !retained)
		return INVALID_CONTEXT;
	retained--;
	return SUCCESS;
}

int cuCtxPushCurrent_v2(void *context)
{
	if (context != CONTEXT || !retained)
		return INVALID_CONTEXT;
	pushed++;
	return SUCCESS;
}

int cuCtxPopCurrent_v2(void **context)
{
	if (!pushed)
		return INVALID_CONTEXT;
	pushed--;
	*context = CONTEXT;
	return SUCCESS;
}

int cuMemHostRegister_v2(void *pointer, size_t length, unsigned int flags)
{
	uint64_t start = (uint64_t)pointer, end = start + length;
	int code = SUCCESS;

	maybe_fail();
	if (!pushed)
		return INVALID_CONTEXT;
	if (!length || flags > 15)
		return INVALID_VALUE;
	pthread_mutex_lock(&lock);
	for (int i = 0; i < count; i++)
		if (ranges[i].start < end && start < ranges[i].end)
			code = ALREADY_REGISTERED;
	if (!code && count == MAX)
		code = OUT_OF_MEMORY;
	if (!code) {
		ranges[count].start = start;
		ranges[count++].end = end;
	}
	pthread_mutex_unlock(&lock);
	return code;
}

int cuMemHostUnregister(void *pointer)
{
	int code = NOT_REGISTERED;

	maybe_fail();
	if (!pushed)
		return INVALID_CONTEXT;
	pthread_mutex_lock(&lock);
	for (int i = 0; i < count; i++)
		if (ranges[i].start == (uint64_t)pointer) {
			ranges[i] = ranges[--count];
			code = SUCCESS;
			break;
		}
	pthread_mutex_unlock(&lock);
	return code;
}

int cuMemHostGetDevicePointer_v2(uint64_t *device, void *pointer, unsigned int flags)
{
	maybe_fail();
	if (!pushed)
		return INVALID_CONTEXT;
	*device = (uint64_t)pointer + DEVICE_OFFSET;
	return flags ? INVALID_VALUE : SUCCESS;
}

int cuGetErrorString(int code, const char **text)
{
	*text = code == OUT_OF_MEMORY ? "out of memory" : "some error";
	return code == 4711 ? INVALID_VALUE : SUCCESS;
}
