# SPDX-License-Identifier: Apache-2.0
"""`Backbone`: a feature extractor with its image settings; `accept_size` for images of another size beside its own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Backbone", "EvalTransform", "accept_size", "check_loading", "interpolate_positions", "pooled_features"]

_INTERPOLATE = "interpolate_pos_encoding"


@dataclass(frozen=True)
class EvalTransform:
    """A library's own transform of RGB images, for PIL images of any colours."""

    transform: Callable[[Any], Tensor]

    def __call__(self, image: Any) -> Tensor:
        """Transform one PIL image to (3, height, width)."""
        return self.transform(image.convert("RGB") if hasattr(image, "convert") else image)


@dataclass(frozen=True, eq=False)
class Backbone:
    """A vision model without classifier, and how images become its input.

    Attributes:
        model: The model in eval mode; timm's models come as transformers' `TimmWrapperModel`.
        transform: The library's own evaluation transform, PIL image -> (3, image_size, image_size).
        feature_dim: Size of the features.
        name: The id for `base_model_name_or_path`.
        image_size: Side of the square input in pixels.
        mean: Mean per channel that the transform subtracts, of images in [0, 1].
        std: Standard deviation per channel that it divides by.
        interpolation: How this package resizes images to train and evaluate, whatever `transform` does.
        crop_pct: Part of the resized shorter side that it keeps.
    """

    model: nn.Module
    transform: Callable[[Any], Tensor]
    feature_dim: int
    name: str
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How images are prepared, JSON-compatible: image_size, mean, std, interpolation, crop_pct."""
        found = {name: getattr(self, name) for name in ("image_size", "mean", "std", "interpolation", "crop_pct")}
        return {**found, "mean": list(self.mean), "std": list(self.std)}

    def prepared_as(self, preprocessing: Mapping[str, Any]) -> Backbone:
        """Copy with the image settings of an adapter's config, as far as it has some; `transform` stays the same."""
        known = {name: preprocessing[name] for name in self.preprocessing if name in preprocessing}
        known |= {name: tuple(known[name]) for name in ("mean", "std") if name in known}
        return replace(self, **known)

    def features(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """Pooled features of a batch, (batch, 3, height, width) -> (batch, feature_dim); see [`pooled_features`]."""
        return pooled_features(self.model, pixel_values, **kwargs)


def pooled_features(model: nn.Module, pixel_values: Tensor, **kwargs: Any) -> Tensor:
    """Compute the features before any head, (batch, 3, height, width) -> (batch, dim).

    That is the projected embedding where the model has a projection, else the pooled output, else the class token,
    else the mean over positions. A pooler with a Linear and tanh (ViT, DeiT) is ignored: most checkpoints hold no
    weights for it.

    Args:
        model: A vision model of transformers or timm, or any that returns a tensor; possibly inside a `PeftModel`.
        pixel_values: Normalised images.
        kwargs: Passed to the model, such as `adapter_names`.
    """
    base: Any = getattr(model, "get_base_model", lambda: model)()
    dtype = next((parameter.dtype for parameter in base.parameters() if parameter.is_floating_point()), torch.float32)
    pixel_values = pixel_values.to(dtype)
    if hasattr(base, "forward_features") and hasattr(base, "forward_head"):
        with _peft_forward(model, kwargs) as passed:
            features: Tensor = base.forward_head(base.forward_features(pixel_values, **passed), pre_logits=True)
        return features.flatten(1)
    output = model(pixel_values, **kwargs)
    if isinstance(output, Tensor):
        return _over_positions(output)
    if getattr(output, "image_embeds", None) is not None:
        return output.image_embeds
    pooled = getattr(output, "pooler_output", None)
    if pooled is not None and not hasattr(getattr(base, "pooler", None), "dense"):
        return pooled.flatten(1)
    hidden: Tensor = output.last_hidden_state
    has_class = hidden.ndim == 3 and getattr(getattr(base, "embeddings", None), "cls_token", None) is not None
    return hidden[:, 0] if has_class else _over_positions(hidden)


@contextmanager
def _peft_forward(model: Any, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Pass `adapter_names` to the layers and not to the base, as `PeftModel.forward` does."""
    special = getattr(model, "special_peft_forward_args", None)
    if special is None:
        yield kwargs
        return
    with model._enable_peft_forward_hooks(**kwargs):
        yield {name: value for name, value in kwargs.items() if name not in special}


def _over_positions(hidden: Tensor) -> Tensor:
    """Mean over tokens (batch, tokens, dim) or over pixels (batch, dim, height, width)."""
    return hidden.mean(dim=1) if hidden.ndim == 3 else hidden.flatten(2).mean(dim=2) if hidden.ndim > 3 else hidden


def check_loading(info: Mapping[str, Any], source: str) -> None:
    """Refuse a checkpoint (`ValueError`) that leaves weights of the model random."""
    missing, mismatched = sorted(info["missing_keys"]), sorted(map(str, info["mismatched_keys"]))
    if missing or mismatched:
        kinds = {"missing": missing, "of another shape": mismatched, "not used": sorted(info["unexpected_keys"])}
        parts = [f"{len(keys)} {what} ({', '.join(keys[:3])})" for what, keys in kinds.items() if keys]
        raise ValueError(f"The weights of {source} do not fit its config: {'; '.join(parts)}.")


def completed(backbone: Backbone, name: str, what: str) -> Backbone:
    """The backbone under its name, in eval mode, with the size of its features, which one black image shows."""
    size = backbone.image_size
    features = probe_features(backbone.model.eval(), size, f"{what} does not take images of {size} pixels")
    if features.ndim != 2:
        raise ValueError(f"{what} must give features (batch, dim); got {tuple(features.shape)}.")
    return replace(backbone, name=name, feature_dim=features.shape[1])


@torch.no_grad()
def probe_features(model: nn.Module, size: int, what: str) -> Tensor:
    """Features of one black image, in eval mode; any error becomes a `ValueError` that starts with `what`."""
    parameter = next(model.parameters(), torch.zeros(()))
    pixel_values = torch.zeros(1, 3, size, size, device=parameter.device)
    training = model.training
    try:
        return pooled_features(model.eval(), pixel_values)
    except Exception as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(f"{what}: {reason}") from error
    finally:
        model.train(training)


def accept_size(backbone: Backbone, size: int) -> None:
    """Let a model take images of `size` pixels a side too; weights and features at its own size do not change.

    ViTs of timm and transformers resample their position embeddings; convolutional networks take any size.

    Raises:
        ValueError: If the model takes its own size only.
    """
    interpolate_positions(backbone.model)
    for module in backbone.model.modules():
        vit: Any = module
        patches: Any = getattr(vit, "patch_embed", None)
        is_fixed = getattr(patches, "strict_img_size", False) and getattr(vit, "dynamic_img_size", True) is False
        if is_fixed and hasattr(vit, "pos_embed"):  # what ``dynamic_img_size=True`` sets when timm makes a ViT
            vit.dynamic_img_size, patches.strict_img_size, patches.flatten = True, False, False
            patches.output_fmt = type(patches.output_fmt)("NHWC")
    what = f"{backbone.name} takes images of {backbone.image_size} pixels, and none of {size} beside them"
    probe_features(backbone.model, size, what)


def interpolate_positions(model: nn.Module) -> None:
    """Make every forward of a transformers model resample the position embeddings, whoever calls it."""
    for module in model.modules():
        parameters = list(inspect.signature(module.forward).parameters)
        if _INTERPOLATE in parameters:
            hook = functools.partial(_interpolate, index=parameters.index(_INTERPOLATE))
            module.register_forward_pre_hook(hook, with_kwargs=True)


def _interpolate(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, index: int) -> tuple[Any, Any]:
    if index < len(args):
        return (*args[:index], True, *args[index + 1 :]), kwargs
    return args, {**kwargs, _INTERPOLATE: True}
