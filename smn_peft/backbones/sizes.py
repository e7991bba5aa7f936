# SPDX-License-Identifier: Apache-2.0
"""`accept_size`: images of another size beside a model's own, such as SwAV's small crops."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn

from .backbone import Backbone, pooled_features

__all__ = ["accept_size", "interpolate_positions"]

_INTERPOLATE = "interpolate_pos_encoding"


@torch.no_grad()
def accept_size(backbone: Backbone, size: int) -> None:
    """Let a model take images of `size` too; weights, names and what it gives for its own size stay as they are.

    ViTs of timm and transformers resample their position embeddings for every other size; convolutional networks take
    any.

    Args:
        backbone: Its model is changed in place.
        size: Pixels of a side.

    Raises:
        ValueError: If the model takes its own size only.
    """
    model = backbone.model
    interpolate_positions(model)
    for module in model.modules():
        _make_dynamic(module)
    parameter = next(model.parameters())
    pixel_values = torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype)
    training = model.training
    try:
        pooled_features(model.eval(), pixel_values)
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(
            f"{backbone.name} takes images of {backbone.image_size} pixels, and none of {size} beside them: {reason}"
        ) from error
    finally:
        model.train(training)


def interpolate_positions(model: nn.Module) -> None:
    """Make every forward of a transformers model resample the position embeddings, whoever calls it."""
    for module in model.modules():
        parameters = list(inspect.signature(module.forward).parameters)
        if _INTERPOLATE in parameters:
            hook = functools.partial(_interpolate, index=parameters.index(_INTERPOLATE))
            module.register_forward_pre_hook(hook, with_kwargs=True)


def _interpolate(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, index: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if index < len(args):
        return (*args[:index], True, *args[index + 1 :]), kwargs
    return args, {**kwargs, _INTERPOLATE: True}


def _make_dynamic(module: Any) -> None:
    """What timm's ViTs do when they are made with ``dynamic_img_size=True``, of which no weight depends."""
    patches: Any = getattr(module, "patch_embed", None)
    if getattr(module, "dynamic_img_size", None) is not False or not hasattr(module, "pos_embed"):
        return
    if getattr(patches, "strict_img_size", False):
        module.dynamic_img_size, patches.strict_img_size, patches.flatten = True, False, False
        patches.output_fmt = type(patches.output_fmt)("NHWC")
