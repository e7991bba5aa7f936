# SPDX-License-Identifier: Apache-2.0
"""Random crops with colour jitter, blur and solarizing: their options, whose defaults are the paper's, and the steps.

Everything is drawn from one generator. Hue and blur are torchvision's but faster: its own, which does not separate
the kernel, take 2.5 and 74 ms of one core at 224 pixels, these about 1 ms each.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from .._options import check_options, option

__all__ = ["AugmentationOptions", "Draws", "MultiCropOptions", "SupervisedOptions", "augmented_crop", "to_float"]

_JITTER = "Strength of the colour jitter: brightness, contrast, saturation (factor 1 ± s) and hue (± s)."
_SOLARIZE = "Probability of solarizing: inverting what is brighter than a half."
_BLUR = "Probability of a Gaussian blur."


@dataclass(frozen=True, kw_only=True)
class AugmentationOptions:
    """Options of every random transform; an image goes through the steps in this order."""

    aspect_ratio: tuple[float, float] = option((3 / 4, 4 / 3), "Smallest and largest width / height of a random crop.")
    flip: float = option(0.5, "Probability of a horizontal flip.", least=0, most=1)
    jitter: tuple[float, float, float, float] = option((0.4, 0.4, 0.4, 0.4), _JITTER)
    jitter_probability: float = option(
        0.8, "Probability of the colour jitter, its parts in random order.", least=0, most=1
    )
    grayscale: float = option(0.2, "Probability of a grey image.", least=0, most=1)
    solarize: float = option(0.2, _SOLARIZE, least=0, most=1)
    blur: float = option(0.0, _BLUR, least=0, most=1)
    blur_sigma: tuple[float, float] = option((0.1, 2.0), "Smallest and largest radius (σ) of the blur in pixels.")

    def __post_init__(self) -> None:
        check_options(self)
        if len(self.jitter) != 4 or min(self.jitter) < 0 or self.jitter[3] > 0.5:
            raise ValueError(f"jitter takes four strengths >= 0, the last at most 0.5; got {self.jitter}.")
        self._check_bounds("aspect_ratio", math.inf)
        self._check_bounds("blur_sigma", math.inf)

    def _check_bounds(self, name: str, highest: float) -> None:
        bounds = getattr(self, name)
        if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] <= highest:
            limit = "" if highest == math.inf else f" <= {highest:g}"
            raise ValueError(f"{name} takes two bounds, 0 < lower <= upper{limit}; got {bounds}.")


@dataclass(frozen=True, kw_only=True)
class SupervisedOptions(AugmentationOptions):
    """One random crop."""

    scale: tuple[float, float] = option((1.0, 1.0), "Smallest and largest part of the image's area that is cropped.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_bounds("scale", 1)


@dataclass(frozen=True, kw_only=True)
class MultiCropOptions(AugmentationOptions):
    """SwAV's multi-crop: two large crops and several small ones."""

    jitter: tuple[float, float, float, float] = option((0.8, 0.8, 0.8, 0.2), _JITTER)
    solarize: float = option(0.0, _SOLARIZE, least=0, most=1)
    blur: float = option(0.5, _BLUR, least=0, most=1)
    global_size: int = option(224, "Pixels of a side of a global crop; a run takes its image size.", least=2)
    global_crops: int = option(2, "Number of global crops.", least=1)
    global_scale: tuple[float, float] = option((0.14, 1.0), "Part of the image's area that a global crop takes.")
    local_size: int = option(96, "Pixels of a side of a local crop.", least=2)
    local_crops: int = option(6, "Number of local crops; 0 for none.", least=0)
    local_scale: tuple[float, float] = option((0.05, 0.14), "Part of the image's area that a local crop takes.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_bounds("global_scale", 1)
        self._check_bounds("local_scale", 1)


class Draws:
    """Uniform random numbers from a generator, taken many at a time: a call of torch costs as much as a small crop."""

    def __init__(self, generator: torch.Generator | None) -> None:
        self._generator = generator
        self._numbers: list[float] = []

    def uniform(self, low: float, high: float) -> float:
        """Draw a number in [low, high)."""
        if not self._numbers:
            self._numbers = torch.rand(32, generator=self._generator, dtype=torch.float64).tolist()
        return low + (high - low) * self._numbers.pop()

    def chance(self, probability: float) -> bool:
        """Draw True with this probability."""
        return self.uniform(0, 1) < probability

    def below(self, number: int) -> int:
        """Draw an integer in [0, number)."""
        return int(self.uniform(0, number))


def to_float(image: Tensor) -> Tensor:
    """Convert uint8 in any memory order to contiguous fp32 in [0, 1]."""
    return image.to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / 255)


def crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], draws: Draws
) -> tuple[int, int, int, int]:
    """Draw (top, left, height, width) of a crop as torchvision's RandomResizedCrop does."""
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
    """Make a random crop of an image (3, height, width) uint8, as (3, size, size) fp32 in [0, 1].

    It is resized (bicubic, antialiased) in uint8, for which torch has a fast kernel; colours are changed in fp32.
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
        pixels = pixels.copy_(F.rgb_to_grayscale(pixels))
    if draws.chance(options.blur):
        # SwAV's kernel: a tenth of the side, odd (23 of 224).
        pixels = blur(pixels, max(3, int(0.1 * size) | 1), draws.uniform(*options.blur_sigma))
    if draws.chance(options.solarize):
        pixels = F.solarize(pixels, 0.5)
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
            image = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)[part](image, factor)
    return image


def hue(image: Tensor, shift: float) -> Tensor:
    """Turn the hue by `shift` of a full circle, keeping HSV's saturation and value.

    With value V, chroma C and hue h in sixths, the channels are ``V - C · clamp(min(k, 4 - k), 0, 1)`` where
    ``k = (n + h) mod 6`` and n = 5, 3, 1 (Smith 1978, in the form without cases).
    """
    red, green, blue = image.unbind(0)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    # Where there is no chroma the hue does not matter.
    inverse = chroma.clamp_min(1e-12).reciprocal_()
    sixths = torch.where(value == green, (blue - red).mul_(inverse).add_(2), (red - green).mul_(inverse).add_(4))
    sixths = torch.where(value == red, (green - blue).mul_(inverse), sixths)
    turned = torch.empty_like(image)
    for channel, offset in enumerate((5.0, 3.0, 1.0)):
        k = sixths + (offset + 6 * shift)
        k.sub_((k * (1 / 6)).floor_().mul_(6))
        # min(k, 4 - k) = 2 - |k - 2|
        k.sub_(2).abs_().neg_().add_(2).clamp_(0, 1).mul_(chroma)
        torch.sub(value, k, out=turned[channel])
    return turned


def blur(image: Tensor, kernel_size: int, sigma: float) -> Tensor:
    """Gaussian blur with reflected borders.

    For kernels of a tenth of the image two products with banded matrices beat any convolution of three channels.

    Args:
        image: (3, height, width).
        kernel_size: Odd, at most twice the shorter side less one.
        sigma: Standard deviation in pixels.
    """
    offsets = torch.arange(kernel_size) - kernel_size // 2
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    weights /= weights.sum()
    height, width = image.shape[-2:]
    return _banded(height, weights) @ image @ _banded(width, weights).T


def _banded(size: int, weights: Tensor) -> Tensor:
    """(size, size) matrix of a convolution with reflection at the borders."""
    columns = _reflected(size, len(weights))
    return torch.zeros(size, size).scatter_add_(1, columns, weights.expand(size, -1))


@functools.lru_cache(maxsize=16)
def _reflected(size: int, kernel_size: int) -> Tensor:
    columns = torch.arange(size)[:, None] + (torch.arange(kernel_size) - kernel_size // 2)
    columns.abs_()
    return torch.where(columns >= size, 2 * (size - 1) - columns, columns)
