# SPDX-License-Identifier: Apache-2.0
"""`evaluate_knn`: accuracy of weighted k-nearest neighbours on features, the paper's first measure of them."""

from __future__ import annotations

from ..functional.knn import knn_votes
from .features import Features, check_pair

__all__ = ["evaluate_knn"]


def evaluate_knn(
    train: Features, test: Features, *, k: int = 200, temperature: float = 0.1, chunk: int = 4096
) -> float:
    """Fraction of the test samples that their k nearest training samples vote for (section 5 of the paper).

    `k` nearest vote, all where there are fewer, each of cosine similarity s with exp(s / `temperature`); `chunk` rows
    are compared at a time.
    """
    labels, truth = check_pair(train, test, "k-NN")
    votes = knn_votes(train.features, labels, test.features, k=k, temperature=temperature, chunk=chunk)
    return float((votes.argmax(dim=1) == truth).double().mean())
