# SPDX-License-Identifier: Apache-2.0
"""Label-efficient subsets: a fraction or a number per class, balanced or not, seeded and nested."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["label_subset"]


def label_subset(
    labels: Tensor,
    *,
    fraction: float | None = None,
    per_class: int | None = None,
    balanced: bool = True,
    seed: int = 0,
) -> Tensor:
    """Indices of the images whose labels may be used, for low-shot learning (the paper's 10 … 0.25 %).

    With the same seed a smaller subset lies in every larger one of the same kind.

    Balanced: from every class the same number, `per_class` or ``max(1, round(fraction · n / classes))``; a class that
    has fewer images than such a fraction asks for gives all it has. Not balanced: ``max(1, round(fraction · n))`` or
    ``per_class · classes`` images at random, so a class may be missing.

    Args:
        labels: (n,) int64; a class is a value that occurs.
        fraction: Part of the images, in (0, 1].
        per_class: Number per class; give this or `fraction`.
        balanced: The same number from every class, or at random.
        seed: Of the random order.

    Returns:
        Sorted indices, (m,) int64.

    Raises:
        ValueError: Both or neither of `fraction` and `per_class`, out of range, or more than a class has.
    """
    if (fraction is None) == (per_class is None):
        raise ValueError("Pass either fraction= or per_class=.")
    if labels.ndim != 1 or len(labels) == 0:
        raise ValueError(f"labels must be a vector of at least one label; got the shape {tuple(labels.shape)}.")
    total = len(labels)
    classes, counts = labels.unique(return_counts=True)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1]; got {fraction}. 1 % is 0.01.")
    if per_class is not None:
        least = int(counts.min())
        if not 1 <= per_class <= (least if balanced else total // len(classes)):
            raise ValueError(
                f"per_class must lie between 1 and the images that a class has; got {per_class}, and class "
                f"{int(classes[counts.argmin()])} has {least}."
            )
    if not balanced:
        number = max(1, round(fraction * total)) if fraction is not None else (per_class or 0) * len(classes)
        return order[:number].sort().values
    number = max(1, round(fraction * total / len(classes))) if fraction is not None else (per_class or 0)
    shuffled = labels[order]
    return torch.cat([order[shuffled == label][:number] for label in classes]).sort().values
