"""examples/mpi_ranks.py: ranks without privileges, which share a daemon."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

from daemons import COMMAND, Daemon
from support import LONG, require, require_source

EXAMPLE = Path(__file__).parent.parent / "examples" / "mpi_ranks.py"
MPIEXEC = Path(sys.executable).with_name("mpiexec")


def test_ranks(daemon: Daemon) -> None:
    if importlib.util.find_spec("mpi4py") is None or not MPIEXEC.exists():
        require("mpi", "mpi4py and mpich are not installed: pip install mpi4py mpich")
    # root, but without any capability: so that it does not matter who may read this checkout.
    done = subprocess.run(
        ["setpriv", "--bounding-set=-all", MPIEXEC, "-n", "4", sys.executable, EXAMPLE, "200"],
        capture_output=True,
        text=True,
        timeout=LONG,
        env=os.environ | {"HYDRA_LAUNCHER": "fork"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4 ranks, source daemon:kvm: 800 transfers, ")
    hits, misses, stale, same = [int(number) for number in re.findall(r"\b\d+\b", done.stdout)][2:]
    assert hits + misses == 800
    assert hits > 0
    assert same > 0
    # What was unmapped was found so, but for what nobody asked for again.
    assert 0 < stale < misses
    daemon.settled()


def test_mpi_that_uses_ucx() -> None:
    """`run --libfabric` says that the ranks have no monitor, and how MPICH takes libfabric."""
    if importlib.util.find_spec("mpi4py") is None or not MPIEXEC.exists():
        require("mpi", "mpi4py and mpich are not installed: pip install mpi4py mpich")
    require_source("uffd")

    def said(**environment: str) -> str:
        rank = [sys.executable, "-c", "from mpi4py import MPI; MPI.COMM_WORLD.Barrier()"]
        done = subprocess.run(
            [*COMMAND, "run", "--libfabric", "--source", "uffd", "--", MPIEXEC, "-n", "2", *rank],
            capture_output=True,
            text=True,
            timeout=LONG,
            env=os.environ | {"HYDRA_LAUNCHER": "fork"} | environment,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert said(MPIR_CVAR_CH4_NETMOD="ucx").count("has no monitor for libfabric: it has loaded UCX") == 2
    assert "has no monitor" not in said(MPIR_CVAR_CH4_NETMOD="ofi")
