# SPDX-License-Identifier: Apache-2.0
"""What each learning rate of the quickstart's methods gives on images that are held out of training.

Used by `quickstart.py`; not an example by itself.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
from common import digits
from quickstart_methods import METHODS
from quickstart_training import NEW, adapt, measure

__all__ = ["sweep"]


def sweep(folder: Path, epochs: int, seeds: int) -> None:
    """Print what each learning rate gives on 100 of the training images, held out; test images take no part."""
    full = digits(NEW)[0]
    for label, method in METHODS.items():
        for lr in method.swept:
            found = []
            for seed in range(seeds):
                order = torch.randperm(len(full), generator=torch.Generator().manual_seed(seed))
                part, held = full.subset(order[100:]), full.subset(order[:100])
                model, _ = adapt(method.at(lr), folder, part, epochs, seed)
                found.append(next(iter(measure(model, method.labels, part, held).values())))
            words = f"{statistics.mean(found):.3f} ({', '.join(f'{value:.2f}' for value in found)})"
            print(f"{label}, lr {lr:g}: {words} on the validation part", flush=True)
