# SPDX-License-Identifier: Apache-2.0
"""Every kind of image becomes RGB, and every broken one is named."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from smn_peft.data import ImageError
from smn_peft.data.decoding import decode_rgb


def save(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "LA", "PA", "CMYK", "YCbCr", "I;16"])
def test_colours(picture, mode):
    rgb = Image.fromarray(picture(7))
    if mode == "I;16":
        grey = np.asarray(rgb.convert("L"))
        image, expected = Image.fromarray(grey.astype(np.uint16) << 8), np.repeat(grey[..., None], 3, -1)
    else:
        image = rgb.convert("RGBA").convert(mode) if mode in ("LA", "PA") else rgb.convert(mode)
        expected = np.asarray(image.convert("RGB"))
    decoded = decode_rgb(save(image, "TIFF"), "x")
    assert (decoded.dtype, decoded.shape) == (torch.uint8, (3, 12, 10))
    np.testing.assert_array_equal(decoded.permute(1, 2, 0), expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_is_what_pillow_reads(picture, mode):
    data = save(Image.fromarray(picture(7)).convert(mode), "JPEG", quality=95)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    for form in (data, torch.frombuffer(bytearray(data), dtype=torch.uint8)):
        np.testing.assert_array_equal(decode_rgb(form, "x").permute(1, 2, 0), expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation(picture, kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    assert decode_rgb(save(Image.fromarray(picture(0)), kind, exif=exif), "x").shape == (3, 10, 12)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_cut_file_is_named(picture, encoded, kind):
    data = encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8), kind)
    with pytest.raises(
        ImageError, match=r"^cats/7\.jpg: cannot be read as an image .*replace the file or leave it out"
    ):
        decode_rgb(data[: len(data) // 2], "cats/7.jpg")


@pytest.mark.parametrize("data", [b"", b"no image", b"\xff\xd8\xff"])
def test_what_is_no_image_is_named(data):
    with pytest.raises(ImageError, match=r"^row 3: cannot be read as an image"):
        decode_rgb(data, "row 3")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 30_000])
def test_a_bomb_is_refused_unread(side):
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(ImageError, match=r"^bomb\.png: .*pixels.*hrink the image or leave it out"):
        decode_rgb(bomb, "bomb.png")
