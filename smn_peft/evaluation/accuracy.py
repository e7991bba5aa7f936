# SPDX-License-Identifier: Apache-2.0
"""Accuracy of a classifier's logits, and of k nearest neighbours, the paper's first measure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..functional.features import knn_votes
from .features import Features, check_pair

__all__ = ["Accuracy", "evaluate_accuracy", "evaluate_knn"]


@dataclass(frozen=True, eq=False)
class Accuracy:
    """Fractions of right predictions."""

    top1: float  # of all samples
    per_class: Tensor  # fp64 (classes,), of each class; NaN where it has no samples
    counts: Tensor  # int64 (classes,), samples of each class

    @property
    def mean_per_class(self) -> float:
        """Mean over the classes that have samples."""
        return float(self.per_class.nanmean())


def evaluate_accuracy(logits: Features) -> Accuracy:
    """Accuracy of labelled logits (n, classes), as `extract_features(…, function=classifier)` gives them."""
    labels, classes = logits.labels_for("Accuracy"), logits.features.shape[1]
    if not len(labels):
        raise ValueError("Accuracy has no samples to test on: check the split.")
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= classes:
        raise ValueError(
            f"Labels run from {lowest} to {highest}, and there are logits for 0 … {classes - 1}: "
            f"give the classifier a head for {highest + 1} classes, or drop samples without a label."
        )
    right = (logits.features.argmax(dim=1) == labels).double()
    counts = torch.bincount(labels, minlength=classes)
    per_class = torch.bincount(labels, weights=right, minlength=classes) / counts
    return Accuracy(float(right.mean()), per_class, counts)


def evaluate_knn(train: Features, test: Features, *, k: int = 200, temperature: float = 0.1) -> float:
    """Fraction of the test samples that their k nearest training samples vote for (section 5 of the paper).

    All vote where there are fewer than `k`, each of cosine similarity s with exp(s / `temperature`).
    """
    labels, truth = check_pair(train, test, "k-NN")
    votes = knn_votes(train.features, labels, test.features, k=k, temperature=temperature)
    return float((votes.argmax(dim=1) == truth).double().mean())
