# SPDX-License-Identifier: Apache-2.0
"""Densities per layer of finished runs, as Figures 6 and 7 average them over datasets and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..analysis import LayerDensity, average_densities, layer_densities
from ..training import load_masks
from .run_spec import RunSpec
from .store import RunStore

__all__ = ["averaged", "from_details"]


def averaged(store: RunStore, runs: Sequence[RunSpec], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Mean and standard deviation of every layer's density over runs and seeds, failed runs left out."""
    specs = [run.seeded(seed) for run in runs for seed in seeds]
    finished = [spec for spec in specs if store.failure(spec) is None]
    if not finished:
        return []
    masks = (load_masks(store.path(spec), backbone=spec.backbone) for spec in finished)
    layers = [layer_densities(_without_head(each)) for each in masks]
    return [asdict(row) for row in average_densities(layers)]


def _without_head(masks: Mapping[str, Any]) -> dict[str, Any]:
    """A head's size is its dataset's: it would not average."""
    return {name: mask for name, mask in masks.items() if not name.startswith("head.")}


def from_details(rows: Sequence[Mapping[str, Any]]) -> list[LayerDensity]:
    """What [`averaged`] gave, read from a record."""
    return [LayerDensity(**row) for row in rows]
