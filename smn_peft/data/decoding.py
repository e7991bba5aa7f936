# SPDX-License-Identifier: Apache-2.0
"""Bytes of an image file to a uint8 RGB tensor, whatever its colours, with limits and errors that name the image."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

__all__ = ["MAX_PIXELS", "ImageError", "decode_rgb"]

# Pillow's own bound for a warning, here an error: 89 million pixels are 256 MiB once decoded.
MAX_PIXELS = 1024**3 // 12


class ImageError(ValueError):
    """An image that cannot be read; the message names the file or row."""


def decode_rgb(data: Tensor | bytes, where: str) -> Tensor:
    """Decode one image to (3, height, width) uint8 RGB; EXIF orientation is applied.

    Greyscale is repeated, palettes and CMYK are converted, 16 bit are cut to 8. Transparency is dropped, as image
    processors do. The memory order is channels last, in which torch resizes uint8 more than twice as fast.

    Args:
        data: The file's bytes, or (n,) uint8 of them.
        where: The file's path or the row, for the message.

    Raises:
        ImageError: The bytes are no image, are cut off, or hold more than `MAX_PIXELS` pixels.
    """
    raw = data.numpy().tobytes() if isinstance(data, Tensor) else data
    try:
        with Image.open(io.BytesIO(raw)) as image:
            # Only the header has been read here, so a bomb costs nothing.
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(
                    f"{where}: {image.width} × {image.height} pixels are more than {MAX_PIXELS}; "
                    "shrink the image or leave it out."
                )
            return _to_rgb(image)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"{where}: {error} Shrink the image or leave it out.") from error
    # Pillow raises many kinds on broken files: OSError, SyntaxError, struct.error, ValueError …
    except Exception as error:
        raise ImageError(
            f"{where}: cannot be read as an image ({type(error).__name__}: {str(error)[:200]}); "
            "replace the file or leave it out."
        ) from error


def _to_rgb(image: Image.Image) -> Tensor:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I":
        # `convert` would clip at 255 instead of scaling.
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        image = Image.fromarray(grey)
    # A copy: torch wants memory that it may write to.
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
