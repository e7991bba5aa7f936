# SPDX-License-Identifier: Apache-2.0
"""Whole runs under accelerate's FSDP2 on two gloo processes: trained, evaluated, resumed and saved as by one."""

from __future__ import annotations

import copy
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

from smn_peft import MaskConfig
from smn_peft.storage.adapter_config import read_config
from smn_peft.training import ExactResumeCallback, TrainArguments, run
from smn_peft.training.checkpoint import latest_checkpoint, list_checkpoints
from smn_peft.training.metrics import read_metrics
from smn_peft.training.run import RunSummary
from tests.gloo import join_group, run_processes

from .tiny import SWAV, tiny_arguments, write_model

# The stem has no mask: FSDP2 wants all that trains in a group of one dtype, and the head is float32.
BLOCKS = {"exclude_modules": r"(backbone\.)?conv1"}
CASES: dict[str, dict[str, Any]] = {
    "labels": {"mask": {**BLOCKS, "batch_norm": "adapt"}, "keep_best": 0.25, "evaluate_every": 1, "accumulate": 2},
    "swav": {**SWAV, "mask": {**BLOCKS, "batch_norm": "adapt"}},
    "bytes": {"mask": {**BLOCKS, "codec": "entropy"}, "max_bytes": 2100, "optimizer": "adamw", "lr": 0.3},
    "flops": {"mask": {**BLOCKS, "granularity": "row"}, "max_flops": 0.9},
    "full": {"adapt": "full", "lr": 0.1},
    "lora": {"adapt": "lora", "lr": 0.1},
}


def switch_to_fsdp(version: int = 2, **options: Any) -> None:
    """Switch on what accelerate keeps for GPUs: its state says FSDP, on the CPU's processes."""
    for state in (AcceleratorState(), PartialState()):
        state.distributed_type = DistributedType.FSDP
    options = {"auto_wrap_policy": "transformer_based_wrap", **options}
    AcceleratorState().fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=version, **options)


def use_fsdp(arguments: TrainArguments, version: int = 2) -> None:
    join_group()
    Accelerator(cpu=True, mixed_precision=arguments.mixed_precision)
    block = "Block" if arguments.backbone.endswith("vit") else "BasicBlock"
    switch_to_fsdp(version, transformer_cls_names_to_wrap=[block])


def run_sharded(arguments: TrainArguments) -> dict[str, torch.Tensor]:
    use_fsdp(arguments)
    summary = run(arguments)
    assert AcceleratorState().is_fsdp2
    return {"after": torch.tensor(list(summary.after.values()))}


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(latest_checkpoint(folder) / "model.safetensors")


@pytest.mark.parametrize(
    "case", ["labels", *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != "labels")]
)
def test_a_sharded_run_is_one_process(tmp_path, case):
    # Masks in float64: where rounding flips one bit, all that follows differs.
    backbone = write_model(tmp_path, "build_double" if "mask" in CASES[case] else "build")
    arguments = tiny_arguments(tmp_path, backbone=backbone, epochs=3, **CASES[case])
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


def resume_sharded(arguments: TrainArguments) -> dict[str, torch.Tensor]:
    """A run that leaves a checkpoint of each epoch, and one that goes on from the first of them."""
    run_sharded(arguments)
    resumed = Path(f"{arguments.output_dir} resumed")
    if torch.distributed.get_rank() == 0:
        shutil.copytree(list_checkpoints(arguments.output_dir)[0], resumed / "checkpoint-4")
    torch.distributed.barrier()
    return run_sharded(replace(arguments, output_dir=str(resumed), resume=True))


@pytest.mark.parametrize(
    "options",
    [
        {"mixed_precision": "bf16", "mask": {"threshold": 0.5, "trainable_fraction": 0.5}},
        {"optimizer": "adamw", "lr": 0.05, "mask": {"batch_norm": "adapt", "granularity": "row"}},
    ],
    ids=["sgd", "adamw"],
)
def test_a_resumed_run_ends_bit_for_bit_where_another_does(tmp_path, options):
    backbone = write_model(tmp_path, "build_vit" if "mixed_precision" in options else "build")
    options = {"backbone": backbone, "keep_checkpoints": 9, **options}
    arguments = tiny_arguments(tmp_path, gradient_checkpointing=True, eval_split=None, **options)
    run_processes(resume_sharded, 2, tmp_path, arguments)
    ends = [latest_checkpoint(f"{arguments.output_dir}{end}") for end in ("", " resumed")]
    assert [path.name for path in ends] == ["checkpoint-8"] * 2
    for name in ("model.safetensors", "optimizer.safetensors", "../adapter_model.safetensors"):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes(), name
    before, after = load_file(list_checkpoints(ends[0].parent)[0] / "model.safetensors"), state_of(ends[0].parent)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("scores" in name for name in moved)
    # The state is whole: one process goes on from it too.
    shutil.rmtree(ends[1])
    assert run(replace(arguments, output_dir=str(ends[1].parent), resume=True)).steps == 8


def refuse(arguments: TrainArguments) -> dict[str, torch.Tensor]:
    for options in ({"score_dtype": "bfloat16"}, {"compile": True}, {"channels_last": True}):
        use_fsdp(arguments)
        with pytest.raises(ValueError, match=f"{next(iter(options))}=.* does not go with FSDP2"):
            run(replace(arguments, **options))
    use_fsdp(arguments, version=1)
    with pytest.raises(ValueError, match=r"does not train under FSDP1: use FSDP2, by --use_fsdp --fsdp_version 2"):
        run(arguments)
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    with pytest.raises(ValueError, match=r"accelerate has none on cpu.*: leave --use_fsdp out, or a --config_file"):
        run(arguments)
    return {}


def test_what_is_refused(tmp_path):
    run_processes(refuse, 2, tmp_path, tiny_arguments(tmp_path))


def train_by_transformers(folder: Path, state_dict_type: str = "FULL_STATE_DICT") -> dict[str, torch.Tensor]:
    """transformers' own Trainer, in whole, and going on from its first checkpoint."""
    several = torch.distributed.get_world_size() > 1
    join_group()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    base = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3)).double()
    data = [{"pixel_values": torch.randn(3, 16, 16).double(), "labels": index % 3} for index in range(24)]
    found: dict[str, torch.Tensor] = {}
    for name in ("whole", "resumed"):
        model = get_peft_model(copy.deepcopy(base), MaskConfig(modules_to_save=["classifier"], init_score=0.15))
        options: dict[str, Any] = {"per_device_train_batch_size": 4 if several else 8, "learning_rate": 0.1}
        options |= {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "max_grad_norm": 0.0}
        arguments = TrainingArguments(str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **options)
        if several:
            Accelerator(cpu=True)
            switch_to_fsdp(transformer_cls_names_to_wrap=["ViTLayer"], state_dict_type=state_dict_type)
        trainer = transformers.Trainer(
            model, arguments, train_dataset=data, eval_dataset=data, callbacks=[ExactResumeCallback()]
        )
        assert trainer.accelerator.is_fsdp2 == several
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if name == "resumed" else None)
        trainer.save_model(str(folder / name))
        numbers = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        found[name] = torch.tensor([*numbers, trainer.evaluate()["eval_loss"], model.base_model.density()])
    return found


@pytest.mark.slow
def test_the_trainer_of_transformers(tmp_path):
    for name in ("one", "two", "parts"):
        (tmp_path / name).mkdir()
    (one,) = run_processes(train_by_transformers, 1, tmp_path / "one", tmp_path / "one")
    two = run_processes(train_by_transformers, 2, tmp_path / "two", tmp_path / "two")
    assert one["whole"][-1] < 1
    for found in (one, *two):
        for numbers in found.values():
            torch.testing.assert_close(numbers, one["whole"], rtol=1e-6, atol=1e-6)
    name = "adapter_model.safetensors"
    assert (tmp_path / "two/whole" / name).read_bytes() == (tmp_path / "two/resumed" / name).read_bytes()
    files = [load_file(tmp_path / folder / name) for folder in ("one/whole", "two/whole")]
    for file in files:
        del file["base_model.model.smn_settings"]
    torch.testing.assert_close(*files, rtol=1e-9, atol=1e-9)
    assert read_config(tmp_path / "one" / "whole") == read_config(tmp_path / "two" / "whole")
    with pytest.raises(Exception, match=r"the Trainer writes no adapter: set it to FULL_STATE_DICT"):
        run_processes(train_by_transformers, 2, tmp_path / "parts", tmp_path / "parts", "SHARDED_STATE_DICT")
