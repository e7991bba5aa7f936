# SPDX-License-Identifier: Apache-2.0
"""What several examples share: handwritten digits as a dataset, and the package's trainer in one call.

Used by the scripts beside it, whose folder Python puts on the path; not an example by itself.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from smn_peft.data import ImageDataset, build_loader
from smn_peft.objectives import Objective
from smn_peft.training import Trainer, TrainingTask
from smn_peft.training.arguments import LoopArguments

__all__ = ["digits", "fit"]


class _Pngs:
    """Grey images (n, height, width) uint8 as the files that a dataset reads."""

    def __init__(self, images: Tensor) -> None:
        self.files = []
        for image in images:
            file = io.BytesIO()
            Image.fromarray(image.numpy()).save(file, "png")
            self.files.append(file.getvalue())

    def read(self, row: int) -> tuple[bytes, str]:
        return self.files[row], f"digit {row}"


def digits(classes: Sequence[int], *, image_size: int = 32, test_size: int = 400) -> tuple[ImageDataset, ImageDataset]:
    """Training and test part of scikit-learn's handwritten digits, without a network.

    The split is fixed and stratified. Labels count from 0 in the order of `classes`.

    Args:
        classes: Digits to take; each has about 180 images.
        image_size: Side in pixels that the 8 × 8 images are enlarged to.
        test_size: Number of test images.
    """
    data = load_digits()
    chosen = torch.isin(torch.tensor(data.target), torch.tensor(classes))
    images = torch.tensor(data.images, dtype=torch.float32)[chosen, None] * (255 / 16)
    images = F.interpolate(images, size=(image_size, image_size), mode="bilinear").round().to(torch.uint8)
    source = _Pngs(images[:, 0])
    labels = torch.tensor([classes.index(label) for label in data.target[chosen.numpy()]])
    parts = train_test_split(torch.arange(len(labels)), test_size=test_size, random_state=0, stratify=labels)
    names = [str(digit) for digit in classes]
    train, test = (
        ImageDataset(source, labels=labels[rows], classes=names, name="digits", split=split, rows=rows).cached()
        for split, rows in zip(("train", "test"), parts, strict=True)
    )
    return train, test


def fit(
    model: nn.Module,
    objective: Objective,
    dataset: ImageDataset,
    transform: Callable[..., Any],
    folder: Path,
    *,
    seed: int = 0,
    **settings: Any,
) -> dict[str, Any]:
    """Train on one CPU process; metrics.jsonl is written in `folder`.

    Args:
        model: What trains: under a mask adapter, or bare.
        objective: What it learns by.
        dataset: Images.
        transform: Of `smn_peft.data`: one view or several crops, as the objective takes them.
        folder: For the log; no checkpoints are kept.
        seed: Of order and augmentation.
        settings: Other fields of `LoopArguments`.

    Returns:
        The last line of the log.
    """
    arguments = LoopArguments(str(folder), seed=seed, cpu=True, keep_checkpoints=0, **settings)
    loader = build_loader(dataset, transform, arguments.batch_size, seed=seed)
    history = Trainer(TrainingTask(model, objective), loader, arguments).train()
    model.eval()
    return history[-1]
