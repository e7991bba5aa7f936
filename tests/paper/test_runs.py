# SPDX-License-Identifier: Apache-2.0
"""Runs as data: what a hash depends on, what is filled in before a run, what is said to be missing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from smn_peft._options import merged
from smn_peft.paper.runs import RunSpec, missing_files

SPEC = RunSpec({"backbone": "resnet18", "dataset": "cifar10", "lr": 5.0, "mask": {"target_modules": ["b", "a"]}})
TOPK = RunSpec({"backbone": "resnet18", "dataset": "cifar10", "mask": {"mask_type": "topk"}}, found=SPEC)
SMALL = RunSpec({"backbone": "a", "dataset": "{assets}/set.npz", "weights": "{assets}/w.safetensors"})


def test_merging_is_deep():
    assert merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 4}}, {"d": {"e": 5}}) == {
        "a": {"b": 4, "c": 2},
        "d": {"e": 5},
    }


def test_the_hash_is_of_what_a_run_does():
    same = [
        SPEC.at(epochs=150, momentum=0.9),  # the defaults
        SPEC.at(log_every=3, num_workers=4, checkpoint_every=7),
        SPEC.at(mask={"target_modules": ["a", "b"]}),  # a set
        replace(SPEC, minutes=9.0),
        SPEC.seeded(0),
    ]
    assert {spec.id for spec in same} == {SPEC.id}
    others = [SPEC.at(lr=6.0), SPEC.seeded(1), SPEC.at(mask={"scale": False}), SPEC.at(eval_limit=10), TOPK]
    assert len({SPEC.id, *(spec.id for spec in others)}) == 6
    assert replace(TOPK, found=SPEC.at(lr=6.0)).id != TOPK.id
    assert TOPK.seeded(1).found.id == SPEC.seeded(1).id
    assert SPEC.seeded(2).arguments.get("fraction_seed") is None
    assert SPEC.at(fraction=0.1).seeded(2).arguments["fraction_seed"] == 2


def test_the_hash_does_not_depend_on_where_files_are(monkeypatch, tmp_path):
    monkeypatch.setenv("SMN_ASSETS", str(tmp_path))
    one = SMALL.id
    monkeypatch.delenv("SMN_ASSETS")
    assert SMALL.id == one


def test_a_wrong_argument_is_found_without_running():
    with pytest.raises(ValueError, match="optimizer must be one of sgd, adamw"):
        _ = SPEC.at(optimizer="adagrad").id


def test_arguments_of_a_run(monkeypatch, tmp_path):
    for name in ("set.npz", "w.safetensors"):
        (tmp_path / name).touch()
    monkeypatch.setenv("SMN_ASSETS", str(tmp_path))
    arguments = SMALL.to_arguments(tmp_path / "out")
    assert (arguments.dataset, arguments.weights) == (str(tmp_path / "set.npz"), str(tmp_path / "w.safetensors"))
    assert (arguments.output_dir, arguments.resume) == (str(tmp_path / "out"), True)
    assert TOPK.to_arguments(tmp_path, {"mask": {"density": 0.7}}).mask.density == 0.7
    package = RunSpec({"backbone": "{package}/small_resnet.py:build", "dataset": "cifar10"}).to_arguments(tmp_path)
    assert package.backbone.endswith("smn_peft/paper/small_resnet.py:build")


def test_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.delenv("SMN_ASSETS", raising=False)
    assert missing_files([SPEC]) == ""
    text = "SMN_ASSETS is unset: it names the folder with .*These runs read {assets}/set.npz, {assets}/w.safetensors"
    with pytest.raises(ValueError, match=text):
        SMALL.to_arguments(tmp_path)
    (tmp_path / "set.npz").touch()
    monkeypatch.setenv("SMN_ASSETS", str(tmp_path))
    assert f"SMN_ASSETS={tmp_path} lacks {{assets}}/w.safetensors: it should hold" in missing_files([SMALL])
