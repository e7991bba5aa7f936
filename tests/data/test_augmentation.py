# SPDX-License-Identifier: Apache-2.0
"""Crops are drawn as torchvision draws them, and every option does what it says."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from smn_peft.data import MultiCropOptions, SupervisedOptions
from smn_peft.data.transforms import Draws, augmented_crop, blur, crop_box, hue

RATIO = (3 / 4, 4 / 3)
OFF = {"flip": 0.0, "jitter_probability": 0.0, "grayscale": 0.0, "solarize": 0.0}


def draws(seed=0):
    return Draws(torch.Generator().manual_seed(seed))


def test_draws_are_uniform_and_repeatable():
    source, again = draws(), draws()
    values = torch.tensor([source.uniform(2, 4) for _ in range(4000)])
    assert 2 <= values.min() < 2.01 < 3.99 < values.max() < 4
    assert abs(values.mean() - 3) < 0.05
    assert values.tolist() == torch.tensor([again.uniform(2, 4) for _ in range(4000)]).tolist()
    assert {source.below(3) for _ in range(100)} == {0, 1, 2}
    assert 0.25 < sum(source.chance(0.3) for _ in range(4000)) / 4000 < 0.35


@pytest.mark.parametrize("scale", [(0.05, 0.14), (0.14, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize(("height", "width"), [(60, 80), (20, 200), (200, 20)])
def test_crops_have_torchvisions_distribution(scale, height, width):
    source, count = draws(), 1000
    ours = torch.tensor([crop_box(height, width, scale, RATIO, source) for _ in range(count)]).float()
    image = torch.empty(3, height, width)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, scale, RATIO) for _ in range(count)]).float()
    assert (ours >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    # The standard error of a difference of means, four times.
    error = 4 * ((ours.var(0) + theirs.var(0)) / count).sqrt() + 1e-3
    assert ((ours.mean(0) - theirs.mean(0)).abs() <= error).all()


@pytest.mark.parametrize(
    ("changes", "change"),
    [
        ({}, lambda x: x),
        ({"flip": 1.0}, lambda x: x.flip(-1)),
        (
            {"grayscale": 1.0},
            lambda x: (torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1) * x).sum(0).expand(3, -1, -1),
        ),
        ({"solarize": 1.0}, lambda x: torch.where(x >= 0.5, 1 - x, x)),
    ],
)
def test_one_step_at_a_time(changes, change):
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    options = SupervisedOptions(**{**OFF, **changes}, aspect_ratio=(1.0, 1.0))
    result = augmented_crop(image, 16, (1.0, 1.0), options, draws())
    torch.testing.assert_close(result, change(image / 255), atol=1e-6, rtol=0)
    assert result.is_contiguous()


def test_jitter_takes_the_strengths():
    image = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    options = SupervisedOptions(**{**OFF, "jitter_probability": 1.0}, jitter=(0.4, 0.0, 0.0, 0.0))
    values = torch.stack([augmented_crop(image, 8, (1.0, 1.0), options, draws(i)).mean() for i in range(200)])
    factors = values / (100 / 255)
    assert 0.6 <= factors.min() < 0.65
    assert 1.35 < factors.max() <= 1.4
    none = SupervisedOptions(**{**OFF, "jitter_probability": 1.0}, jitter=(0.0, 0.0, 0.0, 0.0))
    torch.testing.assert_close(augmented_crop(image, 8, (1.0, 1.0), none, draws()), image / 255)


@pytest.mark.parametrize(("size", "kernel"), [(224, 23), (96, 9), (64, 7), (32, 3), (8, 3)])
def test_the_blurs_kernel_grows_with_the_crop(size, kernel):
    image = torch.zeros(3, size, size, dtype=torch.uint8)
    image[:, size // 2, size // 2] = 255
    options = MultiCropOptions(**OFF, blur=1.0, blur_sigma=(2.0, 2.0), aspect_ratio=(1.0, 1.0))
    reached = augmented_crop(image, size, (1.0, 1.0), options, draws())[0, size // 2] > 0
    assert int(reached.sum()) == kernel


@pytest.mark.parametrize("name", ["flip", "grayscale", "solarize", "blur", "jitter_probability"])
def test_probabilities(name):
    image = torch.randint(0, 256, (3, 12, 12), dtype=torch.uint8)
    options = SupervisedOptions(**{**OFF, name: 0.3}, aspect_ratio=(1.0, 1.0))
    changed = [
        not torch.allclose(augmented_crop(image, 12, (1.0, 1.0), options, draws(i)), image / 255) for i in range(600)
    ]
    assert 0.22 < sum(changed) / 600 < 0.38


def test_hue_and_blur_are_torchvisions():
    noise = torch.rand(3, 20, 17)
    # Every order of the channels, and ties among them.
    for image in (noise, noise[:1].expand(3, -1, -1).clone(), noise.round(), torch.zeros(3, 20, 17)):
        for shift in (0.1, -0.4, 0.5):
            torch.testing.assert_close(hue(image, shift), F.adjust_hue(image, shift), atol=4e-6, rtol=0)
        for size, sigma in ((3, 0.1), (9, 2.0)):
            expected = F.gaussian_blur(image, [size, size], [sigma, sigma])
            torch.testing.assert_close(blur(image, size, sigma), expected, atol=4e-6, rtol=0)


@pytest.mark.parametrize("options", [SupervisedOptions, MultiCropOptions])
def test_every_field_has_help(options):
    assert all(field.metadata["help"].endswith(".") for field in fields(options))


def test_the_papers_strengths():
    supervised, crops = SupervisedOptions(), MultiCropOptions()
    assert (supervised.jitter, supervised.solarize, supervised.blur) == ((0.4, 0.4, 0.4, 0.4), 0.2, 0.0)
    assert (crops.jitter, crops.solarize, crops.blur) == ((0.8, 0.8, 0.8, 0.2), 0.0, 0.5)
    assert (crops.global_crops, crops.local_crops, crops.global_scale) == (2, 6, (0.14, 1.0))


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        (SupervisedOptions, {"flip": 1.5}, r"flip must be at least 0 and at most 1; got 1\.5"),
        (SupervisedOptions, {"jitter": (0.4, 0.4, 0.4, 0.6)}, r"jitter takes four strengths.*the last at most 0\.5"),
        (SupervisedOptions, {"jitter": (0.4,)}, r"jitter takes four"),
        (SupervisedOptions, {"scale": (0.5, 1.5)}, r"scale takes two bounds, 0 < lower <= upper <= 1"),
        (SupervisedOptions, {"aspect_ratio": (0.0, 2.0)}, r"aspect_ratio takes two bounds, 0 < lower <= upper; got"),
        (MultiCropOptions, {"local_scale": (0.2, 0.1)}, r"local_scale takes two bounds"),
        (MultiCropOptions, {"global_crops": 0}, r"global_crops must be at least 1; got 0"),
        (MultiCropOptions, {"blur_sigma": (2.0, 1.0)}, r"blur_sigma takes two bounds"),
    ],
)
def test_ranges(options, changes, message):
    with pytest.raises(ValueError, match=message):
        options(**changes)
