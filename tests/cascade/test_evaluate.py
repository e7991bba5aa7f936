# SPDX-License-Identifier: Apache-2.0
"""The table of a cascade and its controls, each number recomputed from the embeddings."""

from __future__ import annotations

import pytest

from smn_peft.cascade import Cascade, evaluate_cascade
from smn_peft.data import load_images
from smn_peft.evaluation import evaluate_knn, linear_probe
from tests.training.tiny import TEST, TRAIN

ROWS = {
    "dispatcher": "dispatcher",
    "dispatcher, whitened": "whitened",
    "cascade, conditional": "conditional",
    "cascade, unconditional": "unconditional",
}


def test_every_row_is_the_embeddings_worth(fitted, arguments):
    reports = evaluate_cascade(fitted, backbone=arguments.backbone)
    assert [(report.metric, report.label) for report in reports] == [
        (metric, label) for metric in ("knn", "linear_probe") for label in [*ROWS, "dispatchers of 3 seeds"]
    ]
    values = {(report.metric, report.label): report.value for report in reports}
    sets = [load_images(arguments.dataset, split) for split in ("train", "test")]
    cascade, ensemble = (Cascade.load(place, backbone=arguments.backbone) for place in (fitted, fitted / "ensemble"))
    pairs = {label: [cascade.embed_all(part)[mode] for part in sets] for label, mode in ROWS.items()}
    pairs["dispatchers of 3 seeds"] = [ensemble.embed(part, "unconditional") for part in sets]
    for label, (train, test) in pairs.items():
        assert values["knn", label] == evaluate_knn(train, test, k=arguments.knn_k)
        assert values["linear_probe", label] == linear_probe(train, test, standardise=True)
    assert len(set(values.values())) > 3  # the images are hard enough to tell the rows apart
    settings = reports[3].settings
    assert (settings["experts"], settings["router"], settings["dim"]) == (2, "gmm", 16)
    assert (settings["training_images"], settings["test_images"]) == (TRAIN, TEST)


def test_limits_and_mistakes(fitted, arguments):
    (report, *_rest) = evaluate_cascade(fitted, backbone=arguments.backbone, metrics=["knn"], limit=20)
    assert (report.settings["training_images"], report.settings["test_images"]) == (20, 20)
    with pytest.raises(ValueError, match=r"Unknown metric 'accuracy'; there are knn, linear_probe"):
        evaluate_cascade(fitted, metrics=["accuracy"])
    with pytest.raises(ValueError, match="limit must be at least 1; got 0"):
        evaluate_cascade(fitted, limit=0)
