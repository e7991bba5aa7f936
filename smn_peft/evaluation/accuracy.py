# SPDX-License-Identifier: Apache-2.0
"""Accuracy of a classifier's logits, and of k nearest neighbours, the paper's first measure."""

from __future__ import annotations

from torch import Tensor

from ..functional.features import knn_votes
from .features import Features

__all__ = ["check_classes", "check_pair", "evaluate_accuracy", "evaluate_knn"]


def evaluate_accuracy(logits: Features) -> float:
    """Fraction of right predictions of labelled logits (n, classes), of `extract_features(…, function=classifier)`."""
    labels, classes = logits.labels_for("Accuracy"), logits.features.shape[1]
    if not len(labels):
        raise ValueError("Accuracy has no samples to test on: check the split.")
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= classes:
        found = f"Labels run from {lowest} to {highest}, and there are logits for 0 … {classes - 1}"
        fix = f"give the classifier a head for {highest + 1} classes, or drop samples without a label"
        raise ValueError(f"{found}: {fix}.")
    return float((logits.features.argmax(dim=1) == labels).double().mean())


def evaluate_knn(train: Features, test: Features, *, k: int = 200, temperature: float = 0.1) -> float:
    """Fraction of the test samples that their k nearest training samples vote for (section 5 of the paper).

    All vote where there are fewer than `k`, each of cosine similarity s with exp(s / `temperature`).
    """
    labels, truth = check_pair(train, test, "k-NN")
    votes = knn_votes(train.features, labels, test.features, k=k, temperature=temperature)
    return float((votes.argmax(dim=1) == truth).double().mean())


def check_classes(labels: Tensor, what: str) -> None:
    """Refuse labels (n,) that cannot be learned from: none, negative ones, or all of one class."""
    if not len(labels):
        raise ValueError(f"{what} has no samples to learn from: check the split or the subset.")
    if missing := int((labels < 0).sum()):
        raise ValueError(f"{what}: {missing} of {len(labels)} labels are negative. Drop the samples without a label.")
    if bool((labels == labels[0]).all()):
        same = f"all {len(labels)} samples to learn from are of class {int(labels[0])}"
        raise ValueError(f"{what} needs two classes at least, and {same}. Shuffle before taking a part.")


def check_pair(train: Features, test: Features, what: str) -> tuple[Tensor, Tensor]:
    """The labels of both, once features to learn from and features to test on can be compared."""
    labels, truth = train.labels_for(what), test.labels_for(what)
    check_classes(labels, what)
    if not len(test):
        raise ValueError(f"{what} has no samples to test on: check the split.")
    if train.features.shape[1] != test.features.shape[1]:
        dims = f"{train.features.shape[1]} and is tested on dim {test.features.shape[1]}"
        raise ValueError(f"{what} learns from features of dim {dims}: extract both with the same model.")
    return labels, truth
