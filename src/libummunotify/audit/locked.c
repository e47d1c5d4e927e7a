/* SPDX-License-Identifier: BSD-3-Clause */
/* Pins that are found by their address: CUDA's registrations of host memory, and mlock if UMMUNOTIFY_AUDIT_MLOCK asks for it. How a GPU uses
 * its registrations is not seen. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "audit/interpose.h"
#include "audit/pins.h"

static void end(struct pin *pin, const char *what, const void *address, bool done)
{
	if (!done || !pin) {
		pins_drop(pin);
		return;
	}
	pins_add(pin, (const uint64_t[KEYS]){[KEY_PIN] = pins_key(what, (uint64_t)(uintptr_t)address, 0)});
}

#define NO_FUNCTION 999 /* CUDA_ERROR_UNKNOWN, cudaErrorUnknown */

#define CUDA(pin_name, unpin_name)                                                                                                 \
	EXPORT int pin_name(void *address, size_t length, unsigned int flags);                                                     \
	int pin_name(void *address, size_t length, unsigned int flags)                                                             \
	{                                                                                                                          \
		int (*next)(void *, size_t, unsigned int) = (int (*)(void *, size_t, unsigned int))NEXT(pin_name);                 \
		struct pin *pin = pins_begin("cuda", #pin_name, address, length);                                                  \
		bool outer = pins_inside;                                                                                          \
		int result;                                                                                                        \
                                                                                                                                   \
		pins_inside = true; /* the runtime calls the driver */                                                             \
		result = next ? next(address, length, flags) : NO_FUNCTION;                                                        \
		pins_inside = outer;                                                                                               \
		end(pin, "cuda", address, !result);                                                                                \
		return result;                                                                                                     \
	}                                                                                                                          \
	EXPORT int unpin_name(void *address);                                                                                      \
	int unpin_name(void *address)                                                                                              \
	{                                                                                                                          \
		int (*next)(void *) = (int (*)(void *))NEXT(unpin_name);                                                           \
		struct pin *pin = pins_take(pins_key("cuda", (uint64_t)(uintptr_t)address, 0), #unpin_name);                       \
		int result = next ? next(address) : NO_FUNCTION;                                                                   \
                                                                                                                                   \
		if (result)                                                                                                        \
			pins_restore(pin);                                                                                         \
		else                                                                                                               \
			pins_drop(pin);                                                                                            \
		return result;                                                                                                     \
	}
CUDA(cuMemHostRegister, cuMemHostUnregister)
CUDA(cuMemHostRegister_v2, cuMemHostUnregister_v2)
CUDA(cudaHostRegister, cudaHostUnregister)

static bool audits_mlock(void)
{
	static int answer; /* 1: no, 2: yes */

	if (!answer)
		answer = getenv("UMMUNOTIFY_AUDIT_MLOCK") ? 2 : 1;
	return answer == 2;
}

EXPORT int mlock(const void *address, size_t length)
{
	struct pin *pin = audits_mlock() && !stack_is_own(CALLER) ? pins_begin("mlock", "mlock", address, length) : NULL;
	int result = LIBC(mlock)(address, length);

	end(pin, "mlock", address, !result);
	return result;
}

EXPORT int mlock2(const void *address, size_t length, unsigned int flags)
{
	struct pin *pin = audits_mlock() && !stack_is_own(CALLER) ? pins_begin("mlock", "mlock2", address, length) : NULL;
	int result = LIBC(mlock2)(address, length, flags);

	end(pin, "mlock", address, !result);
	return result;
}

EXPORT int munlock(const void *address, size_t length)
{
	struct pin *pin = audits_mlock() && !stack_is_own(CALLER)
				  ? pins_take(pins_key("mlock", (uint64_t)(uintptr_t)address, 0), "munlock")
				  : NULL;
	int result = LIBC(munlock)(address, length);

	if (result)
		pins_restore(pin);
	else
		pins_drop(pin);
	return result;
}
