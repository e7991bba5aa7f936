# SPDX-License-Identifier: Apache-2.0
"""Accuracy of logits, in all and per class."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from smn_peft.evaluation import Features, evaluate_accuracy


def test_accuracy_is_scikit_learns():
    logits, labels = torch.randn(200, 4), torch.randint(0, 3, (200,))
    logits[torch.arange(200), labels] += 1
    logits[:, 3] = -100
    predicted = logits.argmax(1)
    found = evaluate_accuracy(Features(logits, labels))
    assert found.top1 == pytest.approx(accuracy_score(labels, predicted))
    assert found.mean_per_class == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert found.counts.tolist() == torch.bincount(labels, minlength=4).tolist()
    assert found.per_class.isnan().tolist() == [False, False, False, True]


def test_classes_count_the_same_in_the_mean():
    logits = torch.eye(2)[torch.tensor([0] * 9 + [0])]
    found = evaluate_accuracy(Features(logits, torch.tensor([0] * 9 + [1])))
    assert found.top1 == 0.9
    assert found.per_class.tolist() == [1.0, 0.0]
    assert found.mean_per_class == 0.5


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (Features(torch.ones(2, 2)), r"Accuracy needs labels"),
        (
            Features(torch.ones(2, 2), torch.tensor([0, 4])),
            r"from 0 to 4, and there are logits for 0 … 1: .* 5 classes",
        ),
        (Features(torch.ones(2, 2), torch.tensor([0, -1])), r"from -1 to 0.*drop samples without a label"),
        (Features(torch.ones(0, 2), torch.ones(0)), r"Accuracy has no samples to test on"),
    ],
)
def test_labels_that_do_not_fit_are_refused(logits, message):
    with pytest.raises(ValueError, match=message):
        evaluate_accuracy(logits)
