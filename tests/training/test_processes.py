# SPDX-License-Identifier: Apache-2.0
"""Whole runs on two gloo processes end where one process with the same batch does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from smn_peft.training import run
from smn_peft.training.checkpoint import list_checkpoints
from smn_peft.training.metrics import read_metrics
from smn_peft.training.run import RunSummary
from tests.gloo import join_group, run_processes

from .tiny import SWAV, tiny_arguments, write_model

MASK = {"mask": {"batch_norm": "adapt"}}


def work(arguments) -> dict[str, torch.Tensor]:
    """A run as `accelerate launch` starts it: the environment says which process this is."""
    join_group()
    summary = run(arguments)
    return {"after": torch.tensor(list(summary.after.values())), "steps": torch.tensor(summary.steps)}


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(list_checkpoints(folder)[-1] / "model.safetensors")


@pytest.mark.parametrize(
    ("options", "loss", "scores"),
    [
        ({**MASK}, 1e-4, 1e-3),
        ({**SWAV, **MASK}, 1e-3, 1e-2),
        ({"head": "probe", "bound": 0.1, "keep_best": 0.25, "evaluate_every": 1}, 1e-4, 1e-3),
    ],
    ids=["labels", "swav", "few labels"],
)
def test_two_processes_are_one(tmp_path, options, loss, scores):
    # In float64: where rounding, which differs between batches of 6 and 12, flips one bit, all that follows differs.
    backbone = write_model(tmp_path, "build_double")
    arguments = tiny_arguments(tmp_path, backbone=backbone, head_lr=0.1, epochs=3, **options)
    torch.set_num_threads(1)
    one = run(arguments)
    AcceleratorState._reset_state(reset_partial_state=True)
    results = run_processes(work, 2, tmp_path, replace(arguments, output_dir=str(tmp_path / "two")))
    assert [int(result["steps"]) for result in results] == [one.steps] * 2
    assert torch.equal(results[0]["after"], results[1]["after"])
    two = RunSummary.load(tmp_path / "two")
    assert two.best_step == one.best_step
    assert {name: abs(two.after[name] - value) < 0.05 for name, value in one.after.items()} == dict.fromkeys(
        one.after, True
    )
    curves = [
        torch.tensor([line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in line])
        for name in ("out", "two")
    ]
    torch.testing.assert_close(*curves, atol=loss, rtol=0)
    first, second = state_of(tmp_path / "out"), state_of(tmp_path / "two")
    assert first.keys() == second.keys()
    for name in first:
        if first[name].is_floating_point():
            torch.testing.assert_close(first[name], second[name], atol=scores, rtol=scores)
    masks = [
        torch.cat([state[name].flatten() > 0 for name in state if "smn_scores" in name]) for state in (first, second)
    ]
    if one.best_step is None:  # the best of the few labels is their start
        assert (~masks[0]).sum() > 10
    assert (masks[0] != masks[1]).double().mean() < 1e-4
