# SPDX-License-Identifier: Apache-2.0
"""Gradient checkpointing in the words of transformers or timm, whichever the model speaks."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["enable_gradient_checkpointing"]


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
