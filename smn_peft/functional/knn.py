# SPDX-License-Identifier: Apache-2.0
"""Exact weighted k-nearest neighbours in bounded memory: cosine similarity s votes with exp(s / temperature)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .finite import require_finite_rows
from .whole import whole_numbers

__all__ = ["knn_votes"]


@torch.no_grad()
def knn_votes(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    *,
    k: int = 200,
    temperature: float = 0.1,
    num_classes: int | None = None,
    chunk: int = 4096,
) -> Tensor:
    """Share of the votes of each class among the k nearest training samples, as in DINO (section 5 of the paper).

    Among equal similarities at the border of the k nearest, which one votes is up to the device. What is held beside
    the features is `chunk` × `chunk` similarities and `chunk` × 2 k neighbours.

    Args:
        train_features: (train, dim) of any length; rows are L2-normalised here.
        train_labels: (train,), from 0.
        features: (n, dim), the samples to classify.
        k: Number of neighbours; all training samples where there are fewer.
        temperature: Smaller gives the nearest more weight.
        num_classes: Number of columns; by default the largest label plus 1.
        chunk: Rows of either side that are compared at a time.

    Returns:
        fp32 (n, num_classes) on the device of `features`; rows sum to 1.

    Raises:
        ValueError: Shapes, labels, k, temperature or chunk that make no sense, or features that are not finite.
    """
    classes = _check(train_features, train_labels, features, k, temperature, num_classes, chunk)
    device = train_features.device
    labels = whole_numbers(train_labels, "k-NN").to(device)
    parts = []
    with torch.autocast(device.type, enabled=False):  # similarities in bf16 would tie
        train = F.normalize(train_features.float(), dim=1)
        for part in features.split(chunk):
            nearest = F.normalize(part.to(device).float(), dim=1)
            similarity, neighbours = _nearest(nearest, train, min(k, len(train)), chunk)
            # Relative to the nearest one: exp(s / temperature) itself overflows at small temperatures.
            weights = ((similarity - similarity.amax(dim=1, keepdim=True)) / temperature).exp()
            votes = weights.new_zeros(len(part), classes).scatter_add_(1, labels[neighbours], weights)
            parts.append((votes / weights.sum(dim=1, keepdim=True)).to(features.device))
    return torch.cat(parts) if parts else features.new_zeros(0, classes, dtype=torch.float32)


def _nearest(rows: Tensor, train: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Similarities and indices, (rows, k) each, of the most similar training rows, seen a chunk at a time."""
    similarity = rows.new_empty(len(rows), 0)
    neighbours = torch.empty_like(similarity, dtype=torch.int64)
    for start in range(0, len(train), chunk):
        block = rows @ train[start : start + chunk].T
        found, index = block.topk(min(k, block.shape[1]), dim=1)
        similarity, neighbours = torch.cat([similarity, found], 1), torch.cat([neighbours, index + start], 1)
        if similarity.shape[1] > k:
            similarity, order = similarity.topk(k, dim=1)
            neighbours = neighbours.gather(1, order)
    return similarity, neighbours


def _check(
    train: Tensor, labels: Tensor, features: Tensor, k: int, temperature: float, num_classes: int | None, chunk: int
) -> int:
    """Number of classes, once everything makes sense."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}; the paper's is 200, and all samples vote where k is larger.")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}; the paper's is 0.1.")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 row, got {chunk}; leave it out if memory suffices.")
    if train.ndim != 2 or features.ndim != 2 or train.shape[1] != features.shape[1]:
        raise ValueError(
            f"Features must be (n, dim) with one dim for both; got {tuple(train.shape)} to learn from and "
            f"{tuple(features.shape)} to classify. Extract both with the same model."
        )
    if not len(train):
        raise ValueError("There are no training features: k-NN needs at least one labelled sample.")
    if labels.shape != train.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"train_labels must hold one integer per training sample, ({len(train)},); got {labels.dtype} "
            f"{tuple(labels.shape)}."
        )
    lowest, highest = int(labels.min()), int(labels.max())
    classes = highest + 1 if num_classes is None else num_classes
    if lowest < 0 or highest >= classes:
        raise ValueError(
            f"Labels run from {lowest} to {highest}, outside of 0 … {classes - 1}: leave num_classes out, or drop "
            "the samples without a label."
        )
    require_finite_rows(train, "Training features")
    require_finite_rows(features, "Features to classify")
    return classes
