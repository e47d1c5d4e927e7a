"""Write docs/support.md: which kernel, source and probe sees which kind of change, and the same for others.

    python -m benchmarks.support            # as root: natively, then in the guests of tests/vm/kernels.toml

All of it comes from runs of `ummunotify selftest --json`, and for the others from benchmarks.peers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ummunotify.selftest import Outcome, Result

from . import peers

ROOT = Path(__file__).parents[1]
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

`make support` wrote this page. On each kernel `ummunotify selftest` ran as root with every source and probe, and the
same list of changes ran against what others use; [docs/selftest.md](selftest.md) says how to run it on your machine.
`make vmtest` repeats it in the guests, also as a user without privileges, on every change of the code, and `make
vmtest-arm64` in those of arm64.
"""

LEGEND = """\
*yes*: seen; or, in the second table, nothing was reported. *refused*: the source says that it cannot watch such
memory. *blind*: the source cannot see it; harmless to pinned memory or listed in [selftest.md](selftest.md).
*needless*: something was reported without need. *-*: this kernel cannot do it. **no**: missed.
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


def parse(title: str, output: str) -> Kernel:
    """What `ummunotify selftest --json` printed, among what a guest's kernel says."""
    lines = output.splitlines()
    first = lines.index("{")
    report: dict[str, Any] = json.loads("\n".join(lines[first : lines.index("}", first) + 1]))
    results = {
        source: [Result(row["case"], row["changes"], Outcome(row["outcome"]), row["why"]) for row in rows]
        for source, rows in report["sources"].items()
    }
    release = report["kernel"].split()[1]
    kind = [word for word in release.split("-") if word in ("rt", "arm64", "16k")]
    short = " ".join([".".join(release.split(".")[:2]), *kind])
    return Kernel(f"{title}: {release}", short, results, report["unavailable"])


def table(columns: Mapping[str, list[Result]], changes: bool) -> str:
    names = list(dict.fromkeys(each.case for rows in columns.values() for each in rows if each.changes == changes))
    found = {title: {each.case: each.outcome for each in rows} for title, rows in columns.items()}
    lines = [
        "| " + " | ".join(["changes the mapping" if changes else "must not count", *columns]) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name in names:
        cells = [SIGNS[found[title][name]] if name in found[title] else "-" for title in columns]
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
    columns = {f"{kernel.release}: {source}": rows for kernel in kernels for source, rows in kernel.results.items()}
    parts = [INTRODUCTION, "## Sources and probes\n", "| kernel | works | does not |\n|---|---|---|"]
    for kernel in kernels:
        missing = "; ".join(f"{source}: {reason}" for source, reason in kernel.unavailable.items())
        parts[-1] += f"\n| {kernel.title} | {', '.join(kernel.results)} | {missing} |"
    parts[-1] += "\n"
    parts += [summary(columns), "## Kinds of change\n", LEGEND, table(columns, True), table(columns, False)]
    parts += [PEERS, summary(others), table(others, True), table(others, False)]
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
    def output(*command: str) -> str:
        return subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout

    selftest = ("ummunotify", "selftest", "--json")
    kernels = [parse("the CI machine", output(sys.executable, "-m", *selftest))]
    for kernel in tomllib.loads((ROOT / "tests/vm/kernels.toml").read_text())["kernel"]:
        run = (sys.executable, "tests/vm/run.py", "--only", kernel["name"], "--", *selftest)
        kernels.append(parse(kernel["distribution"], output(*run)))
    others = {peers.TITLES[name]: peers.measure(name) for name in peers.NAMES}
    (ROOT / "docs/support.md").write_text(page(kernels, others))


if __name__ == "__main__":
    main()
