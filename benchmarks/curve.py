"""The plot: what a munmap costs more, against the number of regions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .mappings import BETWEEN_SCATTERED, HIT_SCATTERED, Added

_STYLES = ("#4c9f70", "#2a6fbb", "#2a6fbb", "#c0392b", "#c0392b")


def draw(found: Sequence[Added], kinds: Mapping[str, str], kernel: float, path: Path) -> None:
    """`kinds` says what to call each of the places, `kernel` what the kernel's notification costs by itself."""
    plt.rcParams.update({"svg.hashsalt": "ummunotify", "font.size": 10})
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for (name, text), colour in zip(kinds.items(), _STYLES, strict=True):
        points = [(of.regions, of.pairs[name].added) for of in found if name in of.pairs]
        numbers = [number for number, _ in points]
        line = "--" if name in (BETWEEN_SCATTERED, HIT_SCATTERED) else "-"
        axes.plot(numbers, [of.median for _, of in points], line, marker="o", markersize=4, color=colour, label=text)
        axes.fill_between(
            numbers, [of.low for _, of in points], [of.high for _, of in points], color=colour, alpha=0.15, linewidth=0
        )
    axes.axhline(kernel, color="grey", linestyle=":", label="the kernel's notification alone")
    axes.set(xscale="log", xlabel="watched regions", ylabel="added to mmap + touch + munmap, in ns")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
