# SPDX-License-Identifier: Apache-2.0
"""Accuracy against the share of the weights that a mask may touch (the paper's Figures 8 and 9)."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .canvas import canvas
from .curves import Series, draw_series

__all__ = ["SelectiveRow", "plot_selective", "selective_series"]


@dataclass(frozen=True)
class SelectiveRow:
    """A run: how its weights were selected, which share of the maskable ones they are, and the accuracy."""

    label: str
    share: float
    accuracy: float


def selective_series(rows: Sequence[SelectiveRow]) -> list[Series]:
    """A line per label, accuracy in percent over the share in percent; runs of one share are averaged."""
    series = []
    for label in dict.fromkeys(row.label for row in rows):
        by_share: dict[float, list[float]] = {}
        for row in rows:
            if row.label == label:
                by_share.setdefault(100 * row.share, []).append(100 * row.accuracy)
        points = sorted(by_share.items())
        several = all(len(values) > 1 for _, values in points)
        spread = tuple(statistics.stdev(values) for _, values in points) if several else ()
        mean = tuple(statistics.fmean(values) for _, values in points)
        series.append(Series(label, tuple(share for share, _ in points), mean, spread))
    return series


def plot_selective(
    series: Sequence[Series],
    path: str | os.PathLike[str],
    *,
    frozen: float | None = None,
    title: str = "",
    ylabel: str = "k-NN accuracy (%)",
) -> None:
    """Lines with error bars over a logarithmic axis, and the frozen base as a level.

    Args:
        series: From [`selective_series`].
        path: File to write.
        frozen: Accuracy of the frozen base, from 0 to 1; None leaves it out.
        title: Title of the picture.
        ylabel: What the accuracy is.
    """
    with canvas(path) as axes:
        draw_series(axes, series)
        if frozen is not None:
            axes.axhline(100 * frozen, color="0.4", linestyle=":", label="frozen base")
        axes.set(xscale="log", xlabel="weights that a mask may touch (%)", ylabel=ylabel, title=title)
        ticks = [tick for tick in (0.1, 1, 10, 100) if tick >= min(x for line in series for x in line.x) / 2]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.legend(frameon=False)
