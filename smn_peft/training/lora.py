# SPDX-License-Identifier: Apache-2.0
"""PEFT's LoRA as a baseline of masks: on the same layers, at the rank whose factors take the bytes of the mask."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import nn

from ..storage import WEIGHTS_NAME
from ..tuner import MaskConfig, explain_targets
from ..tuner.targets import resolve_targets

__all__ = ["lora_config", "lora_sizes", "matched_lora_rank"]

_FLOAT = 4


def lora_config(
    model: nn.Module,
    mask: MaskConfig,
    *,
    rank: int | None = None,
    alpha: float | None = None,
    modules_to_save: Sequence[str] | None = None,
) -> LoraConfig:
    """LoRA on the layers that a mask would take.

    Args:
        model: The base model.
        mask: Says which layers; the rest of it belongs to masks.
        rank: Rank of the factors; None: [`matched_lora_rank`].
        alpha: The update is scaled by alpha / rank; None: 2 · rank.
        modules_to_save: Modules trained in full, such as the head.

    Raises:
        ValueError: No rank fits, or nothing is targeted.
    """
    rank = matched_lora_rank(model, mask) if rank is None else rank
    return _config(model, mask, rank, 2 * rank if alpha is None else alpha, modules_to_save)


def matched_lora_rank(model: nn.Module, mask: MaskConfig) -> int:
    """The largest rank at which the fp32 factors take no more bytes than the bit-packed mask of the same layers.

    Args:
        model: The base model, untouched.
        mask: Says which layers.

    Raises:
        ValueError: If even rank 1 takes more, as on layers of few channels; both sizes are named.
    """
    available = explain_targets(model, mask, verbose=False).packed_bytes
    per_rank = _FLOAT * _factors(model, mask)
    if per_rank > available:
        raise ValueError(
            f"LoRA of rank 1 takes {per_rank:,} bytes, the mask of the same layers {available:,}: no rank matches it. "
            "Give one, as in lora_rank=1."
        )
    return available // per_rank


def _factors(model: nn.Module, mask: MaskConfig) -> int:
    """Number of values in the factors per rank, counted on a copy of the model without its data."""
    empty = copy.deepcopy(model).to("meta")
    adapted = get_peft_model(empty, _config(empty, mask, 1, 1, None), low_cpu_mem_usage=True)
    return sum(parameter.numel() for name, parameter in adapted.named_parameters() if ".lora_" in name)


def _config(
    model: nn.Module, mask: MaskConfig, rank: int, alpha: float, modules_to_save: Sequence[str] | None
) -> LoraConfig:
    where: dict[str, Any] = {
        "layers_to_transform": mask.layers_to_transform,
        "layers_pattern": mask.layers_pattern,
    }
    targets = resolve_targets(model, mask.target_modules, **where)
    if targets is not mask.target_modules:  # the layers are in the names
        where = {}
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT divides it by the rank, whatever number it is
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=mask.exclude_modules,
        modules_to_save=None if modules_to_save is None else list(modules_to_save),
        **where,
    )


def lora_sizes(folder: str | Path) -> dict[str, int]:
    """Bytes of a saved LoRA adapter: its factors, the head and what else was saved in full, and the whole file."""
    path = Path(folder) / WEIGHTS_NAME
    sums = {"factors": 0, "head": 0}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():
            tensor = file.get_tensor(name)
            sums["factors" if ".lora_" in name else "head"] += tensor.numel() * tensor.element_size()
    return {**sums, "total": path.stat().st_size}
