"""Boot other kernels under this machine's own user space with virtme-ng, and run the kernel tests there.

    python tests/vm/run.py                               # all of kernels.toml, suite.sh in each
    python tests/vm/run.py --only debian-6.1/full -- python -m pytest tests/test_changes.py
    python tests/vm/run.py --arch arm64                  # those of arm64
    python tests/vm/run.py --fetch                       # only download and compile what it takes

The guests have the host's files, at the same paths. What they write is gone afterwards. Kernels are downloaded from
Debian's archive when they are missing, also those of other releases of Debian, and unpacked into a cache
(UMMUNOTIFY_VM_CACHE, by default in ~/.cache). So is a small Debian for arm64, which a guest of that architecture has
instead of the host's files, but for the checkout and the virtual environment: see arm64.py.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
import arm64  # noqa: E402
from random_changes import build  # noqa: E402

CACHE = Path(os.environ.get("UMMUNOTIFY_VM_CACHE") or Path.home() / ".cache/ummunotify-vm")
TREE = CACHE / "arm64"
KERNELS = {"amd64": CACHE / "kernels", "arm64": TREE / "kernels"}
"""virtme-ng loads modules from the guest's files."""
PATH = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
FAILED = 125  # the guest, not the command
# What udev would load for the emulated machine and that nothing here needs, or not yet: it costs 10 s.
BLACKLIST = (
    "ahci,libahci,libata,sr_mod,cdrom,sg,iTCO_wdt,lpc_ich,i2c_i801,i2c_smbus,psmouse,pcspkr,i6300esb,button,evdev,"
    "powernow_k8,kvm,kvm_amd,aesni_intel,crc32_pclmul,crc32c_intel,ghash_clmulni_intel,crct10dif_pclmul,"
    "polyval_clmulni,sha512_ssse3,sha256_ssse3,sha1_ssse3"
)


# What is printed before the kernel knows that it should be quiet.
EARLY = re.compile(r"^\[    0\.0|KASLR using|^Probing EDD|^\x1b.*(SeaBIOS|iPXE|Booting)|^$")


running: set[subprocess.Popen[bytes]] = set()
"""Guests. Each is in a session of its own, so that it is killed with all that started it."""


class Guest(NamedTuple):
    kernel: str
    arch: str
    """As Debian names it."""
    package: str
    suite: str
    """Of Debian, that has the package; if empty, one of this machine's."""
    append: str
    """To the kernel's command line."""
    preempt: str
    """The preemption model to boot with; if empty, the kernel has no choice."""
    tests: list[str]
    sources: list[str]
    """That must work with BPF, and miss nothing."""
    name: str


def guests(by_hand: bool) -> list[Guest]:
    """Those of kernels.toml, each followed by the same for each preemption model."""
    kernels = tomllib.loads((HERE / "kernels.toml").read_text())
    return [
        Guest(
            each["name"],
            each.get("arch", "amd64"),
            each["package"],
            each.get("suite", ""),
            each.get("append", ""),
            model,
            each["tests"],
            each["sources"],
            name,
        )
        for each in kernels["kernel"] + (kernels["by-hand"] if by_hand else [])
        for name, model in (
            (each["name"], each["preempt"][0] if each["preempt"] else ""),
            *((f"{each['name']}/{one}", one) for one in each["preempt"]),
        )
    ]


def image(guest: Guest) -> Path | None:
    root = KERNELS[guest.arch] / guest.kernel
    found = (file for place in ("boot/vmlinuz-*", "lib/modules/*/vmlinuz") for file in root.glob(place))
    return next((file.resolve() for file in found), None)


def output(*command: str | Path, cwd: Path | None = None) -> str:
    return subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.PIPE, text=True).stdout


def mirror() -> str:
    which = ("$(REPO_URI)", "Created-By: Packages", "Label: Debian", "Component: main")
    if not (mirrors := output("apt-get", "indextargets", "--format", *which).split()):
        sys.exit("apt's sources name no mirror of Debian")
    return mirrors[0]


def archive(suite: str, scratch: Path) -> list[str]:
    """Options of apt's tools: to look into this suite of the machine's mirror of Debian, and nowhere else."""
    Path(scratch, "sources.list").write_text(f"deb {mirror()} {suite} main\n")
    Path(scratch, "lists/partial").mkdir(parents=True)
    places = {"Etc::SourceList": "sources.list", "Etc::SourceParts": "none", "State::Lists": "lists", "Cache": "cache"}
    places["State::Status"] = "none"  # as if nothing were installed
    options = [f"Dir::{key}={scratch / path}" for key, path in places.items()]
    return [argument for option in options for argument in ("-o", option)]


def fetch(guest: Guest) -> None:
    """Unpack a kernel's packages into the cache, without installing them."""
    kernels = KERNELS[guest.arch]
    kernels.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kernels, prefix=".fetch-") as folder:
        scratch = Path(folder)
        options = ["-o", "APT::Sandbox::User=root"]  # apt's unprivileged user cannot write there
        options += ["-o", f"APT::Architecture={guest.arch}", "-o", f"APT::Architectures={guest.arch}"]
        if guest.suite:
            options += archive(guest.suite, scratch)
            output("apt-get", "-q", *options, "update")
        # Since Linux 7 the package of the image depends on others, which hold it and the modules.
        needed = output("apt-cache", *options, "depends", "--recurse", "--important", guest.package)
        packages = set(re.findall(r"\blinux-(?:image|base|binary|modules)-\d\S*", needed))
        output("apt-get", "-q", *options, "download", *packages, cwd=scratch)
        root = Path(scratch, "root")
        for package in scratch.glob("*.deb"):
            output("dpkg-deb", "-x", package, root)
        if not (root / "lib").exists():
            (root / "lib").symlink_to("usr/lib")
        for modules in root.glob("lib/modules/*"):
            output("depmod", "-b", root, modules.name)
        root.rename(kernels / guest.kernel)
    if guest.arch == "arm64":
        (TREE / "lib/modules").mkdir(exist_ok=True)
        for modules in (kernels / guest.kernel).glob("lib/modules/*"):
            (TREE / "lib/modules" / modules.name).symlink_to(f"/{modules.relative_to(TREE)}")


def run(
    guest: Guest,
    command: list[str],
    timeout: float,
    prefix: str,
    threads: str,
    shares: Mapping[Path, Path] | None = None,
) -> int:
    """Boot the guest, run the command there and pass on what it prints; the command's exit status.

    `shares`: what the guest has of the host's files, and where, its root first; without them, what the tests need.

    `threads`: with a single one its CPUs take turns. With several they run at once, but QEMU before 8.1 may translate
    code while it is patched by another CPU, and the kernel dies of a breakpoint that is there no more ("Oops: int3").
    """
    kept = {name: value for name, value in os.environ.items() if name.startswith(("UMMUNOTIFY_", "PYTEST_"))}
    kept |= {"PATH": PATH, "HOME": "/root", "UMMUNOTIFY_VM": guest.name}
    kept["UMMUNOTIFY_VM_TESTS"] = " ".join(f"tests/{each}" for each in guest.tests)
    kept["UMMUNOTIFY_VM_SOURCES"] = " ".join(guest.sources)
    directory = "/"
    if shares is None:
        directory, kept["VIRTUAL_ENV"], shares = os.getcwd(), sys.prefix, {Path("/"): Path("/")}
        if guest.arch == "arm64":
            # Meson has tests/core at the place where it was compiled.
            shares = {TREE: Path("/"), arm64.ROOT: arm64.ROOT, arm64.VENV: Path(sys.prefix), arm64.CORE: arm64.CORE}
            kept["UMMUNOTIFY_VM_CORE"] = str(arm64.CORE)
    kept["UMMUNOTIFY_VM_SHARES"] = " ".join(map(str, shares.values()))
    settings = [f"{name}={value}" for name, value in kept.items()]
    started = time.monotonic()
    root = next(iter(shares))
    with tempfile.NamedTemporaryFile("w", prefix="ummunotify-vm-", suffix=".sh", dir=root / "tmp") as script:
        # The kernel's command line, where virtme-ng puts the command, is short.
        script.write(f"export {shlex.join(settings)}\nset -- {shlex.join([directory, *command])}\n")
        script.write((HERE / "guest.sh").read_text())
        script.flush()
        arguments = ["vng", "--verbose", "--run", str(image(guest))]
        arguments += ["--disable-kvm", "--disable-microvm", "--force-9p"]
        arguments += ["--user", "root", "--memory", "2G", "--cpus", "2"]
        arguments += ["--exec", f"bash /tmp/{Path(script.name).name}"]
        hardware = f"-accel tcg,thread={threads}"
        if guest.arch == "arm64":
            arguments += ["--arch", "arm64", "--root", str(root), "--busybox", str(root / "bin/busybox")]
            # With KVM in the guest. To emulate the authentication of pointers takes most of the time.
            hardware += " -machine virt,virtualization=on -cpu max,pauth=off"
        for number, share in enumerate(shares):
            hardware += f" -fsdev local,id=share{number},path={share},security_model=none,readonly=on,multidevs=remap"
            hardware += f" -device virtio-9p-pci,fsdev=share{number},mount_tag=share{number}"
        arguments.append(f"--qemu-opts={hardware}")
        append = f"nowatchdog modprobe.blacklist={BLACKLIST} {guest.append}"
        if guest.preempt:
            append += f" preempt={guest.preempt}"
        if guest.arch == "amd64":
            # On a busy host the emulated clocks drift apart; that must not look like a defect of the guest.
            append += " tsc=reliable"
        # Of the kernel's messages only the last: why it panicked.
        arguments += ["--append", f"{append} loglevel=1"]
        # QEMU's output must be a pipe: it truncates a file.
        vm = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        running.add(vm)
        timer = threading.Timer(timeout, os.killpg, (vm.pid, signal.SIGKILL))
        timer.start()
        try:
            assert vm.stdout is not None
            for data in vm.stdout:
                line = data.decode(errors="replace").rstrip("\r\n")
                if not EARLY.search(line):
                    print(prefix + line, flush=True)
            status = vm.wait()
        finally:
            timer.cancel()
            running.discard(vm)
            if vm.poll() is None:
                os.killpg(vm.pid, signal.SIGKILL)
    meaning = {
        255: " (the kernel panicked)",
        FAILED: " (the guest could not be set up)",
        -9: f" (killed; it may take {timeout:.0f} s)",
    }
    elapsed = time.monotonic() - started
    print(f"{guest.name}: exit status {status}{meaning.get(status, '')} after {elapsed:.0f} s", flush=True)
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", metavar="KERNEL[/PREEMPT]", help=f"of {', '.join(each.name for each in guests(True))}"
    )
    parser.add_argument("--arch", choices=KERNELS, default="amd64", help="of all (%(default)s)")
    parser.add_argument("--timeout", type=float, default=3000, metavar="S", help="for each guest (%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="guests at a time (%(default)s)")
    parser.add_argument("--threads", choices=("single", "multi"), default="single", help="do its CPUs take turns?")
    parser.add_argument("--fetch", action="store_true", help="boot none: only download and compile what it takes")
    parser.add_argument("command", nargs="*", help="instead of suite.sh")
    options = parser.parse_args()
    os.environ["PATH"] = PATH  # vng and depmod
    chosen = [
        each
        for each in guests(by_hand=bool(options.only))
        if (each.name == options.only if options.only else each.name == each.kernel and each.arch == options.arch)
    ]
    if not chosen:
        parser.error(f"there is no kernel {options.only!r}")
    foreign = any(each.arch == "arm64" for each in chosen)
    missing = [each for each in chosen if image(each) is None]
    if missing:
        output("apt-get", "-q", "update")
    if foreign and not (TREE / "etc").exists():
        arm64.make_tree(TREE, mirror())
    for guest in missing:
        fetch(guest)
    if foreign:
        arm64.build(TREE)
    else:
        build()
    if options.fetch:
        return 0
    command = options.command or ["sh", str(HERE / "suite.sh")]
    with ThreadPoolExecutor(options.jobs) as pool:

        def stop(*_: object) -> None:
            pool.shutdown(wait=False, cancel_futures=True)
            for vm in list(running):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(vm.pid, signal.SIGKILL)
            sys.exit(FAILED)

        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)
        results = [
            pool.submit(
                run, each, command, options.timeout, f"{each.name}: " if len(chosen) > 1 else "", options.threads
            )
            for each in chosen
        ]
        return next((code for result in results if (code := result.result())), 0)


if __name__ == "__main__":
    sys.exit(main())
