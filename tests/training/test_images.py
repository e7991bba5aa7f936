# SPDX-License-Identifier: Apache-2.0
"""Data as people have it: no test split, one for validation, and paths from where the run was started."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import pytest

from smn_peft.training import run
from smn_peft.training.assemble import build_images, images_of_run
from smn_peft.training.run import RunSummary, finished_run
from smn_peft.training.saved import evaluate_run

from .tiny import CLASSES, SWAV, picture, tiny_arguments, write_model


def write_classes(folder, images=30):
    generator = np.random.default_rng(0)
    for index in range(images):
        (part := folder / CLASSES[index % 3]).mkdir(parents=True, exist_ok=True)
        (part / f"{index:02}.png").write_bytes(picture(index % 3, generator))
    return folder


def files_of(dataset):
    return {dataset.source.read(int(row))[1] for row in dataset.rows}


def test_a_folder_of_classes_is_trained_on_with_images_held_out(tmp_path):
    folder = write_classes(tmp_path / "set")
    arguments = tiny_arguments(tmp_path, dataset=str(folder), epochs=1)
    with pytest.warns(UserWarning, match=r"no split 'test': 20% of its images, .*--eval-fraction"):
        images = build_images(arguments)
    arguments = replace(arguments, eval_fraction=0.2, seed=5)
    assert files_of(build_images(arguments).test) == files_of(images.test)
    assert images.test.labels.bincount().tolist() == [2, 2, 2]
    assert images.train.labels.bincount().tolist() == [8, 8, 8]
    assert files_of(images.train) | files_of(images.test) == {str(path) for path in folder.rglob("*.png")}
    assert not files_of(images.train) & files_of(images.test)
    same = build_images(replace(arguments, seed=6, limit=12, cache_images=True))
    assert files_of(same.test) == files_of(images.test)  # runs with other seeds see the same images
    assert len(same.train) == 12
    summary = run(arguments)
    assert RunSummary.load(tmp_path / "out").arguments["eval_fraction"] == 0.2
    reports = evaluate_run(tmp_path / "out", backbone=arguments.backbone)
    assert {report.metric: report.value for report in reports} == summary.after
    assert {report.settings["test_images"] for report in reports} == {6}
    (report,) = evaluate_run(tmp_path / "out", backbone=arguments.backbone, metrics=["knn"], eval_fraction=0.5)
    assert report.settings["test_images"] == 15
    (tmp_path / "out" / "run.json").unlink()
    with pytest.raises(ValueError, match=r"eval_fraction: was 0\.2, is 0\.4"):
        run(replace(arguments, eval_fraction=0.4, resume=True))


@pytest.mark.parametrize("name", ["val", "Valid", "validation"])
def test_the_split_for_validation_is_taken_where_there_is_none_to_test_on(tmp_path, name):
    folder = tmp_path / "set"
    write_classes(folder / "train")
    write_classes(folder / name, 6)
    arguments = tiny_arguments(tmp_path, dataset=str(folder), epochs=1)
    with pytest.warns(UserWarning, match=rf"has no split 'test': '{name}' is evaluated on"):
        arguments, images = images_of_run(arguments)
    assert (arguments.eval_split, len(images.test)) == (name, 6)
    with pytest.raises(ValueError, match=r"no split 'tset'.*It was opened to evaluate on: name another"):
        images_of_run(replace(arguments, eval_split="tset"))


def test_what_was_held_out_without_being_asked_for_is_held_out_again(tmp_path):
    arguments = tiny_arguments(tmp_path, dataset=str(write_classes(tmp_path / "set")), epochs=1)
    with pytest.warns(UserWarning, match="held out"):
        summary = run(arguments)
    with pytest.warns(UserWarning, match="held out"):
        reports = evaluate_run(tmp_path / "out", backbone=arguments.backbone)
    assert {report.metric: report.value for report in reports} == summary.after
    assert {report.settings["test_images"] for report in reports} == {6}
    assert finished_run(arguments) == summary


def test_without_labels_nothing_is_held_out(tmp_path):
    folder = tmp_path / "flat"
    write_classes(folder / "all")
    arguments = tiny_arguments(tmp_path, dataset=str(folder / "all" / "red"), eval_fraction=0.5, **SWAV)
    with pytest.warns(UserWarning, match="nothing is evaluated"):
        found, images = images_of_run(arguments)
    assert (found.eval_split, found.eval_fraction, len(images.train)) == (None, None, 10)


def test_fractions_that_cannot_be(tmp_path):
    for wrong in (0.0, 1.0):
        with pytest.raises(ValueError, match="eval_fraction must be above 0 and below 1, or None"):
            tiny_arguments(tmp_path, eval_fraction=wrong)
    with pytest.raises(ValueError, match="eval_split=None evaluates on none"):
        tiny_arguments(tmp_path, eval_fraction=0.5, eval_split=None)


def test_what_is_named_from_here_is_found_from_elsewhere(tmp_path, monkeypatch):
    (there := tmp_path / "there").mkdir()
    monkeypatch.chdir(there)
    arguments = tiny_arguments(there, backbone="model.py:build", dataset="set.npz", output_dir="out", epochs=1)
    write_model(there)
    tiny_arguments(there)  # writes the images
    arguments = replace(arguments)  # as the command line reads it
    summary = run(arguments)
    said = json.loads((there / "out" / "run.json").read_text())["arguments"]
    assert said["dataset"] == str(there / "set.npz")
    assert said["backbone"] == f"{there / 'model.py'}:build"
    monkeypatch.chdir(tmp_path)
    reports = evaluate_run(there / "out", backbone=said["backbone"])
    assert {report.metric: report.value for report in reports} == summary.after


def test_what_is_no_path_stays_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("user")
    arguments = tiny_arguments(tmp_path, dataset="user/birds:small", backbone="timm/resnet18.a1_in1k")
    assert (arguments.dataset, arguments.backbone) == ("user/birds:small", "timm/resnet18.a1_in1k")
    assert arguments.objective == "cross_entropy"
    assert replace(arguments, dataset="{assets}/gone.npz").dataset == "{assets}/gone.npz"
    os.mkdir("set")
    names = {"dataset": "set/train-*.parquet", "init_from": "user", "weights": "gone.safetensors"}
    arguments = replace(arguments, **names)
    assert arguments.dataset == str(tmp_path / "set" / "train-*.parquet")
    assert (arguments.init_from, arguments.weights) == (str(tmp_path / "user"), "gone.safetensors")
