"""Ratios and differences that were measured in pairs, one right after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """The median of what was measured, and how sure that is."""

    median: float
    low: float
    """The median lies between these two with a probability of 95 %, if the samples are independent."""
    high: float
    quarter: float
    """A quarter of the samples are at most this."""
    three_quarters: float
    samples: int

    @property
    def doubt(self) -> float:
        return (self.high - self.low) / 2


def spread(samples: Sequence[float]) -> Spread:
    values = sorted(samples)
    n = len(values)
    around = 0.98 * math.sqrt(n)  # of order statistics: no assumption about the distribution
    return Spread(
        values[n // 2],
        values[max(0, math.floor(n / 2 - around))],
        values[min(n - 1, math.ceil(n / 2 + around))],
        values[n // 4],
        values[3 * n // 4],
        n,
    )


class Pairs:
    """Times with and without something, in ns."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def add(self, with_it: float, without: float) -> None:
        self.times.append((with_it, without))

    def __add__(self, other: Pairs) -> Pairs:
        both = Pairs()
        both.times = self.times + other.times
        return both

    def _spread(self, combine: Callable[[float, float], float]) -> Spread:
        return spread([combine(*pair) for pair in self.times])

    @property
    def ratio(self) -> Spread:
        return self._spread(lambda with_it, without: with_it / without)

    @property
    def added(self) -> Spread:
        return self._spread(lambda with_it, without: with_it - without)

    @property
    def without(self) -> Spread:
        return self._spread(lambda _, without: without)
