# SPDX-License-Identifier: Apache-2.0
"""The quickstart's base model, how it is pretrained and adapted, and how what comes of it is measured.

Used by `quickstart.py`; not an example by itself.
"""

from __future__ import annotations

from pathlib import Path

import torch
from common import digits, fit
from peft import get_peft_model
from quickstart_methods import SWAV, Method
from torch import nn

from smn_peft import MaskConfig
from smn_peft.backbones import load_backbone, load_classifier
from smn_peft.data import ImageDataset, evaluation_transform, multi_crop_transform
from smn_peft.evaluation import evaluate_accuracy, evaluate_knn, extract_features, linear_probe
from smn_peft.objectives import create_objective

__all__ = ["NEW", "PLAIN", "adapt", "load", "measure", "pretrain"]

OLD, NEW = range(5), range(5, 10)
NORM = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as timm makes its ResNet-18
PLAIN = evaluation_transform(32, *NORM)
# Crops show a digit in parts and sizes, and the jitter keeps the amount of ink from giving it away.
VIEWS = multi_crop_transform(
    *NORM,
    global_size=32,
    global_scale=(0.5, 1.0),
    local_crops=0,
    jitter=(0.4, 0.4, 0.0, 0.0),
    flip=0,
    grayscale=0,
    blur=0,
)


def load(base: Path, head: bool, seed: int = 0) -> nn.Module:
    """The base from its folder, with a new head for the new digits or without."""
    backbone = load_backbone(base)
    return load_classifier(backbone, len(NEW), head_seed=seed).model if head else backbone.model


def pretrain(folder: Path, epochs: int) -> float:
    """Train the base on the old digits and save it without its head; returns its accuracy on them."""
    torch.manual_seed(0)
    train, test = digits(OLD)
    backbone = load_backbone("resnet18", pretrained=False, image_size=32, channels=(16, 32, 64, 128))
    model = load_classifier(backbone, len(OLD)).model.requires_grad_(True)
    objective = create_objective("cross_entropy", feature_dim=backbone.feature_dim, num_classes=len(OLD))
    settings = {"lr": 0.05, "head_lr": 0.05, "weight_decay": 5e-4, "head_weight_decay": 5e-4, "batch_size": 32}
    fit(model, objective, train, PLAIN, folder / "log", epochs=epochs, warmup_epochs=epochs / 4, **settings)
    model.backbone.save_pretrained(folder / "base")
    return measure(model, True, train, test)["accuracy"]


def adapt(method: Method, folder: Path, train: ImageDataset, epochs: int, seed: int) -> tuple[nn.Module, dict]:
    """Adapt the base to the new digits; returns the model and the last line of the log."""
    torch.manual_seed(seed)
    model = load(folder / "base", method.labels, seed)
    body = model.backbone if method.labels else model
    if method.what == "mask":
        kept = ["head"] if method.labels else None
        model = get_peft_model(model, MaskConfig(modules_to_save=kept, batch_norm=method.batch_norm))
    else:
        model.requires_grad_(method.what == "weights")
        if method.labels:
            model.head.requires_grad_(True)
    # The trainer holds the statistics of a backbone of which nothing trains; this, at learning rate 0, lets them move.
    if method.what == "statistics":
        list(body.parameters())[-1].requires_grad_(True)
    kind, options = ("cross_entropy", {}) if method.labels else ("swav", SWAV)
    objective = create_objective(kind, feature_dim=128, num_classes=len(NEW), options=options)
    images, views = (train, PLAIN) if method.labels else (train.without_labels(), VIEWS)
    epochs *= method.epochs
    settings = {"epochs": epochs, "warmup_epochs": epochs / 4, "seed": seed, **method.settings}
    log = fit(model, objective, images, views, folder / "log", **settings)
    if method.what == "statistics":
        body.requires_grad_(False)
    return model, log


def measure(model: nn.Module, head: bool, train: ImageDataset, test: ImageDataset) -> dict[str, float]:
    """Accuracy of a classifier; of a model without head k-NN and a linear probe on its features."""
    if head:
        return {"accuracy": evaluate_accuracy(extract_features(model, test, PLAIN, function=model)).top1}
    seen, new = (extract_features(model, part, PLAIN) for part in (train, test))
    knn, knn_20 = (evaluate_knn(seen, new, k=k) for k in (200, 20))
    return {"knn": knn, "knn_20": knn_20, "probe": linear_probe(seen, new)}
