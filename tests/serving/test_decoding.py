# SPDX-License-Identifier: Apache-2.0
"""`opened` and `pixels_of`: an image becomes what evaluation makes of it."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from smn_peft.data import evaluation_transform
from smn_peft.serving.decoding import opened, pixels_of
from smn_peft.serving.errors import ServingError
from smn_peft.serving.limits import Limits
from tests.serving.tiny import MEAN, SIZE, STD

TRANSFORM = evaluation_transform(SIZE, MEAN, STD)


def saved(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decode(data, transform, limits):
    return transform(pixels_of(opened(data, limits)))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_kind_of_colour_is_read(mode):
    grey = Image.fromarray(np.arange(40 * 40, dtype=np.uint8).reshape(40, 40))
    image = Image.new("I;16", (40, 40), 40_000) if mode == "I;16" else grey.convert("RGB").convert(mode)
    values = decode(saved(image, "JPEG" if mode == "CMYK" else "PNG"), TRANSFORM, Limits())
    assert values.shape == (3, SIZE, SIZE)
    assert torch.isfinite(values).all()
    if mode == "I;16":
        assert values.mean() == pytest.approx((40_000 / 65_536 - 0.5) / 0.5, abs=0.01)


def test_orientation_is_applied():
    image = Image.new("RGB", (40, 20))
    image.paste((255, 255, 255), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned = decode(saved(image, "JPEG", exif=exif, quality=95), TRANSFORM, Limits())
    plain = decode(saved(image, "JPEG", quality=95), TRANSFORM, Limits())
    assert plain[:, :, :12].mean() > 0.8
    assert turned[:, :, -12:].mean() > 0.8


def test_bounds_hold_at_their_edge():
    image = saved(Image.new("RGB", (200, 10)))
    assert decode(image, TRANSFORM, Limits(pixels=2000, aspect=20)).shape == (3, SIZE, SIZE)
    for limits, status in ((Limits(pixels=1999), 413), (Limits(aspect=19), 422)):
        with pytest.raises(ServingError) as refused:
            decode(image, TRANSFORM, limits)
        assert refused.value.status == status
