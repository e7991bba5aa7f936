# SPDX-License-Identifier: Apache-2.0
"""Image transforms: uint8 RGB in, normalised fp32 out; supervised, multi-crop and evaluation.

``transform(image, generator)`` draws only from that generator, so that a sample can be repeated exactly.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from ..tuner.config import check_preprocessing
from .augmentation import AugmentationOptions, Draws, MultiCropOptions, SupervisedOptions, augmented_crop, to_float

__all__ = [
    "ForeignTransform",
    "ImageTransform",
    "check_preprocessing",
    "evaluation_transform",
    "multi_crop_transform",
    "preprocessing_transform",
    "supervised_transform",
]

Triple = tuple[float, ...]


class Normalise:
    """uint8 (3, height, width) in any memory order, or fp32 in [0, 1], to contiguous fp32 (pixel - mean) / std."""

    def __init__(self, mean: Triple, std: Triple) -> None:
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean and std need three numbers each, std above 0; got {tuple(mean)} and {tuple(std)}.")
        self._mean = torch.tensor(mean).view(3, 1, 1)
        self._inverse = 1 / torch.tensor(std).view(3, 1, 1)

    def __call__(self, image: Tensor) -> Tensor:
        """Normalise one image, in place if it is fp32."""
        pixels = to_float(image) if image.dtype == torch.uint8 else image
        return pixels.sub_(self._mean).mul_(self._inverse)


class ImageTransform(Protocol):
    """An image (3, height, width) uint8 to one tensor or a list of crops; no generator means torch's global one."""

    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor | list[Tensor]:
        """Transform one image."""


def supervised_transform(
    image_size: int, mean: Triple, std: Triple, options: SupervisedOptions | None = None, **changes: Any
) -> ImageTransform:
    """Augment as the paper does for training with labels: crop, flip, colour jitter, grayscale, solarize.

    Args:
        image_size: Pixels of a side of the result.
        mean: The base model's, per channel.
        std: The base model's, per channel.
        options: Strengths; the paper's by default.
        changes: Fields of the options that differ.
    """
    options = replace(options or SupervisedOptions(), **changes)
    crops, normalise = [(image_size, options.scale)], Normalise(mean, std)
    return functools.partial(_random_crops, crops=crops, normalise=normalise, options=options, single=True)


def multi_crop_transform(
    mean: Triple, std: Triple, options: MultiCropOptions | None = None, **changes: Any
) -> ImageTransform:
    """Augment as SwAV does for training without labels: a list of independent crops, global ones first.

    The arguments are those of [`supervised_transform`]; the options hold the sizes too.
    """
    options = replace(options or MultiCropOptions(), **changes)
    crops = [(options.global_size, options.global_scale)] * options.global_crops
    crops += [(options.local_size, options.local_scale)] * options.local_crops
    return functools.partial(_random_crops, crops=crops, normalise=Normalise(mean, std), options=options)


def _random_crops(
    image: Tensor,
    generator: torch.Generator | None = None,
    *,
    crops: Sequence[tuple[int, tuple[float, float]]],
    normalise: Normalise,
    options: AugmentationOptions,
    single: bool = False,
) -> Tensor | list[Tensor]:
    """Crops of (size, part of the area) each; one comes as a tensor if `single`."""
    draws = Draws(generator)
    made = [normalise(augmented_crop(image, size, scale, options, draws)) for size, scale in crops]
    return made[0] if single else made


def evaluation_transform(
    image_size: int,
    mean: Triple,
    std: Triple,
    *,
    crop_fraction: float = 1.0,
    interpolation: Literal["bicubic", "bilinear"] = "bicubic",
) -> ImageTransform:
    """Resize the shorter side, crop the centre and normalise, as timm and CLIP do, without PIL.

    Args:
        image_size: Pixels of a side of the result.
        mean: Per channel.
        std: Per channel.
        crop_fraction: Part of the resized shorter side that is kept (timm's `crop_pct`), in (0, 1].
        interpolation: How to resize, always antialiased.
    """
    if not 0 < crop_fraction <= 1:
        raise ValueError(f"crop_fraction must lie in (0, 1]; got {crop_fraction}.")
    return functools.partial(
        _evaluation_crop,
        size=image_size,
        resized=int(image_size / crop_fraction),
        interpolation=InterpolationMode(interpolation),
        normalise=Normalise(mean, std),
    )


def _evaluation_crop(
    image: Tensor,
    generator: torch.Generator | None = None,
    *,
    size: int,
    resized: int,
    interpolation: InterpolationMode,
    normalise: Normalise,
) -> Tensor:
    if min(image.shape[-2:]) != resized:
        image = F.resize(image, [resized], interpolation=interpolation, antialias=True)
    return normalise(F.center_crop(image, [size, size]))


def preprocessing_transform(preprocessing: Mapping[str, Any]) -> ImageTransform:
    """Make the evaluation transform of `Backbone.preprocessing` or an adapter's; see [`check_preprocessing`]."""
    known = check_preprocessing(preprocessing)
    return evaluation_transform(
        known["image_size"],
        tuple(known["mean"]),
        tuple(known["std"]),
        crop_fraction=known["crop_pct"],
        interpolation=known["interpolation"],
    )


class ForeignTransform:
    """Any random transform of tensors, such as one of torchvision's (`v2.ToPILImage` first if it takes PIL images).

    The global generators of torch, NumPy and Python are seeded from the sample's for the call and restored after it.
    """

    def __init__(self, transform: Callable[[Tensor], Tensor | list[Tensor]]) -> None:
        self._transform = transform

    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor | list[Tensor]:
        """Transform one image."""
        if generator is None:
            return self._transform(image)
        seed = int(torch.randint(2**31, (), generator=generator))
        states = torch.default_generator.get_state(), np.random.get_state(), random.getstate()
        try:
            torch.default_generator.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            return self._transform(image)
        finally:
            torch.default_generator.set_state(states[0])
            np.random.set_state(states[1])
            random.setstate(states[2])
