# SPDX-License-Identifier: Apache-2.0
"""Dispatcher, router and experts: what each is trained on, in any order, again, and after an interruption."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from smn_peft.cascade import Cascade, prepare, train_experts
from smn_peft.cascade.router import Router
from smn_peft.objectives.swav import SwAV
from smn_peft.training import RunSummary, run
from tests.training.tiny import TRAIN

from .tiny import OPTIONS

PARTS = ("dispatcher", "expert-0", "expert-1", "clusters", "router.json", "router.safetensors", "cascade.json")
MASKS = [f"{name}/adapter_model.safetensors" for name in ("dispatcher", "expert-0", "expert-1")]


def copy_of(fitted: Path, arguments, folder: Path, *names: str):
    """Arguments of a cascade in `folder` that has these parts of the fitted one already."""
    for name in names:
        source = fitted / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        else:
            folder.mkdir(exist_ok=True)
            shutil.copy(source, folder / name)
    return replace(arguments, output_dir=str(folder))


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_every_expert_starts_from_the_dispatcher_on_its_own_cluster(fitted, arguments):
    router = Router.load(fitted)
    indices = [np.load(fitted / "clusters" / f"expert-{number}.npy") for number in range(2)]
    assert sorted(np.concatenate(indices)) == list(range(TRAIN))
    assert [len(part) for part in indices] == list(router.sizes)
    for number, size in enumerate(router.sizes):
        found = RunSummary.load(fitted / f"expert-{number}").arguments
        assert (found["images"], found["epochs"]) == (size, round(TRAIN / size * arguments.epochs))
        assert (Path(found["init_from"]), found["seed"]) == (fitted / "dispatcher", arguments.seed)
        assert found["objective_options"] == arguments.objective_options
    masks = [(fitted / name).read_bytes() for name in MASKS]
    assert len(set(masks)) == 3
    seeds = [RunSummary.load(fitted / "seeds" / name).arguments for name in ("seed-1", "seed-2")]
    assert [(found["seed"], found["images"], found["init_from"]) for found in seeds] == [
        (1, TRAIN, None),
        (2, TRAIN, None),
    ]


def test_what_is_done_is_not_done_again(fitted, arguments, monkeypatch):
    before = contents(fitted)
    monkeypatch.setattr(sys.modules["smn_peft.cascade.fit"], "run", None)
    Cascade.fit(arguments, OPTIONS)
    assert contents(fitted) == before


def test_experts_as_jobs_in_any_order_are_the_same_experts(fitted, arguments, tmp_path):
    alone = copy_of(fitted, arguments, tmp_path / "jobs", "dispatcher")
    options = replace(OPTIONS, ensemble=False)
    with pytest.raises(
        ValueError, match=r"jobs holds no finished dispatcher with a router .*cascade train … --prepare"
    ):
        train_experts(alone, options, [1])
    router, images = prepare(alone, options)
    assert (router.sizes, len(images)) == (Router.load(fitted).sizes, TRAIN)
    # An expert interrupted in its third step, the other one first; checkpoints do not move a weight.
    with pytest.raises(ValueError, match="There is no expert 2: they count from 0 to 1"):
        train_experts(alone, options, [2])
    train_experts(replace(alone, checkpoint_every=1), options, [1])
    with pytest.MonkeyPatch.context() as patch:
        original = SwAV.after_backward

        def stops(self, step):
            original(self, step)
            if step == 2:
                raise KeyboardInterrupt

        patch.setattr(SwAV, "after_backward", stops)
        with pytest.raises(KeyboardInterrupt):
            train_experts(replace(alone, checkpoint_every=1), options, [0])
    AcceleratorState._reset_state(reset_partial_state=True)
    assert (tmp_path / "jobs" / "expert-0" / "checkpoint-2").is_dir()
    assert not (tmp_path / "jobs" / "expert-0" / "run.json").exists()
    cascade = Cascade.fit(alone, options)
    for name in MASKS:
        assert (tmp_path / "jobs" / name).read_bytes() == (fitted / name).read_bytes()
    expected = Cascade.load(fitted, backbone=arguments.backbone).projections["unconditional"]
    assert torch.equal(cascade.projections["unconditional"].components, expected.components)


def test_a_cluster_smaller_than_a_batch(fitted, arguments, tmp_path):
    alone = copy_of(fitted, arguments, tmp_path / "small", "dispatcher")
    with pytest.raises(
        ValueError,
        match=r"Of n=48 training images in K=6 clusters cluster \d has \d.*a batch of 12 .*take fewer experts",
    ):
        prepare(alone, replace(OPTIONS, experts=6))
    assert not (tmp_path / "small" / "router.json").exists()
    router, _ = prepare(
        alone, replace(OPTIONS, router="kmeans")
    )  # the dispatcher is there: other options go on from it
    assert router.kind == "kmeans"


def test_other_settings_are_refused(fitted, arguments, tmp_path):
    with pytest.raises(
        ValueError, match=r"dispatcher/run\.json was written .*other settings(?s:.*)lr: was 5\.0, is 6\.0"
    ):
        prepare(replace(arguments, lr=6.0), OPTIONS)
    with pytest.raises(ValueError, match="ensemble needs one base, and with pretrained=False each seed has its own"):
        prepare(replace(arguments, pretrained=False), OPTIONS)
    moved = copy_of(fitted, arguments, tmp_path / "moved", *PARTS)
    train_experts(moved, OPTIONS, [0, 1])  # done, wherever the folder is: nothing is trained
    checkpoint = tmp_path / "moved" / "dispatcher" / "checkpoint-8"
    (checkpoint / "model.safetensors").write_bytes(b"another")
    with pytest.raises(ValueError, match=r"expert-0/run\.json was written .*other settings(?s:.*)  start: was"):
        train_experts(moved, OPTIONS, [0])
    shutil.rmtree(checkpoint)  # to save space: what is done needs it no more
    train_experts(moved, OPTIONS, [0, 1])
    options = replace(OPTIONS, router="kmeans", experts=3, ensemble=False)
    (tmp_path / "moved" / "cascade.json").unlink()  # a whole one would stay as it is
    prepare(moved, options)
    before, after = (np.load(root / "clusters" / "expert-0.npy") for root in (fitted, tmp_path / "moved"))
    assert before.tolist() != after.tolist()
    with pytest.raises(ValueError, match=r"expert-0/run\.json was written .*other settings(?s:.*)indices: was"):
        train_experts(moved, options, [0])


def test_a_finished_cascade_stays_where_another_router_is_asked_for(fitted, arguments, tmp_path):
    whole = copy_of(fitted, arguments, tmp_path / "whole", *PARTS)
    before = contents(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"whole holds a finished cascade of other settings \(experts: was 2, is 3\)"):
        prepare(whole, replace(OPTIONS, experts=3, ensemble=False))
    assert contents(tmp_path / "whole") == before


def test_the_run_of_an_expert_can_be_repeated_alone(fitted, arguments, tmp_path):
    from smn_peft.training.saved import arguments_of

    mine = arguments_of(RunSummary.load(fitted / "expert-1"), arguments.backbone)
    run(replace(mine, output_dir=str(tmp_path / "again")), evaluate=False)
    again = (tmp_path / "again" / "adapter_model.safetensors").read_bytes()
    assert again == (fitted / "expert-1" / "adapter_model.safetensors").read_bytes()
