# cython: language_level=3, boundscheck=False, wraparound=False, binding=False, autotestdict=False
"""The daemon's connections (daemon/peers.h)."""

from libc.errno cimport EBADMSG
from libc.stdint cimport uint32_t

import os

cdef extern from "daemon/peers.h" nogil:
    struct umn_peer:
        int fd
        uint32_t pid, uid, user
    unsigned int umn_peers_accept(int listener, int program, umn_peer *peers, unsigned int most, unsigned int *accepted, int *error)
    int umn_peers_receive(int fd, void *buffer, uint32_t size)
    void umn_peers_close(int fd)
    bint umn_peers_close_held()
    bint umn_peers_hold()

cdef enum:
    AT_ONCE = 16  # in a turn of the daemon's loop: some 0.3 ms
    RECEIVED_MOST = 4096


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


def receive(int fd, uint32_t size):
    """The next message, or what there is of a stream, up to `size` bytes (4096 at most); b"": the end.

    None: it has descriptors with it, and stays. OSError: BlockingIOError if there is none.
    """
    cdef char buffer[RECEIVED_MOST]
    cdef int length = umn_peers_receive(fd, buffer, min(size, RECEIVED_MOST))
    if length == -EBADMSG:
        return None
    if length < 0:
        raise OSError(-length, os.strerror(-length))
    return buffer[:length]


def close(int fd):
    """Shut the connection down and close it. If descriptors were sent with what is still in it, `close_held` does."""
    umn_peers_close(fd)


def close_held():
    """Have a child close what `close` has left open. True: something is still open."""
    return umn_peers_close_held()


def hold():
    """Is something left for `close_held`?"""
    return umn_peers_hold()
