# SPDX-License-Identifier: Apache-2.0
"""Recipes: those of the package build arguments, and mistakes in one's own are named."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest
from accelerate.state import AcceleratorState

from smn_peft.data import list_datasets
from smn_peft.objectives.base import objective_class
from smn_peft.training import TrainArguments, list_recipes, load_recipe, run
from smn_peft.training.arguments import read_recipe

from .tiny import SWAV, tiny_arguments, write_clip, write_npz

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_there_are_some():
    assert {"supervised-resnet", "supervised-clip", "swav-resnet"} <= set(list_recipes())


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_is_whole(name):
    recipe = load_recipe(name)
    arguments = TrainArguments(**{"backbone": "resnet18", "dataset": "cifar10", **recipe})
    assert recipe.keys() <= vars(arguments).keys()
    assert arguments.dataset in list_datasets()
    objective_class(arguments.objective).Options(**arguments.objective_options)
    notes = {key: value for key, value in read_recipe(name).items() if key not in recipe}
    assert {"description", "source", "tuned_on"} <= set(notes) <= {"description", "source", "tuned_on", "expected"}
    expected = notes.get("expected", {})
    if not name.endswith("-small"):  # the paper's, by dataset; the others by backbone
        assert set(expected) <= set(list_datasets())
    assert all(0 < value < 1 for numbers in expected.values() for value in numbers.values())


@pytest.mark.parametrize(
    ("recipe", "artefact", "rows"),
    [
        ("swav-small", "table2", {"frozen_knn": "frozen base", "knn": "threshold"}),
        ("supervised-small", "table1", {"frozen_linear_probe": "linear probe, frozen base", "mask": "mask"}),
        ("unlabelled-small", "unlabelled", {"frozen_knn": "frozen base", "knn": "mask"}),
    ],
)
def test_what_small_recipes_expect_was_measured(recipe, artefact, rows):
    record = json.loads((EXAMPLES / f"records/paper/{artefact}-small.json").read_text())
    expected = read_recipe(recipe)["expected"]
    assert set(expected) == {"vit", "resnet"}
    for section, name in (("ViT-Tiny, 64 px", "vit"), ("ResNetV2-50, 48 px", "resnet")):
        cells = [cell for cell in record["cells"] if cell["section"].startswith(section)]
        for key, row in rows.items():
            values = [
                cell["values"] for cell in cells if cell["row"] == row and not cell["column"].startswith("\u2264")
            ]
            assert len(values[0]) >= (1 if "frozen" in key else 3)
            assert expected[name][key] == pytest.approx(fmean(values[0]), abs=5e-5)


def test_the_papers_numbers_arrive():
    resnet = TrainArguments(**load_recipe("supervised-resnet"))
    assert (resnet.lr, resnet.warmup_epochs, resnet.epochs, resnet.batch_size) == (50, 40, 150, 64)
    assert (resnet.head, resnet.mask.batch_norm) == ("masked", "adapt")
    swav = TrainArguments(**load_recipe("swav-resnet"))
    assert swav.objective_options["queue_length"] == 512


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("dataset: cifar10\nmulti_crop: {global_scale: [0.3, 1.0]}\nmask: {target_modules: [conv1]}\n")
    arguments = TrainArguments(**load_recipe(path), backbone="resnet18")
    assert arguments.multi_crop.global_scale == (0.3, 1.0)
    assert arguments.mask.target_modules == {"conv1"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", r"Recipe .*mine\.yaml: unknown option 'epoch'\. Did you mean epochs\?"),
        ("mask: {densty: 0.5}", r"mine\.yaml: unknown option 'mask\.densty'\. Did you mean mask\.density\?"),
        ("- a", r"must hold a mapping, such as .epochs: 10.; it holds list"),
        ("a: [", r"mine\.yaml is not a YAML file"),
    ],
)
def test_mistakes_in_a_file(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(tmp_path / "mine.yaml")


def test_unknown_names(tmp_path):
    with pytest.raises(ValueError, match=r"Unknown recipe 'swav-resne'; there are .* Did you mean swav-resnet\?"):
        load_recipe("swav-resne")
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: .*absent\.yaml"):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(ValueError, match=r"multi_crop: unknown option 'local_crop'\. Did you mean local_crops\?"):
        TrainArguments(backbone="a", dataset="b", multi_crop={"local_crop": 2})


def test_the_small_clip_recipe_runs_at_its_own_size(tmp_path):
    """No weights of CLIP were at hand to expect results of; the path is the real one, on a tiny CLIP of other size."""
    own = {"backbone": write_clip(tmp_path / "clip"), "dataset": str(write_npz(tmp_path / "set.npz"))}
    recipe = {**load_recipe("supervised-clip-small"), **own, "templates": ["a photo of a {}."]}
    short = {"lr": 1.0, "batch_size": 16, "max_steps": 3, "cpu": True, "output_dir": str(tmp_path / "out")}
    summary = run(TrainArguments(**{**recipe, **short}))
    assert summary.steps == 3
    assert summary.density < 1
    assert "accuracy" in summary.after


def test_few_labels_goes_on_from_a_run_without(tmp_path):
    first = tiny_arguments(tmp_path, **SWAV, mask={"batch_norm": "adapt"})
    run(first)
    AcceleratorState._reset_state(reset_partial_state=True)
    own = {name: getattr(first, name) for name in ("backbone", "dataset", "knn_k", "cpu")}
    changes = {"fraction": 0.5, "init_from": first.output_dir, "output_dir": str(tmp_path / "few")}
    summary = run(TrainArguments(**{**load_recipe("few-labels"), **own, **changes}))
    assert summary.steps == 10  # an epoch has one batch of 16 of its 24 images
    assert summary.arguments["bound"] == 100
    assert {"accuracy", "knn"} <= summary.before.keys() & summary.after.keys()
