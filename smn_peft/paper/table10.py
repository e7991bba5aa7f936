# SPDX-License-Identifier: Apache-2.0
"""Table 10: how much k-NN varies over five runs of one experiment."""

from __future__ import annotations

from .artefact import Artefact, Cell
from .scale import Scale

__all__ = ["ARTEFACT"]

_COLUMNS = ("R1", "R2", "R3", "R4", "R5", "mean", "std")
_PAPER = {
    "": {
        "dtd": dict(zip(_COLUMNS, (0.685, 0.678, 0.670, 0.678, 0.671, 0.676, 0.005), strict=True)),
        "ucf101": dict(zip(_COLUMNS, (0.569, 0.576, 0.557, 0.574, 0.568, 0.569, 0.007), strict=True)),
    }
}


def _cells(scale: Scale) -> list[Cell]:
    return [
        Cell("", dataset, "k-NN", scale.self_supervised("mask", dataset), "knn")
        for dataset in scale.choices["table10"]
    ]


ARTEFACT = Artefact("table10", "Table 10: five runs", _cells, _PAPER, seeds=5, each_seed=True)
