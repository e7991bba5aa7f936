# SPDX-License-Identifier: Apache-2.0
"""The ResNet-56 with its own weights and head is the classifier that its authors trained."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smn_peft.data import load_images
from smn_peft.evaluation import extract_features
from smn_peft.paper import cifar_resnet

from ..training.tiny import ROOT

ASSETS = Path(os.environ.get("SMN_ASSETS", ROOT.parent / "shared" / "assets"))


@pytest.mark.skipif(
    not (ASSETS / cifar_resnet.WEIGHTS).is_file(), reason="SMN_ASSETS names no folder with the weights"
)
def test_its_own_head_classifies_cifar10(monkeypatch):
    monkeypatch.setenv("SMN_ASSETS", str(ASSETS))
    model = cifar_resnet.build()
    head = {key: value.float() for key, value in load_file(ASSETS / cifar_resnet.WEIGHTS).items() if "linear" in key}
    images = load_images(ASSETS / "cifar10_jpeg.npz", "test").subset(range(0, 10000, 100))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.mean, model.std))
    found = extract_features(model, images, lambda image: (image / 255 - mean) / std)
    logits = found.features @ head["linear.weight"].t() + head["linear.bias"]
    accuracy = (logits.argmax(1) == found.labels).float().mean()
    assert 0.8 < accuracy < 0.93  # 83.2 % of all 10,000 lossy images


def test_a_missing_file_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("SMN_ASSETS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="SMN_ASSETS has to name the folder"):
        cifar_resnet.build()
