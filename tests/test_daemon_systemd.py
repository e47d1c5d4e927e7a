"""The units that `ummunotify daemon install` writes, under a systemd of their own in namespaces."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import COMMAND, PATIENCE
from support import require, require_root

EXPOSURE_MOST = 20
"""Ten times what it prints."""
KVM_GROUP = 61000
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
# The service's user gets into no home, /root or /tmp, so all of Python is to be found under /run. It gets /dev/kvm by
# the group kvm, which udev makes: not every machine has it.
INSIDE = """
set -eu
mount --make-rprivate /
mount -t tmpfs tmpfs /run
{ grep -v ^kvm: /etc/group; echo kvm:x:$KVM:; } > /run/group
mount --bind /run/group /etc/group
cp -a /dev/kvm /run/kvm
chown root:$KVM /run/kvm
chmod 660 /run/kvm
mount --bind /run/kvm /dev/kvm
mkdir /run/python
cp -a "$1/program" /run/python
i=0
for folder in $FOLDERS; do
    mkdir /run/python/$i
    mount --bind "$folder" /run/python/$i
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
    UMMUNOTIFY_SOCKET=/run/ummunotify/socket /run/python/program -c "$CLIENT" > "$1/client"
    systemctl show ummunotify.service > "$1/service"
    cat /proc/$(systemctl show -P MainPID ummunotify.service)/status > "$1/status"
    systemctl stop ummunotify.socket ummunotify.service
    systemctl show ummunotify.service > "$1/stopped"
    journalctl --sync
    journalctl -D /run/log/journal -o json UMMUNOTIFY_EVENT=started + UMMUNOTIFY_EVENT=came > "$1/journal"
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
    deadline = time.monotonic() + PATIENCE
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


@pytest.mark.usefixtures("privileged")
def test_it_runs_with_all_that_the_unit_forbids(tmp_path: Path, units: Path, cgroup: Path) -> None:
    folders = [sys.base_prefix, *(path for path in sys.path if "site-packages" in path or "dist-packages" in path)]
    program = tmp_path / "program"
    packages = ":".join(f"/run/python/{i}" for i in range(1, len(folders)))
    home = "/run/python/0"
    program.write_text(
        f"#!/bin/sh\nexport LD_LIBRARY_PATH={home}/lib PYTHONHOME={home} PYTHONPATH={packages}\n"
        f'exec {home}/bin/python{sys.version_info.major}.{sys.version_info.minor} "$@"\n'
    )
    program.chmod(0o755)
    for name in TARGETS:
        (units / f"{name}.target").write_text("[Unit]\nDefaultDependencies=no\n")
    more = units / "ummunotify.service.d" / "more.conf"
    more.parent.mkdir()
    more.write_text("[Service]\nExecStart=\nExecStart=/run/python/program -m ummunotify daemon --verbose\n")
    settings = {"FOLDERS": " ".join(folders), "CLIENT": CLIENT, "SYSTEMD": systemd(), "KVM": str(KVM_GROUP)}
    with open(tmp_path / "console", "wb") as console:
        process = subprocess.Popen(
            ["sh", "-c", ENTER, "-", str(cgroup), INSIDE, str(tmp_path)],
            env=os.environ | settings,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + PATIENCE
        while process.poll() is None and not (tmp_path / "done").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    said = "\n".join((tmp_path / name).read_text() for name in ("console", "log") if (tmp_path / name).exists())
    assert (tmp_path / "done").exists(), said
    assert json.loads((tmp_path / "client").read_text()) == ["daemon:kvm", False], said
    service = dict(line.split("=", 1) for line in (tmp_path / "service").read_text().splitlines())
    assert service["ActiveState"] == "active"
    assert service["DynamicUser"] == "yes"
    status = dict(line.split(":\t", 1) for line in (tmp_path / "status").read_text().splitlines())
    assert status["CapEff"] == status["CapBnd"] == "000000c000000000"
    assert int(status["Uid"].split()[0]) >= 61184  # systemd's range for dynamic users
    assert status["Seccomp"] == "2"
    stopped = dict(line.split("=", 1) for line in (tmp_path / "stopped").read_text().splitlines())
    assert stopped["Result"] == "success"
    assert stopped["ExecMainStatus"] == "0"
    # In the journal each field is one, and none is an address.
    started, came = (json.loads(line) for line in (tmp_path / "journal").read_text().splitlines())
    assert (started["UMMUNOTIFY_EVENT"], started["UMMUNOTIFY_SOCKET"]) == ("started", "/run/ummunotify/socket")
    assert (started["_TRANSPORT"], started["PRIORITY"]) == ("journal", "6")
    assert (came["UMMUNOTIFY_EVENT"], came["UMMUNOTIFY_UID"], came["PRIORITY"]) == ("came", "65534", "7")
    assert "0x" not in started["MESSAGE"] + came["MESSAGE"]


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


def test_install_says_what_is_missing(tmp_path: Path) -> None:
    """systemd starts no service with a group that there is not."""
    require_root("the test mounts a file")
    group, directory = tmp_path / "group", tmp_path / "units"
    directory.mkdir()
    install = [*COMMAND, "daemon", "install", "--directory", str(directory)]
    for name, said in (("kvm", False), ("other", True)):
        group.write_text(f"root:x:0:\n{name}:x:{KVM_GROUP}:\n")
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-ec", 'mount --bind "$0" /etc/group && "$@"', str(group), *install],
            capture_output=True,
            text=True,
            check=True,
        )
        assert ("groupadd --system kvm" in done.stderr) == said
