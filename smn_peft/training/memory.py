# SPDX-License-Identifier: Apache-2.0
"""Activations that are computed again, and batches with channels last: what costs less memory, or less of its time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["channels_last", "enable_gradient_checkpointing"]


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Have the model recompute its activations in backward.

    Raises:
        ValueError: If no part of the model knows how.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "set_grad_checkpointing"):  # timm
            module.set_grad_checkpointing(True)
            return
        if getattr(module, "supports_gradient_checkpointing", False):  # transformers
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            return
    raise ValueError(
        f"{type(model).__name__} has no gradient checkpointing that timm or transformers know: leave "
        "gradient_checkpointing off, or split the batch with accumulate."
    )


def channels_last(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch whose images, one or several views, have channels last in memory."""

    def convert(value: Any) -> Any:
        if isinstance(value, list):
            return [convert(item) for item in value]
        four = isinstance(value, Tensor) and value.ndim == 4
        return value.to(memory_format=torch.channels_last) if four else value

    return {key: convert(value) for key, value in batch.items()}
