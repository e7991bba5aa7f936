# SPDX-License-Identifier: Apache-2.0
"""Adapt a small ResNet to classes it never saw by learning one bit per weight, and compare (`make quickstart`).

A narrow ResNet-18 is trained on the handwritten digits 0–4. The script then masks it for the digits 5–9, with labels
(cross-entropy) and without (SwAV), and compares: k-NN and linear probe on the frozen features, full fine-tuning, and
controls that have all but the mask. It saves the masks and loads them back in a fresh process, without a network.

It shows how the method is used, and reproduces no number of the paper, whose networks and datasets are larger.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import get_peft_model
from quickstart_parts import NEW, NORM, PLAIN, digits, fit, load, measure, pretrain, stored_bytes, verify
from quickstart_table import render
from transformers.utils import logging

from smn_peft import MaskConfig
from smn_peft.data import ImageDataset, multi_crop_transform
from smn_peft.evaluation import library_versions
from smn_peft.objectives import create_objective

# Crops show a digit in parts and sizes, and the jitter keeps the amount of ink from giving it away.
CROPS = {"global_size": 32, "global_scale": (0.5, 1.0), "local_crops": 0, "jitter": (0.4, 0.4, 0.0, 0.0)}
VIEWS = multi_crop_transform(*NORM, **CROPS, flip=0, grayscale=0, blur=0)
# For a few hundred images: fewer prototypes than a batch has images, harder codes, no queue.
SWAV = {"prototypes": 50, "hidden_dim": 512, "epsilon": 0.02, "queue_length": 0, "freeze_prototypes_steps": 0}


class Method(NamedTuple):
    """How the base is adapted."""

    name: str
    trains: str  # "mask", "weights", or "statistics": a control with all that a mask has but the mask
    settings: Mapping[str, Any]  # of `LoopArguments`
    labels: bool = True  # cross-entropy with a new head, or SwAV
    batch_norm: str = "adapt"  # of the mask


# The learning rates were chosen on a held-out part of the training images.
_ADAM = {"optimizer": "adamw", "lr": 0.1, "head_lr": 0.01, "batch_size": 32}
_SGD = {"head_lr": 0.1, "batch_size": 32}
_SWAV = {"head_lr": 0.1, "batch_size": 64}
METHODS = {
    "new head, statistics adapt": Method("statistics", "statistics", {**_SGD, "lr": 0.0}),
    "full fine-tuning": Method("full", "weights", {**_SGD, "lr": 0.2}),
    "mask, the defaults": Method("frozen", "mask", _ADAM, batch_norm="frozen"),
    "mask, the paper's recipe": Method("adapt", "mask", {**_SGD, "lr": 20.0}),
    "SwAV, statistics adapt": Method("control", "statistics", {**_SWAV, "lr": 0.0}, labels=False),
    "SwAV, mask": Method("swav", "mask", {**_SWAV, "lr": 300.0}, labels=False),
}


def adapt(method: Method, folder: Path, train: ImageDataset, epochs: int, seed: int) -> Any:
    """Adapt the base to the new digits; returns the model."""
    torch.manual_seed(seed)
    model: Any = load(folder / "base", method.labels, seed)
    body = model.backbone if method.labels else model
    if method.trains == "mask":
        kept = ["head"] if method.labels else None
        model = get_peft_model(model, MaskConfig(modules_to_save=kept, batch_norm=method.batch_norm))
    else:
        body.requires_grad_(method.trains == "weights")
        # The trainer holds the statistics of a body of which nothing trains; this, at learning rate 0, lets them move.
        list(body.parameters())[-1].requires_grad_(True)
    kind, options = ("cross_entropy", {}) if method.labels else ("swav", SWAV)
    objective = create_objective(kind, feature_dim=128, num_classes=len(NEW), options=options)
    images, views = (train, PLAIN) if method.labels else (train.without_labels(), VIEWS)
    fit(model, objective, images, views, folder / "log", epochs=epochs, seed=seed, **method.settings)
    if method.trains == "statistics":
        body.requires_grad_(False)
    return model


def run(label: str, folder: Path, epochs: int, seeds: int) -> dict[str, Any]:
    """Adapt once per seed and test; a mask of the last seed is saved with the outputs that it gives."""
    (train, test), method = digits(NEW), METHODS[label]
    epochs *= 1 if method.labels else 2
    row: dict[str, Any] = {"method": label, "labels": method.labels, "lr": method.settings["lr"], "epochs": epochs}
    row |= {"cpu_seconds": [], "density": []}
    for seed in range(seeds):
        start = time.process_time()
        model = adapt(method, folder, train, epochs, seed)
        row["cpu_seconds"].append(time.process_time() - start)
        row["density"] += [model.density()] if method.trains == "mask" else []
        for name, value in measure(model, method.labels, train, test).items():
            row.setdefault(name, []).append(value)
    row["trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    row["bytes"] = stored_bytes(model, folder / f"mask-{method.name}", method.labels)
    what, key = ("accuracy", "accuracy") if method.labels else ("k-NN", "knn")
    print(f"{label}: {what} {', '.join(f'{value:.3f}' for value in row[key])}", flush=True)
    return row


def compare(folder: Path, epochs: int, seeds: int) -> dict[str, Any]:
    """Run every method; returns all that was measured."""
    start = sum(os.times()[:4])  # of this process and of those it waited for: what a busy machine does not change
    old = pretrain(folder, epochs)
    train, test = digits(NEW)
    frozen = measure(load(folder / "base", head=False), False, train, test)
    rows = [run(label, folder, epochs, seeds) for label in METHODS]
    check = subprocess.run([sys.executable, __file__, "--verify", str(folder)], capture_output=True, text=True)
    print(check.stdout + check.stderr, end="", flush=True)
    return {
        "rows": rows,
        "frozen": frozen,
        "old_accuracy": old,
        "reload_identical": check.returncode == 0,
        "images": {"train": len(train), "test": len(test)},
        "cpu_seconds": sum(os.times()[:4]) - start,
        "versions": library_versions(),
    }


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="one seed and few epochs: to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured to FILE")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep base and adapters in DIR, a new folder")
    parser.add_argument("--verify", type=Path, metavar="DIR", help="check the adapters of an --out DIR instead")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a model this small gains little from more, and waits for them on a busy machine
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # PEFT asks transformers for it
    logging.disable_progress_bar()  # transformers', of writing and loading a small file
    if args.verify:
        sys.exit(not verify(args.verify))
    with tempfile.TemporaryDirectory() as temporary:
        record = compare(args.out or Path(temporary) / "quickstart", *((1, 1) if args.fast else (12, 3)))
    print(f"\n{render(record)}")
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    sys.exit(not record["reload_identical"])


if __name__ == "__main__":
    main()
