# SPDX-License-Identifier: Apache-2.0
"""Accuracy against the fraction of labelled images, a line per method (the paper's Figure 3)."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..evaluation import EvalReport, format_fraction, markdown_table
from .canvas import canvas
from .curves import Series, draw_series

__all__ = ["low_shot_series", "low_shot_table", "plot_low_shot"]


def _fraction(report: EvalReport) -> float:
    if "label_fraction" not in report.settings:
        raise ValueError(f"The report of {report.label!r} has no label_fraction in its settings: it is not low-shot.")
    return float(report.settings["label_fraction"])


def low_shot_series(reports: Sequence[EvalReport]) -> list[Series]:
    """A line per label, accuracy in percent over the fraction of labels in percent.

    Args:
        reports: From `low_shot_reports`, each with its `label_fraction`.

    Raises:
        ValueError: A report is not of a low-shot run.
    """
    series = []
    for label in dict.fromkeys(report.label for report in reports):
        mine = sorted((report for report in reports if report.label == label), key=_fraction)
        x, y = [100 * _fraction(report) for report in mine], [100 * report.value for report in mine]
        known = all(report.spread is not None for report in mine)
        series.append(Series(label, tuple(x), tuple(y), tuple(100 * (r.spread or 0.0) for r in mine) if known else ()))
    return series


def low_shot_table(reports: Sequence[EvalReport]) -> str:
    """A Markdown table in percent: a row per method, a column per fraction."""
    columns = {_fraction(report): f"{100 * _fraction(report):g} % of labels" for report in reports}
    rows: dict[str, dict[str, str]] = {}
    for report in reports:
        row = rows.setdefault(report.label, {"method": report.label, **dict.fromkeys(columns.values(), "–")})
        row[columns[_fraction(report)]] = format_fraction(report.value, report.spread)
    return markdown_table(list(rows.values()))


def plot_low_shot(series: Sequence[Series], path: str | os.PathLike[str], *, title: str = "") -> None:
    """Lines with error bars over a logarithmic axis.

    Args:
        series: From [`low_shot_series`].
        path: File to write.
        title: Title of the picture, such as the dataset and the backbone.
    """
    with canvas(path) as axes:
        draw_series(axes, series)
        ticks = sorted({x for line in series for x in line.x})
        axes.set(xscale="log", xlabel="labelled training images (%)", ylabel="test accuracy (%)", title=title)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.legend(frameon=False)
