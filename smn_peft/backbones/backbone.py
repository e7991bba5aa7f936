# SPDX-License-Identifier: Apache-2.0
"""`Backbone`: a feature extractor together with what it needs to know about images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Backbone", "EvalTransform", "pooled_features"]


@dataclass(frozen=True)
class EvalTransform:
    """Image -> (3, height, width), after conversion to RGB.

    Attributes:
        transform: What the model's own library does with an RGB image.
    """

    transform: Callable[[Any], Tensor]

    def __call__(self, image: Any) -> Tensor:
        """Transform one PIL image."""
        return self.transform(image.convert("RGB") if hasattr(image, "convert") else image)


@dataclass(frozen=True, eq=False)
class Backbone:
    """A vision model without classifier, and how images become its input.

    Attributes:
        model: The model in eval mode; timm's models come as transformers' `TimmWrapperModel`.
        transform: Evaluation transform of the model's own config, PIL image -> (3, image_size, image_size).
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
        return {
            "image_size": self.image_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
        }

    def prepared_as(self, preprocessing: Mapping[str, Any]) -> Backbone:
        """The same model for images prepared in another way, as an adapter's config says; `transform` stays its own.

        Args:
            preprocessing: As [`Backbone.preprocessing`]; what it lacks stays as it is. A model that takes one size
                only has to be loaded at that size.
        """
        known = {name: preprocessing[name] for name in self.preprocessing if name in preprocessing}
        known |= {name: tuple(known[name]) for name in ("mean", "std") if name in known}
        return replace(self, **known)

    def features(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """Pooled features of a batch, (batch, 3, height, width) -> (batch, feature_dim).

        Adapters that `get_peft_model` has put into `model` take part.
        """
        return pooled_features(self.model, pixel_values, **kwargs)


def pooled_features(model: nn.Module, pixel_values: Tensor, **kwargs: Any) -> Tensor:
    """Features before any head, (batch, 3, height, width) -> (batch, dim).

    That is the projected embedding where the model has a projection, else the pooled output, else the class token,
    else the mean over positions. A pooler with a Linear and tanh (ViT, DeiT) is passed over: most checkpoints hold no
    weights for it.

    Args:
        model: A vision model of transformers or timm, or any that returns a tensor; possibly inside a `PeftModel`.
        pixel_values: Normalised images.
        kwargs: Passed to the model, such as `adapter_names`.
    """
    unwrap: Any = getattr(model, "get_base_model", lambda: model)
    base: Any = unwrap()
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
    if hidden.ndim == 3 and getattr(getattr(base, "embeddings", None), "cls_token", None) is not None:
        return hidden[:, 0]
    return _over_positions(hidden)


@contextmanager
def _peft_forward(model: Any, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What `PeftModel.forward` does around the base's: `adapter_names` goes to the layers, not to the base."""
    special = getattr(model, "special_peft_forward_args", None)
    if special is None:
        yield kwargs
        return
    with model._enable_peft_forward_hooks(**kwargs):
        yield {name: value for name, value in kwargs.items() if name not in special}


def _over_positions(hidden: Tensor) -> Tensor:
    """Mean over tokens (batch, tokens, dim) or over pixels (batch, dim, height, width)."""
    if hidden.ndim == 3:
        return hidden.mean(dim=1)
    return hidden.flatten(2).mean(dim=2) if hidden.ndim > 3 else hidden
