# SPDX-License-Identifier: Apache-2.0
"""Budgets of bytes and of multiplications: met by a pull that is found while training; resumed exactly; refusals."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from smn_peft import slice_model
from smn_peft.storage.adapter_file import WEIGHTS_NAME
from smn_peft.training import TrainArguments, run
from smn_peft.training.assemble import build_images, build_task
from smn_peft.training.budget import file_size
from smn_peft.training.metrics import read_metrics
from smn_peft.training.saved import load_run

from .tiny import SWAV, tiny_arguments, write_model

LONG = {"epochs": 8, "optimizer": "adamw", "lr": 0.3, "mask": {"codec": "entropy"}, "knn_k": 5}


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """A run without a budget."""
    return run(tiny_arguments(tmp_path_factory.mktemp("without"), **LONG))


@pytest.mark.parametrize(
    ("share", "more"),
    [
        (0.75, {}),
        (0.5, {}),
        (0.5, {"mask": {"codec": "entropy", "trainable_fraction": 0.5}}),
        (0.5, {**SWAV, "mask": {"codec": "entropy", "batch_norm": "adapt"}}),
        (0.6, {"score_dtype": "bfloat16"}),
    ],
    ids=["loose", "tight", "selected", "swav", "narrow"],
)
def test_the_file_is_within_the_budget_and_near_it(tmp_path, without, share, more):
    fixed = without.sizes["total"] - without.sizes["mask"]
    arguments = tiny_arguments(tmp_path, **{**LONG, **more})
    if more:
        run(arguments, evaluate=False)
        plain = arguments.output_dir
        arguments = replace(arguments, output_dir=str(tmp_path / "budgeted"))
        budget = int((0.6 + 0.4 * share) * (tmp_path / plain / WEIGHTS_NAME).stat().st_size)
    else:
        budget = int(fixed + share * without.sizes["mask"])
    summary = run(replace(arguments, max_bytes=budget))
    assert 0.97 * budget <= summary.sizes["total"] <= budget
    line = [line for line in read_metrics(f"{arguments.output_dir}/metrics.jsonl") if "loss" in line][-1]
    assert line["rate"] > 0
    assert summary.density < 1
    assert summary.after  # evaluated as it is saved


def test_a_budget_that_is_not_needed_takes_nothing_away(tmp_path, without):
    summary = run(tiny_arguments(tmp_path, **LONG, max_bytes="1MB"), evaluate=False)
    assert 0.8 * without.sizes["mask"] < summary.sizes["mask"] < 1.2 * without.sizes["mask"]


def test_it_resumes_exactly(tmp_path):
    arguments = tiny_arguments(tmp_path, **LONG, max_bytes=3500, checkpoint_every=5, keep_checkpoints=100)
    run(arguments, evaluate=False)
    whole, again = tmp_path / "out", tmp_path / "again"
    later = [path.name for path in whole.glob("checkpoint-*") if int(path.name.split("-")[1]) > 15]
    assert later
    shutil.copytree(whole, again, ignore=shutil.ignore_patterns("run.json", "adapter_*", "README.md", *later))
    run(replace(arguments, output_dir=str(again), resume=True), evaluate=False)
    for name in (WEIGHTS_NAME, "adapter_config.json"):
        assert (again / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("sizes", [(3500, None), (None, 3200), (3500, 3200)])
def test_a_run_that_starts_from_another_has_a_budget_of_its_own(tmp_path, sizes):
    first = tiny_arguments(tmp_path, **LONG, max_bytes=sizes[0])
    run(first, evaluate=False)
    arguments = replace(first, init_from=first.output_dir, output_dir=str(tmp_path / "next"), max_bytes=sizes[1])
    summary = run(arguments, evaluate=False)
    assert summary.density < 1
    assert sizes[1] is None or summary.sizes["total"] <= sizes[1]


def test_the_size_is_that_of_the_file(tmp_path):
    arguments = tiny_arguments(tmp_path, **LONG)
    task, _ = build_task(arguments, build_images(arguments))
    task.model.save_pretrained(tmp_path / "saved", save_embedding_layers=False)
    assert file_size(task.model) == (tmp_path / "saved" / WEIGHTS_NAME).stat().st_size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_bytes": "40 miles"}, "max_bytes must be a size such as 40000, 40kB or 1MB; got '40 miles'"),
        ({"max_bytes": 9000, "mask": {}}, "max_bytes is of coded masks: it needs adapt='mask', mask.codec='entropy'"),
        ({"max_bytes": 9000, "adapt": "lora"}, "max_bytes is of coded masks"),
        ({"max_bytes": 9000, "keep_best": 0.2}, "max_bytes is of coded masks"),
        (
            {"max_bytes": 9000, "mask": {"codec": "entropy", "mask_type": "topk", "density": 0.9}},
            "rate=1 pulls scores",
        ),
        (
            {"max_bytes": "1kB"},
            r"max_bytes=1000 leaves nothing for masks: head, .* take \d+ bytes\. Allow more, or set",
        ),
    ],
)
def test_refusals_before_training(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(tiny_arguments(tmp_path, **{**LONG, **options}), evaluate=False)
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_sizes_in_words():
    sizes = {"40kB": 40_000, "40KiB": 40_960, "1.5MB": 1_500_000, 777: 777}
    base = {"backbone": "resnet18", "dataset": "cifar10", "mask": {"codec": "entropy"}}
    assert [TrainArguments(**base, max_bytes=size).max_bytes for size in sizes] == list(sizes.values())


# --- Multiplications -------------------------------------------------------------------------------------------------

CUT = {"epochs": 12, "optimizer": "adamw", "lr": 0.2, "warmup_epochs": 0, "mask": {"granularity": "column+weight"}}


def multiplications(model, side: int = 16) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, side, side))
    return counter.get_total_flops()


def vit_arguments(folder: Path, **options) -> TrainArguments:
    return tiny_arguments(folder, **{**CUT, "backbone": write_model(folder, "build_vit"), **options})


@pytest.mark.parametrize("granularity", ["column", "column+weight", "row+weight"])
@pytest.mark.parametrize("share", [0.9, 0.7])
def test_the_multiplications_are_within_the_budget(tmp_path, granularity, share):
    arguments = vit_arguments(tmp_path, mask={"granularity": granularity}, max_flops=share)
    run(arguments)
    model, base = (load_run(tmp_path / "out", base=b, backbone=arguments.backbone)[1].model for b in (False, True))
    assert share - 0.25 < multiplications(slice_model(model)) / multiplications(base) <= share


def test_a_budget_of_multiplications_resumes_exactly(tmp_path):
    arguments = vit_arguments(tmp_path, max_flops=0.7, checkpoint_every=5, keep_checkpoints=100)
    run(arguments, evaluate=False)
    whole, again = tmp_path / "out", tmp_path / "again"
    later = [path.name for path in whole.glob("checkpoint-*") if int(path.name.split("-")[1]) > 15]
    shutil.copytree(whole, again, ignore=shutil.ignore_patterns("run.json", "adapter_*", "README.md", *later))
    run(replace(arguments, output_dir=str(again), resume=True), evaluate=False)
    assert (again / WEIGHTS_NAME).read_bytes() == (whole / WEIGHTS_NAME).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_flops": 0.7}, r"none are masked: set mask\.granularity to column\+weight"),
        (
            {**CUT, "max_flops": 0.01},
            r"max_flops=0\.01 cannot be met: what is not masked as hidden",
        ),
        ({"max_flops": 0.7, "max_bytes": 9000, "mask": {"codec": "entropy"}}, "max_flops is of masks of rows or col"),
        ({"max_flops": 0.7, "adapt": "lora"}, "max_flops is of masks of rows or columns: it needs adapt='mask'"),
        ({"max_flops": 1.7}, "max_flops must be"),
    ],
)
def test_multiplications_that_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(tiny_arguments(tmp_path, **options), evaluate=False)
