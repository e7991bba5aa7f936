# SPDX-License-Identifier: Apache-2.0
"""Steps of a random transform: where to crop, the resized crop, colours and blur, all drawn from one generator."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from .options import AugmentationOptions
from .pixel_ops import blur, brightness_, contrast_, grayscale_, hue, saturation_, solarize_

__all__ = ["Draws", "Normalise", "augmented_crop", "crop_box", "to_float"]


class Draws:
    """Uniform random numbers from a generator, many at a time: a call of torch costs as much as a small image."""

    def __init__(self, generator: torch.Generator | None) -> None:
        self._generator = generator
        self._ready: list[float] = []

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number in [low, high)."""
        if not self._ready:
            self._ready = torch.rand(32, generator=self._generator, dtype=torch.float64).tolist()
        return low + (high - low) * self._ready.pop()

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.uniform() < probability

    def below(self, number: int) -> int:
        """An integer in [0, number)."""
        return int(self.uniform(0, number))


class Normalise:
    """uint8 or fp32 pixels to (pixel - mean) / std.

    Args:
        mean: Per channel, of pixels in [0, 1].
        std: Per channel.

    Raises:
        ValueError: Not three numbers each, or a deviation that is not positive.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean and std need three numbers each, std above 0; got {tuple(mean)} and {tuple(std)}.")
        self._mean = torch.tensor(mean).view(3, 1, 1)
        self._inverse = 1 / torch.tensor(std).view(3, 1, 1)

    def __call__(self, image: Tensor) -> Tensor:
        """Normalise (3, height, width) fp32 in [0, 1], in place."""
        return image.sub_(self._mean).mul_(self._inverse)


def to_float(image: Tensor) -> Tensor:
    """uint8 in any memory order to contiguous fp32 in [0, 1]."""
    return image.to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / 255)


def crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], draws: Draws
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop, as torchvision's RandomResizedCrop draws it.

    Ten tries with a uniform area and a log-uniform aspect ratio; if none fits, the largest centred crop whose ratio is
    within the bounds.
    """
    for _ in range(10):
        area = height * width * draws.uniform(*scale)
        aspect = math.exp(draws.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return draws.below(height - h + 1), draws.below(width - w + 1), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def augmented_crop(
    image: Tensor, size: int, scale: tuple[float, float], options: AugmentationOptions, draws: Draws
) -> Tensor:
    """One random crop of an image (3, height, width) uint8, as (3, size, size) fp32 in [0, 1].

    The crop is resized (bicubic, antialiased) in uint8, for which torch has a fast kernel; everything after that is
    done on the small crop, in place in fp32, which is faster than uint8 and does not round in between.
    """
    top, left, height, width = crop_box(image.shape[-2], image.shape[-1], scale, options.aspect_ratio, draws)
    crop = image[:, top : top + height, left : left + width]
    if (height, width) != (size, size):
        crop = F.resize(crop, [size, size], interpolation=InterpolationMode.BICUBIC, antialias=True)
    if draws.chance(options.flip):
        crop = crop.flip(-1)
    pixels = to_float(crop)
    if draws.chance(options.jitter_probability):
        pixels = _jitter(pixels, options.jitter, draws)
    if draws.chance(options.grayscale):
        pixels = grayscale_(pixels)
    if draws.chance(options.blur):
        # SwAV's kernel: a tenth of the side, odd (23 of 224).
        pixels = blur(pixels, max(3, int(0.1 * size) | 1), draws.uniform(*options.blur_sigma))
    if draws.chance(options.solarize):
        pixels = solarize_(pixels)
    return pixels


def _jitter(image: Tensor, strength: tuple[float, float, float, float], draws: Draws) -> Tensor:
    """Brightness, contrast, saturation and hue in random order, as torchvision's ColorJitter."""
    left = [0, 1, 2, 3]
    while left:
        part = left.pop(draws.below(len(left)))
        amount = strength[part]
        if amount == 0:
            continue
        if part == 3:
            image = hue(image, draws.uniform(-amount, amount))
        else:
            factor = draws.uniform(max(0.0, 1 - amount), 1 + amount)
            image = (brightness_, contrast_, saturation_)[part](image, factor)
    return image
