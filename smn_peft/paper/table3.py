# SPDX-License-Identifier: Apache-2.0
"""Table 3: cascades against their dispatcher, and against the controls that the paper lacks."""

from __future__ import annotations

from .artefact import Artefact, Cell
from .cascades import cascade_of
from .scale import Scale

__all__ = ["ARTEFACT"]

_PAPER = {
    "k-NN": {
        "dispatcher": {"cifar100": 0.656, "inatloc500": 0.263},
        "cascade, conditional": {"cifar100": 0.752, "inatloc500": 0.395},
        "cascade, unconditional": {"cifar100": 0.778, "inatloc500": 0.424},
    },
    "Linear probe": {
        "dispatcher": {"cifar100": 0.769, "inatloc500": 0.524},
        "cascade, conditional": {"cifar100": 0.793, "inatloc500": 0.521},
        "cascade, unconditional": {"cifar100": 0.807, "inatloc500": 0.550},
    },
}
_ROWS = ("dispatcher", "dispatcher, whitened", "cascade, conditional", "cascade, unconditional")


def _cells(scale: Scale) -> list[Cell]:
    rows = [*_ROWS]
    if scale.choices["cascade"]["ensemble"]:
        rows.append(f"dispatchers of {scale.choices['cascade']['experts'] + 1} seeds")
    runs = {dataset: cascade_of(scale, dataset) for dataset in scale.choices["table3"]}
    cells = [
        Cell(section, row, dataset, run, f"cascade_{metric}@{row}")
        for metric, section in (("knn", "k-NN"), ("linear_probe", "Linear probe"))
        for row in rows
        for dataset, run in runs.items()
    ]
    for part, row in (("masks", "masks"), ("total", "all files"), ("paper", "(K + 1) β/32, as the paper counts")):
        cells += [Cell("Storage", row, dataset, run, f"cascade_bytes@{part}") for dataset, run in runs.items()]
    return cells


ARTEFACT = Artefact(
    "table3",
    "Table 3: cascades",
    _cells,
    _PAPER,
    note="Whitening the dispatcher alone, and as many dispatchers of other seeds, are not in the paper.",
)
