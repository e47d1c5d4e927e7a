"""MPI over libfabric: one rank sends from memory that it replaces before each message; how many arrive wrong?

With a provider that has a cache of registrations, such as verbs on a network interface that `rdma link add` made an
RDMA device (docs/rdma.md; not on lo):

    export FI_PROVIDER="verbs;ofi_rxm" FI_UNIVERSE_SIZE=2 MPIR_CVAR_CH4_NETMOD=ofi MPIR_CVAR_NOLOCAL=1
    mpiexec -n 2 python examples/mpi_libfabric.py
    ummunotify run --libfabric -- mpiexec -n 2 python examples/mpi_libfabric.py

The memory is replaced by system calls, as allocators other than libc's do; libfabric's own monitor does not see them.
Exits with 1 if any message was wrong. docs/libfabric.md has more.
"""

import ctypes
import sys

if {"-h", "--help"} & {*sys.argv}:
    print(__doc__)
    sys.exit()
try:
    from mpi4py import MPI
except (ImportError, RuntimeError) as error:  # RuntimeError: there is no MPI library
    print(f"{error}; pip install mpi4py mpich", file=sys.stderr)
    sys.exit(2)

SIZE = 1 << 20  # larger than what is copied
ROUNDS = 10
SYS = {"mmap": 9, "munmap": 11, "madvise": 28}
READ_WRITE, PRIVATE_ANONYMOUS, FIXED, DONTNEED = 3, 0x22, 0x10, 4

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def call(name: str, *arguments: int) -> int:
    result = libc.syscall(ctypes.c_long(SYS[name]), *(ctypes.c_long(each) for each in arguments))
    if result == -1:
        raise OSError(ctypes.get_errno(), name)
    return int(result)


def replace(how: str, address: int) -> None:
    if how == "madvise":
        call("madvise", address, SIZE, DONTNEED)
    else:
        call("munmap", address, SIZE)
        call("mmap", address, SIZE, READ_WRITE, PRIVATE_ANONYMOUS | FIXED, -1, 0)


comm = MPI.COMM_WORLD
if comm.size != 2:
    print("it takes two ranks: mpiexec -n 2 python examples/mpi_libfabric.py", file=sys.stderr)
    sys.exit(2)
address = call("mmap", 0, SIZE, READ_WRITE, PRIVATE_ANONYMOUS, -1, 0)
buffer = MPI.buffer.fromaddress(address, SIZE)
total = 0
for how in ("madvise", "munmap and mmap"):
    wrong = 0
    for i in range(ROUNDS):
        if comm.rank == 0:
            replace(how, address)
            ctypes.memset(address, i + 1, SIZE)
            comm.Send([buffer, MPI.BYTE], 1)
        else:
            comm.Recv([buffer, MPI.BYTE], 0)
            wrong += bytes(buffer) != bytes([i + 1]) * SIZE
        comm.Barrier()
    if comm.rank == 1:
        print(f"{how}: {wrong} of {ROUNDS} messages wrong", flush=True)
    total += wrong
sys.exit(comm.allreduce(total) > 0)
