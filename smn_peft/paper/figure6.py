# SPDX-License-Identifier: Apache-2.0
"""Figure 6: density per layer of a vision transformer masked with labels."""

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


def _runs(scale: Scale) -> dict[str, RunSpec]:
    return {name: scale.run(scale.supervised[scale.vit], "mask", name) for name in scale.choices["figure6"]}


def _cells(scale: Scale) -> list[Cell]:
    label = scale.supervised[scale.vit].label
    return [Cell("", label, dataset, run, "density") for dataset, run in _runs(scale).items()]


def _details(store: RunStore, scale: Scale, seeds: Sequence[int]) -> Any:
    return {scale.supervised[scale.vit].label: averaged(store, list(_runs(scale).values()), seeds)}


def _draw(record: Mapping[str, Any], folder: Path, stem: str) -> list[Path]:
    ((label, rows),) = record["details"].items()
    path = folder / f"{stem}.png"
    plot_densities({label: from_details(rows)}, path, title=f"{label}, with labels")
    return [path]


ARTEFACT = Artefact("figure6", "Figure 6: density per layer of a transformer", _cells, details=_details, draw=_draw)
