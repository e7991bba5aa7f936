# SPDX-License-Identifier: Apache-2.0
"""Image transforms: uint8 RGB in, normalised fp32 out; supervised, multi-crop and evaluation, with their options.

``transform(image, generator)`` draws only from that generator, so that a sample can be repeated exactly. The options'
defaults are the paper's. Hue and blur are torchvision's but faster: its own, which does not separate the kernel, take
2.5 and 74 ms of one core at 224 pixels, these about 1 ms each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from .._options import check_options, option
from ..tuner.config import check_preprocessing

__all__ = [
    "ImageTransform",
    "MultiCropOptions",
    "SupervisedOptions",
    "check_preprocessing",
    "evaluation_transform",
    "multi_crop_transform",
    "preprocessing_transform",
    "supervised_transform",
]

Triple = tuple[float, ...]

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
        for name, bounds in vars(self).items():
            if isinstance(bounds, (tuple, list)) and name != "jitter":
                limit = " <= 1" if name.endswith("scale") else ""  # parts of an area
                if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] or (limit and bounds[1] > 1):
                    raise ValueError(f"{name} takes two bounds, 0 < lower <= upper{limit}; got {bounds}.")


@dataclass(frozen=True, kw_only=True)
class SupervisedOptions(AugmentationOptions):
    """One random crop."""

    scale: tuple[float, float] = option((1.0, 1.0), "Smallest and largest part of the image's area that is cropped.")


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
    return evaluation_transform(**{"crop_fraction" if key == "crop_pct" else key: known[key] for key in known})


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
