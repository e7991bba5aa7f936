# SPDX-License-Identifier: Apache-2.0
"""Low-shot curves: which labels a probe sees, and that it sees no others."""

from __future__ import annotations

import pytest
import torch

from smn_peft.data import label_subset
from smn_peft.evaluation import Features, fit_linear_probe, low_shot_reports

FIELDS = {"label": "probe", "dataset": "d", "split": "test", "metric": "accuracy"}


def test_a_probe_sees_the_labels_of_its_subset_only(blobs):
    train, test = blobs(n=300, noise=2.0)
    (report,) = low_shot_reports(train, test, fractions=[0.1], seeds=[0, 1], probe={"decays": [1.0]}, **FIELDS)
    for seed, value in zip(report.seeds, report.values, strict=True):
        indices = label_subset(train.labels, fraction=0.1, seed=seed)
        wrong = (train.labels + 1) % 3
        wrong[indices] = train.labels[indices]
        probe = fit_linear_probe(Features(train.features, wrong).subset(indices), decays=[1.0], seed=seed)
        assert value == probe.accuracy(test)


def test_more_labels_help(blobs):
    train, test = blobs(n=600, dim=20, noise=3.0, distance=1.0)
    more, few = low_shot_reports(train, test, fractions=[0.5, 0.02], probe={"decays": [10.0]}, **FIELDS)
    assert more.value > few.value


def test_reports_hold_one_fraction_over_its_seeds(blobs):
    train, test = blobs(n=300)
    options = {"fractions": [0.1, 0.02], "seeds": [0, 2], "probe": {"decays": [1.0]}, "settings": {"k": 1}}
    first, second = low_shot_reports(train, test, **options, **FIELDS)
    assert (len(first.values), first.seeds, first.metric) == (2, (0, 2), "accuracy")
    assert first.settings == {"k": 1, "label_fraction": 0.1, "labelled_images": 30}
    assert second.settings["labelled_images"] == 6


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fractions": []}, r"fractions must hold at least one value, each once; got \[\]"),
        ({"seeds": [1, 1]}, r"seeds must hold at least one value, each once; got \[1, 1\]"),
        ({"fractions": [10]}, r"fraction must lie in \(0, 1\]; got 10"),
    ],
)
def test_what_makes_no_sense_is_refused(blobs, changed, message):
    train, test = blobs()
    with pytest.raises(ValueError, match=message):
        low_shot_reports(train, test, **{"fractions": [0.1], **changed}, **FIELDS)
    with pytest.raises(ValueError, match=r"Low-shot needs two classes at least, and all 9 samples"):
        low_shot_reports(Features(torch.zeros(9, 6), torch.zeros(9)), test, **FIELDS)
