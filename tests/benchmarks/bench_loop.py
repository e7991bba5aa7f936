# SPDX-License-Identifier: Apache-2.0
"""Images per second of the package's training loop against a bare PyTorch loop over the same model and batches.

Both train the same mask by cross-entropy, with the same loader, optimizer and schedule; the package's loop also logs,
seeds each step, guards against NaN and empty masks, and counts the density. Floor: the bare loop, ratio 1.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import torch
from common import BATCH, DEVICE, SHAPES, SIZE, masked
from recording import Recorder
from torch import nn

from smn_peft.data import build_loader, supervised_transform
from smn_peft.objectives import create_objective
from smn_peft.training import LoopArguments, Trainer, TrainingTask

STEPS, ROUNDS, LIMIT = 12, 7, 0.95
CLASSES = 100


class RandomImages:
    """Images in memory, as an `ImageDataset` gives them."""

    def __init__(self, count: int) -> None:
        """Draw `count` images of the benchmark's size."""
        self.images = torch.randint(256, (count, 3, SIZE, SIZE), dtype=torch.uint8)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Image, label and position."""
        return {"image": self.images[index], "label": index % CLASSES, "index": index}


def loader() -> Any:
    """Supervised batches, as a run has them."""
    transform = supervised_transform(SIZE, (0.5,) * 3, (0.5,) * 3)
    return build_loader(RandomImages(BATCH * STEPS), transform, BATCH)


def package_epoch(model: nn.Module, batches: Any) -> float:
    """Seconds of an epoch in the package's loop, without what is set up before it."""
    with tempfile.TemporaryDirectory() as folder:
        task = TrainingTask(model, create_objective("cross_entropy", feature_dim=1, num_classes=CLASSES))
        arguments = LoopArguments(
            output_dir=folder, epochs=1, batch_size=BATCH, lr=1.0, head_lr=1e-3, keep_checkpoints=0
        )
        trainer = Trainer(task, batches, arguments)
        start = time.perf_counter()
        trainer.train()
        return time.perf_counter() - start


def bare_epoch(model: nn.Module, batches: Any, optimizer: torch.optim.Optimizer) -> None:
    """What a PyTorch user would write."""
    model.train()
    batches.set_epoch(0)
    for batch in batches:
        loss = nn.functional.cross_entropy(model(batch["pixel_values"].to(DEVICE)), batch["labels"].to(DEVICE))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    """Run both loops in turn, an epoch each, and print the medians."""
    recorder = Recorder("loop", DEVICE)
    print(f"Training loop, batch {BATCH}, {SIZE} px, {DEVICE}, data loaded in the training process")
    print("| model | bare loop, images/s | package's loop, images/s | ratio | target |")
    print("|---|---|---|---|---|")
    for name in SHAPES:
        model, batches, times = masked(name), loader(), []
        groups = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for _ in range(ROUNDS + 1):
            seconds = package_epoch(model, batches)
            optimizer = torch.optim.SGD(groups, lr=1e-3, momentum=0.9)
            start = time.perf_counter()
            bare_epoch(model, batches, optimizer)
            times.append([BATCH * STEPS / seconds, BATCH * STEPS / (time.perf_counter() - start)])
        package, bare = (statistics.median(row[i] for row in times[1:]) for i in (0, 1))
        ratios = [a / b for a, b in times[1:]]
        ratio = recorder.add("images/s, package's loop / bare loop", name, ratios, better="higher", target=LIMIT)
        print(f"| {name} | {bare:.0f} | {package:.0f} | {ratio:.3f} | ≥ {LIMIT} |")


if __name__ == "__main__":
    main()
