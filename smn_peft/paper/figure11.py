# SPDX-License-Identifier: Apache-2.0
"""Figure 11: how many of a cluster's images belong to its most common classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..analysis import ClusterComposition, plot_clusters
from .artefact import Artefact, Cell
from .cascades import cascade_of, clusters_of
from .scale import Scale
from .store import RunStore

__all__ = ["ARTEFACT"]


def _cells(scale: Scale) -> list[Cell]:
    dataset, row = scale.choices["figure11"], "cascade, conditional"
    return [Cell("", row, dataset, cascade_of(scale, dataset), f"cascade_knn@{row}")]


def _details(store: RunStore, scale: Scale, seeds: Sequence[int]) -> Any:
    spec = cascade_of(scale, scale.choices["figure11"]).seeded(seeds[0])
    return [] if store.failure(spec) is not None else clusters_of(store.path(spec), spec.backbone)


def _draw(record: Mapping[str, Any], folder: Path, stem: str) -> list[Path]:
    if not record["details"]:
        return []
    clusters = [ClusterComposition(**{**row, "cumulative": tuple(row["cumulative"])}) for row in record["details"]]
    path = folder / f"{stem}.png"
    plot_clusters(clusters, path, title="Clusters of the training images")
    return [path]


ARTEFACT = Artefact(
    "figure11",
    "Figure 11: what clusters are made of",
    _cells,
    note="Clusters of the first seed's router.",
    details=_details,
    draw=_draw,
    seeds=1,
)
