# cython: language_level=3, boundscheck=False, wraparound=False, binding=False, autotestdict=False
"""The native part of the source `uffd`. See libummunotify/sources/uffd.c for what it rests on."""

cimport cython
from libc.errno cimport errno
from libc.stdint cimport uint32_t, uintptr_t

from ._core cimport umn_source

import os

cdef extern from "sources/uffd.h" nogil:
    enum umn_uffd_step:
        pass
    int UMN_UFFD_OPEN, UMN_UFFD_IOCTL, UMN_UFFD_FEATURES, UMN_UFFD_PROOF, UMN_UFFD_TABLES, UMN_UFFD_MEMORY
    int UMN_UFFD_THREAD, UMN_UFFD_READER
    int UMN_UFFD_UNMAPPED, UMN_UFFD_KIND, UMN_UFFD_OTHER, UMN_UFFD_OWN, UMN_UFFD_MAPPINGS, UMN_UFFD_NO_PROC
    int UMN_UFFD_CLOSED, UMN_UFFD_START
    struct umn_uffd:
        pass
    struct umn_uffd_failure:
        umn_uffd_step step
        int error, device_error
    umn_uffd *umn_uffd_new(umn_uffd_failure *failure)
    void umn_uffd_start_failure(umn_uffd_failure *failure)
    umn_source *umn_uffd_source(umn_uffd *uffd)
    void *umn_uffd_add_segment(umn_uffd *uffd, uint32_t pages)
    int umn_uffd_wake_fd(umn_uffd *uffd)
    void umn_uffd_acknowledge(umn_uffd *uffd)
    void umn_uffd_close(umn_uffd *uffd)
    void umn_uffd_delete(umn_uffd *uffd)

OPEN = UMN_UFFD_OPEN
IOCTL = UMN_UFFD_IOCTL
FEATURES = UMN_UFFD_FEATURES
PROOF = UMN_UFFD_PROOF
TABLES = UMN_UFFD_TABLES
MEMORY = UMN_UFFD_MEMORY
THREAD = UMN_UFFD_THREAD
READER = UMN_UFFD_READER

UNMAPPED = UMN_UFFD_UNMAPPED
KIND = UMN_UFFD_KIND
OTHER = UMN_UFFD_OTHER
OWN = UMN_UFFD_OWN
MAPPINGS = UMN_UFFD_MAPPINGS
NO_PROC = UMN_UFFD_NO_PROC
CLOSED = UMN_UFFD_CLOSED
START = UMN_UFFD_START


class Failure(Exception):
    """The source does not work here: at which step, and the errnos of the system call and of /dev/userfaultfd."""

    def __init__(self, step, error, device_error):
        super().__init__(step, error, device_error)
        self.step = step
        self.error = error
        self.device_error = device_error


def start_failure():
    """Why watching last failed with START: a Failure."""
    cdef umn_uffd_failure failure
    umn_uffd_start_failure(&failure)
    return Failure(failure.step, failure.error, failure.device_error)


@cython.final
cdef class Uffd:
    """What feeds one table."""

    cdef umn_uffd *_uffd

    def __cinit__(self):
        """Raises Failure."""
        cdef umn_uffd_failure failure
        with nogil:
            self._uffd = umn_uffd_new(&failure)
        if self._uffd is NULL:
            raise Failure(failure.step, failure.error, failure.device_error)

    def __dealloc__(self):
        if self._uffd is not NULL:
            umn_uffd_delete(self._uffd)

    @property
    def address(self):
        """Of its struct umn_source, which is there as long as this object."""
        return <uintptr_t>umn_uffd_source(self._uffd)

    def add_segment(self, uint32_t pages):
        """The address of memory for the table's next segment. OSError."""
        cdef void *memory = umn_uffd_add_segment(self._uffd, pages)
        if memory is NULL:
            raise OSError(errno, os.strerror(errno))
        return <uintptr_t>memory

    def wake_fd(self):
        """The descriptor that polls readable after a wake-up. OSError."""
        cdef int fd = umn_uffd_wake_fd(self._uffd)
        if fd < 0:
            raise OSError(-fd, os.strerror(-fd))
        return fd

    def acknowledge(self):
        """Make it unreadable."""
        umn_uffd_acknowledge(self._uffd)

    def settle(self, unsigned int milliseconds):
        """Wait until every change that has been made by now was fed. False: that took too long."""
        cdef umn_source *source = umn_uffd_source(self._uffd)
        cdef bint settled
        with nogil:
            settled = source.wait_delivered(source, milliseconds)
        return settled

    def close(self):
        """After the table. May be called more than once."""
        umn_uffd_close(self._uffd)
