# SPDX-License-Identifier: Apache-2.0
"""Table 9: topk whose density falls from 1 to the found one while it trains, against topk at it and the threshold."""

from __future__ import annotations

from dataclasses import replace

from .artefact import Artefact, Cell
from .scale import Scale

__all__ = ["ARTEFACT"]

_COLUMNS = ("dtd", "eurosat", "flowers102", "ucf101")


def _row(*values: float) -> dict[str, float]:
    return dict(zip(_COLUMNS, values, strict=True))


_PAPER = {
    "k-NN": {
        "topk, progressive": _row(0.658, 0.957, 0.895, 0.549),
        "topk, found density": _row(0.671, 0.973, 0.903, 0.572),
        "threshold": _row(0.674, 0.971, 0.920, 0.549),
    },
    "Linear probe": {
        "topk, progressive": _row(0.706, 0.981, 0.983, 0.681),
        "topk, found density": _row(0.733, 0.984, 0.985, 0.690),
        "threshold": _row(0.714, 0.983, 0.983, 0.697),
    },
    "Density": {"threshold": _row(0.988, 0.967, 0.986, 0.957)},
}


def _cells(scale: Scale) -> list[Cell]:
    cells, label = [], scale.unsupervised[scale.varied].label
    for metric, name in (("knn", "k-NN"), ("linear_probe", "Linear probe"), ("density", "Density")):
        for dataset in scale.choices["table9"]:
            mask = scale.variation("mask", dataset)
            topk = replace(scale.variation("topk", dataset, mask={"rank_by": "score"}), found=mask)
            runs = {
                "topk, progressive": topk.at(mask={"density_schedule": "linear"}),
                "topk, found density": topk,
                "threshold": mask,
            }
            cells += [Cell(f"{label}: {name}", row, dataset, run, metric) for row, run in runs.items()]
    return cells


ARTEFACT = Artefact("table9", "Table 9: progressive topk", _cells, _PAPER)
