# SPDX-License-Identifier: Apache-2.0
"""A pre-activation ResNet-50 v2, stages 1 to 3, with real ImageNet weights: a backbone of the small scale.

Named as a user's file ("small_resnet.py:build"), since timm knows no such model; so it imports nothing of the package.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.layers import BatchNormAct2d, create_conv2d
from timm.models.resnetv2 import ResNetV2
from torch import nn

WEIGHTS = "resnetv2_50_stages123.onnxzoo.fp16.safetensors"


def build() -> nn.Module:
    """The backbone, (batch, 3, 48, 48) -> features (batch, 1024), and how it wants its images."""
    path = Path(os.environ.get("SMN_ASSETS", ".")) / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: SMN_ASSETS has to name the folder that holds {WEIGHTS}.")
    model: Any = ResNetV2(
        layers=[3, 4, 6],
        channels=(256, 512, 1024),
        preact=True,
        stem_type="",
        conv_layer=create_conv2d,
        norm_layer=BatchNormAct2d,
        num_classes=0,
    )
    convolution = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
    stem = {"norm0": nn.BatchNorm2d(3), "conv": convolution, "norm": BatchNormAct2d(64), "pool": nn.MaxPool2d(3, 2, 1)}
    model.stem = nn.Sequential(OrderedDict(stem))
    model.load_state_dict({key: value.to(torch.float32) for key, value in load_file(path).items()})
    model.image_size, model.mean, model.std = 48, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return model
