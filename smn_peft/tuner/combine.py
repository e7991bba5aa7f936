# SPDX-License-Identifier: Apache-2.0
"""Combine the masks of several adapters into a new one: union, intersection, weighted majority."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor

from .batch_norm import BatchNorm
from .config import MaskConfig
from .layer import MaskLayer
from .rollback import whole_or_nothing

if TYPE_CHECKING:
    from .model import MaskModel

__all__ = ["COMBINATIONS", "combine_adapters", "combine_masks"]

COMBINATIONS = ("union", "intersection", "majority")


def combine_masks(masks: Sequence[Tensor], weights: Sequence[float], combination_type: str) -> Tensor:
    """Combine bool masks of one shape.

    Args:
        masks: The masks.
        weights: Weight of each, for ``"majority"``.
        combination_type: One of [`COMBINATIONS`].

    Returns:
        A bool tensor of the same shape; for ``"majority"`` active where more than half of the weight is.
    """
    stacked = torch.stack(list(masks))
    if combination_type == "union":
        return stacked.any(0)
    if combination_type == "intersection":
        return stacked.all(0)
    votes = torch.tensor(weights, dtype=torch.float32, device=stacked.device)
    share = (stacked * votes.reshape(-1, *[1] * (stacked.dim() - 1))).sum(0)
    return share > votes.sum() / 2


def combine_adapters(
    model: MaskModel,
    adapters: list[str],
    weights: Sequence[float] | None,
    adapter_name: str,
    combination_type: str,
) -> None:
    """See [`MaskModel.add_weighted_adapter`]."""
    if combination_type not in COMBINATIONS:
        raise ValueError(f"combination_type must be one of {', '.join(COMBINATIONS)}; got {combination_type!r}.")
    if unknown := [name for name in adapters if name not in model.peft_config] or not adapters:
        raise ValueError(
            f"Adapter(s) {unknown if adapters else '[]'} do not exist; there are {list(model.peft_config)}."
        )
    if adapter_name in model.peft_config:
        raise ValueError(f"Adapter with name {adapter_name!r} already exists: delete it or choose another name.")
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if len(weights) != len(adapters) or min(weights) < 0 or sum(weights) <= 0:
        raise ValueError(f"weights must be {len(adapters)} non-negative numbers, not all 0; got {weights}.")
    layers = [layer for layer in model.model.modules() if isinstance(layer, MaskLayer)]
    for layer in layers:
        slots = [layer.smn_info[name].slots if name in layer.smn_info else () for name in adapters]
        if any(other != slots[0] for other in slots):
            raise ValueError(f"The adapters {adapters} do not mask the same weights and cannot be combined.")
    saved = [module for module in model.model.modules() if isinstance(module, ModulesToSaveWrapper)]
    if both := [module for module in saved if sum(name in module.modules_to_save for name in adapters) > 1]:
        raise ValueError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{len(both)} such instance(s): masks combine, heads do not. Combine adapters without modules_to_save."
        )
    configs: list[Any] = [model.peft_config[name] for name in adapters]
    config: MaskConfig = copy.deepcopy(configs[0])
    config.inference_mode, config.save_scores = True, False
    config.batch_norm = "adapt" if any(other.batch_norm == "adapt" for other in configs) else "frozen"
    config.modules_to_save = list(dict.fromkeys(n for c in configs for n in c.modules_to_save or ())) or None
    model.peft_config[adapter_name] = config
    try:
        with whole_or_nothing(model.model, adapter_name):
            model.inject_adapter(model.model, adapter_name)
            for layer in layers:
                for slot in layer.smn_info[adapter_name].slots if adapter_name in layer.smn_info else ():
                    masks = [layer.mask(name, slot) for name in adapters]
                    layer.set_mask(adapter_name, slot, combine_masks(masks, weights, combination_type))
            for norm in (module for module in model.model.modules() if isinstance(module, BatchNorm)):
                norm.average(adapter_name, adapters, weights)
            for module in saved:
                for name in (name for name in adapters if name in module.modules_to_save):
                    source = module.modules_to_save[name].state_dict()
                    module.modules_to_save[adapter_name].load_state_dict(source)
    except Exception:
        del model.peft_config[adapter_name]
        raise
