# SPDX-License-Identifier: Apache-2.0
"""A bound on how far training moves the features from those at the start."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from smn_peft.training import run
from smn_peft.training.assemble import build_images, build_task
from smn_peft.training.metrics import read_metrics

from .helpers import Batches, supervised_task, swav_task
from .tiny import SWAV, tiny_arguments


def test_loss_and_gradient_are_those_of_the_formula():
    """With f = the features of the same forward, and what autograd makes of the formula written out."""
    task, batches = supervised_task(batch_norm="frozen").train(), Batches()
    batch = next(iter(batches))
    start = torch.randn(len(batches.images), 16, generator=torch.Generator().manual_seed(1))
    scores = [parameter for _, parameter, is_score in task.trainable() if is_score]
    torch.manual_seed(3)  # of the stochastic depth
    classifier = task.model.get_base_model()
    features = classifier.forward_features(batch["pixel_values"])
    squares = sum(
        (feature - start[index]).pow(2).sum() for feature, index in zip(features, batch["index"], strict=True)
    )
    variance = sum(start[:, j].std() ** 2 for j in range(16)) / 16
    distance = squares / (len(features) * 16) / variance
    wanted = F.cross_entropy(classifier.forward_head(features), batch["labels"]) + 0.7 * distance
    gradients = torch.autograd.grad(wanted, scores)
    plain = task(batch)
    task.set_bound(0.7 * len(start), start)
    assert task.start_features is start
    assert not any("start" in name for name in task.state_dict())
    torch.manual_seed(3)
    found = task(batch)
    torch.testing.assert_close(found["loss"], wanted.detach())
    torch.testing.assert_close(found["distance"], distance.detach())
    assert plain.keys() == found.keys() - {"distance"}
    for gradient, expected in zip(torch.autograd.grad(found["loss"], scores), gradients, strict=True):
        torch.testing.assert_close(gradient, expected)


def test_statistics_stay_the_starts():
    """Batches of few images would move them, and the features with them."""
    task, batch = supervised_task(batch_norm="adapt"), next(iter(Batches()))
    before = {name: tensor.clone() for name, tensor in task.training_state().items() if "running" in name}
    assert before
    task.set_bound(1.0, torch.randn(32, 16))
    task.train()(batch)
    after = task.training_state()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_views_of_one_image_have_no_bound(tmp_path):
    with pytest.raises(ValueError, match="bound needs one view per image, and swav has several"):
        swav_task().set_bound(1.0, torch.zeros(4, 16))
    arguments = tiny_arguments(tmp_path, **SWAV, bound=1.0)
    with pytest.raises(ValueError, match="bound needs one view per image"):
        build_task(arguments, build_images(arguments))


def test_a_bounded_run_stays_near_its_start(tmp_path):
    loose = tiny_arguments(tmp_path, head="probe", epochs=3, bound=3e-5)
    tight = replace(loose, bound=300.0, output_dir=str(tmp_path / "tight"))
    last = []
    for arguments in (loose, tight):
        run(arguments, evaluate=False)
        lines = read_metrics(f"{arguments.output_dir}/metrics.jsonl")
        distances = [line["distance"] for line in lines if "loss" in line]
        assert distances[0] < distances[-1]
        last.append(distances[-1])
    assert last[1] < 0.7 * last[0]
