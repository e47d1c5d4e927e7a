"""MPI over RDMA, by UCX and by libfabric: two ranks change the memory of their messages all the time (tests/c/mpi.c).

The device is one that Linux makes of a network interface. With UMMUNOTIFY_SLOW all combinations of docs/mpi.md run, and
UMMUNOTIFY_MESSAGES says how many messages each.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import soft_roce

sys.path.append(str(Path(__file__).parents[1]))
from mpi import LIBRARIES, PROGRAM
from support import SLOW

MESSAGES = os.environ.get("UMMUNOTIFY_MESSAGES", "400")
LENGTH = "8192"
"""The longer, the slower, as the processor is emulated; what is shorter is copied."""
CHANGES = ("munmap", "madvise", "mremap", "mmap")
"""What the libraries' own hooks do not see."""


NO_SHARED_MEMORY = {"OMPI_MCA_btl": "self,tcp", "MPIR_CVAR_NOLOCAL": "1"}
"""Between the ranks."""
UCX = NO_SHARED_MEMORY | {
    "MPIR_CVAR_CH4_NETMOD": "ucx",
    "OMPI_MCA_pml": "ucx",
    "OMPI_MCA_osc": "ucx",
    "UCX_NET_DEVICES": f"{soft_roce.DEVICE}:1",
    "UCX_TLS": "rc_v,ud_v,self",
    "UCX_IB_GID_INDEX": "1",
    # Else UCX drops the datagrams by which it connects endpoints, as not meant for it; then connecting times out.
    "UCX_UD_VERBS_ETH_DGID_CHECK": "n",
    "UCX_RNDV_THRESH": "4k",  # what is sent at once is copied, and no cache is used
    "UCX_LOG_LEVEL": "error",
}
LIBFABRIC = NO_SHARED_MEMORY | {
    "MPIR_CVAR_CH4_NETMOD": "ofi",
    "OMPI_MCA_pml": "cm",
    "OMPI_MCA_mtl": "ofi",
    "OMPI_MCA_mtl_ofi_provider_include": "verbs;ofi_rxm",
    "OMPI_MCA_osc": "^ucx",
    "FI_PROVIDER": "verbs;ofi_rxm",
    "FI_VERBS_IFACE": soft_roce.INTERFACE,
    "FI_UNIVERSE_SIZE": "2",  # else it wants longer queues than the device has
    # What is shorter is copied, at once or in pieces.
    "FI_OFI_RXM_BUFFER_SIZE": "4096",
    "FI_OFI_RXM_SAR_LIMIT": "4096",
}
LAYERS = {"ucx": UCX, "libfabric": LIBFABRIC}
PAIRS = (("openmpi", "ucx"), ("openmpi", "libfabric"), ("mpich", "ucx"), ("wheel", "ucx"), ("wheel", "libfabric"))
COMBINATIONS = [(*pair, mode) for mode in ("send", "window") for pair in PAIRS]
USUAL = COMBINATIONS[:1]


@pytest.fixture(scope="module", autouse=True)
def device() -> Iterator[None]:
    with soft_roce.made():
        yield


def exchange(library: str, layer: str, mode: str, folder: Path, watched: bool) -> tuple[dict[str, int], str]:
    """How many messages of each kind were wrong, and all that was said."""
    which = LIBRARIES[library]
    which.require()
    program = folder / "mpi"
    subprocess.run([which.compiler, "-O2", "-Wall", "-Wextra", "-o", program, PROGRAM], check=True)
    preload = [sys.executable, "-m", "ummunotify", "run", f"--{layer}", "--source", "bpf", "--"] if watched else []
    result = subprocess.run(
        [*preload, which.launcher, "-n", "2", program, mode, LENGTH, MESSAGES],
        env=os.environ | which.environment | LAYERS[layer] | {"UMMUNOTIFY_REPORT": "1", "IPATH_NO_BACKTRACE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(result.stdout)
    found = re.findall(r"^(\w+): (\d+) of (\d+) wrong$", result.stdout, re.MULTILINE)
    wrong = {kind: int(count) for kind, count, _ in found}
    assert set(CHANGES) < set(wrong), result.stdout
    assert sum(int(total) for _, _, total in found) == int(MESSAGES)
    assert (result.returncode != 0) == any(wrong.values()), result.stdout
    return wrong, result.stdout


@pytest.mark.parametrize(("library", "layer", "mode"), COMBINATIONS if SLOW else USUAL)
def test_memory_that_is_changed(library: str, layer: str, mode: str, tmp_path: Path) -> None:
    wrong, said = exchange(library, layer, mode, tmp_path, watched=False)
    assert all(wrong[change] for change in CHANGES), said
    wrong, said = exchange(library, layer, mode, tmp_path, watched=True)
    assert not any(wrong.values()), said
    told = re.findall(r"registrations watched (\d+)" if layer == "ucx" else r"(\d+) subscribed", said)
    assert max(map(int, told)) > len(CHANGES), said
