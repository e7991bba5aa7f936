# SPDX-License-Identifier: Apache-2.0
"""A model with a convolution that cannot be masked, for the tests of targets."""

from __future__ import annotations

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
