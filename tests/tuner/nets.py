# SPDX-License-Identifier: Apache-2.0
"""Small models: with a convolution that cannot be masked, and with BatchNorm in body and head."""

from __future__ import annotations

import torch
from torch import nn


class Padded(nn.Conv2d):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))


class Net(nn.Module):
    """A stem whose name is the ending of a convolution that is no target."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.stage = nn.Module()
        self.stage.conv = Padded(4, 4, 3)
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.fc = nn.Conv2d(4, 5, 1)

    def get_classifier(self) -> nn.Module:
        return self.fc


class TwoNorms(nn.Module):
    """A BatchNorm in the body and one in the head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enc = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.enc(x).mean((2, 3)))
