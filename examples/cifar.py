# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10 from an npz of JPEG files (`jpeg`, `offsets`, `label`, `split`), as the examples on real backbones need it.

Used by `real_vit.py` and `real_resnet.py`; not an example by itself.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.io import ImageReadMode, decode_jpeg

__all__ = ["Split", "Task", "assets_folder", "load_task", "write_subsets"]


@dataclass(frozen=True)
class Split:
    """Images (n, 3, size, size) in uint8 and labels (n,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Task:
    """A training set, a validation set that settings are chosen on, and a test set that is looked at once."""

    train: Split
    validation: Split
    test: Split
    mean: Tensor
    std: Tensor

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 images to floats with the base model's mean and standard deviation."""
        return (images.float() / 255 - self.mean) / self.std


def assets_folder() -> Path:
    """The folder of weights and images that `SMN_ASSETS` names."""
    folder = Path(os.environ.get("SMN_ASSETS", ""))
    if not (folder / "cifar10_jpeg.npz").is_file():
        sys.exit("Set SMN_ASSETS to the folder with cifar10_jpeg.npz and the weights, see this example's first lines.")
    return folder


def load_task(
    size: int, mean: tuple[float, ...], std: tuple[float, ...], counts: tuple[int, int, int], device: str
) -> Task:
    """Decode and resize seeded random subsets of CIFAR-10.

    Args:
        size: Pixels of a side after resizing.
        mean: The base model's mean per channel.
        std: The base model's standard deviation per channel.
        counts: Training and validation images, both from the training split, and test images.
        device: Where the images go.
    """
    with np.load(assets_folder() / "cifar10_jpeg.npz") as archive:
        jpeg, offsets, label, split = (archive[key] for key in ("jpeg", "offsets", "label", "split"))
    generator = np.random.default_rng(0)
    training = generator.permutation(np.flatnonzero(split == 0))[: counts[0] + counts[1]]
    test = generator.permutation(np.flatnonzero(split == 1))[: counts[2]]

    def decode(indices: np.ndarray) -> Split:
        files = (torch.from_numpy(jpeg[offsets[i] : offsets[i + 1]]) for i in indices)
        images = torch.stack([decode_jpeg(file, mode=ImageReadMode.RGB) for file in files])
        resized = [
            F.interpolate(part.to(device).float(), size=(size, size), mode="bicubic", antialias=True)
            for part in images.split(500)
        ]
        pixels = torch.cat([part.round().clamp(0, 255).to(torch.uint8) for part in resized])
        return Split(pixels, torch.from_numpy(label[indices].astype(np.int64)).to(device))

    return Task(
        decode(training[: counts[0]]),
        decode(training[counts[0] :]),
        decode(test),
        torch.tensor(mean, device=device).view(3, 1, 1),
        torch.tensor(std, device=device).view(3, 1, 1),
    )


def write_subsets(folder: Path, training: int, validation: int) -> tuple[Path, Path]:
    """Two npz files in the layout of the assets with the same seeded training images.

    Args:
        folder: Where the files go.
        training: Number of training images.
        validation: Number of other training images, to choose settings on.

    Returns:
        One file to report on, with the whole test split as "test"; one to choose on, with the validation images there.
    """
    with np.load(assets_folder() / "cifar10_jpeg.npz") as archive:
        arrays = {key: archive[key] for key in archive}
    order = np.random.default_rng(0).permutation(np.flatnonzero(arrays["split"] == 0))
    train, held_out = order[:training], order[training : training + validation]
    paths = []
    for name, test in (("final", np.flatnonzero(arrays["split"] == 1)), ("selection", held_out)):
        indices = np.concatenate([train, test])
        sizes = np.diff(arrays["offsets"])[indices]
        jpeg = np.concatenate([arrays["jpeg"][arrays["offsets"][i] : arrays["offsets"][i + 1]] for i in indices])
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        split = np.repeat(np.uint8([0, 1]), [len(train), len(test)])
        paths.append(folder / f"{name}.npz")
        np.savez(paths[-1], jpeg=jpeg, offsets=offsets, label=arrays["label"][indices], split=split,
                 classes=arrays["classes"])  # fmt: skip
    return paths[0], paths[1]
