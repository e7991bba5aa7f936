# SPDX-License-Identifier: Apache-2.0
"""What `quickstart.py` starts from and ends with: digits, the base, and measures; not an example by itself."""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from smn_peft.backbones import load_backbone, load_classifier
from smn_peft.data import ImageDataset, build_loader, evaluation_transform
from smn_peft.evaluation import evaluate_accuracy, evaluate_knn, extract_features, linear_probe
from smn_peft.objectives import create_objective
from smn_peft.storage.adapter_file import adapter_sizes
from smn_peft.training import LoopArguments, Trainer, TrainingTask

OLD, NEW = range(5), range(5, 10)
NORM = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as timm makes its ResNet-18
PLAIN = evaluation_transform(32, *NORM)


class _Pngs:
    """Grey images (n, height, width) in uint8 as the files that an `ImageDataset` reads."""

    def __init__(self, images: Tensor) -> None:
        self.files = []
        for image in images:
            Image.fromarray(image.numpy()).save(file := io.BytesIO(), "png")
            self.files.append(file.getvalue())

    def read(self, row: int) -> tuple[bytes, str]:
        return self.files[row], f"digit {row}"


@functools.cache
def digits(classes: Sequence[int]) -> tuple[ImageDataset, ImageDataset]:
    """Training and test part (400 images) of scikit-learn's digits at 32 px; labels count from 0 in `classes`."""
    data = load_digits()
    chosen = torch.isin(torch.tensor(data.target), torch.tensor(classes))
    images = torch.tensor(data.images, dtype=torch.float32)[chosen, None] * (255 / 16)
    images = F.interpolate(images, size=(32, 32), mode="bilinear").round().to(torch.uint8)
    labels = torch.tensor([classes.index(label) for label in data.target[chosen.numpy()]])
    parts = train_test_split(torch.arange(len(labels)), test_size=400, random_state=0, stratify=labels)
    facts = {"classes": [str(digit) for digit in classes], "name": "digits"}
    source = _Pngs(images[:, 0])
    train, test = (
        ImageDataset(source, labels=labels[rows], split=split, rows=rows, **facts).cached()
        for split, rows in zip(("train", "test"), parts, strict=True)
    )
    return train, test


def load(base: Path, head: bool, seed: int = 0) -> nn.Module:
    """The base from its folder, with a new head for the new digits or without."""
    backbone = load_backbone(base)
    return load_classifier(backbone, len(NEW), head_seed=seed).model if head else backbone.model


def fit(model: nn.Module, objective: Any, images: ImageDataset, transform: Any, folder: Path, **settings: Any) -> None:
    """Train on one CPU process; metrics.jsonl is written in `folder`."""
    settings["warmup_epochs"] = settings["epochs"] / 4
    arguments = LoopArguments(str(folder), cpu=True, keep_checkpoints=0, **settings)
    loader = build_loader(images, transform, arguments.batch_size, seed=arguments.seed)
    Trainer(TrainingTask(model, objective), loader, arguments).train()
    model.eval()


def pretrain(folder: Path, epochs: int) -> float:
    """Train the base on the old digits and save it without its head; returns its accuracy on them."""
    torch.manual_seed(0)
    train, test = digits(OLD)
    backbone = load_backbone("resnet18", pretrained=False, image_size=32, channels=(16, 32, 64, 128))
    model = load_classifier(backbone, len(OLD)).model.requires_grad_(True)
    objective = create_objective("cross_entropy", feature_dim=backbone.feature_dim, num_classes=len(OLD))
    settings = {"lr": 0.05, "head_lr": 0.05, "weight_decay": 5e-4, "head_weight_decay": 5e-4, "batch_size": 32}
    fit(model, objective, train, PLAIN, folder / "log", epochs=epochs, **settings)
    model.backbone.save_pretrained(folder / "base")
    return measure(model, True, train, test)["accuracy"]


def measure(model: nn.Module, head: bool, train: ImageDataset, test: ImageDataset) -> dict[str, float]:
    """Accuracy of a classifier; of a model without head k-NN and a linear probe on its features."""
    if head:
        return {"accuracy": evaluate_accuracy(extract_features(model, test, PLAIN, function=model))}
    seen, new = (extract_features(model, part, PLAIN) for part in (train, test))
    knn, knn_20 = (evaluate_knn(seen, new, k=k) for k in (200, 20))
    return {"knn": knn, "knn_20": knn_20, "probe": linear_probe(seen, new)}


def stored_bytes(model: nn.Module, folder: Path, head: bool) -> dict[str, int]:
    """Bytes to keep beside the base, or in its place; a mask is saved in `folder` with what it computes."""
    if isinstance(model, PeftModel):
        model.save_pretrained(folder)
        outputs = extract_features(model, digits(NEW)[1], PLAIN, function=model if head else None)
        save_file({"logits" if head else "features": outputs.features}, folder / "outputs.safetensors")
        return vars(adapter_sizes(folder))
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in model.state_dict().items()}
    if all(parameter.requires_grad for parameter in model.parameters()):
        return {"total": sum(sizes.values())}
    head_size = sum(size for name, size in sizes.items() if name.startswith("head."))
    buffers = sum(sizes[name] for name, _ in model.named_buffers() if not name.startswith("head."))
    return {"head": head_size, "statistics": buffers, "total": head_size + buffers}


def verify(folder: Path) -> bool:
    """Rebuild base and adapters from their files, and compare their outputs with those of the process that trained."""
    same = []
    for saved in sorted(folder.glob("mask-*/outputs.safetensors")):
        ((kind, expected),) = load_file(saved).items()
        model = PeftModel.from_pretrained(load(folder / "base", head=kind == "logits"), saved.parent)
        function = model if kind == "logits" else None
        outputs = extract_features(model, digits(NEW)[1], PLAIN, function=function).features
        same.append(torch.equal(outputs, expected))
        words = "identical to the bit" if same[-1] else "NOT identical"
        print(f"Reloaded {saved.parent.name} in a fresh process: {outputs.numel()} {kind} {words}.", flush=True)
    return bool(same) and all(same)
