# SPDX-License-Identifier: Apache-2.0
"""The small recipe against the paper's: accuracy over the length of training, and where neither was tuned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..analysis import Series, mean_curve, plot_curves
from .artefact import Artefact, Cell
from .scale import Scale

__all__ = ["ARTEFACT"]

_FROZEN = {"frozen_knn": "k-NN, frozen base", "frozen_linear_probe": "linear probe, frozen base"}


def _cells(scale: Scale) -> list[Cell]:
    cells = []
    for setting, dataset, lengths in scale.choices["recipes"]:
        section = f"{setting.label}, {dataset}"
        for epochs in lengths:
            column = f"{epochs} {'epoch' if epochs == 1 else 'epochs'}"
            runs = {}
            for row, method in scale.choices["recipes_methods"].items():
                recipe = scale.run(setting, method, dataset)
                changes: dict[str, Any] = {"epochs": epochs}
                if rising := recipe.arguments.get("warmup_epochs"):  # the same share of the run
                    changes["warmup_epochs"] = rising * epochs / recipe.arguments["epochs"]
                runs[row] = recipe.at(**changes)
            first = next(iter(runs.values()))
            for metric, row in _FROZEN.items():
                if metric == "frozen_knn" or first.arguments.get("eval_probe"):
                    cells.append(Cell(section, row, column, first, metric))
            cells += [Cell(section, row, column, run, "accuracy") for row, run in runs.items()]
    return cells


def _draw(record: Mapping[str, Any], folder: Path, stem: str) -> list[Path]:
    panels: dict[str, list[Series]] = {}
    for section in dict.fromkeys(cell["section"] for cell in record["cells"]):
        mine = [cell for cell in record["cells"] if cell["section"] == section and None not in cell["values"]]
        if len({cell["column"] for cell in mine}) < 2:
            continue
        for row in dict.fromkeys(cell["row"] for cell in mine):
            points = {float(c["column"].split()[0]): c["values"] for c in mine if c["row"] == row}
            seeds = min(len(values) for values in points.values())
            curves = [{x: 100 * values[seed] for x, values in points.items()} for seed in range(seeds)]
            panels.setdefault(section, []).append(mean_curve(row, curves))
    if not panels:
        return []
    path = folder / f"{stem}.png"
    plot_curves(panels, path, xlabel="epochs", ylabel="accuracy (%)", markers=True)
    return [path]


ARTEFACT = Artefact(
    "recipes",
    "The small recipe against the paper's",
    _cells,
    note=(
        "Not in the paper. The paper's recipe as far as it fits: SGD on the scores, a random head, statistics that "
        "adapt. The small one: AdamW, a head that starts from a linear probe, a warm-up, frozen statistics. Both were "
        "tuned on CIFAR-10; nothing was tuned on the other images, nor on ResNet-56."
    ),
    draw=_draw,
)
