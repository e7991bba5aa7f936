# SPDX-License-Identifier: Apache-2.0
"""Results in the Hub's formats, against what the Hub's own client makes of the same numbers."""

from __future__ import annotations

import huggingface_hub
import pytest
import yaml

from smn_peft.evaluation import EvalReport
from smn_peft.hub.card import eval_result_files, metric_name, model_index

REPORTS = [
    EvalReport("a", "pets", "test", "knn", (0.7, 0.8), (0, 1), revision="a" * 40, settings={"k": 20}),
    EvalReport("a", "org/set", "val", "accuracy", (0.98765,)),
    EvalReport("a", "cifar10", "test", "linear_probe@0.01", (0.5,)),
    EvalReport("a", "/home/me/own photos.npz", "test", "knn", (0.5,)),
]


def test_files_are_what_the_hub_s_client_writes():
    if not hasattr(huggingface_hub, "eval_result_entries_to_yaml"):
        pytest.skip("this huggingface_hub is older than the format")
    files = eval_result_files(REPORTS, "vit/pets")
    assert list(files) == [
        ".eval_results/vit-pets-pets-knn.yaml",
        ".eval_results/vit-pets-org-set-accuracy.yaml",
        ".eval_results/vit-pets-cifar10-linear_probe-0.01.yaml",
    ]
    for content in files.values():
        entries = huggingface_hub.parse_eval_result_entries(yaml.safe_load(content))
        assert huggingface_hub.eval_result_entries_to_yaml(entries) == yaml.safe_load(content)
    (entry,) = huggingface_hub.parse_eval_result_entries(yaml.safe_load(next(iter(files.values()))))
    assert (entry.dataset_id, entry.value, entry.dataset_revision) == ("timm/oxford-iiit-pet", 75.0, "a" * 40)
    assert entry.notes == ("k-NN accuracy (k = 20) in percent; split test; mean of 2 seeds, standard deviation 7.07")


def test_names_and_values():
    assert [metric_name(report) for report in REPORTS] == [
        "k-NN accuracy (k = 20)",
        "accuracy",
        "linear probe accuracy, 1 % of the labels",
        "k-NN accuracy",
    ]
    index = model_index(REPORTS)
    assert [(r.dataset_type, r.dataset_name, r.metric_value) for r in index] == [
        ("timm/oxford-iiit-pet", "pets", 75.0),
        ("org/set", "org/set", 98.77),
        ("uoft-cs/cifar10", "cifar10", 50.0),
        ("own photos.npz", "own photos.npz", 50.0),
    ]
    data = huggingface_hub.ModelCardData(model_name="x", eval_results=index)
    again = huggingface_hub.ModelCardData(**yaml.safe_load(data.to_yaml()))
    assert sorted(map(repr, again.eval_results)) == sorted(map(repr, index))
