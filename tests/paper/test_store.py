# SPDX-License-Identifier: Apache-2.0
"""The store: a run is done once, goes on after Ctrl-C, and one that cannot go on is remembered with its reason."""

from __future__ import annotations

import signal

import pytest
from safetensors.torch import load_file

from smn_peft.objectives.swav import SwAV
from smn_peft.paper.runs import RunStore
from smn_peft.training import Interrupted
from smn_peft.training.checkpoint import list_checkpoints


def files(path) -> set[str]:
    return {file.name for file in path.iterdir()}


def test_an_interrupted_run_goes_on_to_the_same_mask(tiny_scale, tmp_path):
    spec = tiny_scale.run(tiny_scale.main, "mask", "colours", max_steps=5, eval_split=None)
    store, whole = RunStore(tmp_path / "a"), RunStore(tmp_path / "b")
    original = SwAV.after_backward

    def press(self, step):
        original(self, step)
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SwAV, "after_backward", press)
        with pytest.raises(Interrupted):
            store.ensure(spec)
    assert not store.is_done(spec)
    assert list_checkpoints(store.path(spec))
    store.ensure(spec)
    whole.ensure(spec)
    assert store.summary(spec).steps == whole.summary(spec).steps == 5
    name = "adapter_model.safetensors"
    one, two = load_file(store.path(spec) / name), load_file(whole.path(spec) / name)
    assert all((one[key] == two[key]).all() for key in one)
    kept = {"README.md", "adapter_config.json", "metrics.jsonl", "run.json", "checkpoint-5", name}  # to start from
    assert files(store.path(spec)) == kept
    before = (store.path(spec) / "run.json").stat().st_mtime_ns
    store.ensure(spec)
    assert (store.path(spec) / "run.json").stat().st_mtime_ns == before


def test_unknown_metrics(tiny_scale, store):
    spec = tiny_scale.run(tiny_scale.main, "mask", "colours")
    with pytest.raises(ValueError, match="Unknown metric 'knm'; there are knn, "):
        store.measure(spec, "knm")
    store.ensure(spec)
    with pytest.raises(ValueError, match="has no 'accuracy': its arguments do not ask for it"):
        store.measure(spec, "accuracy")


def test_a_run_that_cannot_go_on_is_not_tried_again(tiny_scale, tmp_path):
    store = RunStore(tmp_path)
    spec = tiny_scale.run(tiny_scale.main, "mask", "colours", head_lr=1e38, max_steps=4)
    follower = tiny_scale.run(tiny_scale.main, "topk", "colours")
    follower = type(follower)(follower.arguments, found=spec)
    store.ensure(follower)
    assert store.is_done(spec)
    assert "step" in store.failure(spec)
    assert store.failure(follower) == store.failure(spec)
    assert not list_checkpoints(store.path(spec))
    assert not store.path(follower).exists()
