# SPDX-License-Identifier: Apache-2.0
"""A run that starts from another one's weights, and on some of the images only."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from smn_peft.evaluation import extract_features, fit_linear_probe
from smn_peft.storage.fingerprint import tensor_digest
from smn_peft.training import run
from smn_peft.training.assemble import build_images, build_task, evaluation_of, read_indices
from smn_peft.training.checkpoint import list_checkpoints, start_digest
from smn_peft.training.run import finished_run
from smn_peft.training.saved import evaluate_run

from .tiny import SWAV, TRAIN, tiny_arguments


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Arguments of a finished run without labels, with a filled queue."""
    arguments = tiny_arguments(tmp_path_factory.mktemp("first"), **SWAV, mask={"batch_norm": "adapt"})
    run(arguments)
    AcceleratorState._reset_state(reset_partial_state=True)
    return arguments


def checkpoint(arguments) -> dict[str, torch.Tensor]:
    return load_file(list_checkpoints(arguments.output_dir)[-1] / "model.safetensors")


def test_it_starts_from_everything_but_the_queue(first, tmp_path):
    saved = checkpoint(first)
    arguments = replace(first, init_from=first.output_dir, output_dir=str(tmp_path / "second"))
    task, _ = build_task(arguments, build_images(arguments))
    state = task.training_state()
    differing = {name for name in state if not torch.equal(state[name], saved[name])}
    assert differing == {"objective.queue", "objective.queue_filled"}
    assert not state["objective.queue"].any()
    assert {name.partition("smn_")[2].partition(".")[0] for name in state if "smn_" in name} >= {
        "scores",
        "running_mean",
    }
    summary = run(arguments, evaluate=False)
    assert summary.arguments["start"] == start_digest(first.output_dir)
    assert summary.steps == 8  # from step 0
    assert (summary.before, summary.after) == ({}, {})
    again = checkpoint(arguments)
    assert any(not torch.equal(again[name], saved[name]) for name in again if "scores" in name)


def test_a_start_that_does_not_fit(first, tmp_path):
    nothing = tmp_path / "nothing"
    for options, kind, message in (
        ({"init_from": str(nothing)}, FileNotFoundError, r"init_from=.*nothing holds no checkpoint.*keep_checkpoints"),
        ({"mask": {"batch_norm": "frozen"}}, ValueError, r"on one side only.*same backbone"),
        (
            {"mask": {"exclude_modules": ["conv1"]}, "objective": "cross_entropy", "objective_options": {}},
            ValueError,
            r"on one side only.*same backbone",
        ),
        ({"objective_options": {**SWAV["objective_options"], "prototypes": 5}}, ValueError, r"prototypes.* has shape"),
    ):
        arguments = replace(first, **{"init_from": first.output_dir, "output_dir": str(tmp_path), **options})
        with pytest.raises(kind, match=message):
            build_task(arguments, build_images(arguments))


def test_labels_on_top_of_a_run_without(first, tmp_path):
    """Mask and statistics are the other run's; the head is a probe on their features, under them one on the base's."""
    saved = checkpoint(first)
    labels = {"objective": "cross_entropy", "objective_options": {}, "head": "probe", "bound": 1.0}
    arguments = replace(first, **labels, init_from=first.output_dir, output_dir=str(tmp_path / "second"))
    images = build_images(arguments)
    task, backbone = build_task(arguments, images)
    own = {name: tensor for name, tensor in task.training_state().items() if ".head." not in name}
    assert len(own) == sum(not name.startswith("objective.") for name in saved)
    for name, tensor in own.items():
        assert torch.equal(tensor, saved[name.replace(".backbone.", ".")])
    head = task.model.get_base_model().head
    for disabled in (False, True):
        with task.model.disable_adapter() if disabled else nullcontext():
            features = extract_features(task.model, images.train, evaluation_of(backbone), batch_size=12)
            assert head.feature_mean.equal(features.features.mean(0))
            probe = fit_linear_probe(features, standardise=True, cautious=True)
            torch.testing.assert_close(head.weight.detach(), probe.weight)
            if not disabled:  # the bound is to the other run's mask
                assert task.start_features.equal(features.features)
    summary = run(arguments)
    assert summary.before["accuracy"] != summary.after["accuracy"]
    again = replace(arguments, init_from=arguments.output_dir, output_dir=str(tmp_path / "third"))
    task, _ = build_task(again, images)  # of a run with a head: as it is there
    third = checkpoint(arguments)
    assert all(torch.equal(tensor, third[name]) for name, tensor in task.training_state().items())


def test_only_the_images_of_the_file_are_trained_on(first, tmp_path):
    chosen = np.arange(0, TRAIN, 2)[::-1].copy()
    np.save(tmp_path / "chosen.npy", chosen)
    options = {"indices_file": str(tmp_path / "chosen.npy"), "output_dir": str(tmp_path / "part"), "epochs": 1}
    arguments = replace(first, **options)
    images = build_images(arguments)
    assert images.train.rows.tolist() == chosen.tolist()
    assert len(images.bank) == TRAIN  # k-NN votes with all
    summary = run(arguments, evaluate=False)
    assert (summary.arguments["images"], summary.steps) == (TRAIN // 2, 2)
    assert summary.arguments["indices"] == tensor_digest(images.train.rows)
    assert finished_run(arguments, indices=summary.arguments["indices"]) == summary
    with pytest.raises(ValueError, match=r"run\.json was written by a run with other settings(?s:.*)indices: was"):
        finished_run(arguments, indices="other")
    with pytest.raises(ValueError, match=r"epochs: was 1, is 3"):
        finished_run(replace(arguments, epochs=3))
    assert finished_run(replace(arguments, output_dir=str(tmp_path / "none"))) is None
    np.save(tmp_path / "chosen.npy", chosen[:12])  # the same name, other images
    with pytest.raises(ValueError, match=r"other settings(?s:.*)\n  images: was 24, is 12\n  indices: was"):
        run(replace(arguments, resume=True))
    (tmp_path / "chosen.npy").unlink()
    (report,) = evaluate_run(arguments.output_dir, backbone=arguments.backbone)  # to evaluate takes no such file
    assert report.settings["training_images"] == TRAIN


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.array([0, 1, 10]), r"each number once, from 0 to 9; it holds 3 from 0 to 10"),
        (np.array([2, 2]), "each number once"),
        (np.array([-1]), "from -1 to -1"),
        (np.array([0.0, 1.0]), r"one row of integers, one at least; it holds float64 \(2,\)"),
        (np.array([], dtype=np.int64), "one at least"),
        (np.array([{"a": 1}], dtype=object), r"is not a \.npy file of integers: .*allow_pickle"),
    ],
)
def test_bad_indices(tmp_path, content, message):
    np.save(tmp_path / "bad.npy", content, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        read_indices(tmp_path / "bad.npy", 10)


def test_indices_that_are_no_file_of_numbers(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"indices_file=.*gone\.npy does not exist"):
        read_indices(tmp_path / "gone.npy", 10)
    (tmp_path / "empty.npy").touch()
    with pytest.raises(ValueError, match=r"is not a \.npy file of integers"):
        read_indices(tmp_path / "empty.npy", 10)
    np.savez(tmp_path / "several.npz", a=np.arange(3))
    with pytest.raises(ValueError, match="it holds several arrays"):
        read_indices(tmp_path / "several.npz", 10)
