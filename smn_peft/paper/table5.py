# SPDX-License-Identifier: Apache-2.0
"""Table 5: number of prototypes, what is kept frozen, and the initialisation; k-NN of masks learned without labels."""

from __future__ import annotations

from .artefact import Artefact, Cell
from .run_spec import RunSpec
from .scale import Scale

__all__ = ["ARTEFACT"]

_COLUMNS = ("cifar10", "dtd", "sun397")


def _row(*values: float) -> dict[str, float]:
    return dict(zip(_COLUMNS, values, strict=True))


_PAPER = {
    "(a) Prototypes": {
        "50": _row(0.510, 0.644, 0.503),
        "500": _row(0.921, 0.674, 0.518),
        "5000": _row(0.920, 0.640, 0.496),
    },
    "(b) Kept frozen": {
        "none": _row(0.560, 0.434, 0.177),
        "norms": _row(0.921, 0.674, 0.518),
        "biases": _row(0.681, 0.505, 0.266),
    },
    "(c) Initialisation": {
        "DINO": _row(0.915, 0.695, 0.529),
        "SwAV": _row(0.921, 0.674, 0.518),
        "TIMM": _row(0.900, 0.623, 0.505),
    },
}


_KEPT = {"none": {"mask_norms": True, "mask_bias": True}, "norms": {}, "biases": {"mask_norms": True}}


def _with_prototypes(run: RunSpec, number: int) -> RunSpec:
    rows = run.arguments["batch_size"] + run.arguments["objective_options"]["queue_length"]
    few = {"allow_few_rows": True} if number > rows else {}
    return run.at(objective_options={"prototypes": number, **few})


def _cells(scale: Scale) -> list[Cell]:
    cells, label = [], scale.unsupervised[scale.varied].label
    for dataset in scale.choices["table5"]:
        for number in scale.choices["table5_prototypes"]:
            run = _with_prototypes(scale.variation("mask", dataset), number)
            cells.append(Cell(f"(a) Prototypes, {label}", str(number), dataset, run, "knn"))
        for kept, options in _KEPT.items():
            run = scale.variation("mask", dataset, **({"mask": options} if options else {}))
            cells.append(Cell(f"(b) Kept frozen, {label}", kept, dataset, run, "knn"))
        for key in scale.choices["table5_initialisations"]:
            setting = scale.unsupervised[key]
            section = "(c) Initialisation"
            run = scale.run(setting, "mask", dataset)
            cells.append(Cell(section, f"{setting.label}: frozen base", dataset, run, "frozen_knn"))
            cells.append(Cell(section, f"{setting.label}: mask", dataset, run, "knn"))
    return cells


ARTEFACT = Artefact(
    "table5",
    "Table 5: prototypes, what is kept frozen, initialisation",
    _cells,
    _PAPER,
    note=(
        "k-NN. More prototypes than batch and queue have rows are refused elsewhere; here they are trained, as the "
        "paper did. At the small scale the initialisations are two networks."
    ),
)
