# SPDX-License-Identifier: Apache-2.0
"""Small adapters, and folders as a run leaves them, made without training."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from smn_peft import MaskConfig
from smn_peft.hub import full_bytes
from smn_peft.storage.adapter_file import adapter_sizes
from smn_peft.training import RunSummary, TrainArguments

X = torch.linspace(-1, 1, 4 * 32).reshape(4, 32)


def base(seed: int = 0) -> nn.Module:
    """A base model of 3,152 weights and biases, the same in every call."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))


def masked(seed: int = 0, name: str = "default") -> PeftModel:
    """The base under a random mask of half density, which belongs to the seed."""
    config = MaskConfig(target_modules=["0", "2"], init_weights=False, seed=seed)
    return get_peft_model(base(), config, adapter_name=name).eval()


def write_run(folder: Path, seed: int = 0, after: float = 0.75, **arguments: Any) -> PeftModel:
    """What `smn train` leaves in a folder: the adapter, run.json, and things that nobody should upload."""
    model = masked(seed)
    model.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    backbone = "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": backbone}))
    defaults: dict[str, Any] = {"backbone": backbone, "dataset": "cifar10", "output_dir": str(folder), "seed": seed}
    chosen = TrainArguments(**{**defaults, **arguments})
    facts = json.loads(json.dumps({**asdict(chosen), "head_classes": None}, default=lambda value: sorted(value)))
    RunSummary(
        arguments=facts,
        before={"knn": 0.5},
        after={"knn": after},
        loss=0.25,
        density=model.base_model.density(),
        steps=90,
        seconds=12.5,
        images_per_second=100.0,
        sizes={**vars(adapter_sizes(folder)), "full": full_bytes(model)},
        versions={"smn_peft": "0.1.0"},
    ).save(folder)
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "checkpoint-4").mkdir(exist_ok=True)
    return model


def code_of(card: str) -> str:
    """The Python block of a card."""
    found = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert found is not None
    return found[1]
