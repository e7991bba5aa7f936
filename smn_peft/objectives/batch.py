# SPDX-License-Identifier: Apache-2.0
"""Read images, labels, crops and features for an objective, and check them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Batch, Model

__all__ = ["check_features", "crops_of", "entry", "features_of_crops"]


_FIXES = {
    "pixel_values": "use a transform that gives one view, such as supervised_transform.",
    "labels": "use a data set with labels (label_column), or an objective without.",
    "crops": "use a transform with several views, such as multi_crop_transform.",
}


def entry(batch: Batch, key: str, name: str) -> Any:
    """``batch[key]``; a ValueError names objective `name` if it is missing."""
    if key not in batch:
        raise ValueError(f"{name} needs batch[{key!r}], and the batch has {sorted(batch)}: {_FIXES[key]}")
    return batch[key]


def crops_of(batch: Batch, name: str, global_crops: int) -> list[Tensor]:
    """``batch["crops"]``: at least two tensors (batch, 3, h, w), the global crops first, all of one size."""
    crops = list(entry(batch, "crops", name))
    needed = max(global_crops, 2)
    if len(crops) < needed:
        raise ValueError(
            f"{name} needs {global_crops} global crops and {needed} crops in all, the batch has {len(crops)}: let the "
            "transform make more crops, or lower global_crops."
        )
    if len({len(crop) for crop in crops}) > 1:
        raise ValueError(f"Every crop must hold the same images, got batch sizes {[len(crop) for crop in crops]}.")
    sizes = [tuple(crop.shape[-2:]) for crop in crops]
    if len(set(sizes[:global_crops])) > 1:
        raise ValueError(
            f"The first {global_crops} crops of a batch must be the global ones, of one size; got sizes {sizes}."
        )
    return crops


def check_features(features: Tensor, dim: int, name: str) -> Tensor:
    """Return the features; a ValueError names objective `name` if their shape is not (batch, `dim`)."""
    if features.ndim != 2 or features.shape[1] != dim:
        raise ValueError(
            f"{name} was made for features of shape (batch, {dim}), and the model returned {tuple(features.shape)}: "
            "pass the model's pooled features, or its feature_dim when the objective is created."
        )
    return features


def features_of_crops(model: Model, crops: Sequence[Tensor], dim: int, name: str) -> Tensor:
    """Features of all crops, (crops · batch, dim), crop by crop; crops of one size share a forward."""
    groups: dict[torch.Size, list[int]] = {}
    for i, crop in enumerate(crops):
        groups.setdefault(crop.shape, []).append(i)
    found: dict[int, Tensor] = {}
    for members in groups.values():
        features = check_features(model(torch.cat([crops[i] for i in members])), dim, name)
        found.update(zip(members, features.chunk(len(members)), strict=True))
    return torch.cat([found[i] for i in range(len(crops))])
