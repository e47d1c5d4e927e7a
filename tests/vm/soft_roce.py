"""An RDMA device that Linux makes of a network interface, in the guests."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from support import require

ADDRESS = "10.77.0.1"
INTERFACE = "umn-dummy"
DEVICE = "rxe1"
PATIENCE = 300


@contextlib.contextmanager
def made() -> Iterator[None]:
    """libfabric passes over the interface lo, and so over rxe0."""
    if "UMMUNOTIFY_VM" not in os.environ:
        require("rdma", "only the guests' kernels have the modules, and their network is nobody's")
    for command in (
        "modprobe -a rdma_ucm dummy",
        f"ip link add {INTERFACE} mtu 4500 type dummy",
        f"ip addr add {ADDRESS}/24 dev {INTERFACE}",
        f"ip link set {INTERFACE} up",
        f"rdma link add {DEVICE} type rxe netdev {INTERFACE}",
    ):
        subprocess.run(command.split(), check=True)
    gid = Path(f"/sys/class/infiniband/{DEVICE}/ports/1/gids/1")  # the second, of the IPv4 address
    for _ in range(PATIENCE):
        with contextlib.suppress(OSError):
            if "ffff" in gid.read_text():
                break
        time.sleep(1)
    try:
        yield
    finally:
        subprocess.run(["ip", "link", "del", INTERFACE], check=True)
