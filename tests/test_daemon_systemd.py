"""The units that `ummunotify daemon install` writes, under a systemd of their own in namespaces."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from daemons import COMMAND
from support import LONG, require

from ummunotify.bpf import libbpf

EXPOSURE_MOST = 22
"""Ten times what it prints. It judges what the unit starts with; what the daemon keeps of that is checked here."""
TARGETS = ("test", "sysinit", "basic", "sockets", "shutdown")
CLIENT = """
import json, mmap, os, ummunotify
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
with ummunotify.open() as umn:
    buffer = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE)
    buffer[0] = 1
    region = umn.watch(buffer)
    buffer.close()
    print(json.dumps([umn.source, region.valid]))
"""
# The service's user gets into no home, /root or /tmp, so all of Python is to be found under /opt.
INSIDE = """
set -eu
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /opt
cp -a "$1/program" /opt/program
eval "$SETUP"
i=0
for folder in $FOLDERS; do
    mkdir /opt/$i
    mount --bind "$folder" /opt/$i
    i=$((i + 1))
done
umount -R /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
(
    exec > "$1/log" 2>&1 < /dev/null
    mkdir -p /run/systemd/journald.conf.d
    printf '[Journal]\\nStorage=volatile\\nReadKMsg=no\\nAudit=no\\n' > /run/systemd/journald.conf.d/test.conf
    /lib/systemd/systemd-journald &
    i=0
    while ! systemctl start ummunotify.socket; do
        sleep 0.1
        i=$((i + 1))
        [ $i -lt 100 ] || break
    done
    UMMUNOTIFY_SOCKET=/run/ummunotify/socket /opt/program -c "$CLIENT" > "$1/client"
    systemctl show ummunotify.service > "$1/service"
    cat /proc/$(systemctl show -P MainPID ummunotify.service)/status > "$1/status" || true
    systemctl stop ummunotify.socket ummunotify.service
    systemctl show ummunotify.service > "$1/stopped"
    journalctl --sync
    journalctl -D /run/log/journal -o json UMMUNOTIFY_EVENT=started + UMMUNOTIFY_EVENT=came > "$1/journal"
    journalctl -D /run/log/journal -o cat > "$1/messages"
    touch "$1/done"
) &
exec env -i container=other PATH="$PATH" SYSTEMD_UNIT_PATH="$1/units" \\
    "$SYSTEMD" --system --unit=test.target --log-target=console
"""
ENTER = """
echo $$ > "$1/cgroup.procs"
exec unshare -pmuiC --fork --kill-child --mount-proc sh -c "$2" - "$3"
"""


@pytest.fixture
def units(tmp_path: Path) -> Path:
    directory = tmp_path / "units"
    directory.mkdir()
    subprocess.run([*COMMAND, "daemon", "install", "--directory", directory], check=True, stdout=subprocess.DEVNULL)
    return directory


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A new one, of version 2, and empty."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    try:
        folder = next(Path(mount[1]) for mount in mounts if mount[2] == "cgroup2")
        cgroup = Path(tempfile.mkdtemp(prefix="ummunotify-", dir=folder))
    except (StopIteration, OSError) as error:
        require("systemd", f"no cgroup can be made: {error!r}")
    yield cgroup
    deadline = time.monotonic() + LONG
    for path, _, _ in os.walk(cgroup, topdown=False):
        while True:
            try:
                os.rmdir(path)
                break
            except OSError:  # what was killed is still on its way out
                assert time.monotonic() < deadline
                time.sleep(0.05)


def systemd() -> str:
    path = "/lib/systemd/systemd"
    if not os.access(path, os.X_OK) or shutil.which("systemd-analyze") is None:
        require("systemd", "systemd is not installed")
    return path


Run = Callable[[str], "Said"]


class Said(NamedTuple):
    """What became of the unit and of a client."""

    client: tuple[str, bool]
    """Its source, and whether its region was valid after a change."""
    service: dict[str, str]
    """Properties while it ran."""
    status: dict[str, str]
    """Of its process."""
    stopped: dict[str, str]
    """Properties after it was stopped."""
    journal: list[dict[str, str]]
    messages: list[str]
    everything: str


def properties(path: Path, separator: str) -> dict[str, str]:
    lines = (line.split(separator, 1) for line in path.read_text().splitlines())
    return {line[0]: line[1] for line in lines if len(line) == 2}


@pytest.fixture
def run(tmp_path: Path, units: Path, cgroup: Path) -> Run:
    """Runs the unit in a systemd of its own, after these commands."""
    folders = [sys.base_prefix, *(path for path in sys.path if "site-packages" in path or "dist-packages" in path)]
    program = tmp_path / "program"
    packages = ":".join(f"/opt/{i}" for i in range(1, len(folders)))
    program.write_text(
        f"#!/bin/sh\nexport LD_LIBRARY_PATH=/opt/0/lib PYTHONHOME=/opt/0 PYTHONPATH={packages}\n"
        f'exec /opt/0/bin/python{sys.version_info.major}.{sys.version_info.minor} "$@"\n'
    )
    program.chmod(0o755)
    for name in TARGETS:
        (units / f"{name}.target").write_text("[Unit]\nDefaultDependencies=no\n")
    # As it is installed, but for where Python is.
    service = units / "ummunotify.service"
    (command,) = re.findall(r"^ExecStart=!(\S+) daemon", service.read_text(), re.MULTILINE)
    service.write_text(service.read_text().replace(f"{command} daemon", "/opt/program -m ummunotify daemon --verbose"))

    def run(setup: str) -> Said:
        with open(tmp_path / "console", "wb") as console:
            process = subprocess.Popen(
                ["sh", "-c", ENTER, "-", str(cgroup), INSIDE, str(tmp_path)],
                env=os.environ | {"FOLDERS": " ".join(folders), "CLIENT": CLIENT, "SYSTEMD": systemd(), "SETUP": setup},
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
            )
        try:
            deadline = time.monotonic() + LONG
            while process.poll() is None and not (tmp_path / "done").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        texts = [tmp_path / name for name in ("console", "log", "messages")]
        everything = "\n".join(path.read_text() for path in texts if path.exists())
        assert (tmp_path / "done").exists(), everything
        return Said(
            tuple(json.loads((tmp_path / "client").read_text())),
            properties(tmp_path / "service", "="),
            properties(tmp_path / "status", ":\t"),
            properties(tmp_path / "stopped", "="),
            [json.loads(line) for line in (tmp_path / "journal").read_text().splitlines()],
            (tmp_path / "messages").read_text().splitlines(),
            everything,
        )

    return run


SETUPS = {
    "as it is": "",
    "no group kvm": 'grep -v ^kvm: /etc/group > "$1/group"; mount --bind "$1/group" /etc/group; ! getent group kvm',
    "for root only": (
        f'mknod -m 600 "$1/kvm" c {" ".join(map(str, divmod(os.stat("/dev/kvm").st_rdev, 256)))}; '
        'mount --bind "$1/kvm" /dev/kvm'
        if os.path.exists("/dev/kvm")
        else ""
    ),
    "another group's": (
        f'mknod -m 660 "$1/kvm" c {" ".join(map(str, divmod(os.stat("/dev/kvm").st_rdev, 256)))}; '
        'chgrp 12345 "$1/kvm"; mount --bind "$1/kvm" /dev/kvm'
        if os.path.exists("/dev/kvm")
        else ""
    ),
}


@pytest.mark.parametrize("setup", SETUPS)
def test_it_runs_with_all_that_the_unit_forbids(run: Run, setup: str) -> None:
    said = run(SETUPS[setup])
    assert said.client == ("daemon:kvm", False), said.everything
    assert said.service["ActiveState"] == "active"
    assert said.service["DynamicUser"] == "yes"
    assert said.status["CapPrm"] == said.status["CapEff"] == said.status["CapBnd"] == "000000c000000000"
    assert int(said.status["CapInh"], 16) == int(said.status["CapAmb"], 16) == 0
    assert all(int(uid) >= 61184 for uid in said.status["Uid"].split())  # systemd's range for dynamic users
    assert all(int(gid) >= 61184 for gid in said.status["Gid"].split())
    assert not said.status["Groups"].strip()
    assert said.status["NoNewPrivs"] == "1"
    assert said.status["Seccomp"] == "2"
    assert said.stopped["Result"] == "success"
    assert said.stopped["ExecMainStatus"] == "0"
    # In the journal each field is one, and none is an address.
    started, came = said.journal
    assert (started["UMMUNOTIFY_EVENT"], started["UMMUNOTIFY_SOCKET"]) == ("started", "/run/ummunotify/socket")
    assert (started["UMMUNOTIFY_PROBE"], started["UMMUNOTIFY_KVM"]) == ("kvm", "given")
    assert (started["_TRANSPORT"], started["PRIORITY"]) == ("journal", "6")
    assert (came["UMMUNOTIFY_EVENT"], came["UMMUNOTIFY_UID"], came["PRIORITY"]) == ("came", "65534", "7")
    for entry in said.journal:  # all that the text has
        fields = dict(field.split("=", 1) for field in entry["MESSAGE"].split()[1:4])
        assert fields == {name: entry[f"UMMUNOTIFY_{name.upper()}"] for name in fields}
    assert "0x" not in started["MESSAGE"] + came["MESSAGE"]


def test_without_kvm_it_takes_kprobes_and_says_so(run: Run) -> None:
    """Where there are none either, it says what is missing, and ends."""
    said = run(
        'mkdir "$1/dev"; mount -t tmpfs -o mode=755 tmpfs "$1/dev"; mkdir "$1/dev/shm"; '
        'cp -a /dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/tty "$1/dev"; mount --bind "$1/dev" /dev'
    )
    (missing,) = {line for line in said.messages if "there is no /dev/kvm" in line}
    if libbpf.kprobes_available():
        assert said.client == ("daemon:zap", False), said.everything
        assert missing.startswith("missing probes=kvm, mmu_notifier")
        assert said.journal[0]["UMMUNOTIFY_PROBE"] == "zap"
    else:
        assert said.client == ("uffd", False), said.everything
        assert "zap: the kernel has no kprobes" in missing
        assert said.service["ActiveState"] != "active"


def test_exposure(units: Path) -> None:
    systemd()
    done = subprocess.run(
        [
            "systemd-analyze",
            "security",
            "--offline=true",
            f"--threshold={EXPOSURE_MOST}",
            units / "ummunotify.service",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_verify(units: Path) -> None:
    systemd()
    done = subprocess.run(
        ["systemd-analyze", "--man=no", "verify", units / "ummunotify.service", units / "ummunotify.socket"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if "ummunotify" in line]
