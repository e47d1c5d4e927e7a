"""Giving up what the daemon does not need. All in the calling thread: to be called before there are others."""

from __future__ import annotations

import ctypes
import os

CAP_PERFMON, CAP_BPF = 38, 39
KEPT = 1 << CAP_BPF | 1 << CAP_PERFMON

_PR_SET_KEEPCAPS, _PR_CAPBSET_READ, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 8, 23, 24, 38
_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _prctl(option: int, argument: int) -> None:
    _call("prctl", option, ctypes.c_ulong(argument), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))


def drop(user: tuple[int, int] | None) -> None:
    """Keep CAP_BPF and CAP_PERFMON, nothing else; become `user` (uid, gid), if given, and of no other group.

    Raises OSError: EPERM without the capabilities that this takes, or those that are to be kept.
    """
    if os.geteuid() == 0:
        number = 0
        while (bounded := _libc.prctl(_PR_CAPBSET_READ, ctypes.c_ulong(number))) >= 0:  # the kernel knows it
            if bounded and not KEPT >> number & 1:
                _prctl(_PR_CAPBSET_DROP, number)
            number += 1
    if user is not None:
        _prctl(_PR_SET_KEEPCAPS, 1)
        os.setgroups([])
        os.setresgid(user[1], user[1], user[1])
        os.setresuid(user[0], user[0], user[0])
    header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)
    # Effective, permitted, inheritable: the low 32 capabilities, then the high ones.
    data = (ctypes.c_uint32 * 6)(0, 0, 0, KEPT >> 32, KEPT >> 32, 0)
    _call("capset", header, data)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
