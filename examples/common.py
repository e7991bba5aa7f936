# SPDX-License-Identifier: Apache-2.0
"""What several examples share: digits as data, a training loop, and the package's measures of what comes out.

Used by the scripts beside it, whose folder Python puts on the path; not an example by itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from smn_peft.evaluation import (
    PAPER_DECAY,
    Features,
    evaluate_accuracy,
    evaluate_knn,
    fit_linear_probe,
    markdown_table,
)

__all__ = [
    "accuracy",
    "batches",
    "digits",
    "extract_features",
    "fit",
    "knn_accuracy",
    "linear_probe",
    "markdown_table",
    "param_groups",
    "predict",
]

Function = Callable[[Tensor], Tensor]


def digits(
    classes: Sequence[int], *, image_size: int = 32, test_size: int = 400
) -> tuple[TensorDataset, TensorDataset]:
    """Training and test part of scikit-learn's handwritten digits, without a network.

    The split is fixed and stratified. Labels count from 0 in the order of `classes`.

    Args:
        classes: Digits to take; each has about 180 images.
        image_size: Side in pixels that the 8 × 8 images are enlarged to.
        test_size: Number of test images.

    Returns:
        Two datasets of (image (1, image_size, image_size) in [-1, 1], label).
    """
    data = load_digits()
    chosen = torch.isin(torch.tensor(data.target), torch.tensor(classes))
    images = torch.tensor(data.images, dtype=torch.float32)[chosen, None] / 16
    images = F.interpolate(images, size=(image_size, image_size), mode="bilinear") * 2 - 1
    labels = torch.tensor([classes.index(label) for label in data.target[chosen.numpy()]])
    train, test = train_test_split(range(len(labels)), test_size=test_size, random_state=0, stratify=labels)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def batches(dataset: Any, batch_size: int, *, train: bool = False, **kwargs: Any) -> DataLoader:
    """Shuffled whole batches to train on, or all samples in their order."""
    return DataLoader(dataset, batch_size, shuffle=train, drop_last=train, **kwargs)


def _device(function: Function) -> torch.device:
    """Where a model, or the model that a bound method belongs to, is; the CPU for any other function."""
    model = getattr(function, "__self__", function)
    return next(model.parameters()).device if isinstance(model, nn.Module) else torch.device("cpu")


# --- Training --------------------------------------------------------------------------------------------------------


def param_groups(model: nn.Module, lr: float, head_lr: float, head: str) -> list[dict[str, Any]]:
    """Two groups of what a model trains: the module called `head` at `head_lr`, and the rest at `lr`.

    The rest is the scores of a masked model or the weights of one that is fine-tuned. Scores want a learning rate
    far above that of weights, and no weight decay.
    """
    groups: list[dict[str, Any]] = [{"params": [], "lr": lr}, {"params": [], "lr": head_lr}]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[head in name.split(".")]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def fit(
    model: nn.Module, loader: DataLoader, epochs: int, optimizer: torch.optim.Optimizer, *, label: str = "train"
) -> dict[str, float]:
    """Train by cross-entropy; the learning rates rise over a quarter of the steps, then follow a cosine to 0.

    Args:
        model: Classifier, images -> logits (batch, classes); left in eval mode.
        loader: Batches of (images, labels), gone through once per epoch.
        epochs: Number of passes.
        optimizer: Steps at its own learning rates, one per parameter group.
        label: Words in front of the progress bar, which shows loss, density and images per second.

    Returns:
        Mean loss of the last epoch, seconds, and images per second.

    Raises:
        FloatingPointError: If the loss is not finite.
    """
    steps = epochs * len(loader)
    rise = max(1, steps // 4)

    def factor(step: int) -> float:
        fallen = (step - rise) / max(1, steps - rise)
        return (step + 1) / rise if step < rise else (1 + math.cos(math.pi * fallen)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    device, start, seen, mean = _device(model), time.perf_counter(), 0, math.nan
    # Where nobody watches, tqdm leaves the bar out by itself.
    with tqdm(total=steps, desc=label, unit="batch", disable=None, leave=False) as bar:
        for _ in range(epochs):
            model.train()
            losses = []
            for images, labels in loader:
                loss = F.cross_entropy(model(images.to(device)), labels.to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                if not math.isfinite(losses[-1]):
                    raise FloatingPointError(
                        f"{label}: the loss is {losses[-1]} after {seen} images; lower the rates."
                    )
                seen += len(images)
                bar.update()
            mean = sum(losses) / len(losses)
            density = f"{model.density():.3f}" if hasattr(model, "density") else "–"
            rate = f"{seen / (time.perf_counter() - start):.0f}"
            bar.set_postfix({"loss": f"{mean:.3f}", "density": density, "images/s": rate})
    model.eval()
    seconds = time.perf_counter() - start
    return {"loss": mean, "seconds": seconds, "images_per_second": seen / seconds}


# --- Evaluation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict(function: Function, loader: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Outputs (n, dim) of a model or function and the labels (n,), both on the CPU; a model is put in eval mode."""
    if isinstance(function, nn.Module):
        function.eval()
    device = _device(function)
    outputs, labels = zip(*((function(x.to(device)).float().cpu(), y) for x, y in loader), strict=True)
    return torch.cat(outputs), torch.cat(labels)


extract_features = predict  # of a model without head, or a function, that maps images to features (n, dim)


def accuracy(model: Function, loader: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Fraction of samples whose largest logit is their label's."""
    return evaluate_accuracy(Features(*predict(model, loader))).top1


def knn_accuracy(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor, k: int = 200
) -> float:
    """Accuracy of weighted k-nearest neighbours, the paper's."""
    return evaluate_knn(Features(train_features, train_labels), Features(test_features, test_labels), k=k)


def linear_probe(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor
) -> tuple[float, Tensor, Tensor]:
    """Accuracy of logistic regression with the paper's decay; weight (classes, dim) and bias (classes,) for a head."""
    # The settings of the committed record; the defaults go on to the minimum.
    settings = {"tolerance": 1e-4, "dtype": torch.float32}
    probe = fit_linear_probe(Features(train_features, train_labels), decays=[PAPER_DECAY], **settings)
    return probe.accuracy(Features(test_features, test_labels)), probe.weight, probe.bias
