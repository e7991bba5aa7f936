# SPDX-License-Identifier: Apache-2.0
"""`evaluate_knn`: accuracy of weighted k-nearest neighbours on features, the paper's first measure of them."""

from __future__ import annotations

from ..functional.features import knn_votes
from .checks import check_pair
from .features import Features

__all__ = ["evaluate_knn"]


def evaluate_knn(
    train: Features, test: Features, *, k: int = 200, temperature: float = 0.1, chunk: int = 4096
) -> float:
    """Fraction of the test samples that their k nearest training samples vote for (section 5 of the paper).

    Args:
        train: Labelled features, of two classes at least.
        test: Labelled features of the same model.
        k: Number of neighbours; all where there are fewer.
        temperature: Cosine similarity s votes with exp(s / temperature).
        chunk: Rows compared at a time: bounds the memory.

    Raises:
        ValueError: No labels, one class only, other dims, or k or temperature that make no sense.
    """
    labels, truth = check_pair(train, test, "k-NN")
    votes = knn_votes(train.features, labels, test.features, k=k, temperature=temperature, chunk=chunk)
    return float((votes.argmax(dim=1) == truth).double().mean())
