"""Install each wheel for arm64 in dist/, and nothing else of this checkout, in an arm64 guest, and use it there.

    python tests/vm/wheels.py [WHEEL...]

A guest has the release of Debian whose Python the wheel is for. There is none with Python 3.12; sid's, which has
3.14, does not start here yet.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
import arm64
import run
from run import CACHE, TREE

SUITES = {"cp311": "bookworm", "cp313": "trixie"}
COMMANDS = """
set -e
unset PYTHONPATH PYTHONDONTWRITEBYTECODE
say() { echo "== $(cut -d' ' -f1 /proc/uptime) s: $*"; }
say "$(uname -rm), pages of $(getconf PAGESIZE) bytes, $(python3 --version)"
python3 -m venv --without-pip /var/tmp/venv
pip="$(echo /wheels/pip-*.whl)/pip" # to install that one, too, would take minutes
/var/tmp/venv/bin/python3 "$pip" -q install --no-compile --no-index --find-links /wheels ummunotify
say installed
for command in --version demo selftest; do
    say "ummunotify $command"
    /var/tmp/venv/bin/ummunotify $command
done
say done
"""


def test(wheel: Path) -> int:
    python = wheel.name.split("-")[2]
    if python not in SUITES:
        print(f"{wheel.name}: not tried, as there is no guest with this Python")
        return 0
    [guest] = (each for each in run.guests(by_hand=False) if each.name == "debian-6.12-arm64")
    if not (TREE / "etc").exists():  # the kernel is there
        arm64.make_tree(TREE, run.mirror())
    if run.image(guest) is None:
        run.fetch(guest)
    tree = CACHE / f"arm64-{SUITES[python]}"
    if not tree.exists():
        arm64.make_tree(tree, run.mirror(), SUITES[python], arm64.GUEST_PACKAGES)
    # virtme-ng finds modules among the guest's files.
    subprocess.run(["cp", "-dru", "--link", TREE / "kernels", tree], check=True)
    subprocess.run(["cp", "-dru", TREE / "lib/modules", tree / "lib/"], check=True)
    with tempfile.TemporaryDirectory() as wheels:
        # With what it needs, and pip. What is for another platform is refused.
        target = ["--platform=manylinux_2_28_aarch64", f"--python-version={python.removeprefix('cp')}"]
        pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "download", "--only-binary=:all:"]
        subprocess.run([*pip, *target, "-d", wheels, wheel, "pip"], check=True)
        shares = {tree: Path("/"), Path(wheels): Path("/wheels")}
        return run.run(guest, ["bash", "-c", COMMANDS], 3000, f"{python}: ", "single", shares)


def main() -> int:
    wheels = [Path(name) for name in sys.argv[1:]] or sorted(Path("dist").glob("*_aarch64.whl"))
    if not wheels:
        sys.exit("there is no wheel for arm64 in dist/: make wheels")
    results = [test(wheel) for wheel in wheels]
    return next((code for code in results if code), 0)


if __name__ == "__main__":
    sys.exit(main())
