# SPDX-License-Identifier: Apache-2.0
"""Lines as data, and plots: every `plot_…` function draws into `path`, a .png, .svg or .pdf file."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluation import EvalReport, format_fraction, markdown_table
from ..storage.files import atomic_write
from .masks import ClusterComposition, EmbeddingMap, LayerDensity, Similarity

# Okabe and Ito's palette for colour-blind readers, without its yellow, which is too light for lines on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_STYLES = ("-", "--", "-.", ":")
_SETTINGS = {
    "axes.axisbelow": True,
    "axes.facecolor": "white",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "white",
    "font.size": 10,
    "grid.alpha": 0.3,
    "savefig.facecolor": "white",
    "svg.fonttype": "none",  # text stays text
}

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Series:
    """One line of a plot: positions, as many values, and the standard deviation of each; empty if unknown."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    spread: tuple[float, ...] = ()


def _averaged(label: str, values: Mapping[float, Sequence[float]]) -> Series:
    """Mean at every position; standard deviation too if every position has several values."""
    points = sorted(values.items())
    spread = tuple(statistics.stdev(y) for _, y in points) if all(len(y) > 1 for _, y in points) else ()
    return Series(label, tuple(x for x, _ in points), tuple(statistics.fmean(y) for _, y in points), spread)


def mean_curve(label: str, curves: Sequence[Mapping[float, float]]) -> Series:
    """Mean and standard deviation of several curves (value by position), at the positions that all of them have."""
    common = set.intersection(*(set(curve) for curve in curves)) if curves else set()
    if not common:
        raise ValueError(f"The {len(curves)} curves of {label!r} have no position in common.")
    return _averaged(label, {x: [curve[x] for curve in curves] for x in common})


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Trailing mean over at most `window` values, at least 1."""
    if window < 1:
        raise ValueError(f"window must be at least 1; got {window}.")
    return [statistics.fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]


def _label_fraction(report: EvalReport) -> float:
    if "label_fraction" not in report.settings:
        raise ValueError(f"The report of {report.label!r} has no label_fraction in its settings: it is not low-shot.")
    return float(report.settings["label_fraction"])


def low_shot_series(reports: Sequence[EvalReport]) -> list[Series]:
    """A line per label: accuracy over the labelled fraction, in percent; ValueError for other reports."""
    return share_series([(r.label, _label_fraction(r), value) for r in reports for value in r.values])


def low_shot_table(reports: Sequence[EvalReport]) -> str:
    """A Markdown table in percent: a row per method, a column per fraction."""
    columns = {_label_fraction(report): f"{100 * _label_fraction(report):g} % of labels" for report in reports}
    rows: dict[str, dict[str, str]] = {}
    for report in reports:
        row = rows.setdefault(report.label, {"method": report.label, **dict.fromkeys(columns.values(), "–")})
        row[columns[_label_fraction(report)]] = format_fraction(report.value, report.spread)
    return markdown_table(list(rows.values()))


def share_series(points: Iterable[tuple[str, float, float]]) -> list[Series]:
    """A line per label, of (label, share, accuracy) from 0 to 1: in percent, averaged over points of one share."""
    lines: dict[str, dict[float, list[float]]] = {}
    for label, share, accuracy in points:
        lines.setdefault(label, {}).setdefault(100 * share, []).append(100 * accuracy)
    return [_averaged(label, values) for label, values in lines.items()]


@contextmanager
def canvas(path: PathLike, columns: int = 1, size: tuple[float, float] = (6.0, 4.0)) -> Iterator[list[Any]]:
    """Yield `columns` axes of `size` inches, side by side; the picture is saved if the block ends without an error."""
    path = Path(path)
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{path} must end in .png, .svg or .pdf, which names the format of the picture.")
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots are drawn by matplotlib: pip install 'smn_peft[plot]'.") from error
    style: Any = {**matplotlib.rcParamsDefault, **_SETTINGS, "backend": "agg"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(size[0] * columns, size[1]), layout="constrained")
        FigureCanvasAgg(figure)
        yield list(figure.subplots(1, columns, squeeze=False)[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            figure.savefig(file, format=path.suffix[1:].lower(), dpi=150)


def _legend_outside(axes: Any, **options: Any) -> None:
    """Put the legend right of the axes, where it covers no data."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, **options)


def _style(index: int) -> dict[str, Any]:
    """Colour and line of the n-th line of a plot."""
    return {"color": _COLOURS[index % len(_COLOURS)], "linestyle": "-" if index < len(_COLOURS) else "--"}


def _draw_points(axes: Any, series: Sequence[Series], labels: Sequence[str] = (), **options: Any) -> None:
    """Draw lines with markers and error bars, in the styles of their places among `labels`, all of them by default."""
    labels = labels or [line.label for line in series]
    for index, line in ((labels.index(line.label), line) for line in series):
        marker = _MARKERS[(index + index // len(_COLOURS)) % len(_MARKERS)]  # another one when a colour comes again
        style = {**_style(index), "marker": marker, "capsize": 2, **options}
        axes.errorbar(line.x, line.y, line.spread or None, label=line.label, **style)


def _draw_bands(axes: Any, series: Sequence[Series]) -> None:
    """Draw lines with bands of ± the spread; each is thinner and more broken, and shows an equal one below it."""
    last = len(series) - 1
    for index, line in enumerate(series):
        colour = _COLOURS[index % len(_COLOURS)]
        form = {"linewidth": 1.5 + 4.0 * (last - index) / max(1, last), "alpha": 1.0 if index == last else 0.5}
        axes.plot(line.x, line.y, _STYLES[index % 4], color=colour, label=line.label, **form)
        if line.spread:
            low, high = ([y + sign * s for y, s in zip(line.y, line.spread, strict=True)] for sign in (-1, 1))
            axes.fill_between(line.x, low, high, color=colour, alpha=0.15, linewidth=0)


def plot_curves(
    panels: Mapping[str, Sequence[Series]],
    path: PathLike,
    *,
    xlabel: str = "optimizer step",
    ylabel: str = "training loss (nats)",
    markers: bool = False,
) -> None:
    """Draw lines, a panel per title side by side (Figure 5 has two).

    With `markers`, each panel has a scale of its own, and lines have error bars; else bands, all on one scale.
    """
    with canvas(path, columns=len(panels), size=(5.5, 4.0)) as axes:
        ends = [value for lines in panels.values() for line in lines for value in line.y]
        margin = 0.05 * (max(ends) - min(ends) or 1.0)
        for part, (title, lines) in zip(axes, panels.items(), strict=True):
            (_draw_points if markers else _draw_bands)(part, lines)
            part.set(xlabel=xlabel, ylabel=ylabel, title=title)
            if not markers:
                part.set_ylim(min(ends) - margin, max(ends) + margin)
            part.legend(frameon=False)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices, by size, of the (size, value) pairs that no other one beats: with a higher value at no larger size."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


def plot_sizes(panels: Mapping[str, Sequence[Series]], path: PathLike, *, ylabel: str) -> None:
    """Draw accuracy over the size of the file in kB on a logarithmic axis, and the Pareto front, a panel per title.

    The axis ends below the worst line's best point; what is lower, as where training failed, is named at its edge.
    """
    labels = list(dict.fromkeys(line.label for lines in panels.values() for line in lines))
    with canvas(path, columns=len(panels), size=(6.0, 4.5)) as axes:
        for part, (title, lines) in zip(axes, panels.items(), strict=True):
            points = [pair for line in lines for pair in zip(line.x, line.y, strict=True)]
            x, y = zip(*(points[index] for index in pareto_front(points)), strict=True)
            end = max(size for size, _ in points)
            part.step([*x, end], [*y, y[-1]], where="post", color="0.6", zorder=0, label="Pareto front")
            part.set_xscale("log")
            least = min(max(line.y) for line in lines)
            low: list[tuple[Series, int]] = []
            for line in lines:
                kept = [index for index, value in enumerate(line.y) if value >= least]
                low += [(line, index) for index in range(len(line.y)) if index not in kept]
                x, y, spread = (tuple(of[index] for index in kept if of) for of in (line.x, line.y, line.spread))
                _draw_points(part, [Series(line.label, x, y, spread)], labels, linestyle="none")
            for line, index in low:
                text, edge = f"{line.label} {line.y[index]:.1f} ↓", part.get_ylim()[0]
                part.annotate(text, (line.x[index], edge), ha="center", va="bottom", fontsize=7)
            part.set(xlabel="size of the file (kB)", ylabel=ylabel, title=title)
            _legend_outside(part, fontsize=8)


def plot_low_shot(series: Sequence[Series], path: PathLike, *, title: str = "") -> None:
    """Draw accuracy over the labelled fraction, on a logarithmic axis (Figure 3)."""
    with canvas(path) as (axes,):
        axes.set(xlabel="labelled training images (%)", ylabel="test accuracy (%)", title=title)
        _draw_over_shares(axes, series, sorted({x for line in series for x in line.x}))


def plot_selective(series: Sequence[Series], path: PathLike, *, frozen: float | None = None) -> None:
    """Draw accuracy over the share of maskable weights (Figures 8, 9); `frozen` (0 to 1) is drawn as a level."""
    with canvas(path) as (axes,):
        axes.set(xlabel="weights that a mask may touch (%)", ylabel="k-NN accuracy (%)")
        if frozen is not None:
            axes.axhline(100 * frozen, color="0.4", linestyle=":", label="frozen base")
        least = min(x for line in series for x in line.x)
        _draw_over_shares(axes, series, [tick for tick in (0.1, 1, 10, 100) if tick >= least / 2])


def _draw_over_shares(axes: Any, series: Sequence[Series], ticks: Sequence[float]) -> None:
    _draw_points(axes, series)
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False)


def plot_densities(groups: Mapping[str, Sequence[LayerDensity]], path: PathLike, *, title: str = "") -> None:
    """Draw density over the layers in the model's order.

    One group is drawn as a line per kind of layer over the blocks (Figure 6), several as a line each over all layers
    (Figure 7).
    """
    lines: dict[str, list[tuple[int, LayerDensity]]] = {}
    (first, *others) = groups.values()
    if others:
        lines = {label: list(enumerate(rows)) for label, rows in groups.items()}
        starts = [i for i, row in enumerate(first) if i == 0 or row.block != first[i - 1].block]
        ticks = {i: first[i].block or first[i].name.split(".")[-2] for i in starts}
    else:
        blocks = list(dict.fromkeys(row.block for row in first))
        ticks = {i: block or "outside" for i, block in enumerate(blocks)}
        for row in first:
            lines.setdefault(row.kind, []).append((blocks.index(row.block), row))
    series = []
    for label, points in lines.items():
        rows = [(float(x), 100 * row.density, 100 * (row.spread or 0.0)) for x, row in points]
        series.append(Series(label, *zip(*rows, strict=True)))
    with canvas(path, size=(9.0, 4.5)) as (axes,):
        _draw_points(axes, series, markersize=4)
        axes.set_xticks(list(ticks), list(ticks.values()), rotation=90)
        axes.set(xlabel="block, from the input to the output", ylabel="active weights (%)", title=title)
        _legend_outside(axes, title=None if others else "tensor", borderaxespad=0.0)


def plot_similarity(rows: Sequence[Similarity], path: PathLike, *, title: str = "") -> None:
    """Draw a square per pair: the Jaccard index of the inactive weights below the diagonal, chance above it."""
    names = list(dict.fromkeys(name for row in rows for name in (row.first, row.second)))
    values: list[list[float]] = [[float("nan")] * len(names) for _ in names]
    for row in rows:
        i, j = sorted((names.index(row.first), names.index(row.second)))
        values[j][i], values[i][j] = 100 * row.jaccard, 100 * row.jaccard_chance
    highest = max(100 * max(row.jaccard, row.jaccard_chance) for row in rows) or 1.0
    side = max(4.5, 0.9 * len(names) + 2.0)
    with canvas(path, size=(side + 1.2, side)) as (axes,):
        axes.grid(False)
        image = axes.imshow(values, cmap="Blues", vmin=0, vmax=highest)
        for j, line in enumerate(values):
            for i, value in enumerate(line):
                colour, text = "white" if value > 0.6 * highest else "black", "–" if i == j else f"{value:.1f}"
                axes.text(i, j, text, ha="center", va="center", color=colour)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        axes.set_title(title or "below the diagonal: measured; above: by chance")
        axes.figure.colorbar(image, ax=axes, label="Jaccard index of the inactive weights (%)")


def plot_clusters(clusters: Sequence[ClusterComposition], path: PathLike, *, title: str = "") -> None:
    """Draw the composition of every cluster, and of a cluster in which all classes are equally common."""
    with canvas(path) as (axes,):
        classes = max(len(cluster.cumulative) for cluster in clusters)
        x = range(1, classes + 1)
        for index, cluster in enumerate(clusters):
            label = f"cluster {cluster.cluster + 1}: {cluster.images:,} images"
            axes.plot(x, [100 * share for share in cluster.cumulative], label=label, **_style(index))
        axes.plot(x, [100 * count / classes for count in x], color="0.4", linestyle=":", label="all classes alike")
        axes.set(xlabel="most common classes of the cluster", ylabel="images of the cluster (%)", title=title)
        axes.set_ylim(0, 103)
        axes.legend(frameon=False, loc="lower right")


def plot_embedding_maps(maps: Sequence[EmbeddingMap], path: PathLike, *, names: Sequence[str] | None = None) -> None:
    """Draw maps of the same classes side by side, a colour per class, named in the legend by `names`."""
    with canvas(path, columns=len(maps), size=(4.5, 4.5)) as axes:
        import matplotlib

        present = sorted({int(label) for one in maps for label in one.labels.unique()})
        palette = matplotlib.colormaps["tab10" if len(present) <= 10 else "tab20"]
        for part, one in zip(axes, maps, strict=True):
            for index, label in enumerate(present):
                points = one.points[one.labels == label]
                name = names[label] if names is not None and label < len(names) else f"class {label}"
                part.scatter(points[:, 0], points[:, 1], s=8, color=palette(index % palette.N), label=name)
            part.set(title=one.label, xlabel="t-SNE 1 (no unit)", ylabel="t-SNE 2 (no unit)", xticks=[], yticks=[])
            part.grid(False)
        _legend_outside(axes[-1], markerscale=2, fontsize=8)
