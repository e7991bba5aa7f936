# SPDX-License-Identifier: Apache-2.0
"""Augmentation options: the paper's defaults, help texts, and ranges."""

from __future__ import annotations

from dataclasses import fields

import pytest

from smn_peft.data import MultiCropOptions, SupervisedOptions


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
        (SupervisedOptions, {"flip": 1.5}, r"flip is a probability: it must lie in \[0, 1\]; got 1\.5"),
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
