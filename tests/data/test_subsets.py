# SPDX-License-Identifier: Apache-2.0
"""Exact counts of label-efficient subsets, and that smaller ones lie in larger ones."""

from __future__ import annotations

import pytest
import torch

from smn_peft.data import held_out, label_subset

LABELS = torch.arange(10).repeat_interleave(100)[torch.randperm(1000, generator=torch.Generator().manual_seed(1))]
UNEVEN = torch.tensor([0] * 3 + [1] * 97)


def counts(labels, chosen):
    return torch.bincount(labels[chosen], minlength=int(labels.max()) + 1).tolist()


@pytest.mark.parametrize(
    ("fraction", "each"), [(1.0, 100), (0.1, 10), (0.04, 4), (0.02, 2), (0.01, 1), (0.005, 1), (0.0025, 1)]
)
def test_balanced_fractions(fraction, each):
    assert counts(LABELS, label_subset(LABELS, fraction=fraction)) == [each] * 10


@pytest.mark.parametrize(("fraction", "total"), [(1.0, 1000), (0.1, 100), (0.01, 10), (0.0001, 1)])
def test_unbalanced_fractions(fraction, total):
    chosen = label_subset(LABELS, fraction=fraction, balanced=False)
    assert len(chosen) == len(chosen.unique()) == total
    assert torch.equal(chosen, chosen.sort().values)


def test_a_small_class_gives_all_it_has():
    assert counts(UNEVEN, label_subset(UNEVEN, fraction=0.1)) == [3, 5]
    # Unbalanced subsets follow the frequencies.
    assert counts(UNEVEN, label_subset(UNEVEN, fraction=1.0, balanced=False)) == [3, 97]


def test_labels_may_have_gaps():
    labels = torch.tensor([5, 9, 9, 5])
    assert sorted(labels[label_subset(labels, fraction=0.5)].tolist()) == [5, 9]


@pytest.mark.parametrize("balanced", [True, False])
def test_nested_and_seeded(balanced):
    def chosen(fraction, seed=3):
        return set(label_subset(LABELS, fraction=fraction, balanced=balanced, seed=seed).tolist())

    assert chosen(0.01) < chosen(0.02) < chosen(0.1) < chosen(1.0)
    assert chosen(0.1) == chosen(0.1) != chosen(0.1, seed=4)


def test_the_caller_s_random_state_is_untouched():
    before = torch.get_rng_state()
    label_subset(LABELS, fraction=0.1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (LABELS, {"fraction": 0.0}, r"fraction must lie in \(0, 1\]; got 0\.0\. 1 % is 0\.01"),
        (LABELS, {"fraction": 10}, r"fraction must lie in"),
        (torch.tensor([]), {"fraction": 0.5}, r"labels must be a vector of at least one label"),
    ],
)
def test_what_cannot_be(labels, options, message):
    with pytest.raises(ValueError, match=message):
        label_subset(labels, **options)


def test_held_out_evenly_and_seeded_and_something_is_left():
    labels = torch.tensor([0] * 10 + [1] * 5 + [2] * 2 + [3])
    chosen = held_out(labels, 0.2, seed=3)
    assert labels[chosen].bincount(minlength=4).tolist() == [2, 1, 1, 0]
    assert torch.equal(chosen, held_out(labels, 0.2, seed=3))
    assert not torch.equal(chosen, held_out(labels, 0.2, seed=4))
    assert labels[held_out(labels, 0.99)].bincount(minlength=4).tolist() == [9, 4, 1, 0]
    for fraction in (0.0, 1.0, -1):
        with pytest.raises(ValueError, match=r"must lie in \(0, 1\)"):
            held_out(labels, fraction)
    with pytest.raises(ValueError, match="No class has two images"):
        held_out(torch.arange(3), 0.5)
