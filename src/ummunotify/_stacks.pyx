# cython: language_level=3, boundscheck=False, wraparound=False, binding=False, autotestdict=False
"""Stacks of changes, as stacks.bpf.c takes them, and which belongs to which event.

Native because of signals, as _bpf is: a notifier asks for the stack of an event that it has taken already. The GIL is the lock.
"""

cimport cython
from libc.stdint cimport int32_t, uint32_t, uint64_t

import os

from . import symbols
from .bpf.libbpf import BpfError

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec, tv_nsec
    int nanosleep(const timespec *wanted, timespec *left)

cdef extern from "<linux/bpf.h>" nogil:
    enum:
        BPF_MAP_TYPE_RINGBUF

cdef extern from "process/process.h" nogil:
    uint32_t umn_process_current()
    bint umn_process_is(uint32_t epoch)
    int umn_process_start()

cdef extern from "bpf/objects.h" nogil:
    int umn_bpf_create_map(uint32_t type, const char *name, uint32_t key_size, uint32_t value_size, uint32_t entries, uint32_t flags)

cdef extern from "bpf/stack_ring.h" nogil:
    const uint32_t UMN_STACK_RING_BYTES
    const uint32_t UMN_STACK_USER
    const uint32_t UMN_STACK_KERNEL
    struct umn_stack:
        uint64_t time, start, end
        uint32_t process, thread
        char process_name[16]
        char thread_name[16]
        uint64_t caller
        uint32_t user_frames, kernel_frames
        uint64_t user[48]
        uint64_t kernel[32]
    struct umn_stack_ring:
        pass
    int umn_stack_ring_map(umn_stack_ring *ring, int fd)
    void umn_stack_ring_unmap(umn_stack_ring *ring)
    bint umn_stack_ring_take(umn_stack_ring *ring, umn_stack *stack)

cdef enum:
    KEPT = 2048  # stacks that were read and may belong to an event that was not
    TRIES = 20
    PAUSE = 50_000  # nanoseconds

cdef int start_error = umn_process_start()
if start_error:
    raise OSError(-start_error, os.strerror(-start_error))


def create_ring():
    """A ring buffer for stacks. A map's descriptor, which the caller closes; OSError."""
    cdef int fd = umn_bpf_create_map(BPF_MAP_TYPE_RINGBUF, b"umn_stacks", 0, 0, UMN_STACK_RING_BYTES, 0)
    if fd < 0:
        raise BpfError(-fd, "make a ring buffer")
    return fd


cdef str name_in(const char *name):
    cdef int length = 0
    while length < 16 and name[length]:
        length += 1
    return name[:length].decode(errors="replace")


@cython.final
@cython.no_gc
cdef class Stack:
    """The thread that made a change, its names, the time, and the frames.

    Functions, files and lines are looked up when they are first asked for, in the files of the process that made the
    change; that process has to be there still.
    """

    cdef umn_stack _stack
    cdef tuple _frames, _kernel

    def __init__(self, *args, **kwargs):
        raise TypeError("stacks are made by a notifier that was opened with stacks=True")

    def __reduce__(self):
        raise TypeError("a stack cannot be pickled; its frames can")

    def __repr__(self):
        return f"<Stack of thread {self.thread} ({self.thread_name}), process {self.process} ({self.process_name})>"

    @property
    def time(self):
        """When the change was made, as time.monotonic() counts."""
        return self._stack.time / 1e9

    @property
    def nanoseconds(self):
        """When the change was made, as time.monotonic_ns() counts."""
        return self._stack.time

    @property
    def start(self):
        """The first address that was changed, whatever of it was watched."""
        return self._stack.start

    @property
    def end(self):
        return self._stack.end

    @property
    def thread(self):
        """As in Invalidation."""
        return self._stack.thread

    @property
    def thread_name(self):
        return name_in(self._stack.thread_name)

    @property
    def process(self):
        """The number of the thread's process; 0: it has none here."""
        return self._stack.process

    @property
    def process_name(self):
        return name_in(self._stack.process_name)

    @property
    def frames(self):
        """The process's frames, a tuple of Frame, innermost first.

        By frame pointers: a function that was compiled without them hides its caller, or all that is further out.
        """
        if self._frames is None:
            places = self.places(symbols.code_of(self._stack.process))
            self._frames = symbols.resolve(places, symbols.look_up(places))
        return self._frames

    def places(self, code):
        """The same without names, at once. `code`: what the process has mapped, from symbols.code_of."""
        addresses = [self._stack.user[i] for i in range(min(self._stack.user_frames, UMN_STACK_USER))]
        return symbols.places(code, addresses, self._stack.caller)

    @property
    def kernel(self):
        """The kernel's functions, a tuple of names, innermost first."""
        cdef uint32_t i
        if self._kernel is None:
            self._kernel = symbols.kernel_functions(
                [self._stack.kernel[i] for i in range(min(self._stack.kernel_frames, UMN_STACK_KERNEL))]
            )
        return self._kernel


@cython.final
@cython.no_gc_clear
cdef class Tracer:
    """What reads a ring buffer of stacks; while it is there, what writes it stays attached.

    Not for the child of a fork.
    """

    cdef umn_stack_ring _ring
    cdef uint32_t _epoch
    cdef list _stacks  # the oldest first
    cdef object _kept
    cdef bint _in_vain
    cdef object __weakref__

    def __cinit__(self, int fd, kept=None):
        """Of a map's descriptor, which the caller closes. `kept`: is kept as long as this is. OSError."""
        cdef int error = umn_stack_ring_map(&self._ring, fd)
        if error:
            raise BpfError(-error, "map the stacks")
        self._epoch = umn_process_current()
        self._stacks = []
        self._kept = kept

    def __dealloc__(self):
        if umn_process_is(self._epoch):
            umn_stack_ring_unmap(&self._ring)

    cdef int drain(self) except -1:
        cdef Stack stack
        if not umn_process_is(self._epoch):
            return 0
        while True:
            stack = Stack.__new__(Stack)
            if not umn_stack_ring_take(&self._ring, &stack._stack):
                break
            self._stacks.append(stack)
            self._in_vain = False
        if len(self._stacks) > KEPT:
            del self._stacks[:len(self._stacks) - KEPT]
        return 0

    cdef Stack look(self, uint64_t since, uint64_t start, uint64_t end, uint32_t thread):
        """The first one after `since`."""
        cdef Py_ssize_t i
        cdef Stack stack, found = None
        self.drain()
        for i in range(len(self._stacks) - 1, -1, -1):
            stack = <Stack>self._stacks[i]
            if stack._stack.time <= since:
                break
            if stack._stack.thread == thread and stack._stack.start < end and stack._stack.end > start:
                found = stack
        return found

    def find(self, uint64_t since, uint64_t start, uint64_t end, uint32_t thread):
        """The stack of the first change of [start, end) that this thread has made since then, in nanoseconds; or None."""
        cdef Stack found = self.look(since, start, end, thread)
        cdef timespec pause
        cdef int i
        # An event is there before its stack: some microseconds.
        pause.tv_sec, pause.tv_nsec = 0, PAUSE
        for i in range(TRIES):
            if found is not None or not thread or self._in_vain:
                return found
            with nogil:
                nanosleep(&pause, NULL)
            found = self.look(since, start, end, thread)
        # There was no room for it, most likely, and so not for those that follow.
        self._in_vain = found is None
        return found

    def take(self):
        """All that there are, a list, the oldest first; they are not found any more."""
        self.drain()
        stacks, self._stacks = self._stacks, []
        return stacks
