# SPDX-License-Identifier: Apache-2.0
"""The three transforms: shapes, normalisation, repeatability, and agreement with timm's and Pillow's path."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from smn_peft.data import (
    MultiCropOptions,
    evaluation_transform,
    multi_crop_transform,
    preprocessing_transform,
    supervised_transform,
)
from tests.processes import sent

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


@pytest.fixture
def image(picture):
    return torch.from_numpy(picture(3, 40, 50)).permute(2, 0, 1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_supervised(image):
    before = image.clone()
    result = supervised_transform(16, MEAN, STD)(image, seeded())
    assert (result.shape, result.dtype) == ((3, 16, 16), torch.float32)
    assert torch.equal(image, before)


def test_multi_crop(image):
    crops = multi_crop_transform(MEAN, STD, global_size=16, local_size=8)(image, seeded())
    assert [tuple(crop.shape) for crop in crops] == [(3, 16, 16)] * 2 + [(3, 8, 8)] * 6
    assert not torch.equal(crops[0], crops[1])
    two = multi_crop_transform(MEAN, STD, MultiCropOptions(global_size=16), local_crops=0)
    assert len(two(image, seeded())) == 2


def test_pixels_are_normalised():
    grey = torch.full((3, 12, 12), 128, dtype=torch.uint8)
    still = {"jitter_probability": 0.0, "solarize": 0.0, "grayscale": 0.0}
    expected = (128 / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    for result in (
        supervised_transform(8, MEAN, STD, **still)(grey, seeded()),
        evaluation_transform(8, MEAN, STD)(grey),
        *multi_crop_transform(MEAN, STD, global_size=8, local_size=6, **still)(grey, seeded()),
    ):
        torch.testing.assert_close(result.mean((1, 2)), expected)
        assert result.std((1, 2)).max() < 1e-5


@pytest.mark.parametrize(
    "transform",
    [
        supervised_transform(16, MEAN, STD),
        multi_crop_transform(MEAN, STD, global_size=16, local_size=8),
    ],
)
def test_the_generator_is_all_that_counts(image, transform):
    torch.manual_seed(1)
    first = transform(image, seeded(5))
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    second, other = transform(image, seeded(5)), transform(image, seeded(6))
    torch.testing.assert_close(first, second, atol=0, rtol=0)
    assert not torch.equal(first[0], other[0])
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_without_a_generator_the_global_one_draws(image):
    transform = supervised_transform(16, MEAN, STD)
    torch.manual_seed(0)
    first = transform(image)
    assert not torch.equal(first, transform(image))
    torch.manual_seed(0)
    assert torch.equal(first, transform(image))


def test_transforms_travel_to_workers(image):
    for transform in (supervised_transform(16, MEAN, STD), evaluation_transform(16, MEAN, STD)):
        again = sent(transform)
        assert torch.equal(again(image, seeded()), transform(image, seeded()))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("fraction", [1.0, 0.875, 0.9])
@pytest.mark.parametrize(("height", "width"), [(40, 50), (50, 40), (32, 32), (20, 20), (300, 170)])
def test_evaluation_is_what_timm_does(picture, height, width, fraction, interpolation):
    from timm.data import create_transform

    pixels = picture(1, height, width)
    theirs = create_transform(
        32, is_training=False, mean=MEAN, std=STD, crop_pct=fraction, interpolation=interpolation
    )
    ours = evaluation_transform(32, MEAN, STD, crop_fraction=fraction, interpolation=interpolation)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    expected = theirs(Image.fromarray(pixels))
    # One of 255 levels: Pillow and torch round differently in between.
    torch.testing.assert_close(ours(image), expected, atol=1.01 / 255 / min(STD), rtol=0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: evaluation_transform(8, MEAN, STD, crop_fraction=0.0), r"crop_fraction must lie in \(0, 1\]; got 0"),
        (lambda: supervised_transform(8, MEAN, (0.2, 0.0, 0.2)), r"mean and std need three numbers each, std above 0"),
        (lambda: supervised_transform(8, (0.5,), (0.5,)), r"mean and std need three numbers"),
    ],
)
def test_what_cannot_be(build, message):
    with pytest.raises(ValueError, match=message):
        build()


HOW = {"image_size": 16, "mean": list(MEAN), "std": list(STD), "interpolation": "bilinear", "crop_pct": 0.8}


def test_what_a_config_says_is_what_is_done(image):
    result = preprocessing_transform(HOW)(image)
    wanted = evaluation_transform(16, MEAN, STD, crop_fraction=0.8, interpolation="bilinear")(image)
    assert torch.equal(result, wanted)
    plain = {name: HOW[name] for name in ("image_size", "mean", "std")}
    assert torch.equal(preprocessing_transform(plain)(image), evaluation_transform(16, MEAN, STD)(image))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_size", None),
        ("image_size", 10**9),  # would take the machine's memory
        ("mean", [10**400, 0.5, 0.5]),
        ("image_size", True),
        ("image_size", 16.0),
        ("mean", [0.5, float("nan"), 0.5]),
        ("mean", "0.5"),
        ("std", [0.2, 0.2]),
        ("std", [0.2, 0.0, 0.2]),
        ("std", [0.2, float("inf"), 0.2]),
        ("interpolation", "best"),
        ("interpolation", ["bicubic"]),
        ("crop_pct", 1e-9),
        ("crop_pct", "0.9"),
    ],
)
def test_what_a_config_cannot_mean_is_named(name, value):
    with pytest.raises(ValueError, match=f"preprocessing: {name} must be .*; it is"):
        preprocessing_transform({**HOW, name: value})


def test_what_a_config_lacks_is_named():
    with pytest.raises(ValueError, match=r"image_size must be .*; it is missing"):
        preprocessing_transform({"mean": MEAN, "std": STD})
    with pytest.raises(ValueError, match="must be a mapping"):
        preprocessing_transform([16])
