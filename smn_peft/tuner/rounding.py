# SPDX-License-Identifier: Apache-2.0
"""What an adapter has beside its mask, rounded in the live model as its file will round it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..storage import rounded
from .batch_norm import BatchNorm
from .config import MaskConfig

__all__ = ["round_extras", "widened"]


@torch.no_grad()
def round_extras(model: PeftModel, adapter_name: str = "default") -> int:
    """Round an adapter's head and BatchNorm statistics to the `save_dtype` of its config, in place.

    The tensors keep their dtype and hold values that the file holds exactly: evaluate after this call, and what is
    measured is what is saved. With ``save_dtype="float32"`` nothing is done.

    Args:
        model: A model with mask adapters.
        adapter_name: Name of the adapter.

    Returns:
        The number of values that changed.

    Raises:
        ValueError: If a value is beyond what the dtype can hold.
    """
    config: MaskConfig = model.peft_config[adapter_name]  # type: ignore[assignment]
    changed = 0
    for name, tensor in _extras(model, adapter_name):
        narrow = rounded(name, tensor, config.save_dtype)
        if narrow is not tensor:
            changed += int((narrow.to(tensor.dtype) != tensor).sum())
            tensor.copy_(narrow)
    return changed


def _extras(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Tensor]]:
    for path, module in model.named_modules():
        if isinstance(module, BatchNorm):
            for name in ("running_mean", "running_var"):
                if adapter_name in module.statistics(name):
                    yield f"{path}.{name}", module.statistics(name)[adapter_name]
        elif isinstance(module, AuxiliaryTrainingWrapper):
            part = f".modules_to_save.{adapter_name}."
            for key, tensor in (*module.named_parameters(prefix=path), *module.named_buffers(prefix=path)):
                if part in key:
                    yield key, tensor


def widened(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float tensors from a file in the dtype of the model's own, for loaders that put them in its place."""
    own = dict((*model.named_parameters(), *model.named_buffers()))
    return {
        key: value.to(own[key].dtype)
        if key in own and value.is_floating_point() and own[key].is_floating_point()
        else value
        for key, value in state_dict.items()
    }
