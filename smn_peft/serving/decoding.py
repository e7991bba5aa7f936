# SPDX-License-Identifier: Apache-2.0
"""A client's image file, within bounds that its header is held to before it is decoded, and what is refused."""

from __future__ import annotations

from PIL import Image
from torch import Tensor

from ..data.decoding import ImageError, TooManyPixelsError, UnknownFormatError, open_image, to_rgb
from .errors import ServingError
from .limits import Limits

__all__ = ["FORMATS", "opened", "pixels_of"]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""What clients may send, some of what the decoder reads: what browsers show, and nothing of libtiff's."""


def opened(data: bytes, limits: Limits) -> Image.Image:
    """Read and check the header of an image file.

    Args:
        data: The image file. Of an animation the first picture counts.
        limits: See [`Limits`].

    Raises:
        ServingError: 413 for too many pixels, 415 for another format, 422 for a damaged file, one that would take
            long, or an odd shape.
    """
    try:
        image = open_image(data, "The image", formats=FORMATS, max_pixels=limits.pixels)
    except TooManyPixelsError as error:
        raise ServingError(413, str(error), f"Shrink the image to {limits.pixels} pixels at most.") from error
    except UnknownFormatError as error:
        what = f"The file is not an image of a known format ({', '.join(FORMATS)})."
        raise ServingError(415, what, "Send one.") from error
    except ImageError as error:
        raise _damaged(error) from error
    width, height = image.size
    if max(width, height) > limits.aspect * min(width, height):
        fix = f"Crop it: the longer side may be {limits.aspect} times the shorter."
        raise ServingError(422, f"The image is a strip of {width} × {height} pixels.", fix)
    return image


def pixels_of(image: Image.Image) -> Tensor:
    """Decode what [`opened`] returned to (3, height, width) uint8 RGB.

    Raises:
        ServingError: 422 for a damaged file.
    """
    try:
        with image:
            return to_rgb(image, "The image")
    except ImageError as error:
        raise _damaged(error) from error


def _damaged(error: ImageError) -> ServingError:
    return ServingError(422, str(error), "Send a whole image file.")
