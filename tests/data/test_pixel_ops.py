# SPDX-License-Identifier: Apache-2.0
"""Every operation equals torchvision's."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms.v2 import functional as F

from smn_peft.data import pixel_ops


@pytest.fixture(params=["noise", "grey", "primary", "black"])
def image(request):
    """Images with every order of the channels, and with ties among them."""
    noise = torch.rand(3, 20, 17)
    grey = torch.rand(1, 20, 17).expand(3, -1, -1).clone()
    return {"noise": noise, "grey": grey, "primary": noise.round(), "black": torch.zeros(3, 20, 17)}[request.param]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda x: pixel_ops.brightness_(x, 1.3), lambda x: F.adjust_brightness(x, 1.3)),
        (lambda x: pixel_ops.brightness_(x, 0.2), lambda x: F.adjust_brightness(x, 0.2)),
        (lambda x: pixel_ops.contrast_(x, 1.8), lambda x: F.adjust_contrast(x, 1.8)),
        (lambda x: pixel_ops.contrast_(x, 0.2), lambda x: F.adjust_contrast(x, 0.2)),
        (lambda x: pixel_ops.saturation_(x, 1.8), lambda x: F.adjust_saturation(x, 1.8)),
        (lambda x: pixel_ops.saturation_(x, 0.0), lambda x: F.adjust_saturation(x, 0.0)),
        (pixel_ops.grayscale_, lambda x: F.rgb_to_grayscale(x, 3)),
        (pixel_ops.solarize_, lambda x: F.solarize(x, 0.5)),
        (lambda x: pixel_ops.hue(x, 0.1), lambda x: F.adjust_hue(x, 0.1)),
        (lambda x: pixel_ops.hue(x, -0.4), lambda x: F.adjust_hue(x, -0.4)),
        (lambda x: pixel_ops.hue(x, 0.5), lambda x: F.adjust_hue(x, 0.5)),
        (lambda x: pixel_ops.blur(x, 3, 0.1), lambda x: F.gaussian_blur(x, [3, 3], [0.1, 0.1])),
        (lambda x: pixel_ops.blur(x, 9, 2.0), lambda x: F.gaussian_blur(x, [9, 9], [2.0, 2.0])),
    ],
)
def test_torchvision_agrees(image, ours, theirs):
    expected = theirs(image)
    torch.testing.assert_close(ours(image.clone()), expected, atol=4e-6, rtol=0)


def test_hue_comes_round():
    image = torch.rand(3, 8, 8)
    torch.testing.assert_close(pixel_ops.hue(pixel_ops.hue(image, 0.25), -0.25), image, atol=1e-5, rtol=0)


def test_blur_keeps_the_mean_of_a_flat_image():
    flat = torch.full((3, 12, 7), 0.3)
    torch.testing.assert_close(pixel_ops.blur(flat, 7, 1.0), flat)
