# SPDX-License-Identifier: Apache-2.0
"""Figure 10: embeddings of the base, of the dispatcher and of the cascade, laid out by t-SNE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..analysis import EmbeddingMap, plot_embedding_maps
from .artefact import Artefact, Cell
from .cascades import cascade_of, maps_of
from .scale import Scale
from .store import RunStore

__all__ = ["ARTEFACT"]

_IMAGES = 1000


def _cells(scale: Scale) -> list[Cell]:
    dataset = scale.choices["figure10"]
    rows = ("dispatcher", "cascade, unconditional")
    return [Cell("", row, dataset, cascade_of(scale, dataset), f"cascade_knn@{row}") for row in rows]


def _details(store: RunStore, scale: Scale, seeds: Sequence[int]) -> Any:
    spec = cascade_of(scale, scale.choices["figure10"]).seeded(seeds[0])
    if store.failure(spec) is not None:
        return []
    return maps_of(store.path(spec), spec.backbone, scale.choices["figure10_classes"], _IMAGES)


def _draw(record: Mapping[str, Any], folder: Path, stem: str) -> list[Path]:
    if not record["details"]:
        return []
    maps = [
        EmbeddingMap(one["label"], torch.tensor(one["points"]), torch.tensor(one["labels"]))
        for one in record["details"]
    ]
    path = folder / f"{stem}.png"
    plot_embedding_maps(maps, path, names=record["details"][0]["names"])
    return [path]


ARTEFACT = Artefact(
    "figure10",
    "Figure 10: embeddings",
    _cells,
    note=f"At most {_IMAGES:,} test images of the first classes, first seed; the numbers are k-NN of all.",
    details=_details,
    draw=_draw,
    seeds=1,
)
