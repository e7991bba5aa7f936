# SPDX-License-Identifier: Apache-2.0
"""A run goes on only over the base and the images that it was started with, whatever they are called now."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from accelerate.state import AcceleratorState

from smn_peft.data import load_images
from smn_peft.training import run
from smn_peft.training.arguments import check_same
from smn_peft.training.run import RunSummary

from .tiny import CLASSES, picture, tiny_arguments, write_npz


def write_folder(root, images=24):
    generator = np.random.default_rng(0)
    for index in range(images):
        for split in ("train", "test"):
            (folder := root / split / CLASSES[index % 3]).mkdir(parents=True, exist_ok=True)
            (folder / f"{index}.png").write_bytes(picture(index % 3, generator))
    return root


def test_moved_data_and_base_go_on(tmp_path):
    arguments = tiny_arguments(tmp_path, dataset=str(write_folder(tmp_path / "set")), eval_split=None)
    run(replace(arguments, epochs=1))
    (tmp_path / "out" / "run.json").unlink()  # as if it had been stopped
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (tmp_path / "set").rename(moved / "pictures")
    (tmp_path / "model.py").rename(moved / "base.py")
    there = {"dataset": str(moved / "pictures"), "backbone": f"{moved / 'base.py'}:build"}
    summary = run(replace(arguments, epochs=1, resume=True, **there))
    assert summary.steps == 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder of a run, its data and its model."""
    folder = tmp_path_factory.mktemp("finished")
    run(tiny_arguments(folder, eval_split=None, max_steps=1))
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


@pytest.mark.parametrize(("what", "named"), [("image", "data"), ("label", "data"), ("base", "base"), ("mean", "prep")])
def test_what_changed_under_its_name_is_named(finished, tmp_path, what, named):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    arguments = tiny_arguments(tmp_path, eval_split=None, max_steps=1)
    path = tmp_path / "set.npz"
    if what in ("image", "label"):
        with np.load(path) as archive:
            arrays = dict(archive)
        if what == "image":
            arrays["jpeg"][arrays["offsets"][1] + 60] ^= 1
        else:
            arrays["label"][[4, 5]] = arrays["label"][[5, 4]]  # as many of every class
        np.savez(path, **arrays)
    else:
        change = "    model.bn1.running_mean[0] = 1\n" if what == "base" else ""
        text = (tmp_path / "model.py").read_text().replace("    model.mean, ", f"{change}    model.mean, ", 1)
        (tmp_path / "model.py").write_text(text.replace("(0.5,) * 3", "(0.4,) * 3", what == "mean"))
    with pytest.raises(
        ValueError, match=rf"other settings, so going on would not be the same run:\n  {named}.*: was"
    ) as said:
        run(replace(arguments, resume=True))
    assert str(said.value).count(": was ") == 1


def test_names_are_compared_where_one_side_knows_no_digest():
    check_same({"dataset": "a"}, {"data": "y", "dataset": "a"}, "it")
    with pytest.raises(ValueError, match=r"\n  dataset: was 'a', is 'b'\n"):
        check_same({"dataset": "a"}, {"data": "y", "dataset": "b"}, "it")
    check_same({"data": "y", "dataset": "a"}, {"data": "y", "dataset": "b"}, "it")


def test_the_digest_is_of_labels_and_files_and_not_of_where_they_lie(tmp_path):
    one = load_images(write_folder(tmp_path / "one"))
    assert one.digest() == load_images(write_folder(tmp_path / "two")).digest()
    assert one.digest() != one.without_labels().digest()
    assert one.digest() != one.subset(range(len(one) - 1)).digest()
    assert one.cached().digest() == one.digest()
    other = load_images(write_npz(tmp_path / "set.npz"))
    assert len(other.digest()) == 64
    assert other.digest() != one.digest()


def test_a_run_writes_what_it_was_made_of(finished):
    said = RunSummary.load(finished / "out").arguments
    assert said["base"].startswith("float32:")
    assert said["data"] == load_images(finished / "set.npz").digest()
    assert said["preprocessing"]["image_size"] == 16
