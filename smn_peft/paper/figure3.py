# SPDX-License-Identifier: Apache-2.0
"""Figure 3: accuracy from few labels, where the mask without labels has seen all images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..analysis import Series, mean_curve, plot_low_shot
from .artefact import Artefact, Cell
from .scale import Scale

__all__ = ["ARTEFACT"]


def _cells(scale: Scale) -> list[Cell]:
    supervised, options = scale.supervised[scale.resnet], scale.choices["figure3_options"]
    cells = []
    for dataset in scale.choices["figure3"]:
        mask = scale.self_supervised("mask", dataset)
        for fraction in scale.choices["figure3_fractions"]:
            column = f"{100 * fraction:g} %"
            few = {**options, "fraction": fraction, "eval_probe": False}
            runs = {method: scale.run(supervised, method, dataset, **few) for method in ("full", "mask")}
            cells += [
                Cell(dataset, "linear probe, frozen base", column, mask, f"frozen_low_shot@{fraction:g}"),
                Cell(dataset, "full fine-tuning", column, runs["full"], "accuracy"),
                Cell(dataset, "mask with these labels", column, runs["mask"], "accuracy"),
                Cell(dataset, "mask without labels, linear probe", column, mask, f"low_shot@{fraction:g}"),
            ]
    return cells


def _draw(record: Mapping[str, Any], folder: Path, stem: str) -> list[Path]:
    files = []
    for dataset in dict.fromkeys(cell["section"] for cell in record["cells"]):
        mine = [cell for cell in record["cells"] if cell["section"] == dataset]
        lines: list[Series] = []
        for row in dict.fromkeys(cell["row"] for cell in mine):
            points = {float(c["column"][:-2]): c["values"] for c in mine if c["row"] == row}
            seeds = min(len(values) for values in points.values())
            curves = [
                {x: 100 * values[seed] for x, values in points.items() if values[seed] is not None}
                for seed in range(seeds)
            ]
            lines.append(mean_curve(row, curves))
        files.append(folder / f"{stem}-{dataset}.png")
        plot_low_shot(lines, files[-1], title=dataset)
    return files


ARTEFACT = Artefact(
    "figure3",
    "Figure 3: few labels",
    _cells,
    note=(
        "Linear probes are the mean over three draws of the labels. The paper's text does not name the three datasets "
        "of its figure, nor prints its numbers."
    ),
    draw=_draw,
)
