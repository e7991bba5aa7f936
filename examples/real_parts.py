# SPDX-License-Identifier: Apache-2.0
"""Backbones, images and the classifier of `real_backbones.py`, and what it saves; not an example by itself."""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_recipes import Recipe
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.io import ImageReadMode, decode_jpeg

from smn_peft.backbones import load_backbone
from smn_peft.evaluation import Features, evaluate_accuracy
from smn_peft.paper import small_resnet
from smn_peft.storage.adapter_file import WEIGHTS_NAME, adapter_sizes

VIT_WEIGHTS = "vit_tiny_patch16_224.augreg_in21k_ft_in1k.fp16.safetensors"
CODECS = {"bits": "bit-packed", "entropy": "coded"}


def assets_folder() -> Path:
    """The folder of weights and images that `SMN_ASSETS` names."""
    folder = Path(os.environ.get("SMN_ASSETS", ""))
    if not (folder / "cifar10_jpeg.npz").is_file():
        sys.exit("Set SMN_ASSETS to the folder with cifar10_jpeg.npz and the weights, see this example's first lines.")
    return folder


@dataclass(frozen=True)
class Setting:
    """A backbone and how it takes its images."""

    build: Any
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    targets: str


def build_vit() -> nn.Module:
    """The ViT-Tiny at 64 px, features (batch, 192); transformers' wrapper around timm's model is taken off."""
    weights = assets_folder() / VIT_WEIGHTS
    return load_backbone("vit_tiny_patch16_224", state_dict=weights, image_size=64).model.timm_model


SETTINGS = {
    "vit": Setting(build_vit, 64, (0.5,) * 3, (0.5,) * 3, r"backbone\.blocks\.\d+\..*(qkv|proj|fc1|fc2)"),
    "resnet": Setting(small_resnet.build, 48, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "all-conv"),
}


@dataclass(frozen=True)
class Images:
    """Seeded random images of CIFAR-10, normalised (n, 3, size, size), and their labels (n,)."""

    pixels: Tensor
    labels: Tensor


def load_task(setting: Setting, counts: tuple[int, int, int], device: str = "cpu") -> dict[str, Images]:
    """Images to train on, to choose settings on ("validation", of the training split too) and to test on once."""
    with np.load(assets_folder() / "cifar10_jpeg.npz") as archive:
        jpeg, offsets, label, split = (archive[key] for key in ("jpeg", "offsets", "label", "split"))
    generator = np.random.default_rng(0)
    training = generator.permutation(np.flatnonzero(split == 0))[: counts[0] + counts[1]]
    test = generator.permutation(np.flatnonzero(split == 1))[: counts[2]]
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (setting.mean, setting.std))

    def decode(indices: np.ndarray) -> Images:
        files = (torch.from_numpy(jpeg[offsets[i] : offsets[i + 1]]) for i in indices)
        images = torch.stack([decode_jpeg(file, mode=ImageReadMode.RGB) for file in files])
        size = (setting.size, setting.size)
        parts = (F.interpolate(part.to(device).float(), size=size, mode="bicubic", antialias=True)
                 for part in images.split(500))  # fmt: skip
        pixels = torch.cat([(part.round().clamp(0, 255) / 255 - mean) / std for part in parts])
        return Images(pixels, torch.from_numpy(label[indices].astype(np.int64)).to(device))

    parts = {"train": training[: counts[0]], "validation": training[counts[0] :], "test": test}
    return {name: decode(indices) for name, indices in parts.items()}


class Classifier(nn.Module):
    """Backbone, features standardised by the frozen backbone's statistics on the training images, linear head."""

    def __init__(self, backbone: nn.Module, mean: Tensor, std: Tensor, classes: int = 10) -> None:
        """Take the backbone and its features' mean and standard deviation (dim,)."""
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(len(mean), classes)
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(batch, 3, size, size) -> logits (batch, classes)."""
        return self.head((self.backbone(pixel_values) - self.mean) / self.std)


@torch.no_grad()
def outputs(model: nn.Module, images: Images) -> Features:
    """The model's output (n, dim) in eval mode on un-augmented images."""
    model.eval()
    return Features(torch.cat([model(part) for part in images.pixels.split(256)]), images.labels)


def saved(adapted: Any, recipe: Recipe, test: Images) -> dict[str, Any]:
    """Bytes of what was trained, in every form that it can be saved in."""
    if recipe.trains == "weights":
        return {"bytes": sum(t.numel() * t.element_size() for t in adapted.state_dict().values())}
    with tempfile.TemporaryDirectory() as folder:
        if recipe.trains == "mask":
            forms = {}
            for codec, label in CODECS.items():
                adapted.peft_config["default"].codec = codec
                adapted.save_pretrained(Path(folder) / codec)
                forms[label] = asdict(adapter_sizes(Path(folder) / codec))
            bits = forms["bit-packed"]
            parts = {f"{part}_bytes": bits[part] for part in ("mask", "head", "statistics")}
            return {"density": adapted.density(), "bytes": bits["total"], **parts, "forms": forms}
        adapted.save_pretrained(folder)
        path = Path(folder) / WEIGHTS_NAME
        forms: dict[str, Any] = {"float32": {"total": path.stat().st_size}}
        with torch.no_grad():  # rounded first, measured then: what is saved is what is evaluated
            for parameter in (p for p in adapted.parameters() if p.requires_grad):
                parameter.copy_(parameter.bfloat16())
        save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
        accuracy = evaluate_accuracy(outputs(adapted, test))
        forms["bfloat16"] = {"total": path.stat().st_size, "test": accuracy}
    return {"bytes": forms["float32"]["total"], "forms": forms}
