"""`ummunotify selftest`: the command, and that it tells a source that misses from one that does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner
from other_users import require_another_user
from support import require_root

from ummunotify import Notifier
from ummunotify.cli import main
from ummunotify.selftest import _UFFD_BLIND, Outcome, Watched, changes, run_case
from ummunotify.selftest.changes import ANONYMOUS, CASES, CHANGES, NO_CHANGES, Case, Memory, call, private, void


def selftest(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["selftest", *arguments], env={"COLUMNS": "80"}, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def case(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def test_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert set(_UFFD_BLIND) <= {case.name for case in CHANGES}


def test_every_source_here(keeper: Notifier) -> None:
    report = json.loads(selftest("--json"))
    assert keeper.source in report["sources"]
    for results in report["sources"].values():
        assert [result["case"] for result in results] == [case.name for case in (*CHANGES, *NO_CHANGES)]
        assert [result for result in results if result["bad"]] == []
    for result in report["sources"][keeper.source]:
        may = {"seen", "quiet", "not here"} | ({"needless"} if case(result["case"]).needless else set())
        assert result["outcome"] in may, result


def test_the_table(keeper: Notifier) -> None:
    output = selftest("--source", keeper.source)
    assert all(len(line) <= 80 for line in output.splitlines())
    assert f"{keeper.source}: no miss" in output
    for each in CASES:
        assert each.name in output


def test_a_child_that_cannot_make_the_change(umn: Notifier, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends: it does not go on with the rest, as the parent."""

    def cannot() -> None:
        raise changes.MissingError("it is not there")

    with pytest.raises(changes.MissingError):
        changes.check_end(changes.forked(cannot))
    with pytest.raises(AssertionError):
        changes.check_end(changes.forked(lambda: os._exit(3)))
    monkeypatch.setattr(changes, "INT_80", "")  # as on another processor
    for name in ("munmap, a 32-bit system call", "madvise DONTNEED, a 32-bit system call"):
        assert run_case(case(name), umn).outcome is Outcome.IMPOSSIBLE


def test_a_direct_write_that_is_none() -> None:
    """tmpfs takes it since Linux 6.6, and writes into its pages, which stay."""
    with Memory() as memory:
        changes.memfd(memory)
        with pytest.raises(changes.MissingError):
            changes.direct_write(memory)


def test_a_source_that_is_unknown() -> None:
    assert "there is no source" in selftest("--source", "nonsense", code=2)


def test_no_source_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UMMUNOTIFY_SOCKET", "/nonexistent")
    output = selftest("--source", "daemon", code=1)
    assert "daemon: unavailable" in " ".join(output.split())
    assert "no source works here" in output


def test_a_miss_is_a_miss(keeper: Notifier) -> None:
    """What is declared to change more than it does."""
    lying = case("munmap of a part")._replace(expected=((1, 4),))
    result = run_case(lying, keeper)
    assert (result.outcome, result.why) == (Outcome.MISSED, "units [1] of [1, 2, 3]")
    assert result.bad
    idle = Case("nothing", private, lambda m: None, ((0, 8),))
    assert run_case(idle, keeper).outcome is Outcome.MISSED
    assert keeper.regions == []


def test_a_page_that_has_moved_is_a_miss(keeper: Notifier) -> None:
    """Whatever was expected."""
    require_root("only root may know where pages are")
    with Memory() as memory:
        private(memory)
        with Watched(keeper, memory) as watched:
            assert watched.moved == set()
            case("munmap of a part").run(memory)
            assert watched.moved == {2, 3} == watched.invalid


def test_needless(keeper: Notifier) -> None:
    result = run_case(case("munmap of a part")._replace(expected=((2, 3),)), keeper)
    assert (result.outcome, result.bad) == (Outcome.NEEDLESS, False)


def test_not_here(keeper: Notifier) -> None:
    def refuse(memory: Memory) -> None:
        call("mmap", 1, 0, 0, ANONYMOUS, -1, 0)

    result = run_case(Case("impossible", private, refuse, ((0, 8),)), keeper)
    assert (result.outcome, result.bad) == (Outcome.IMPOSSIBLE, False)
    assert "mmap: Invalid argument" in result.why


def test_failed(keeper: Notifier) -> None:
    def fail(memory: Memory) -> None:
        void(call("munmap", memory.address, memory.length))
        raise AssertionError("so it is")

    result = run_case(Case("failing", private, fail, ((0, 8),)), keeper)
    assert (result.outcome, result.bad) == (Outcome.FAILED, True)
    assert keeper.regions == []


def test_without_privileges() -> None:
    """Whatever works then: what it cannot do or cannot see it says, and misses nothing."""
    require_another_user()
    code = """
import os, ummunotify.cli
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
ummunotify.cli.main()
"""
    result = subprocess.run(
        [sys.executable, "-c", code, "selftest", "--json"], capture_output=True, text=True, check=False
    )
    assert result.stdout, result.stderr
    report = json.loads(result.stdout)
    assert report["uid"] == 65534
    assert "bpf:kvm" in report["unavailable"]
    assert result.returncode == (0 if report["sources"] else 1), result.stdout
    for results in report["sources"].values():
        assert [each for each in results if each["bad"]] == []
