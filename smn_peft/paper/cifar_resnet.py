# SPDX-License-Identifier: Apache-2.0
"""The ResNet-56 of He et al. for CIFAR-10, with real weights: a backbone of the small scale that no rate was tuned on.

Named as a user's file ("cifar_resnet.py:build"), since timm knows no such model; so it imports nothing of the package.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

WEIGHTS = "cifar10_resnet56.akamaster.fp16.safetensors"


class _Block(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.added = width - inputs
        self.conv1 = nn.Conv2d(inputs, width, 3, 2 if self.added else 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.added:  # option A: every other pixel, and channels of zeros
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """The network of 56 layers for 32-pixel images, without its head (He et al. 2016, section 4.2)."""

    def __init__(self) -> None:
        """Make three stages of nine blocks, 16, 32 and 64 wide."""
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(_Block(inputs, width), *(_Block(width, width) for _ in range(8)))
            for inputs, width in ((16, 16), (16, 32), (32, 64))
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(batch, 3, side, side) -> features (batch, 64)."""
        x = F.relu(self.bn1(self.conv1(pixel_values)))
        found: Tensor = self.layer3(self.layer2(self.layer1(x))).mean((2, 3))
        return found


def build() -> nn.Module:
    """The backbone, (batch, 3, 32, 32) -> features (batch, 64), and how it wants its images."""
    path = Path(os.environ.get("SMN_ASSETS", ".")) / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: SMN_ASSETS has to name the folder that holds {WEIGHTS}.")
    model: Any = CifarResNet()
    weights = {key: value.to(torch.float32) for key, value in load_file(path).items() if "linear." not in key}
    counters = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
    model.load_state_dict({**counters, **weights})
    model.image_size, model.mean, model.std = 32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return model
