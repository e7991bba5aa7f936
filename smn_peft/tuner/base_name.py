# SPDX-License-Identifier: Apache-2.0
"""The id of a base model, for `base_model_name_or_path`, which PEFT leaves empty for raw timm models."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["base_name"]


def base_name(model: nn.Module) -> str | None:
    """The name under which the model's weights can be found again.

    Args:
        model: A transformers model (its `name_or_path`) or the result of `timm.create_model` (its
            `pretrained_cfg`, which names the weights of that architecture even where they were not loaded:
            the fingerprint in the adapter's config is what tells them apart).

    Returns:
        A Hub id ("timm/resnet50.a1_in1k"), a path, a timm name ("resnet50.a1_in1k"), or None if nothing is known.
    """
    path = getattr(model, "name_or_path", None)
    if isinstance(path, str) and path:
        return path
    config: Any = getattr(model, "pretrained_cfg", None)
    if config is None:
        return None
    hub_id, architecture, tag = (_entry(config, key) for key in ("hf_hub_id", "architecture", "tag"))
    if hub_id:
        return hub_id
    return f"{architecture}.{tag}" if architecture and tag else architecture


def _entry(config: Any, key: str) -> str | None:
    value = config.get(key) if isinstance(config, dict) else getattr(config, key, None)
    return value if isinstance(value, str) and value else None
