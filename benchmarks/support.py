"""Write docs/support.md: which kernel, source and probe sees which kind of change, and the same for others.

    python -m benchmarks.support            # as root: natively, then in the guests of tests/vm/kernels.toml
    python -m benchmarks.support NAME...    # only in those, or "native"; of the rest what build/support has

All of it comes from runs of `ummunotify selftest --json`, which build/support keeps, and for the others from
benchmarks.peers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ummunotify.selftest import Outcome, Result

from . import peers

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "build/support"
NATIVE = "native"
# Each source by itself: what one has found is kept, whatever happens to the next.
COMMAND = (
    "for source in bpf:mmu_notifier bpf:kvm bpf:zap uffd; do "
    f"{sys.executable} -m ummunotify selftest --json --source $source; done"
)
SIGNS = {
    Outcome.SEEN: "yes",
    Outcome.MISSED: "**no**",
    Outcome.BLIND: "blind",
    Outcome.QUIET: "yes",
    Outcome.NEEDLESS: "needless",
    Outcome.REFUSED: "refused",
    Outcome.IMPOSSIBLE: "-",
    Outcome.FAILED: "**fails**",
}

INTRODUCTION = """\
# What is seen where

`make support` wrote this page. On each kernel `ummunotify selftest` ran as root with every probe and with userfaultfd
(a daemon sees what its probe sees), and the same list of changes ran against what others use;
[docs/selftest.md](selftest.md) says how to run it on your machine.
`make vmtest` repeats it in the guests, also as a user without privileges, on every change of the code, and `make
vmtest-arm64` in those of arm64.
"""

NO_KVM = """\
These machines have /dev/kvm. Without it `bpf:mmu_notifier` works where [something else](architecture.md#subscribing)
makes the kernel notify of the process's changes. In the guest of 7.3 `make vmtest` takes /dev/kvm away: there it is
soft-RoCE, the source is `bpf:mmu_notifier`, and `ummunotify doctor` names *RDMA memory that is paged on demand*.
"""

LEGEND = """\
*yes*: seen; or, in the second table, nothing was reported. *refused*: the source says that it cannot watch such
memory. *blind*: the source cannot see it; harmless to pinned memory or listed in [selftest.md](selftest.md).
*needless*: something was reported without need; a change was seen all the same. *-*: this kernel cannot do it.
**no**: missed.

A cell says what most kernels show, and then which show something else.
"""

PEERS = """\
## UCX and libfabric

Debian 12's UCX 1.13 (`ucm`'s event for memory that is unmapped, which its registration cache uses) and libfabric 1.17
(its monitors `memhooks` and `userfaultfd`), natively, as they are by default. Both are asked through their own
functions, not through the caches above them: a cache cannot know what its monitor is not told. libfabric exports
nothing of its monitors; its providers with a cache (verbs, efa) need an RDMA device, and then pin the memory. So the
monitors come from Debian's `libfabric.a`, with `ofi_mr_cache_notify()` replaced (`benchmarks/peers/`). `fi_import()`
was of no use: it puts a monitor in and gets none out.

Registered memory is pinned, the memory here is not. That matters in two places. To miss a copy on write does no harm
to pinned pages. And libfabric's uffd monitor stops at the first use of pages that were never touched, which pinning
would have touched.
"""


class Kernel(NamedTuple):
    title: str
    release: str
    results: dict[str, list[Result]]
    unavailable: dict[str, str]


def _reports(output: str) -> Iterator[dict[str, Any]]:
    """What `ummunotify selftest --json` printed, once or several times, among what a guest's kernel says."""
    lines = output.splitlines()
    while "{" in lines:
        del lines[: lines.index("{")]
        end = lines.index("}") + 1
        yield json.loads("\n".join(lines[:end]))
        del lines[:end]


def parse(title: str, output: str) -> Kernel:
    results: dict[str, list[Result]] = {}
    unavailable: dict[str, str] = {}
    release = ""
    for report in _reports(output):
        release = report["kernel"].split()[1]
        unavailable |= report["unavailable"]
        for source, rows in report["sources"].items():
            results[source] = [Result(row["case"], row["changes"], Outcome(row["outcome"]), row["why"]) for row in rows]
    if not release:
        sys.exit(f"{title}: no report in\n{output}")
    kind = [word for word in release.split("-") if word in ("rt", "arm64", "16k")]
    short = " ".join([".".join(release.split(".")[:2]), *kind])
    return Kernel(f"{title}: {release}", short, results, unavailable)


def _cell(signs: Mapping[str, str]) -> str:
    """What most kernels show, then the others."""
    if not signs:
        return "-"
    most = Counter(signs.values()).most_common(1)[0][0]
    others = {sign: [kernel for kernel in signs if signs[kernel] == sign] for sign in signs.values() if sign != most}
    return "; ".join([most, *(f"{', '.join(kernels)}: {sign}" for sign, kernels in others.items())])


def table(sources: Mapping[str, Mapping[str, list[Result]]], changes: bool) -> str:
    """Of each source by kernel."""
    names: dict[str, None] = {}
    found: dict[tuple[str, str], dict[str, str]] = {}
    for source, kernels in sources.items():
        for kernel, rows in kernels.items():
            for row in rows:
                if row.changes == changes:
                    names[row.case] = None
                    found.setdefault((source, row.case), {})[kernel] = SIGNS[row.outcome]
    lines = ["| " + " | ".join(["changes the mapping" if changes else "must not count", *sources]) + " |"]
    lines.append("|---" * (len(sources) + 1) + "|")
    for name in names:
        cells = [_cell(found.get((source, name), {})) for source in sources]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines) + "\n"


def summary(columns: Mapping[str, list[Result]]) -> str:
    outcomes = [Outcome.SEEN, Outcome.MISSED, Outcome.BLIND, Outcome.REFUSED, Outcome.NEEDLESS]
    outcomes += [Outcome.IMPOSSIBLE, Outcome.FAILED]
    lines = ["| | " + " | ".join(each.lower() for each in outcomes) + " |", "|---" * (len(outcomes) + 1) + "|"]
    for title, rows in columns.items():
        counts = [sum(row.outcome is outcome for row in rows) for outcome in outcomes]
        lines.append("| " + " | ".join([title, *map(str, counts)]) + " |")
    return "\n".join(lines) + "\n"


def page(kernels: list[Kernel], others: Mapping[str, list[Result]]) -> str:
    rows = {f"{kernel.release}: {source}": rows for kernel in kernels for source, rows in kernel.results.items()}
    sources: dict[str, dict[str, list[Result]]] = {}
    for kernel in kernels:
        for source, results in kernel.results.items():
            sources.setdefault(source, {})[kernel.release] = results
    peers_by_kernel = {title: {kernels[0].release: results} for title, results in others.items()}
    parts = [INTRODUCTION, "## Sources and probes\n", "| kernel | works | does not |\n|---|---|---|"]
    for kernel in kernels:
        missing = "; ".join(f"{source}: {reason}" for source, reason in kernel.unavailable.items())
        parts[-1] += f"\n| {kernel.title} | {', '.join(kernel.results)} | {missing} |"
    parts[-1] += "\n"
    parts += [NO_KVM, summary(rows), "## Kinds of change\n", LEGEND, table(sources, True), table(sources, False)]
    parts += [PEERS, summary(others), table(peers_by_kernel, True), table(peers_by_kernel, False)]
    if broken := broken_by(others, kernels[0]):
        parts += [
            "What no longer works under them:\n",
            "".join(f"- {each}\n" for each in broken),
        ]
    return "\n".join(parts)


def broken_by(others: Mapping[str, list[Result]], kernel: Kernel) -> list[str]:
    """What fails or cannot be done under them, but can be on the same kernel without."""
    cannot = (Outcome.FAILED, Outcome.IMPOSSIBLE)
    can = {row.case for rows in kernel.results.values() for row in rows if row.outcome not in cannot}
    return [
        f"{title}: {row.case}: {row.why}"
        for title, rows in others.items()
        for row in rows
        if row.outcome in cannot and row.case in can
    ]


def main() -> None:
    kernels = tomllib.loads((ROOT / "tests/vm/kernels.toml").read_text())["kernel"]
    titles = {NATIVE: "the CI machine", **{kernel["name"]: kernel["distribution"] for kernel in kernels}}
    if unknown := set(sys.argv[1:]) - set(titles):
        sys.exit(f"there is no kernel {', '.join(unknown)}; there are {', '.join(titles)}")
    KEPT.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[1:] or titles:
        command = ["sh", "-c", COMMAND]
        if name != NATIVE:  # those of arm64 take hours
            command = [sys.executable, "tests/vm/run.py", "--only", name, "--timeout", "28800", "--", *command]
        with Path(KEPT, f"{name}.log").open("w") as log:
            subprocess.run(command, check=False, stdout=log, cwd=ROOT)
    found = [parse(title, Path(KEPT, f"{name}.log").read_text()) for name, title in titles.items()]
    others = {peers.TITLES[name]: peers.measure(name) for name in peers.NAMES}
    (ROOT / "docs/support.md").write_text(page(found, others))


if __name__ == "__main__":
    main()
