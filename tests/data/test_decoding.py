# SPDX-License-Identifier: Apache-2.0
"""Every kind of image becomes RGB, and every broken one is named."""

from __future__ import annotations

import io
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

from smn_peft.data import ImageError
from smn_peft.data.decoding import FORMATS, UnknownFormatError, decode_rgb


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


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


def test_postscript_called_a_photo_starts_no_program(tmp_path, monkeypatch):
    marker, program = tmp_path / "started", tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {marker}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # looked for once per process
    with pytest.raises(UnknownFormatError, match=r"^cat\.jpg: cannot be read as an image of a known format \(JPEG, "):
        decode_rgb(POSTSCRIPT, "cat.jpg")
    assert not marker.exists()
    with pytest.raises(OSError, match="."):  # it is what Pillow would have done
        Image.open(io.BytesIO(POSTSCRIPT)).load()
    assert marker.exists()


def test_a_file_of_two_formats_is_read_as_an_allowed_one_or_not_at_all():
    polyglot = (b"RIFF\xff\xff\xff\x00WEBPVP8 ".ljust(2048, b"\0") + b"PCD_IPI").ljust(
        96 * 2048 + 768 * 512 * 3, b"\7"
    )
    assert Image.open(io.BytesIO(polyglot), formats=["PCD"]).format == "PCD"
    with pytest.raises(ImageError):
        decode_rgb(polyglot, "x.webp")


@pytest.mark.parametrize("kind", ["PCX", "SGI", "TGA", "ICO", "DDS", "IM", "MSP", "SPIDER", "XBM", "JPEG2000", "QOI"])
def test_other_readers_of_pillow_are_never_reached(kind):
    mode = {"MSP": "1", "XBM": "1", "SPIDER": "F"}.get(kind, "RGB")
    data = save(Image.new(mode, (16, 16)), kind)
    with pytest.raises(UnknownFormatError):
        decode_rgb(data, "x")


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind not in ("JPEG", "WEBP")])
def test_allowed_formats_are_read(picture, kind):
    image = Image.fromarray(picture(3))
    if kind == "GIF":
        image = image.convert("P")
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(decode_rgb(save(image, kind), "x").permute(1, 2, 0), expected)


def scanned(side: int, scans: int, between: bytes = b"") -> bytes:
    """A progressive JPEG with so many more scans, each nearly empty."""
    data = save(Image.new("L", (side, side), 0), "JPEG", progressive=True, quality=30)
    start = data.rindex(b"\xff\xda")
    return data[:-2] + (between + data[start : start + 10] + bytes(12)) * scans + data[-2:]


def refused_quickly(data: bytes, match: str, seconds: float = 1.0) -> None:
    began = time.process_time()
    with pytest.raises(ImageError, match=match):
        decode_rgb(data, "x")
    assert time.process_time() - began < seconds


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded():
    assert decode_rgb(scanned(16, 80), "x").shape == (3, 16, 16)
    refused_quickly(scanned(2500, 20_000), "more than 100 scans")
    # A decoder passes over what is no marker, and over padding.
    refused_quickly(scanned(16, 200, b"\x00\x17\xff\xff"), "more than 100 scans")
    refused_quickly(scanned(5000, 60), "25000000 pixels in .* scans")  # each visits every pixel


def test_bytes_that_only_look_like_scans_are_not_counted(picture):
    image, look = Image.fromarray(picture(3)), b"\xff\xda" * 2000
    plain = save(image, "JPEG")
    comment = plain[:2] + b"\xff\xfe" + struct.pack(">H", 2 + len(look)) + look + plain[2:]
    for data in (comment, plain + look):  # a thumbnail's, and a film's behind the picture
        np.testing.assert_array_equal(decode_rgb(data, "x"), decode_rgb(plain, "x"))


def test_a_jpeg_of_many_segments_is_refused():
    data = save(Image.new("RGB", (16, 16)), "JPEG")
    refused_quickly(data[:2] + b"\xff\xfe\x00\x02" * 1_000_000 + data[2:], "more than 10000 segments")


@pytest.mark.parametrize("side", [4, 6000])
def test_a_run_length_bmp_is_refused(side):
    pixels, palette = bytes([1, 1, 0, 0]) * side, bytes(4 * 256)
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(pixels), 0, 0, 256, 0)
    start = 14 + len(header) + len(palette)
    file = b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + header + palette + pixels
    refused_quickly(file, "a BMP file that takes long to decode; save it again as PNG")


def test_what_pillow_decodes_in_python_is_bounded(picture):
    small = picture(3)
    text = f"P3\n{small.shape[1]} {small.shape[0]}\n255\n" + " ".join(map(str, small.flatten()))
    np.testing.assert_array_equal(decode_rgb(text.encode(), "x").permute(1, 2, 0), small)
    refused_quickly(b"P3\n3000 3000\n255\n" + b"0 " * 1_000_000, "a PPM file that takes long")
