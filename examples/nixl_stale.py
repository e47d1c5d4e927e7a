"""Buffers that NIXL sends after their memory was freed and mapped anew: with registrations kept by address, and right.

    pip install nixl
    python examples/nixl_stale.py

Over TCP or shared memory, where nothing is pinned, only the buffer that is larger than what was registered fails. Over
RDMA the old pages are sent, without an error: UCX_TLS=rc shows that where there is a device (docs/engines.md).

Exits with 0 if both halves turn out as told, with 1 if not, and with 2 if NIXL is missing.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time

from recycled import LENGTHS, compare, new_buffer

from ummunotify.registrars.nixl import NixlRegistrar

if {"-h", "--help"} & {*sys.argv}:
    print(__doc__)
    sys.exit()
try:
    from nixl_cu12 import nixl_agent, nixl_agent_config
except ImportError:
    try:
        from nixl import nixl_agent, nixl_agent_config
    except ImportError as error:
        print(f"{error}; pip install nixl", file=sys.stderr)
        sys.exit(2)

SPACE = max(LENGTHS)


class Line:
    """An agent that sends to another one, here in the same process."""

    def __init__(self) -> None:
        settings = nixl_agent_config(backends=["UCX"])
        self.sender, self.receiver = nixl_agent("sender", settings), nixl_agent("receiver", settings)
        self.target = new_buffer(SPACE)
        self.target_memory = self.receiver.register_memory([(self.target, SPACE, 0, "")], "DRAM")
        self.sender.add_remote_agent(self.receiver.get_agent_metadata())

    def send(self, address: int, length: int) -> bytes:
        ours = self.sender.get_xfer_descs([(address, length, 0)], "DRAM")
        theirs = self.sender.get_xfer_descs([(self.target, length, 0)], "DRAM")
        transfer = self.sender.initialize_xfer("WRITE", ours, theirs, "receiver")
        state = self.sender.transfer(transfer)
        while state == "PROC":
            time.sleep(0.001)
            state = self.sender.check_xfer_state(transfer)
        transfer.release()
        if state != "DONE":
            raise OSError(f"the transfer ends as {state}")
        return ctypes.string_at(self.target, length)

    def close(self) -> None:
        self.sender.remove_remote_agent("receiver")
        self.receiver.deregister_memory(self.target_memory)
        del self.sender, self.receiver  # NIXL's library ends with them, while the interpreter is still there


def main() -> int:
    line = Line()
    as_told = compare(NixlRegistrar(line.sender), line.send)
    line.close()
    return 0 if as_told else 1


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # NIXL's wheel (1.5) brings a libnl that crashes when a program ends
