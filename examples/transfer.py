# SPDX-License-Identifier: Apache-2.0
"""Adapt one real backbone by several recipes: sweep learning rates with one seed, then three seeds at each best.

Used by `real_vit.py` and `real_resnet.py`; not an example by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from cifar import Split, Task
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm
from transfer_recipe import LoraRecipe, Recipe

from smn_peft import MaskConfig
from smn_peft.evaluation import Features, evaluate_accuracy

__all__ = ["Classifier", "accuracy", "features", "train"]


class Classifier(nn.Module):
    """Backbone, features standardised by the frozen backbone's statistics on the training images, linear head."""

    def __init__(self, backbone: nn.Module, mean: Tensor, std: Tensor, classes: int) -> None:
        """Take the backbone and its features' mean and standard deviation (dim,)."""
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(len(mean), classes)
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(batch, 3, size, size) -> logits (batch, classes)."""
        return self.head((self.backbone(pixel_values) - self.mean) / self.std)


@torch.no_grad()
def features(model: nn.Module, task: Task, split: Split) -> Tensor:
    """The model's output in eval mode on un-augmented images, (n, dim)."""
    model.eval()
    return torch.cat([model(task.normalise(part)) for part in split.images.split(256)])


def accuracy(model: nn.Module, task: Task, split: Split) -> float:
    """Fraction of images whose largest logit is right."""
    return evaluate_accuracy(Features(features(model, task, split), split.labels)).top1


def train(
    model: Classifier, task: Task, recipe: Recipe, lr: float, seed: int, targets: str, bar: str
) -> tuple[nn.Module, float]:
    """Adapt `model` in place by a recipe; returns it, under its adapter if there is one, and the last epoch's loss."""
    torch.manual_seed(seed)
    adapted: nn.Module = model
    if recipe.mask:
        batch_norm = "adapt" if recipe.adapt_statistics else "frozen"
        config = MaskConfig(target_modules=targets, modules_to_save=["head"], batch_norm=batch_norm)
        adapted = get_peft_model(model, config)
    elif isinstance(recipe, LoraRecipe):
        lora = LoraConfig(r=recipe.rank, lora_alpha=2 * recipe.rank, target_modules=targets, modules_to_save=["head"])
        adapted = get_peft_model(model, lora)
    trainable = [(name, p) for name, p in adapted.named_parameters() if p.requires_grad]
    head = [p for name, p in trainable if ".head." in f".{name}"]
    body = [p for name, p in trainable if ".head." not in f".{name}"]
    make: Callable[..., torch.optim.Optimizer] = torch.optim.Adam if recipe.adam else torch.optim.SGD
    optimizers = [
        make(body, lr=lr, **({} if recipe.adam else {"momentum": 0.9})),
        torch.optim.SGD(head, lr=0.001 if recipe.probe_head else 0.01, momentum=0.9),
    ]
    per_epoch = len(task.train.labels) // 64
    steps = recipe.epochs * per_epoch
    rising = int(recipe.warmup * steps)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in tqdm(range(recipe.epochs), desc=bar, unit="epoch", leave=False):
        adapted.train()
        if not recipe.adapt_statistics:
            for module in adapted.modules():
                module.training &= not isinstance(module, _BatchNorm)
        for batch in torch.randperm(len(task.train.labels), generator=generator)[: per_epoch * 64].split(64):
            images, labels = task.train.images[batch], task.train.labels[batch]
            flipped = torch.rand(64, generator=generator) < 0.5
            images[flipped.to(images.device)] = images[flipped.to(images.device)].flip(3)
            loss = F.cross_entropy(adapted(task.normalise(images)), labels, label_smoothing=recipe.smoothing)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            losses.append(loss.item())
    return adapted, sum(losses[-per_epoch:]) / per_epoch
