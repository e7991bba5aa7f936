# SPDX-License-Identifier: Apache-2.0
"""A small dataset in the form of `smn_peft.data`, and features with known classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from smn_peft.evaluation import Features


class Images:
    """Random images whose mean grows with their label."""

    name, split, revision = "images", "test", "abc123"

    def __init__(self, n: int = 7, labelled: bool = True, size: int = 32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(n) % 3 if labelled else None
        self.images = torch.randint(0, 80, (n, 3, size, size), generator=generator, dtype=torch.uint8)
        self.images += (80 * (torch.arange(n) % 3)).to(torch.uint8).view(-1, 1, 1, 1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: dict[str, Any] = {"image": self.images[index], "index": index}
        return item if self.labels is None else {**item, "label": int(self.labels[index])}


@pytest.fixture
def images() -> Callable[..., Images]:
    return Images


@pytest.fixture
def blobs() -> Callable[..., tuple[Features, Features]]:
    """Training and test features around one centre per class."""

    def make(
        n: int = 120, classes: int = 3, dim: int = 6, noise: float = 1.0, distance: float = 2.0
    ) -> tuple[Features, Features]:
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(2 * n) % classes
        centres = distance * torch.randn(classes, dim, generator=generator)
        features = centres[labels] + noise * torch.randn(2 * n, dim, generator=generator)
        return Features(features[:n], labels[:n]), Features(features[n:], labels[n:])

    return make
