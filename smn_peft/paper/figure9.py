# SPDX-License-Identifier: Apache-2.0
"""Figure 9: masks on a share of every tensor's weights, chosen at random or as the largest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .artefact import Artefact, Cell
from .scale import Scale
from .selective import draw_shares

__all__ = ["ARTEFACT"]


def _cells(scale: Scale) -> list[Cell]:
    dataset = scale.choices["figure9"]
    whole, where = scale.variation("mask", dataset), scale.unsupervised[scale.varied].label
    cells = [Cell(where, "frozen base", "k-NN", whole, "frozen_knn"), Cell(where, "all weights", "k-NN", whole, "knn")]
    for select in ("random", "magnitude"):
        for share in scale.choices["figure9_shares"]:
            run = scale.variation("mask", dataset, mask={"trainable_fraction": share, "select": select})
            cells.append(Cell(where, f"{select}: {100 * share:g} %", "k-NN", run, "knn"))
    return cells


def _draw(record: Mapping[str, Any], folder: Path, stem: str) -> list[Path]:
    return [draw_shares(record, folder / f"{stem}.png", {})]


ARTEFACT = Artefact(
    "figure9",
    "Figure 9: a random share of the weights, or the largest",
    _cells,
    note="The paper prints no numbers beside the figure.",
    draw=_draw,
)
