# SPDX-License-Identifier: Apache-2.0
"""From a client's bytes to the model's input, within bounds that the file's header is held to before it is decoded."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

from PIL import Image
from torch import Tensor

from ..data.decoding import ImageError, decode_rgb
from .errors import ServingError
from .limits import Limits

__all__ = ["FORMATS", "decoded"]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""What is read; Pillow's other readers are many, seldom used and never reached."""


def decoded(data: bytes, transform: Callable[[Any], Tensor], limits: Limits) -> Tensor:
    """Check and decode an image, and prepare it as for evaluation.

    Args:
        data: The image file. Of an animation the first picture counts.
        transform: (3, height, width) uint8 RGB to the model's input.
        limits: See [`Limits`].

    Returns:
        float (3, size, size).

    Raises:
        ServingError: 413 for too many pixels, 415 for another format, 422 for a damaged file or an odd shape.
    """
    allowed = ", ".join(FORMATS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's on large images, which are refused below
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
    except Image.DecompressionBombError as error:
        raise _too_large(str(error), limits) from error
    except Exception as error:  # Pillow raises many kinds on what is no image
        raise ServingError(415, f"The file is not an image of a known format ({allowed}).", "Send one.") from error
    if width * height > limits.pixels:
        raise _too_large(f"The image has {width} × {height} pixels.", limits)
    if max(width, height) > limits.aspect * min(width, height):
        fix = f"Crop it: the longer side may be {limits.aspect} times the shorter."
        raise ServingError(422, f"The image is a strip of {width} × {height} pixels.", fix)
    try:
        return transform(decode_rgb(data, "The image"))
    except ImageError as error:
        raise ServingError(422, str(error), "Send a whole image file.") from error


def _too_large(what: str, limits: Limits) -> ServingError:
    return ServingError(413, what, f"Shrink the image to {limits.pixels} pixels at most.")
