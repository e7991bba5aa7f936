# SPDX-License-Identifier: Apache-2.0
"""k-NN accuracy of features: against scikit-learn, and errors that say what to do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from smn_peft.evaluation import Features, evaluate_knn


@pytest.mark.parametrize("k", [1, 5, 120])
def test_accuracy_is_scikit_learns(blobs, k):
    train, test = blobs(noise=3.0)
    oracle = KNeighborsClassifier(k, metric="cosine", weights=lambda distances: np.exp((1 - distances) / 0.1))
    expected = oracle.fit(train.features.double(), train.labels).score(test.features.double(), test.labels)
    assert 0.4 < expected < 0.95
    assert evaluate_knn(train, test, k=k) == pytest.approx(expected)


def test_k_above_the_number_of_samples_takes_all(blobs):
    train, test = blobs(noise=3.0)
    assert evaluate_knn(train, test) == evaluate_knn(train, test, k=120)


def test_a_sample_is_its_own_nearest(blobs):
    train, _ = blobs(noise=5.0)
    assert evaluate_knn(train, train, k=1) == 1.0


def test_a_test_class_that_was_never_seen_counts_as_wrong(blobs):
    train, test = blobs(noise=0.01)
    seen = train.subset((train.labels < 2).nonzero().squeeze(1))
    assert evaluate_knn(seen, test, k=5) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("train", "test", "options", "message"),
    [
        (Features(torch.ones(4, 2)), None, {}, r"k-NN needs labels and these features have none: load the dataset"),
        (None, Features(torch.ones(4, 2)), {}, r"k-NN needs labels"),
        (
            Features(torch.ones(4, 2), torch.full((4,), 3)),
            None,
            {},
            r"k-NN needs two classes at least, and all 4 samples to learn from are of class 3\. Shuffle before",
        ),
        (
            None,
            Features(torch.ones(1, 5), torch.ones(1)),
            {},
            r"features of dim 2 and is tested on dim 5: extract both",
        ),
        (Features(torch.ones(0, 2), torch.ones(0)), None, {}, r"k-NN has no samples to learn from: check the split"),
        (None, Features(torch.ones(0, 2), torch.ones(0)), {}, r"k-NN has no samples to test on: check the split"),
        (Features(torch.ones(2, 2), torch.tensor([-1, 1])), None, {}, r"k-NN: 1 of 2 labels are negative\. Drop"),
        (None, None, {"k": 0}, r"k must be at least 1, got 0"),
        (None, None, {"temperature": -1}, r"temperature must be above 0, got -1"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(train, test, options, message):
    good = Features(torch.eye(2), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=message):
        evaluate_knn(good if train is None else train, good if test is None else test, **options)
