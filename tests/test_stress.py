"""The real kernel, under stress: threads that change mappings at random, against an oracle of what each has changed.

UMMUNOTIFY_CHANGES is how many changes to make; UMMUNOTIFY_SLOW=1 stands for ten million. Without them it takes seconds.
"""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
from support import probes, require

import ummunotify

CHANGES = int(os.environ.get("UMMUNOTIFY_CHANGES", 10_000_000 if "UMMUNOTIFY_SLOW" in os.environ else 50_000))


@pytest.mark.parametrize("source", [*probes(), "uffd"])
def test_random_changes(source: str, native: Any, record_property: Any) -> None:
    try:
        umn = ummunotify.open(source)
    except ummunotify.SourceUnavailableError as error:
        require(source.partition(":")[0], str(error))
    begin = time.monotonic()
    with umn:
        wrong, totals = native.run(
            umn,
            threads=4,
            # userfaultfd is blind to changes of files, so `watch` refuses them.
            files=source != "uffd",
            changes=CHANGES,
            seconds=1e6,
            seed=time.time_ns() % 1_000_000,
        )
        overflows = umn.stats.overflows
    totals |= {"overflows": overflows, "seconds": round(time.monotonic() - begin, 1)}
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
