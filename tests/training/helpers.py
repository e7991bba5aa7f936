# SPDX-License-Identifier: Apache-2.0
"""Small parts that the training tests share: a masked model, images, and a loader that is a list of batches."""

from __future__ import annotations

import signal
from typing import Any

import timm
import torch
from peft import get_peft_model
from torch import nn

from smn_peft import MaskConfig
from smn_peft.backbones import Classifier
from smn_peft.objectives import create_objective
from smn_peft.training import LoopArguments, Trainer, TrainingTask

CLASSES = 3


class Batches:
    """Batches of random labelled images, shuffled per epoch, as `smn_peft.data.build_loader` gives them."""

    def __init__(
        self, count: int = 32, batch_size: int = 8, rank: int = 0, processes: int = 1, views: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(count, 3, 32, 32, generator=generator)
        self.labels = torch.arange(count) % CLASSES
        self.images += 2 * self.labels.view(-1, 1, 1, 1)
        self.batch_size, self.rank, self.processes, self.views = batch_size, rank, processes, views
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        self.epoch, self.start = epoch, start_batch

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def __iter__(self) -> Any:
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(self.epoch))
        for batch in order[: len(self) * self.batch_size].split(self.batch_size)[self.start :]:
            share = batch.tensor_split(self.processes)[self.rank]
            item: dict[str, Any] = {"index": share, "labels": self.labels[share]}
            if self.views:
                item["crops"] = [self.images[share].roll(shift, 3) for shift in range(self.views)]
            else:
                item["pixel_values"] = self.images[share]
            yield item


def resnet() -> nn.Module:
    torch.manual_seed(0)
    # Without zero_init_last the blocks do something before they are trained.
    options = {"layers": [1, 1], "channels": [8, 16], "zero_init_last": False}
    model = timm.create_model("resnet18", num_classes=0, drop_path_rate=0.1, **options)
    model.layer3, model.layer4 = nn.Sequential(), nn.Sequential()
    return model


def supervised_task(batch_norm: str = "adapt", **mask: Any) -> TrainingTask:
    model = Classifier(resnet(), 16, CLASSES)
    model = get_peft_model(model, MaskConfig(batch_norm=batch_norm, modules_to_save=["head"], **mask))
    return TrainingTask(model, create_objective("cross_entropy", feature_dim=16, num_classes=CLASSES))


def small() -> nn.Module:
    """A network that compiles in a moment."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(1))


def swav_task(batch_norm: str = "adapt", **mask: Any) -> TrainingTask:
    model = get_peft_model(resnet(), MaskConfig(batch_norm=batch_norm, **mask))
    torch.manual_seed(1)
    options = {
        "hidden_dim": 16,
        "output_dim": 8,
        "prototypes": 6,
        "queue_length": 16,
        "queue_from_step": 2,
        "freeze_prototypes_steps": 3,
    }
    return TrainingTask(model, create_objective("swav", feature_dim=16, options=options))


def stop_after(trainer: Trainer, steps: int) -> None:
    """Press Ctrl-C in step `steps`."""
    objective = trainer.task.objective
    hook = objective.after_backward

    def press(step: int) -> None:
        hook(step)
        if step == steps - 1:
            signal.raise_signal(signal.SIGINT)

    objective.after_backward = press


def loop(folder: Any, **options: Any) -> LoopArguments:
    defaults = {"output_dir": str(folder), "epochs": 3, "batch_size": 8, "lr": 5.0, "head_lr": 0.1, "cpu": True}
    return LoopArguments(**{**defaults, "log_every": 1, **options})
