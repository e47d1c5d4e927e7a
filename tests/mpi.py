"""MPI libraries that tests run programs with."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from support import require

PROGRAM = Path(__file__).parent / "c/mpi.c"
"""Two ranks that change the memory of their messages."""
_BIN = Path(sys.executable).parent


class Library(NamedTuple):
    compiler: Path
    launcher: str
    environment: dict[str, str]
    needs: str

    def require(self, *, always: bool = True) -> None:
        if not self.compiler.exists() or not shutil.which(self.launcher):
            require("mpi", f"there is no {self.compiler.name}: {self.needs}", always=always)


_OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_plm": "isolated",
}
_MPICH = {"HYDRA_LAUNCHER": "fork"}
LIBRARIES = {
    "openmpi": Library(Path("/usr/bin/mpicc.openmpi"), "mpirun.openmpi", _OPEN_MPI, "apt-get install libopenmpi-dev"),
    "mpich": Library(Path("/usr/bin/mpicc.mpich"), "mpiexec.hydra", _MPICH, "apt-get install libmpich-dev"),
    "wheel": Library(_BIN / "mpicc", str(_BIN / "mpiexec"), _MPICH, "pip install mpich"),
}
