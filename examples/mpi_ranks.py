"""Each rank gets memory of its neighbour, from buffers that come and go, and attaches none of them twice without need.

    pip install mpi4py mpich
    mpiexec -n 4 python examples/mpi_ranks.py

Memory has to be attached to a window before other ranks may get from it, which may pin it. So each rank keeps what it
has attached, in a registration cache. It frees a buffer now and then, and usually gets the next one at the same
address: what was attached there must not be used again.

ummunotify finds out itself where it learns that from: on a cluster usually the daemon, as ranks have no privileges.
"""

import argparse
import mmap
import random
import sys
from dataclasses import dataclass

import ummunotify

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("transfers", nargs="?", type=int, default=500, help="of each rank; default: 500")
options = parser.parse_args()
try:
    from mpi4py import MPI
except (ImportError, RuntimeError) as error:  # RuntimeError: there is no MPI library
    print(f"{error}; pip install mpi4py mpich", file=sys.stderr)
    sys.exit(2)

BUFFERS = 8
SIZE = 1 << 16


@dataclass(frozen=True)
class Attachment:
    memory: MPI.memory
    mapping: int
    """Which of the mappings that were at this address one after the other."""


class Attacher:
    """A registrar: attaches memory to a window. Memory cannot be attached twice at a time."""

    granularity = mmap.PAGESIZE
    overlap = False

    def __init__(self, window: MPI.Win) -> None:
        self.window = window
        self.mappings: dict[int, int] = {}

    def register(self, address: int, length: int) -> Attachment:
        memory = MPI.memory.fromaddress(address, length)
        self.window.Attach(memory)
        return Attachment(memory, self.mappings[address])

    def deregister(self, attachment: Attachment) -> None:
        self.window.Detach(attachment.memory)


def get(window: MPI.Win, rank: int, address: int, length: int) -> bytes:
    got = bytearray(length)
    window.Lock(rank, MPI.LOCK_SHARED)
    window.Get([got, MPI.BYTE], rank, [address, length, MPI.BYTE])
    window.Unlock(rank)
    return bytes(got)


def main(rounds: int) -> None:
    comm = MPI.COMM_WORLD
    rng = random.Random(comm.rank)
    window = MPI.Win.Create_dynamic(comm=comm)
    attacher = Attacher(window)
    again = 0  # the address of the buffer that was freed just before

    def allocate() -> mmap.mmap:
        buffer = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE)
        address = MPI.Get_address(buffer)
        attacher.mappings[address] = attacher.mappings.get(address, 0) + 1
        return buffer

    with ummunotify.open() as umn, ummunotify.RegistrationCache(attacher, notifier=umn) as cache:
        buffers = [allocate() for _ in range(BUFFERS)]
        for number in range(rounds):
            i = rng.randrange(BUFFERS)
            if rng.random() < 0.3:
                address = MPI.Get_address(buffers[i])
                buffers[i].close()
                buffers[i] = allocate()
                again += MPI.Get_address(buffers[i]) == address
            buffer = buffers[i]
            buffer[:] = bytes([comm.rank, number % 256]) * (SIZE // 2)
            with cache.acquire(buffer) as attached:
                address = MPI.Get_address(buffer)
                assert attached.handle.mapping == attacher.mappings[address], "attached before it was unmapped"
                addresses = comm.allgather(address)
                neighbour = (comm.rank + 1) % comm.size
                got = get(window, neighbour, addresses[neighbour], SIZE)
                assert got == bytes([neighbour, number % 256]) * (SIZE // 2), "not what the neighbour has there"
                comm.Barrier()  # the neighbour is done with this buffer too
        stats = cache.stats
        everybody = comm.gather((umn.source, again, stats.hits, stats.misses, stats.stale))
    window.Free()
    if everybody is not None:
        sources = ", ".join(sorted({source for source, *_ in everybody}))
        same, hits, misses, stale = (sum(column) for column in list(zip(*everybody, strict=True))[1:])
        print(
            f"{comm.size} ranks, source {sources}: {comm.size * rounds} transfers, {hits} from memory attached before"
        )
        print(f"{misses} attached, {stale} of them found unmapped later; {same} times at the same address again")


if __name__ == "__main__":
    main(options.transfers)
