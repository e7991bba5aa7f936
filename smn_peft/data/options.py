# SPDX-License-Identifier: Apache-2.0
"""Strengths of the augmentations, with their help texts; the defaults are the paper's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

__all__ = ["AugmentationOptions", "MultiCropOptions", "SupervisedOptions"]


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class AugmentationOptions:
    """What every random transform has beside its crops; an image in [0, 1] goes through in this order."""

    aspect_ratio: tuple[float, float] = _option(
        (3 / 4, 4 / 3), "Smallest and largest width / height of a random crop."
    )
    flip: float = _option(0.5, "Probability of a horizontal flip.")
    jitter: tuple[float, float, float, float] = _option(
        (0.4, 0.4, 0.4, 0.4),
        "Strength of the jitter of brightness, contrast, saturation (factor 1 ± s) and hue (± s).",
    )
    jitter_probability: float = _option(
        0.8, "Probability of the colour jitter, whose four parts come in random order."
    )
    grayscale: float = _option(0.2, "Probability of a grey image.")
    solarize: float = _option(0.2, "Probability of solarizing: inverting what is brighter than a half.")
    blur: float = _option(0.0, "Probability of a Gaussian blur.")
    blur_sigma: tuple[float, float] = _option((0.1, 2.0), "Smallest and largest radius (σ) of the blur in pixels.")

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: A probability outside [0, 1], a negative strength, or bounds in the wrong order.
        """
        for name in ("flip", "jitter_probability", "grayscale", "solarize", "blur"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability: it must lie in [0, 1]; got {getattr(self, name)}.")
        if len(self.jitter) != 4 or min(self.jitter) < 0 or self.jitter[3] > 0.5:
            raise ValueError(
                "jitter takes four strengths >= 0 (brightness, contrast, saturation, hue), the last at most 0.5; "
                f"got {self.jitter}."
            )
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

    scale: tuple[float, float] = _option((1.0, 1.0), "Smallest and largest part of the image's area that is cropped.")

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self._check_bounds("scale", 1)


@dataclass(frozen=True, kw_only=True)
class MultiCropOptions(AugmentationOptions):
    """SwAV's multi-crop: two large crops and several small ones."""

    jitter: tuple[float, float, float, float] = _option(
        (0.8, 0.8, 0.8, 0.2),
        "Strength of the jitter of brightness, contrast, saturation (factor 1 ± s) and hue (± s).",
    )
    solarize: float = _option(0.0, "Probability of solarizing: inverting what is brighter than a half.")
    blur: float = _option(0.5, "Probability of a Gaussian blur.")
    global_size: int = _option(224, "Pixels of a side of a global crop; a run takes its image size.")
    global_crops: int = _option(2, "Number of global crops.")
    global_scale: tuple[float, float] = _option((0.14, 1.0), "Part of the image's area that a global crop takes.")
    local_size: int = _option(96, "Pixels of a side of a local crop.")
    local_crops: int = _option(6, "Number of local crops; 0 for none.")
    local_scale: tuple[float, float] = _option((0.05, 0.14), "Part of the image's area that a local crop takes.")

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self._check_bounds("global_scale", 1)
        self._check_bounds("local_scale", 1)
        for name, least in (("global_size", 2), ("local_size", 2), ("global_crops", 1), ("local_crops", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}.")
