# cython: language_level=3, boundscheck=False, wraparound=False, binding=False, autotestdict=False
"""The daemon's new connections (daemon/peers.h)."""

from libc.stdint cimport uint32_t

import os

cdef extern from "daemon/peers.h" nogil:
    struct umn_peer:
        int fd
        uint32_t pid, uid, user
    unsigned int umn_peers_accept(int listener, int program, umn_peer *peers, unsigned int most, unsigned int *accepted, int *error)

cdef enum:
    AT_ONCE = 16  # in a turn of the daemon's loop: some 0.3 ms


def accept(int listener, int program):
    """Accept connections that wait, a few at a time: descriptor, pid, uid and user of those that are still open.

    `program`: of peers.bpf.c, or -1. The descriptors are the caller's. OSError: the process or the system has no room
    (BlockingIOError: none waits).
    """
    cdef umn_peer peers[AT_ONCE]
    cdef unsigned int count, accepted
    cdef int error
    with nogil:
        count = umn_peers_accept(listener, program, peers, AT_ONCE, &accepted, &error)
    if error and not accepted:
        raise OSError(error, os.strerror(error))
    return [(peers[i].fd, peers[i].pid, peers[i].uid, peers[i].user) for i in range(count)]
