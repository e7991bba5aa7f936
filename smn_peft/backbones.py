# SPDX-License-Identifier: Apache-2.0
"""Load a pretrained vision model with its own image transform, by name: transformers, timm, a folder or a file."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .image_transforms import ProcessorTransform, timm_transform
from .tuner.base_name import base_name

__all__ = ["Backbone", "base_name", "load_backbone", "pooled_features"]

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_CONVERT = (
    "Weights are read from safetensors only, because a pickle runs code. Convert the file once, where you trust it: "
    "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')."
)


@dataclass(frozen=True, eq=False)
class Backbone:
    """A feature extractor and what it needs to know about images.

    Attributes:
        model: The model without classifier, in eval mode: a transformers model (timm's come as `TimmWrapperModel`).
        transform: Evaluation transform of the model's own config, PIL image -> (3, height, width).
        feature_dim: Size of the features.
        name: The id for `base_model_name_or_path`.
        image_size: Side of the square input in pixels.
        mean: Mean per channel of the normalisation, for images in [0, 1].
        std: Standard deviation per channel.
    """

    model: nn.Module
    transform: Callable[[Any], Tensor]
    feature_dim: int
    name: str
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def features(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """Pooled features of a batch: (batch, 3, height, width) -> (batch, feature_dim).

        Adapters that `get_peft_model` put into `model` act here too; for another model of the same kind there is
        [`pooled_features`].
        """
        return pooled_features(self.model, pixel_values, **kwargs)


def load_backbone(
    name: str | os.PathLike[str],
    *,
    pretrained: bool = True,
    image_size: int | None = None,
    state_dict: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    projection: bool = False,
    **kwargs: Any,
) -> Backbone:
    """Load a backbone.

    Args:
        name: A transformers id ("openai/clip-vit-base-patch32": the vision tower; "google/vit-base-patch16-224"), a
            timm id ("timm/resnet50.a1_in1k", "resnet50", "hf-hub:timm/resnet50.a1_in1k"), or a folder written by
            `save_pretrained`.
        pretrained: False gives random weights; the model then has no `name_or_path`, as no one could load it again.
        image_size: Another input size than the model's own. timm's position embeddings are resampled while loading,
            those of transformers in every forward.
        state_dict: Weights for the timm architecture `name`: a safetensors file or tensors by name. fp16 is cast to
            fp32, the classifier is dropped, every other key must fit.
        dtype: Type of the weights; default fp32.
        revision: Git revision on the Hub.
        projection: Take CLIP's vision tower with its projection into the space shared with text (zero-shot use).
        kwargs: For timm arguments of `create_model`, for transformers of `from_pretrained`.

    Raises:
        ValueError: Unknown name, pickled weights, or weights that do not fit; the message names the fix.
        OSError: The Hub cannot be reached and the files are not in the cache.
    """
    from . import _loading

    name = os.fspath(name)
    if name.endswith((*_PICKLES, ".safetensors")):
        raise ValueError(
            f"{name} is a weights file, whose architecture is unknown: call load_backbone('<timm architecture>', "
            f"state_dict='{Path(name).with_suffix('.safetensors')}')."
            + (f" {_CONVERT}" if name.endswith(_PICKLES) else "")
        )
    raise NotImplementedError(_loading)
