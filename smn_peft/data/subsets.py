# SPDX-License-Identifier: Apache-2.0
"""Subsets by label: few labels to learn from, nested and seeded, and images held out to evaluate on."""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional.features import whole_numbers

__all__ = ["held_out", "label_subset"]


def label_subset(labels: Tensor, fraction: float, *, balanced: bool = True, seed: int = 0) -> Tensor:
    """Choose the images whose labels may be used, for low-shot learning (the paper's 10 … 0.25 %).

    With the same seed a smaller subset lies in every larger one of the same kind.

    Args:
        labels: (n,) whole numbers; a class is a value that occurs.
        fraction: Part of the images, in (0, 1]; at least one image, per class if balanced.
        balanced: Take the same number from every class, all of a class that has fewer than the fraction asks for;
            else so many at random, so that a class may be missing.
        seed: Seed of the random order.

    Returns:
        Sorted indices, (m,) int64.

    Raises:
        ValueError: No labels, or a fraction out of range.
    """
    if labels.ndim != 1 or len(labels) == 0:
        raise ValueError(f"labels must be a vector of at least one label; got the shape {tuple(labels.shape)}.")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1]; got {fraction}. 1 % is 0.01.")
    labels, total = whole_numbers(labels, "labels"), len(labels)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    if not balanced:
        return order[: max(1, round(fraction * total))].sort().values
    classes, shuffled = labels.unique(), labels[order]
    number = max(1, round(fraction * total / len(classes)))
    return torch.cat([order[shuffled == label][:number] for label in classes]).sort().values


def held_out(labels: Tensor, fraction: float, *, seed: int = 0) -> Tensor:
    """Choose images to evaluate on, evenly of every class, one at least and never all; the rest is to train on.

    Args:
        labels: (n,) whole numbers.
        fraction: Part of the images, in (0, 1).
        seed: Seed of the choice.

    Returns:
        Sorted indices, (m,) int64.

    Raises:
        ValueError: The fraction is out of range, or no class has two images.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"A fraction to hold out must lie in (0, 1); got {fraction}. 20 % is 0.2.")
    labels = whole_numbers(labels, "labels")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled, found = labels[order], []
    for label in labels.unique():
        of_class = order[shuffled == label]
        count = len(of_class)
        found.append(of_class[: min(max(1, round(fraction * count)), count - 1)])
    if not sum(map(len, found)):
        raise ValueError("No class has two images, so none can be held out to evaluate on.")
    return torch.cat(found).sort().values
