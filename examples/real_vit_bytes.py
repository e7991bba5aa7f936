# SPDX-License-Identifier: Apache-2.0
"""What an adapter of a real ViT-Tiny weighs: a mask in three codecs, LoRA of rank 8, and all weights fine-tuned.

Images, weights (SMN_ASSETS) and training are those of `real_vit.py`, and so are the learning rates of mask and full
fine-tuning, chosen there; LoRA's is chosen here. No number here compares with the paper's.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch
from cifar import Task
from experiment import main
from real_vit import FULL_ADAM, MASK, TARGETS, build
from safetensors.torch import load_file, save_file
from torch import nn
from transfer import accuracy
from transfer_recipe import LoraRecipe

from smn_peft.storage import WEIGHTS_NAME, adapter_sizes
from smn_peft.training.assemble import lora_sizes

CODECS = {"bits": "bit-packed", "entropy": "coded", "archival": "coded with the base's weights"}
LORA = LoraRecipe("LoRA, rank 8", mask=False, rank=8, lrs=(1e-3, 3e-3, 1e-2))


def forms(adapted: nn.Module, task: Task) -> dict:
    """Bytes of every form that an adapter can be saved in, by purpose."""
    if not hasattr(adapted, "peft_config"):
        return {}
    config, found = adapted.peft_config["default"], {}
    with tempfile.TemporaryDirectory() as folder:
        if hasattr(config, "codec"):
            for codec, label in CODECS.items():
                config.codec = codec
                adapted.save_pretrained(Path(folder) / codec)
                found[label] = asdict(adapter_sizes(Path(folder) / codec))
            return {"forms": found}
        adapted.save_pretrained(folder)
        found["float32"] = lora_sizes(folder)
        # rounded first, measured then: what is saved is what is evaluated
        with torch.no_grad():
            for parameter in (p for p in adapted.parameters() if p.requires_grad):
                parameter.copy_(parameter.bfloat16())
        path = Path(folder) / WEIGHTS_NAME
        save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
        found["bfloat16"] = {**lora_sizes(folder), "test": accuracy(adapted, task, task.test)}
    return {"bytes": found["float32"]["total"], "forms": found}


if __name__ == "__main__":
    recipes = [replace(FULL_ADAM, lrs=(3e-4,)), LORA, replace(MASK, lrs=(0.06,))]
    main(build, recipes, [LORA], 64, (0.5,) * 3, (0.5,) * 3, targets=TARGETS, more=forms)
