# SPDX-License-Identifier: Apache-2.0
"""Bytes of an image file to a uint8 RGB tensor, whatever its colours, with limits and errors that name the image.

Everything that this package decodes passes here, so what a hostile file may start or cost is decided here alone.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

__all__ = [
    "FORMATS",
    "ImageError",
    "TooManyPixelsError",
    "UnknownFormatError",
    "as_rgb",
    "decode_rgb",
    "open_image",
    "to_rgb",
]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What is read. Pillow's other readers are seldom used, and one of them starts a program (EPS: Ghostscript)."""

# Pillow's own bound for a warning, here an error: 89 million pixels are 256 MiB once decoded.
MAX_PIXELS = 1024**3 // 12
# Encoders write some ten scans. A decoder visits every pixel in each, however little a scan holds.
_MAX_SCANS = 100
_MAX_SCANNED_PIXELS = 2**30
_MAX_SEGMENTS = 10_000
# What Pillow decodes in Python takes about a second for a million pixels.
_MAX_PIXELS_IN_PYTHON = 2**22
# Between segments and scans: 0xFF and a code, which is neither data (00, restarts) nor padding.
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")


class ImageError(ValueError):
    """An image that cannot be read; the message names the file or row."""


class UnknownFormatError(ImageError):
    """A file that is no image of an allowed format."""


class TooManyPixelsError(ImageError):
    """An image that is too large."""


def decode_rgb(data: Tensor | bytes, where: str) -> Tensor:
    """Decode one image to (3, height, width) uint8 RGB; EXIF orientation is applied.

    Greyscale is repeated, palettes and CMYK are converted, 16 bit are cut to 8, transparency is dropped. The memory
    order is channels last, in which torch resizes uint8 more than twice as fast. `where` names the file or row in the
    `ImageError` of what cannot be read.
    """
    with open_image(data.numpy().tobytes() if isinstance(data, Tensor) else data, where) as image:
        return to_rgb(image, where)


def as_rgb(image: Any, where: str) -> Tensor:
    """Convert an image as libraries hand it over to (3, height, width) uint8 RGB.

    Args:
        image: A PIL image; an image file's bytes, or ``{"bytes": …}``; uint8 (height, width) or (height, width, 1, 3
            or 4) as an array, or (3, height, width) as a tensor.
        where: Names it in the `ImageError` of what is none of these, or cannot be read.
    """
    if isinstance(image, Mapping) and image.get("bytes") is not None:
        image, where = image["bytes"], f"{where} ({image['path']})" if image.get("path") else where
    if isinstance(image, bytes):
        return decode_rgb(image, where)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3):
        if image.ndim == 2 or image.shape[2] in (1, 3, 4):
            image = Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
    if isinstance(image, Image.Image):
        return to_rgb(image.copy(), where)  # which turns it by its EXIF in place
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3 and len(image) == 3:
        return image
    kind = type(image).__name__
    if isinstance(image, (np.ndarray, Tensor)):
        kind = f"{kind} of {image.dtype} {tuple(image.shape)}"
    fix = "give a PIL image, a file's bytes, uint8 (height, width, 3) as an array, or (3, height, width) as a tensor"
    raise ImageError(f"{where} is a {kind}: {fix}.")


def open_image(
    data: bytes, where: str, *, formats: Sequence[str] = FORMATS, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Read an image's header and check it; nothing is decoded before [`to_rgb`].

    Raises:
        UnknownFormatError: The bytes are no image of `formats`.
        TooManyPixelsError: The image is too large.
        ImageError: The image is damaged, or made to take long.
    """
    scans = _jpeg_scans(data, where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # such images are refused below
            image = Image.open(io.BytesIO(data), formats=tuple(formats))
    except Image.DecompressionBombError as error:
        raise TooManyPixelsError(f"{where}: {error} Shrink the image or leave it out.") from error
    except Image.UnidentifiedImageError as error:
        what = f"{where}: cannot be read as an image of a known format ({', '.join(formats)})"
        raise UnknownFormatError(f"{what}; replace the file or leave it out.") from error
    except Exception as error:
        raise _damaged(where, error) from error
    # Only the header has been read here, so a bomb costs nothing.
    pixels = image.width * image.height
    if pixels > max_pixels:
        what = f"{where}: {image.width} × {image.height} pixels are more than {max_pixels}"
        raise TooManyPixelsError(f"{what}; shrink the image or leave it out.")
    if scans * pixels > _MAX_SCANNED_PIXELS:
        raise ImageError(f"{where}: a JPEG of {pixels} pixels in {scans} scans; save it again as a plain JPEG.")
    decoders = {tile[0] for tile in getattr(image, "tile", ())} & set(Image.DECODERS)
    if "bmp_rle" in decoders or (decoders and pixels > _MAX_PIXELS_IN_PYTHON):
        raise ImageError(f"{where}: a {image.format} file that takes long to decode; save it again as PNG.")
    return image


def to_rgb(image: Image.Image, where: str) -> Tensor:
    """Decode what [`open_image`] opened to (3, height, width) uint8 RGB; `ImageError` if it is damaged or cut off."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16") or image.mode == "I":
            # `convert` would clip at 255 instead of scaling.
            grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
            image = Image.fromarray(grey)
        if image.mode != "RGB":
            image = image.convert("RGB")
        # A copy: torch wants memory that it may write to.
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    except Exception as error:
        raise _damaged(where, error) from error


def _damaged(where: str, error: Exception) -> ImageError:
    # Pillow raises many kinds on broken files: OSError, SyntaxError, struct.error, ValueError …
    what = f"{where}: cannot be read as an image ({type(error).__name__}: {str(error)[:200]})"
    return ImageError(f"{what}; replace the file or leave it out.")


def _jpeg_scans(data: bytes, where: str) -> int:
    """Count the scans of a JPEG by its markers, as a decoder finds them; 0 for another file."""
    if not data.startswith(b"\xff\xd8\xff"):
        return 0
    scans, position = 0, 2
    for _ in range(_MAX_SEGMENTS):
        found = _MARKER.search(data, position)
        if found is None or found[1] == b"\xd9":
            return scans
        scans += found[1] == b"\xda"
        if scans > _MAX_SCANS:
            raise ImageError(f"{where}: a JPEG of more than {_MAX_SCANS} scans; save it again as a plain JPEG.")
        # The segment's length counts itself; after that of a scan, its data go on to the next marker.
        position = found.end() + max(2, int.from_bytes(data[found.end() : found.end() + 2], "big"))
    raise ImageError(f"{where}: a JPEG of more than {_MAX_SEGMENTS} segments; save it again as a plain JPEG.")
