"""Buffers that Mooncake transfers after their memory was freed and mapped anew: with registrations kept by address, and
right.

    pip install mooncake-transfer-engine-non-cuda     # or another of Mooncake's wheels
    python examples/mooncake_stale.py [DEVICE]

Over TCP nothing is pinned, and only the buffer that is larger than what was registered fails. Over RDMA, with a DEVICE,
the data goes to the old pages, without an error (docs/engines.md).

Exits with 0 if both halves turn out as told, with 1 if not, and with 2 if Mooncake is missing.
"""

from __future__ import annotations

import ctypes
import sys

from recycled import LENGTHS, compare, new_buffer

from ummunotify.registrars.mooncake import MooncakeRegistrar

if {"-h", "--help"} & {*sys.argv}:
    print(__doc__)
    sys.exit()
try:
    from mooncake.engine import TransferEngine
except ImportError as error:
    print(f"{error}; pip install mooncake-transfer-engine-non-cuda", file=sys.stderr)
    sys.exit(2)

HOST = "127.0.0.1"
SPACE = max(LENGTHS)


class Line:
    """An engine that owns buffers, and another one that reads them, here in the same process."""

    def __init__(self, device: str) -> None:
        self.owner, self.reader = TransferEngine(), TransferEngine()
        for engine in (self.owner, self.reader):
            if engine.initialize(HOST, "P2PHANDSHAKE", "rdma" if device else "tcp", device):
                raise OSError("Mooncake's engine cannot be initialised")
        self.name = f"{HOST}:{self.owner.get_rpc_port()}"
        self.target = new_buffer(SPACE)
        self.reader.register_memory(self.target, SPACE)

    def read(self, address: int, length: int) -> bytes:
        ctypes.memset(self.target, 0, SPACE)
        if self.reader.transfer_sync_read(self.name, self.target, address, length):
            raise OSError("Mooncake refuses the transfer")
        return ctypes.string_at(self.target, length)

    def close(self) -> None:
        self.reader.unregister_memory(self.target)


def main() -> int:
    line = Line(sys.argv[1] if len(sys.argv) > 1 else "")
    as_told = compare(MooncakeRegistrar(line.owner), line.read)
    line.close()
    return 0 if as_told else 1


if __name__ == "__main__":
    sys.exit(main())
