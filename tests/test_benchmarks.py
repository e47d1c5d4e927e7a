"""The benchmarks measure what they say. How long things take is not tested: another machine may be slow or busy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks import bare, calls, mappings, probes, report, support, uffd, watching
from benchmarks.mappings import BETWEEN, BETWEEN_SCATTERED, HIT, HIT_SCATTERED, OUT
from benchmarks.samples import Pairs, spread

from ummunotify import Notifier
from ummunotify.selftest import Outcome, Result

PLACE = 0x0700_0000_0000


@pytest.fixture(scope="module")
def figures(keeper: Notifier) -> Iterator[watching.Figures]:
    """Everything, measured in seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watching, "MANY", 2000)
        yield watching.measure(quick=True)


def test_each_kind_of_place_is_measured(figures: watching.Figures) -> None:
    places = {number: set(of.pairs) for number, of in figures.added.items()}
    assert places == {
        1: {OUT, HIT},
        2: {OUT, HIT, BETWEEN},
        2000: {OUT, HIT, BETWEEN, HIT_SCATTERED, BETWEEN_SCATTERED},
    }
    for of in figures.added.values():
        assert of.program.keys() == of.pairs.keys()
        assert all(time > 0 for time in of.program.values()), "the program did not run for each munmap"
        for pairs in of.pairs.values():
            assert all(watching > 0 and not_watching > 0 for watching, not_watching in pairs.times)
        assert 0 <= of.noise.dropped < 1


def test_other_figures_are_measured(figures: watching.Figures) -> None:
    assert figures.subscribed.times
    assert figures.other.times
    assert all(figure.samples == 3 and figure.median > 0 for figure in figures.one_munmap)
    assert set(figures.calls) == {calls.NOTHING, calls.SLOT, calls.CHANGED, calls.VALID, calls.WATCH}
    assert all(benchmark.median() > 0 for benchmark in figures.calls.values())
    assert figures.check > 0
    assert figures.few == 256 << 10
    assert figures.added[2000].bytes % (256 << 10) == 0


@pytest.fixture(scope="module")
def page(figures: watching.Figures, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The text and the picture. Here, because Matplotlib keeps fonts open."""
    folder = tmp_path_factory.mktemp("page")
    return report.wrapped(watching.page(figures, folder)), (folder / "benchmarks.svg").read_text()


def test_the_page_has_every_figure_and_a_picture(figures: watching.Figures, page: tuple[str, str]) -> None:
    text, picture = page
    for row in watching.rows(figures):
        assert f"| {row.what} | {row.goal} | {row.measured} |" in text
    assert "(benchmarks.svg)" in text
    assert "</svg>" in picture
    assert max(map(len, (line for line in text.splitlines() if line[:1] not in "|!"))) <= 120


def test_only_a_free_address_is_mapped(keeper: Notifier) -> None:
    bare.reserve(PLACE, 4096)
    try:
        with pytest.raises(RuntimeError, match="not free"):
            bare.churn(bare.addresses([PLACE + 4096, PLACE]))
        with pytest.raises(RuntimeError, match="not free"):
            bare.reserve(PLACE, 4096)
    finally:
        bare.unmap(PLACE, 4096)
    assert bare.churn(bare.addresses([PLACE, PLACE])).cpu > 0


def test_attached_programs_are_counted(keeper: Notifier) -> None:
    assert bare.probes() >= 1


def test_a_section_is_renewed_alone() -> None:
    order = ("one", "two", "three")
    page = report.assemble(order, {"three": "## Three\n\n3", "one": "## One\n\n1"})
    assert report.sections(page) == {"one": "## One\n\n1", "three": "## Three\n\n3"}
    renewed = report.assemble(order, report.sections(page) | {"two": "## Two"})
    assert list(report.sections(renewed)) == ["one", "two", "three"]
    assert report.sections(renewed)["one"] == "## One\n\n1"


def test_what_is_not_known_well_enough_is_not_judged() -> None:
    costs = {"": probes.Cost(1.1, 0.01), **{name: probes.Cost(1.2, 0.06) for name in probes.KINDS}}
    *own, other = probes.rows("debian/full", {"bpf:zap": costs})
    assert [row.measured for row in own] == ["inconclusive: 1.20x ± 0.06"] * len(probes.KINDS)
    assert {row.reached for row in own} == {None}
    assert (other.measured, other.reached) == ("1.10x ± 0.01", False)


def test_a_miss_is_told() -> None:
    assert report.table([report.Row("this", "1 ns", "2 ns", "", False)]).endswith(
        "| this | 1 ns | 2 ns |  | **missed** |\n"
    )


def test_a_ratio_is_that_of_pairs() -> None:
    pairs = Pairs()
    for baseline in (100, 200, 400):  # the machine gets slower; the ratio stays
        pairs.add(1.5 * baseline, baseline)
    assert pairs.ratio.median == pairs.ratio.low == pairs.ratio.high == 1.5
    assert pairs.added.median == 100


def test_the_median_is_within_its_doubt() -> None:
    found = spread(range(1001))
    assert found.median == 500
    assert (found.low, found.high) == (469, 532)
    assert (found.quarter, found.three_quarters) == (250, 750)


def test_measuring_ends_when_it_is_known_well_enough() -> None:
    assert len(list(mappings.until(mappings.Budget(0.1, 0, 60), lambda: 0.05))) == 16
    assert len(list(mappings.until(mappings.Budget(0.1, 0, 0), lambda: 0.5))) == 1


def test_support() -> None:
    case = {"case": "munmap", "changes": True, "outcome": "seen", "why": "", "bad": False}
    run = {"kernel": "Linux 6.1.0-1 x86_64", "sources": {"bpf:kvm": [case]}, "unavailable": {"uffd": "forbidden"}}
    text = f"a message\n{json.dumps(run, indent=2)}\nanother\n"
    # Each source may have been tested by itself.
    kernel = support.parse("Debian", text + json.dumps(run | {"sources": {"bpf:zap": [case]}}, indent=2) + "\nexit\n")
    assert list(kernel.results) == ["bpf:kvm", "bpf:zap"]
    others = {"hooks": [Result("munmap", True, Outcome.MISSED, "units 1 of 2")]}
    page = support.page([kernel], others)
    assert "| Debian: 6.1.0-1 | bpf:kvm, bpf:zap | uffd: forbidden |" in page
    assert "| changes the mapping | bpf:kvm | bpf:zap |\n|---|---|---|\n| munmap | yes | yes |" in page
    assert "| munmap | **no** |" in page
    # A kernel that differs is named, and kernels of one version are told apart.
    run |= {"kernel": "Linux 6.1.0-1-arm64-16k aarch64", "sources": {"bpf:kvm": [case | {"outcome": "MISSED"}]}}
    other = support.parse("Debian, arm64", json.dumps(run, indent=2))
    assert "| munmap | yes; 6.1 arm64 16k: **no** | yes |" in support.page([kernel, other], others)


def test_support_tells_what_others_break() -> None:
    kernel = support.Kernel("here", "6.1", {"uffd": [Result("mremap", True, Outcome.SEEN, "")]}, {})
    others = {"hooks": [Result("mremap", True, Outcome.IMPOSSIBLE, "EINVAL")]}
    assert "- hooks: mremap: EINVAL" in support.page([kernel], others)


def test_userfaultfd_is_measured(tmp_path: Path) -> None:
    """It raises if an event is missed."""
    text = uffd.section(True, tmp_path)
    assert "| munmap of a watched page, the reader on the same CPU | 1.3x |" in text
    assert f"where nothing is watched, {uffd.HUGE_PAGES}" in " ".join(text.split())
