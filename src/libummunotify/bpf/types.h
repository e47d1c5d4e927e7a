/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */
/* The kernel's names of types, for libbpf's headers: its own headers are not those of the kernel that runs. */
#ifndef UMN_BPF_TYPES_H
#define UMN_BPF_TYPES_H

#include <stdint.h>

typedef uint8_t __u8;
typedef int8_t __s8;
typedef uint16_t __u16, __be16;
typedef int16_t __s16;
typedef uint32_t __u32, __be32, __wsum;
typedef int32_t __s32;
typedef uint64_t __u64;
typedef int64_t __s64;

#endif
