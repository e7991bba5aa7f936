# SPDX-License-Identifier: Apache-2.0
"""Accuracy of logits."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import accuracy_score

from smn_peft.evaluation import Features, evaluate_accuracy


def test_accuracy_is_scikit_learns():
    logits, labels = torch.randn(200, 4), torch.randint(0, 3, (200,))
    logits[torch.arange(200), labels] += 1
    found = evaluate_accuracy(Features(logits, labels))
    assert found == pytest.approx(accuracy_score(labels, logits.argmax(1)))


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
