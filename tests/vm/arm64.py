"""What an arm64 guest has instead of the host's files: a tree of Debian's packages, and what is compiled for it here.

Under emulation a compiler takes minutes, so the host's own compile: GCC for arm64, and Python, which believes that it
is arm64's if it is given what that one says of itself. So both must be the same release of Debian.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import random_changes

ROOT = Path(__file__).resolve().parents[2]
VENV = Path(sys.prefix, "arm64")
"""What the guest has at the place of the host's virtual environment."""
CORE = VENV / "core"
"""Where tests/core is compiled."""
BUILT = VENV / "built"
SETUP = (f"--cross-file={ROOT / 'tools/aarch64.ini'}", "-Dwerror=true")
SUITE = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
# Debian's: for the guest itself and what virtme-ng starts in it; what the tests run; and Python's headers.
GUEST_PACKAGES = (
    "base-passwd,bash,busybox-static,coreutils,dash,e2fsprogs,findutils,grep,hostname,iproute2,kmod,libbpf1,libc-bin,"
    "mawk,mount,procps,python3,sed,util-linux"
)
PACKAGES = f"{GUEST_PACKAGES},gcc,libc6-dev,libpython3-dev"
FROM_PYPI = ("click", "hypothesis", "meson", "numpy", "pytest", "rich")


def make_tree(tree: Path, mirror: str, suite: str = SUITE, packages: str = PACKAGES) -> None:
    """Unpacked, not installed: nothing of it needs to run for that."""
    tree.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tree.parent, prefix=".tree-") as scratch:
        made = Path(scratch, "root")
        with open(f"{scratch}/apt.conf", "w") as settings:
            subprocess.run([ROOT / "tools/apt-settings"], stdout=settings, check=True)
        command = ["mmdebstrap", "--quiet", "--variant=extract", "--architecture=arm64", f"--include={packages}"]
        command.append(f"--aptopt={scratch}/apt.conf")
        subprocess.run([*command, suite, made, f"deb {mirror} {suite} main"], check=True)
        for name in ("passwd", "group"):
            shutil.copy(made / f"usr/share/base-passwd/{name}.master", made / f"etc/{name}")
        # What virtme-ng takes for granted.
        (made / "sbin/poweroff").symlink_to("/bin/busybox")
        (made / "etc/shadow").touch()
        for name in ("etc/lvm", "opt", "srv"):
            (made / name).mkdir(exist_ok=True)
        # The kernel's own would be compiled at each start of Python.
        library = made / f"usr/lib/python{sys.version_info.major}.{sys.version_info.minor}"
        if library.exists():
            subprocess.run([sys.executable, "-m", "compileall", "-q", "-s", made, library], check=False)
        made.rename(tree)


def build(tree: Path) -> None:
    """Compile the package, the programs of tests/core and those of random_changes.py. Warnings are errors."""

    def run(command: list[str | Path], **more: str) -> None:
        done = subprocess.run(command, env=environment | more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            sys.exit(done.stdout.decode(errors="replace"))

    # As pip takes a while, also where nothing has changed.
    names = ("src", "tests/core", "tests/c", "tests/random_changes.py", "tests/vm/arm64.py", "meson.build")
    files = [file for name in names for file in (ROOT / name, *(ROOT / name).rglob("*")) if file.suffix != ".pyc"]
    newest = max(file.stat().st_mtime for file in files if file.is_file())
    if BUILT.exists() and BUILT.stat().st_mtime == newest:
        return
    environment = os.environ | {"CC": f"aarch64-linux-gnu-gcc -idirafter {tree / 'usr/include'}"}
    packages = VENV.joinpath(*Path(os.path.relpath(random_changes.PACKAGE, sys.prefix)).parts[:-1])
    packages.mkdir(parents=True, exist_ok=True)
    (VENV / "pyvenv.cfg").write_text("home = /usr/bin\n")
    with tempfile.TemporaryDirectory() as scratch:
        name = "_sysconfigdata__aarch64-linux-gnu"
        shutil.copy(next(tree.glob(f"usr/lib/python3*/{name}.py")), scratch)
        pretend = {"_PYTHON_HOST_PLATFORM": "linux-aarch64", "_PYTHON_SYSCONFIGDATA_NAME": name, "PYTHONPATH": scratch}
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-build-isolation"]
        options = [f"--target={packages}", "--upgrade", *(f"-Csetup-args={each}" for each in SETUP)]
        run([*pip, *options, f"-Cbuild-dir={VENV / 'build'}", ROOT, *FROM_PYPI], **pretend)
    # What pip has as scripts runs at the same path in the guest.
    shutil.copytree(packages / "bin", VENV / "bin", dirs_exist_ok=True)
    for name in ("python", "python3"):
        (VENV / "bin" / name).unlink(missing_ok=True)
        (VENV / "bin" / name).symlink_to("/usr/bin/python3")
    meson = [Path(sys.prefix, "bin/meson")]
    if not CORE.exists():
        run([*meson, "setup", CORE, ROOT, *SETUP, "-Dpython=disabled", "-Dtests=true"])
    run([*meson, "compile", "-C", CORE])
    suffix = f".cpython-{sys.version_info.major}{sys.version_info.minor}-aarch64-linux-gnu.so"
    random_changes.build(packages / "ummunotify", ["aarch64-linux-gnu-gcc", "-idirafter", tree / "usr/include"], suffix)
    BUILT.touch()
    os.utime(BUILT, (newest, newest))
