# SPDX-License-Identifier: Apache-2.0
"""What the quickstart's methods leave on disk: how many bytes, and whether a fresh process gives the same with them.

Used by `quickstart.py`; not an example by itself.
"""

from __future__ import annotations

from pathlib import Path

import torch
from common import digits
from peft import PeftModel
from quickstart_training import NEW, PLAIN, load
from safetensors.torch import load_file, save_file
from torch import nn

from smn_peft.evaluation import extract_features
from smn_peft.storage import adapter_sizes

__all__ = ["stored_bytes", "verify"]


def stored_bytes(model: nn.Module, folder: Path, head: bool) -> dict[str, int]:
    """Bytes to keep beside the base, or in its place; a mask is saved in `folder` with what it computes."""
    if isinstance(model, PeftModel):
        model.save_pretrained(folder)
        outputs = extract_features(model, digits(NEW)[1], PLAIN, function=model if head else None)
        save_file({"logits" if head else "features": outputs.features}, folder / "outputs.safetensors")
        return vars(adapter_sizes(folder))
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in model.state_dict().items()}
    if all(parameter.requires_grad for parameter in model.parameters()):
        return {"total": sum(sizes.values())}
    head_size = sum(size for name, size in sizes.items() if name.startswith("head."))
    buffers = sum(sizes[name] for name, _ in model.named_buffers() if not name.startswith("head."))
    return {"head": head_size, "statistics": buffers, "total": head_size + buffers}


def verify(folder: Path) -> bool:
    """Rebuild base and adapters from their files, and compare their outputs with those of the process that trained."""
    same = []
    for saved in sorted(folder.glob("mask-*/outputs.safetensors")):
        ((kind, expected),) = load_file(saved).items()
        model = PeftModel.from_pretrained(load(folder / "base", head=kind == "logits"), saved.parent)
        function = model if kind == "logits" else None
        outputs = extract_features(model, digits(NEW)[1], PLAIN, function=function).features
        same.append(torch.equal(outputs, expected))
        words = "identical to the bit" if same[-1] else "NOT identical"
        print(f"Reloaded {saved.parent.name} in a fresh process: {outputs.numel()} {kind} {words}.", flush=True)
    return bool(same) and all(same)
