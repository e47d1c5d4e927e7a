"""The real kernel, under stress: threads that change mappings at random, against an oracle of what each has changed.

UMMUNOTIFY_CHANGES is how many changes to make; UMMUNOTIFY_SLOW=1 stands for ten million. Without them it takes seconds.
"""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
from daemons import NOBODY, Child, Daemon
from hostile import misbehave
from support import SLOW, probes, require

import ummunotify

CHANGES = int(os.environ.get("UMMUNOTIFY_CHANGES", 10_000_000 if SLOW else 50_000))


@pytest.mark.parametrize("source", [*probes(), "uffd"])
def test_random_changes(source: str, native: Any, record_property: Any) -> None:
    try:
        umn = ummunotify.open(source)
    except ummunotify.SourceUnavailableError as error:
        require(source.partition(":")[0], str(error))
    with umn:
        # userfaultfd is blind to changes of files, so `watch` refuses them.
        stress(umn, native, record_property, files=source != "uffd")


def test_beside_hostile_clients(daemon: Daemon, native: Any, record_property: Any) -> None:
    """They write nonsense into their tables, and say nonsense to the daemon that this process uses too."""
    hostile = [Child(misbehave, NOBODY - each) for each in range(2)]
    try:
        assert [each.hear() for each in hostile] == ["misbehaving"] * len(hostile)
        with ummunotify.open("daemon") as umn:
            stress(umn, native, record_property, files=True)
        for each in hostile:
            each.pipe.send("stop")
        done = [each.result() for each in hostile]
        hostile.clear()
    finally:
        for each in hostile:
            each.kill()
    tables, messages = map(sum, zip(*done, strict=True))
    print(f"beside {tables:,} crafted tables, {messages:,} messages")
    assert tables > 0
    assert messages > 0


def stress(umn: ummunotify.Notifier, native: Any, record_property: Any, *, files: bool) -> None:
    begin = time.monotonic()
    wrong, totals = native.run(
        umn, threads=4, files=files, changes=CHANGES, seconds=1e6, seed=time.time_ns() % 1_000_000
    )
    totals |= {"overflows": umn.stats.overflows, "seconds": round(time.monotonic() - begin, 1)}
    report = ", ".join(f"{number:,} {what}" for what, number in totals.items())
    print(f"{umn.source}: {report}")
    record_property("stress", report)
    assert wrong is None, report
    assert totals["hit"] > CHANGES / 10, report
    assert totals["valid"] > CHANGES / 10, report
    assert totals["renewed"] > CHANGES / 10, report
    assert totals["taken"] > CHANGES / 1000, report
    # They cost time only, but if they were many then something else would be tested than was meant to be.
    assert totals["false_alarms"] < totals["checks"] / 10, report
