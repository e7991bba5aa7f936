# SPDX-License-Identifier: Apache-2.0
"""Whole runs under accelerate's FSDP2 on two gloo processes: trained, evaluated, resumed and saved as by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file

from smn_peft.storage.adapter_config import read_config
from smn_peft.training import TrainArguments, run
from smn_peft.training.checkpoint import latest_checkpoint
from smn_peft.training.metrics import read_metrics
from smn_peft.training.run import RunSummary
from tests.gloo import join_group, run_processes

from .tiny import SWAV, tiny_arguments, write_model

CASES: dict[str, dict[str, Any]] = {
    "labels": {"mask": {"batch_norm": "adapt"}, "keep_best": 0.25, "evaluate_every": 1, "accumulate": 2},
    "swav": {**SWAV, "mask": {"batch_norm": "adapt"}},
    "budget": {"mask": {"codec": "entropy"}, "max_bytes": 2100, "optimizer": "adamw", "lr": 0.3},
    "full": {"adapt": "full", "lr": 0.1},
    "lora": {"adapt": "lora", "lr": 0.1},
}


def use_fsdp(version: int = 2, **options: Any) -> None:
    """Switch on what accelerate keeps for GPUs: its state says FSDP, on the CPU's processes."""
    join_group()
    Accelerator(cpu=True)
    options = {
        "auto_wrap_policy": "transformer_based_wrap",
        "transformer_cls_names_to_wrap": ["BasicBlock"],
        **options,
    }
    state: Any = AcceleratorState()
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=version, **options)


def run_sharded(arguments: TrainArguments, stop: int | None = None) -> dict[str, torch.Tensor]:
    use_fsdp()
    summary = run(arguments)
    return {"after": torch.tensor(list(summary.after.values()))}


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(latest_checkpoint(folder) / "model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_a_sharded_run_is_one_process(tmp_path, case):
    arguments = tiny_arguments(tmp_path, backbone=write_model(tmp_path, "build_double"), epochs=3, **CASES[case])
    torch.set_num_threads(1)
    one = run(arguments)
    AcceleratorState._reset_state(reset_partial_state=True)
    results = run_processes(run_sharded, 2, tmp_path, replace(arguments, output_dir=str(tmp_path / "two")))
    assert torch.equal(results[0]["after"], results[1]["after"])
    two = RunSummary.load(tmp_path / "two")
    torch.testing.assert_close(
        torch.tensor([*two.after.values()]), torch.tensor([*one.after.values()]), atol=0.05, rtol=0
    )
    assert two.best_step == one.best_step
    assert two.density == one.density
    lines = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("out", "two")]
    for name in ("loss", "density", "bits_per_weight"):
        curves = [torch.tensor([line[name] or 0.0 for line in each if "loss" in line]) for each in lines]
        torch.testing.assert_close(*curves, atol=1e-4, rtol=0)
    torch.testing.assert_close(state_of(tmp_path / "two"), state_of(tmp_path / "out"), atol=1e-3, rtol=1e-3)
    name = "model.safetensors" if case == "full" else "adapter_model.safetensors"
    files = [load_file(tmp_path / folder / name) for folder in ("two", "out")]
    for file in files:  # with a digest of the last bits of the head
        file.pop("base_model.model.smn_settings", None)
    torch.testing.assert_close(*files, atol=1e-3, rtol=1e-3)
    if case != "full":
        first, second = (read_config(tmp_path / folder) for folder in ("two", "out"))
        assert {**first, "rate": None} == {**second, "rate": None}
