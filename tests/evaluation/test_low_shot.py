# SPDX-License-Identifier: Apache-2.0
"""Low-shot curves: which labels a method sees, and that probes see no others."""

from __future__ import annotations

import pytest
import torch

from smn_peft.evaluation import Features, fit_linear_probe, low_shot, low_shot_probe, low_shot_reports

LABELS = torch.arange(400) % 4


def test_every_fraction_and_seed_is_run_with_its_own_images():
    seen = {}

    def evaluate(indices, seed):
        seen[len(indices), seed] = set(indices.tolist())
        return len(indices) / 400

    rows = low_shot(LABELS, evaluate, fractions=[0.1, 0.01], seeds=[3, 5])
    assert [(row.fraction, row.images, row.seed, row.accuracy) for row in rows] == [
        (0.1, 40, 3, 0.1),
        (0.1, 40, 5, 0.1),
        (0.01, 4, 3, 0.01),
        (0.01, 4, 5, 0.01),
    ]
    assert seen[4, 3] < seen[40, 3]
    assert seen[40, 3] != seen[40, 5]
    assert all(torch.bincount(LABELS[list(images)]).unique().numel() == 1 for images in seen.values())


def test_an_unbalanced_subset_is_drawn_at_random():
    counts = []
    low_shot(LABELS, lambda i, seed: counts.append(torch.bincount(LABELS[i])) or 0.5, fractions=[0.1], balanced=False)
    assert [int(count.sum()) for count in counts] == [40] * 3
    assert any(count.unique().numel() > 1 for count in counts)


def test_a_probe_sees_the_labels_of_its_subset_only(blobs):
    train, test = blobs(n=300, noise=2.0)
    rows = low_shot_probe(train, test, fractions=[0.1], seeds=[0, 1], decays=[1.0])
    drawn = []
    low_shot(train.labels, lambda indices, seed: drawn.append(indices) or 0.5, fractions=[0.1], seeds=[0, 1])
    for row, indices in zip(rows, drawn, strict=True):
        wrong = (train.labels + 1) % 3
        wrong[indices] = train.labels[indices]
        probe = fit_linear_probe(Features(train.features, wrong).subset(indices), decays=[1.0])
        assert row.accuracy == probe.accuracy(test)


def test_more_labels_help(blobs):
    train, test = blobs(n=600, dim=20, noise=3.0, distance=1.0)
    rows = low_shot_probe(train, test, fractions=[0.5, 0.02], decays=[10.0])
    more, few = (sum(row.accuracy for row in part) for part in (rows[:3], rows[3:]))
    assert more > few


def test_reports_hold_one_fraction_over_its_seeds():
    rows = low_shot(LABELS, lambda indices, seed: 0.5 + seed / 10, fractions=[0.1, 0.01], seeds=[0, 2])
    given = {"label": "probe", "dataset": "d", "split": "test", "metric": "accuracy", "settings": {"k": 1}}
    first, second = low_shot_reports(rows, **given)
    assert (first.values, first.seeds) == ((0.5, 0.7), (0, 2))
    assert first.settings == {"k": 1, "label_fraction": 0.1, "labelled_images": 40}
    assert second.settings["labelled_images"] == 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fractions": []}, r"fractions must hold at least one value, each once; got \[\]"),
        ({"seeds": [1, 1]}, r"seeds must hold at least one value, each once; got \[1, 1\]"),
        ({"labels": torch.zeros(9)}, r"Low-shot needs two classes at least, and all 9 samples"),
        ({"fractions": [10]}, r"fraction must lie in \(0, 1\]; got 10"),
        (
            {"evaluate": lambda indices, seed: 93.0},
            r"accuracy from 0 to 1; it returned 93\.0 for 40 images and seed 0",
        ),
        ({"evaluate": lambda indices, seed: float("nan")}, r"accuracy from 0 to 1; it returned nan"),
    ],
)
def test_what_makes_no_sense_is_refused(changed, message):
    arguments = {"labels": LABELS, "evaluate": lambda indices, seed: 0.5, "fractions": [0.1], **changed}
    with pytest.raises(ValueError, match=message):
        low_shot(**arguments)
