# SPDX-License-Identifier: Apache-2.0
"""Image transforms: uint8 RGB in, normalised fp32 out; supervised, multi-crop and evaluation.

Every transform is called as ``transform(image, generator)`` and draws only from that generator, so that a sample can
be repeated exactly; without one it draws from torch's global generator.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from ..tuner.config import check_preprocessing
from .augmentation import Draws, Normalise, augmented_crop, to_float
from .options import MultiCropOptions, SupervisedOptions

__all__ = [
    "ForeignTransform",
    "ImageTransform",
    "PilTransform",
    "check_preprocessing",
    "evaluation_transform",
    "multi_crop_transform",
    "preprocessing_transform",
    "supervised_transform",
]

Triple = tuple[float, ...]


class ImageTransform(Protocol):
    """An image (3, height, width) uint8 to one tensor, or to a list of crops."""

    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor | list[Tensor]:
        """Transform one image."""


def supervised_transform(
    image_size: int, mean: Triple, std: Triple, options: SupervisedOptions | None = None, **changes: Any
) -> ImageTransform:
    """The paper's augmentation for training with labels.

    Random resized crop (the whole area, bicubic), flip, colour jitter, grayscale, solarize.

    Args:
        image_size: Pixels of a side of the result.
        mean: The base model's mean per channel.
        std: The base model's standard deviation per channel.
        options: Strengths; the paper's by default.
        changes: Fields of `SupervisedOptions` that differ.
    """
    return _Supervised(image_size, Normalise(mean, std), replace(options or SupervisedOptions(), **changes))


def multi_crop_transform(
    mean: Triple, std: Triple, options: MultiCropOptions | None = None, **changes: Any
) -> ImageTransform:
    """SwAV's multi-crop for training without labels: a list of crops, global ones first.

    Each is cropped, flipped, jittered, made grey and blurred on its own.

    Args:
        mean: The base model's mean per channel.
        std: The base model's standard deviation per channel.
        options: Sizes, numbers and strengths; the paper's by default.
        changes: Fields of `MultiCropOptions` that differ, such as ``local_crops=0``.
    """
    return _MultiCrop(Normalise(mean, std), replace(options or MultiCropOptions(), **changes))


def evaluation_transform(
    image_size: int,
    mean: Triple,
    std: Triple,
    *,
    crop_fraction: float = 1.0,
    interpolation: Literal["bicubic", "bilinear"] = "bicubic",
) -> ImageTransform:
    """The shorter side resized, the centre cropped, normalised: what timm and CLIP do, without the way through PIL.

    Args:
        image_size: Pixels of a side of the result.
        mean: The base model's mean per channel.
        std: The base model's standard deviation per channel.
        crop_fraction: Part of the resized shorter side that is kept (timm's `crop_pct`).
        interpolation: How to resize, always antialiased.

    Raises:
        ValueError: A fraction outside (0, 1].
    """
    if not 0 < crop_fraction <= 1:
        raise ValueError(f"crop_fraction must lie in (0, 1]; got {crop_fraction}.")
    return _Evaluation(
        image_size, int(image_size / crop_fraction), InterpolationMode(interpolation), Normalise(mean, std)
    )


def preprocessing_transform(preprocessing: Mapping[str, Any]) -> ImageTransform:
    """The evaluation transform that `Backbone.preprocessing`, or an adapter's config, describes.

    Args:
        preprocessing: See [`check_preprocessing`].

    Returns:
        (3, height, width) uint8 -> (3, image_size, image_size) fp32.

    Raises:
        ValueError: A value is missing or unusable; it is named.
    """
    known = check_preprocessing(preprocessing)
    return evaluation_transform(
        known["image_size"],
        tuple(known["mean"]),
        tuple(known["std"]),
        crop_fraction=known["crop_pct"],
        interpolation=known["interpolation"],
    )


class PilTransform:
    """A transform of PIL images, such as a backbone's own, for the tensors of an `ImageDataset`."""

    def __init__(self, transform: Callable[[Any], Tensor]) -> None:
        self._transform = transform

    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Transform one image; nothing is drawn."""
        return self._transform(F.to_pil_image(image))


class ForeignTransform:
    """Any random transform of tensors, such as one of torchvision's, that draws from the global generators.

    Those of torch, numpy and Python are seeded from the sample's generator for the call and put back after it.
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


class _Supervised:
    def __init__(self, size: int, normalise: Normalise, options: SupervisedOptions) -> None:
        self._size, self._normalise, self.options = size, normalise, options

    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        crop = augmented_crop(image, self._size, self.options.scale, self.options, Draws(generator))
        return self._normalise(crop)


class _MultiCrop:
    def __init__(self, normalise: Normalise, options: MultiCropOptions) -> None:
        self._normalise, self.options = normalise, options

    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
        options, draws = self.options, Draws(generator)
        kinds = [(options.global_size, options.global_scale)] * options.global_crops
        kinds += [(options.local_size, options.local_scale)] * options.local_crops
        return [self._normalise(augmented_crop(image, size, scale, options, draws)) for size, scale in kinds]


class _Evaluation:
    def __init__(self, size: int, resized: int, interpolation: InterpolationMode, normalise: Normalise) -> None:
        self._size, self._resized = size, resized
        self._interpolation, self._normalise = interpolation, normalise

    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if min(image.shape[-2:]) != self._resized:
            image = F.resize(image, [self._resized], interpolation=self._interpolation, antialias=True)
        return self._normalise(to_float(F.center_crop(image, [self._size, self._size])))
