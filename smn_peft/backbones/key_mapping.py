# SPDX-License-Identifier: Apache-2.0
"""Carry a CLIP adapter between the vision tower alone and the whole model, and between versions of transformers."""

from __future__ import annotations

from torch import nn

__all__ = ["clip_key_mapping"]


def clip_key_mapping(model: nn.Module) -> dict[str, str]:
    """`key_mapping` for `PeftModel.from_pretrained`, so that an adapter of any CLIP vision class loads on `model`.

    `CLIPVisionModel` has its encoder at ``encoder`` in transformers 5 and at ``vision_model.encoder`` in transformers
    4 and in `CLIPModel`.

    Args:
        model: The base model that the adapter is to be loaded on.

    Returns:
        Regex by replacement, for keys without PEFT's ``base_model.model.`` prefix.
    """
    if any(name == "vision_model.encoder" for name, _ in model.named_modules()):
        return {r"^(?:vision_model\.)?encoder\.": "vision_model.encoder."}
    return {r"^(?:vision_model\.)?encoder\.": "encoder."}
