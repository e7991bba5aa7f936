# SPDX-License-Identifier: Apache-2.0
"""The canvas of every plot: white in both page themes, colours told apart by colour-blind readers, saved whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..storage import atomic_write

__all__ = ["COLOURS", "MARKERS", "canvas", "legend_outside"]

#: Okabe and Ito's palette without its yellow, which is too light for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_STYLE = {
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


@contextmanager
def canvas(path: str | os.PathLike[str], columns: int = 1, size: tuple[float, float] = (6.0, 4.0)) -> Iterator[Any]:
    """Axes to draw on, saved as a picture when the block ends without an error.

    Args:
        path: File to write; its suffix names the format: .png, .svg or .pdf.
        columns: Number of axes side by side.
        size: Width and height of each in inches.

    Yields:
        The axes, or a list of them where there are several columns.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The suffix names no format.
    """
    path = Path(path)
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{path} must end in .png, .svg or .pdf, which names the format of the picture.")
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Plots are drawn by matplotlib, which is not installed: pip install 'smn_peft[plot]'."
        ) from (error)
    style: Any = {**matplotlib.rcParamsDefault, **_STYLE, "backend": "agg"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(size[0] * columns, size[1]), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, columns, squeeze=False)[0]
        yield axes[0] if columns == 1 else list(axes)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            figure.savefig(file, format=path.suffix[1:].lower(), dpi=150)


def legend_outside(axes: Any, title: str | None = None) -> None:
    """Put the legend right of the axes, where it covers no data."""
    axes.legend(title=title, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, borderaxespad=0.0)
