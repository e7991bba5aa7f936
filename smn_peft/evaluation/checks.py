# SPDX-License-Identifier: Apache-2.0
"""What every evaluation by labels asks of its features, with errors that say what to do."""

from __future__ import annotations

from torch import Tensor

from .features import Features

__all__ = ["check_classes", "check_pair"]


def check_classes(labels: Tensor, what: str) -> None:
    """Refuse labels (n,) that cannot be learned from.

    Raises:
        ValueError: If there are none, some are negative, or all are of one class.
    """
    if not len(labels):
        raise ValueError(f"{what} has no samples to learn from: check the split or the subset.")
    if int(labels.min()) < 0:
        missing = int((labels < 0).sum())
        raise ValueError(f"{what}: {missing} of {len(labels)} labels are negative. Drop the samples without a label.")
    if bool((labels == labels[0]).all()):
        raise ValueError(
            f"{what} needs two classes at least, and all {len(labels)} samples to learn from are of class "
            f"{int(labels[0])}. Shuffle before taking a part, or take a balanced subset."
        )


def check_pair(train: Features, test: Features, what: str) -> tuple[Tensor, Tensor]:
    """The labels of features to learn from and of features to test on.

    Raises:
        ValueError: If these features cannot be compared, or not learned from.
    """
    labels, truth = train.labels_for(what), test.labels_for(what)
    check_classes(labels, what)
    if not len(test):
        raise ValueError(f"{what} has no samples to test on: check the split.")
    if train.features.shape[1] != test.features.shape[1]:
        raise ValueError(
            f"{what} learns from features of dim {train.features.shape[1]} and is tested on dim "
            f"{test.features.shape[1]}: extract both with the same model."
        )
    return labels, truth
