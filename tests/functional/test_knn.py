# SPDX-License-Identifier: Apache-2.0
"""k-NN votes: against a plain loop and scikit-learn, the same for every chunk, safe at every temperature."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch.utils._python_dispatch import TorchDispatchMode

from smn_peft.functional.features import knn_votes


def data(n: int = 60, dim: int = 7, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    train, features = torch.randn(n, dim, generator=generator), torch.randn(25, dim, generator=generator)
    return train * 5, torch.arange(n) % classes, features


def loop_votes(train, labels, features, k: int, temperature: float, classes: int) -> torch.Tensor:
    """The definition, one sample and one neighbour at a time, in fp64."""
    votes = torch.zeros(len(features), classes, dtype=torch.float64)
    for row, sample in enumerate(features.double()):
        similarities = [float(sample @ other / (sample.norm() * other.norm())) for other in train.double()]
        nearest = sorted(range(len(train)), key=lambda i: -similarities[i])[:k]
        for i in nearest:
            votes[row, labels[i]] += math.exp(similarities[i] / temperature)
    return votes / votes.sum(1, keepdim=True)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (7, 0.05), (59, 1.0), (60, 0.1)])
def test_votes_are_the_plain_loops(k, temperature):
    train, labels, features = data()
    votes = knn_votes(train, labels, features, k=k, temperature=temperature)
    assert votes.dtype == torch.float32
    expected = loop_votes(train, labels, features, k, temperature, 4)
    torch.testing.assert_close(votes.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("k", [1, 9, 60])
def test_votes_are_scikit_learns(k):
    train, labels, features = data()
    oracle = KNeighborsClassifier(k, metric="cosine", weights=lambda distances: np.exp((1 - distances) / 0.1))
    oracle.fit(train.double().numpy(), labels.numpy())
    expected = torch.tensor(oracle.predict_proba(features.double().numpy()))
    torch.testing.assert_close(knn_votes(train, labels, features, k=k).double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("k", [2, 20, 200])
def test_every_chunk_gives_the_same_votes(k):
    train, labels, features = data()
    whole = knn_votes(train, labels, features, k=k)
    for chunk in (1, 3, 7, 25, 59, 1000):
        torch.testing.assert_close(knn_votes(train, labels, features, k=k, chunk=chunk), whole, rtol=0, atol=1e-6)


def test_k_above_the_number_of_samples_takes_all():
    train, labels, features = data()
    assert torch.equal(knn_votes(train, labels, features, k=10**9), knn_votes(train, labels, features, k=60))
    torch.testing.assert_close(
        knn_votes(train, labels, features, k=200).double(),
        loop_votes(train, labels, features, 60, 0.1, 4),
        rtol=0,
        atol=2e-6,
    )


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for part in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(part, torch.Tensor):
                self.numel = max(self.numel, part.numel())
        return found


def test_memory_is_bounded_by_the_chunk():
    train, labels, features = torch.randn(3000, 2), torch.arange(3000) % 3, torch.randn(1000, 2)
    sizes = []
    for chunk in (50, 5000):
        with LargestTensor() as largest:
            knn_votes(train, labels, features, k=5, chunk=chunk)
        sizes.append(largest.numel)
    assert sizes == [6000, 3_000_000]  # the training features themselves; every similarity at once


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 1e6])
def test_extreme_temperatures_neither_overflow_nor_vanish(temperature):
    train, labels, features = data()
    votes = knn_votes(train, labels, features, k=30, temperature=temperature)
    torch.testing.assert_close(votes.sum(1), torch.ones(25))
    if temperature < 1e-3:  # the nearest alone decides
        nearest = torch.nn.functional.cosine_similarity(features[:, None], train[None], dim=2).argmax(1)
        assert torch.equal(votes.argmax(1), labels[nearest])


def test_lengths_do_not_matter_and_autocast_is_left_out():
    train, labels, features = data()
    votes = knn_votes(train, labels, features, k=9)
    torch.testing.assert_close(knn_votes(train * 8, labels, features / 4, k=9), votes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(knn_votes(train, labels, features, k=9), votes)
    assert knn_votes(train.bfloat16(), labels, features.bfloat16(), k=9).dtype == torch.float32


def test_number_of_classes():
    train, labels, features = data()
    assert knn_votes(train, labels, features).shape == (25, 4)
    wider = knn_votes(train, labels.to(torch.uint8), features, num_classes=6)
    assert wider.shape == (25, 6)
    assert not wider[:, 4:].any()
    assert knn_votes(train, labels, features[:0]).shape == (0, 4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": 0}, r"k must be at least 1, got 0"),
        ({"temperature": 0.0}, r"temperature must be above 0, got 0\.0"),
        ({"temperature": float("nan")}, r"temperature must be above 0, got nan"),
        ({"chunk": 0}, r"chunk must be, got 0"),
        ({"num_classes": 3}, r"Labels run from 0 to 3, outside of 0 … 2: leave num_classes out"),
        ({"features": torch.ones(2, 8)}, r"got \(60, 7\) to learn from and \(2, 8\) to classify.*with the same model"),
        ({"features": torch.ones(7)}, r"Features must be \(n, dim\)"),
        (
            {"train_labels": torch.zeros(59, dtype=torch.long)},
            r"one integer per training sample, \(60,\); got .*\(59,\)",
        ),
        ({"train_labels": torch.zeros(60)}, r"one integer per training sample, \(60,\); got torch\.float32"),
        ({"train_labels": torch.full((60,), -1)}, r"Labels run from -1 to -1.*drop the samples without a label"),
        ({"train_features": torch.ones(0, 7), "train_labels": torch.ones(0)}, r"There are no training features"),
        ({"features": torch.tensor([[1.0] * 7, [math.nan] * 7])}, r"to classify: 1 of 2 rows hold NaN .* is row 1\."),
    ],
)
def test_what_makes_no_sense_is_refused(changed, message):
    train, labels, features = data()
    arguments = {"train_features": train, "train_labels": labels, "features": features, **changed}
    with pytest.raises(ValueError, match=message):
        knn_votes(**arguments)


def test_training_features_that_are_not_finite_are_counted():
    train, labels, features = data()
    train[[3, 8, 9], 2] = math.inf
    with pytest.raises(
        ValueError, match=r"Training features: 3 of 60 rows hold NaN or infinity, the first is row 3\."
    ):
        knn_votes(train, labels, features)
