# SPDX-License-Identifier: Apache-2.0
"""Curves with a spread: the loss under equivalent hyper-parameters (Figure 5), and whatever else is a line."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .canvas import COLOURS, MARKERS, canvas

__all__ = ["Series", "draw_series", "mean_curve", "plot_curves", "smooth"]

_STYLES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Series:
    """One line of a plot.

    Attributes:
        label: Its name in the legend.
        x: Positions.
        y: Values, as many.
        spread: Standard deviation of each value, empty without.

    Raises:
        ValueError: If their numbers differ.
    """

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    spread: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check the lengths."""
        for name in ("x", "y", "spread"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        if len(self.x) != len(self.y) or len(self.spread) not in (0, len(self.y)):
            raise ValueError(
                f"{self.label!r} has {len(self.x)} positions, {len(self.y)} values and {len(self.spread)} spreads."
            )


def mean_curve(label: str, curves: Sequence[Mapping[float, float]]) -> Series:
    """Mean and standard deviation of several curves, at the positions that all of them have.

    Args:
        label: Name of the line.
        curves: Value by position, one mapping per seed.

    Raises:
        ValueError: There are no curves, or they have no position in common.
    """
    common = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    if not common:
        raise ValueError(f"The {len(curves)} curves of {label!r} have no position in common.")
    columns = [[curve[x] for curve in curves] for x in common]
    spread = tuple(statistics.stdev(column) for column in columns) if len(curves) > 1 else ()
    return Series(label, tuple(common), tuple(statistics.fmean(column) for column in columns), spread)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Trailing mean over at most `window` values.

    Raises:
        ValueError: If the window is below 1.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1; got {window}.")
    return [statistics.fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]


def draw_series(axes: Any, series: Sequence[Series], *, markers: bool = True) -> None:
    """Draw lines, with error bars where markers are wanted and bands where not."""
    for index, line in enumerate(series):
        colour = COLOURS[index % len(COLOURS)]
        if markers:
            form = {"marker": MARKERS[index % len(MARKERS)], "color": colour, "capsize": 2, "label": line.label}
            axes.errorbar(line.x, line.y, line.spread or None, **form)
            continue
        # Equal curves lie on each other: every next line is thinner and more broken, and shows the one below.
        last = len(series) - 1
        form = {"linewidth": 1.5 + 4.0 * (last - index) / max(1, last), "alpha": 1.0 if index == last else 0.5}
        axes.plot(line.x, line.y, _STYLES[index % 4], color=colour, label=line.label, **form)
        if line.spread:
            low, high = ([y + sign * s for y, s in zip(line.y, line.spread, strict=True)] for sign in (-1, 1))
            axes.fill_between(line.x, low, high, color=colour, alpha=0.15, linewidth=0)


def plot_curves(
    panels: Mapping[str, Sequence[Series]],
    path: str | os.PathLike[str],
    *,
    xlabel: str = "optimizer step",
    ylabel: str = "training loss (nats)",
    markers: bool = False,
) -> None:
    """Lines, a panel per title side by side on one scale: Figure 5 has two.

    Args:
        panels: Lines by the panel's title.
        path: File to write.
        xlabel: What the positions are, with their unit.
        ylabel: What the values are, with their unit.
        markers: Mark the positions, with error bars, for lines of a few; each panel has its own scale then.
    """
    with canvas(path, columns=len(panels), size=(5.5, 4.0)) as found:
        axes = found if isinstance(found, list) else [found]
        ends = [value for lines in panels.values() for line in lines for value in line.y]
        for part, (title, lines) in zip(axes, panels.items(), strict=True):
            draw_series(part, lines, markers=markers)
            part.set(xlabel=xlabel, ylabel=ylabel, title=title)
            if not markers:
                margin = 0.05 * (max(ends) - min(ends) or 1.0)
                part.set_ylim(min(ends) - margin, max(ends) + margin)
            part.legend(frameon=False)
