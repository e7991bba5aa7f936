# SPDX-License-Identifier: Apache-2.0
"""Numbers that no run can have are refused before anything is loaded."""

from __future__ import annotations

import math

import pytest

from smn_peft.training import TrainArguments


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("knn_k", 0, r"knn_k must be at least 1; got 0"),
        ("num_workers", -1, r"num_workers must be at least 0; got -1"),
        ("seed", -1, r"seed must be at least 0 and below 4294967296; got -1"),
        ("image_size", 0, r"image_size must be at least 1 and at most 4096, or None; got 0"),
        ("momentum", 1.0, r"momentum must be at least 0 and below 1; got 1"),
        ("momentum", -0.1, r"momentum must be at least 0 and below 1; got -0"),
        ("lr", math.inf, r"lr must be at least 0; got inf"),
        ("head_lr", math.nan, r"head_lr must be at least 0; got nan"),
    ],
)
def test_out_of_range(name, value, message):
    with pytest.raises(ValueError, match=message):
        TrainArguments(backbone="resnet18", dataset="cifar10", **{name: value})


def test_the_ends_of_the_ranges():
    TrainArguments(backbone="resnet18", dataset="cifar10", knn_k=1, seed=2**32 - 1, image_size=1, momentum=0.0, lr=0.0)
