# SPDX-License-Identifier: Apache-2.0
"""Figure 7: density per layer of a convolutional network, masked without labels and with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..analysis import plot_densities
from .artefact import Artefact, Cell
from .densities import averaged, from_details
from .run_spec import RunSpec
from .scale import Scale
from .store import RunStore

__all__ = ["ARTEFACT"]


def _runs(scale: Scale) -> dict[str, dict[str, RunSpec]]:
    datasets = scale.choices["figure7"]
    return {
        "without labels": {name: scale.self_supervised("mask", name) for name in datasets},
        "with labels": {name: scale.run(scale.supervised[scale.resnet], "mask", name) for name in datasets},
    }


def _cells(scale: Scale) -> list[Cell]:
    return [
        Cell("", row, dataset, run, "density") for row, runs in _runs(scale).items() for dataset, run in runs.items()
    ]


def _details(store: RunStore, scale: Scale, seeds: Sequence[int]) -> Any:
    return {row: averaged(store, list(runs.values()), seeds) for row, runs in _runs(scale).items()}


def _draw(record: Mapping[str, Any], folder: Path, stem: str) -> list[Path]:
    groups = {label: from_details(rows) for label, rows in record["details"].items() if rows}
    path = folder / f"{stem}.png"
    plot_densities(groups, path, title="Density per layer")
    return [path]


ARTEFACT = Artefact("figure7", "Figure 7: density per layer of a ResNet", _cells, details=_details, draw=_draw)
