# SPDX-License-Identifier: Apache-2.0
"""Runs that end in the state that was best on images held out of the training images."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from smn_peft.training import Interrupted, Trainer, run
from smn_peft.training.assemble import build_images
from smn_peft.training.checkpoint import list_checkpoints
from smn_peft.training.metrics import read_metrics

from .helpers import Batches, loop, stop_after, supervised_task
from .tiny import SWAV, TRAIN, tiny_arguments

HELD_OUT = {0: 0.2, 4: 0.9, 8: 0.5, 12: 0.9}  # by step; among equals the first is kept


class Evaluation:
    """Returns what `HELD_OUT` says of the trainer's step, and keeps the states that it saw."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.states: dict[int, dict[str, torch.Tensor]] = {}

    def __call__(self, task):
        step, state = self.trainer.step, task.training_state()
        again = step in self.states  # the state that was restored
        self.states.setdefault(step, {name: tensor.detach().clone() for name, tensor in state.items()})
        return {"held_out": HELD_OUT[self.trainer.best_step if again else step]}


def trainer(folder, **options) -> Trainer:
    evaluation = Evaluation()
    arguments = loop(folder, evaluate_every=1, **options)
    evaluation.trainer = Trainer(supervised_task(), Batches(), arguments, evaluate=evaluation)
    return evaluation.trainer


def assert_same(state, other):
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted trainer."""
    found = trainer(tmp_path_factory.mktemp("whole"))
    found.train()
    return found


def test_the_best_state_is_restored(whole):
    best = whole.evaluate.states[4]
    assert (whole.best_step, whole.step) == (4, 12)
    assert_same(whole.task.training_state(), best)
    assert any(not torch.equal(best[name], tensor) for name, tensor in whole.evaluate.states[12].items())
    assert [line["held_out"] for line in whole.history if "held_out" in line] == [*HELD_OUT.values(), 0.9]
    # A run that starts from this one, and this one if it is resumed at its end.
    (checkpoint,) = list_checkpoints(whole.arguments.output_dir)
    assert_same(load_file(checkpoint / "model.safetensors"), best)


@pytest.mark.parametrize("step", [2, 4, 6])
def test_it_resumes_exactly(whole, tmp_path, step):
    """Also where it was stopped between a checkpoint and the evaluation of the same step."""
    first = trainer(tmp_path)
    stop_after(first, step)
    with pytest.raises(Interrupted):
        first.train()
    assert first.best_step == (0 if step <= 4 else 4)
    second = trainer(tmp_path, resume=True)
    second.train()
    assert second.best_step == 4
    assert_same(second.task.training_state(), whole.task.training_state())
    logged = [(line["step"], line["held_out"]) for line in read_metrics(second.log.path) if "held_out" in line]
    assert logged == [*HELD_OUT.items(), (12, 0.9)]


@pytest.mark.parametrize("options", [{}, SWAV], ids=["labels", "swav"])
def test_a_whole_run(tmp_path, options):
    arguments = tiny_arguments(tmp_path, keep_best=0.25, evaluate_every=1, fraction=0.5, **options)
    images = build_images(arguments)
    assert (len(images.train), images.held.labels.bincount().tolist()) == (TRAIN // 2 - 6, [2, 2, 2])
    assert not set(images.train.rows.tolist()) & set(images.held.rows.tolist())
    assert len(images.test) == len(build_images(replace(arguments, keep_best=None)).test)
    summary = run(arguments)
    lines = read_metrics(tmp_path / "out" / "metrics.jsonl")
    values = [line["held_out"] for line in lines if "held_out" in line]
    assert values[-1] == max(values)
    assert "knn" in summary.after
    with pytest.raises(ValueError, match=r"evaluate_every: was 1, is None"):
        run(replace(arguments, evaluate_every=None, resume=True))


def test_it_needs_no_images_to_evaluate_on(tmp_path):
    arguments = tiny_arguments(tmp_path, keep_best=0.25, eval_split=None, lr=1e-6, head_lr=1e-6)
    summary = run(arguments, evaluate=False)
    assert (summary.best_step, summary.before, summary.after) == (0, {}, {})  # nothing that it predicts has changed
    assert "kept: the state after step 0" in summary.text()


def test_what_cannot_be_kept(tmp_path):
    schedule = {"mask_type": "topk", "density": 0.5, "density_schedule": "linear"}
    with pytest.raises(ValueError, match="keep_best may end in a denser mask than density_schedule asks for"):
        tiny_arguments(tmp_path, keep_best=0.2, mask=schedule)
    with pytest.raises(ValueError, match="No class has two images, so none can be held out"):
        build_images(tiny_arguments(tmp_path, keep_best=0.2, fraction=0.01))
