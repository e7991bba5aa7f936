# SPDX-License-Identifier: Apache-2.0
"""Refusals of tensors that are not whole where a layer needs them: sharded, partitioned, flattened or offloaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..functional.distributed import is_sharded

if TYPE_CHECKING:
    from .masks import MaskState

__all__ = ["ZERO3", "check_forward", "is_managed", "is_offloaded", "refuse_if_sharded"]

_FSDP2 = "FSDP2: fully_shard, or `accelerate launch --use_fsdp --fsdp_version 2`"
ZERO3 = f"is partitioned by DeepSpeed's ZeRO-3, which is not supported: shard it by {_FSDP2}."


def is_managed(module: nn.Module) -> bool:
    """Whether FSDP, of either version, shards the parameters of a module."""
    return "_is_fsdp_managed_module" in module.__dict__


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings the parameters of a module for its forward only."""
    hook: Any = module.__dict__.get("_hf_hook")
    return any(getattr(each, "offload", False) for each in (hook, *getattr(hook, "hooks", ())))


def refuse_if_sharded(layer: MaskState, what: str) -> None:
    """Raise ValueError where a layer is sharded, whose parameters only an optimizer may write then."""
    if is_managed(layer) or any(is_sharded(layer.base_tensor(slot)) for slot in layer.present_slots):
        raise ValueError(f"{_name(layer)} is sharded already: {what} before the model is sharded.")


def check_forward(layer: MaskState, names: Sequence[str]) -> None:
    """Refuse a forward over tensors that are not whole, or not what will be saved; cheap where nothing is sharded.

    Raises:
        ValueError: With the engine's name and what to use in its place.
    """
    weight = layer.base_tensor(layer.present_slots[0])
    managed = is_managed(layer)
    if type(weight) is nn.Parameter and not (managed or weight.is_meta or hasattr(weight, "ds_id")):
        return
    if problem := _problem(layer, names, weight, managed):
        raise ValueError(f"{_name(layer)} {problem}")


def _problem(layer: MaskState, names: Sequence[str], weight: Tensor, managed: bool) -> str | None:
    if hasattr(weight, "ds_id"):
        return ZERO3
    if weight.is_meta and is_offloaded(layer.get_base_layer()):
        return (
            "is offloaded by accelerate, which brings its weight too late for a mask: call merge_and_unload() before "
            "dispatch_model or cpu_offload, or keep the masked layers on a device."
        )
    owned = [(layer.smn_info[name], own) for name in names for own in layer.parameters_of(name).values()]
    if is_sharded(weight) or any(is_sharded(own) for _, own in owned):
        return (
            "is sharded in its own forward. Under FSDP2 call the module that was given to fully_shard, and give it "
            "blocks and models, not single layers. Under tensor parallelism call merge_and_unload() first."
        )
    if managed and type(weight) is not nn.Parameter:
        return f"is flattened by FSDP1, under which masks cannot be saved: use {_FSDP2}."
    for info, own in owned if managed else ():
        exact = info.spec.mask_type == "threshold" and info.spec.threshold == 0 and own.dtype == torch.bfloat16
        if own.dtype.itemsize < 4 and not exact:
            return (
                f"is computed with scores that FSDP2 rounds to {own.dtype}, whose mask is not the one that is saved: "
                "use MixedPrecisionPolicy(param_dtype=None) and torch.autocast."
            )
    return None


def _name(layer: MaskState) -> str:
    return repr(next((info.key for info in layer.smn_info.values()), "A masked layer"))
