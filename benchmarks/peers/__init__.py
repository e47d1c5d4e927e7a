"""What others notice: the hooks of UCX and the monitors of libfabric, put through the list of changes of `selftest`.

    python -m benchmarks.peers [NAME]...

Each runs in a process of its own, which it patches or whose page faults it handles. They are Debian's (libucx-dev and
libfabric-dev), as they are by default. They are asked directly, not through the caches above them: what these are not
told they cannot know.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple, cast

from ummunotify import Notifier
from ummunotify.errors import UnsupportedMemoryError
from ummunotify.selftest import Outcome, Result, run_case
from ummunotify.selftest.changes import CASES, CHANGES

NAMES = ("ucx", "memhooks", "uffd")
"""UCX's, and libfabric's two."""

TITLES = {"ucx": "UCX", "memhooks": "libfabric memhooks", "uffd": "libfabric uffd"}

_HERE = Path(__file__).parent
_SECONDS = 20
"""None of the changes takes nearly as long."""


class _Region:
    def __init__(self, peer: Peer, number: int) -> None:
        self._peer = peer
        self.number = number

    @property
    def valid(self) -> bool:
        return not self._peer.library.peer_changed(self.number)

    def close(self) -> None:
        self._peer.regions.remove(self)
        self._peer.library.peer_unwatch(self.number)


class _Event(NamedTuple):
    region: _Region


class Peer:
    """As much of a Notifier as the self-test needs."""

    def __init__(self, name: str, library: ctypes.CDLL) -> None:
        self.source = TITLES[name]
        self.library = library
        self.regions: list[_Region] = []
        if status := library.peer_open(name.encode()):
            raise RuntimeError(f"{self.source} cannot be started: {status}")

    def watch(self, memory: tuple[int, int]) -> _Region:
        address, length = memory
        number = self.library.peer_watch(ctypes.c_void_p(address), ctypes.c_size_t(length))
        if number < 0:
            why = f"it cannot be watched: {os.strerror(-number)}"
            raise UnsupportedMemoryError(why, address, length, None, why)
        self.regions.append(region := _Region(self, number))
        return region

    def read(self) -> list[_Event]:
        return [_Event(region) for region in self.regions if not region.valid]


def _build(name: str, folder: Path) -> Path:
    """A library, or an interpreter that has it inside."""
    made = folder / f"peer-{name}"
    command = ["gcc", "-O2", "-Wall", "-Wextra", "-o", str(made), str(_HERE / "peers.c")]
    if name == "ucx":
        command += ["-DWITH_UCX", "-shared", "-fPIC", "-lucm", "-lucs"]
    else:
        # The providers would need libraries for hardware; nobody calls them.
        command += ["-rdynamic", "-Wl,--wrap=ofi_mr_cache_notify,--unresolved-symbols=ignore-all,-z,lazy"]
        command += ["-l:libfabric.a", f"-lpython{sysconfig.get_python_version()}", "-lpthread", "-ldl"]
    subprocess.run(command, check=True)
    return made


def child(name: str, library: str, first: str) -> None:
    peer = Peer(name, ctypes.CDLL(library or None))
    for case in CASES[int(first) :]:
        print(json.dumps(run_case(case, cast(Notifier, peer))), flush=True)
    os._exit(0)  # what the peers leave behind is not made for exiting


def measure(name: str) -> list[Result]:
    """Of a peer that makes the process hang or crash, that is the outcome, and the next process goes on behind it."""
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        made = str(_build(name, Path(folder)))
        command = [sys.executable, "-m", __name__, name, made] if name == "ucx" else [made, "-m", __name__, name, ""]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path[1:]])}
        while len(results) < len(CASES):
            process = subprocess.Popen(
                [*command, str(len(results))], env=environment, stdout=subprocess.PIPE, text=True
            )
            assert process.stdout is not None
            before = len(results)
            while select.select([process.stdout], [], [], _SECONDS)[0] and (line := process.stdout.readline()):
                case, changes, outcome, why = json.loads(line)
                results.append(Result(case, changes, Outcome(outcome), why))
            process.kill()  # no other way out of a hang
            status = process.wait()
            if len(results) < len(CASES):
                if not before and not results:
                    raise RuntimeError(f"{TITLES[name]} does not start: {status}")
                case = CASES[len(results)]
                why = "it hangs" if status == -signal.SIGKILL else f"it ends with status {status}"
                results.append(Result(case.name, case in CHANGES, Outcome.FAILED, why))
    return results
