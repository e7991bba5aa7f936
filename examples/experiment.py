# SPDX-License-Identifier: Apache-2.0
"""Run recipes on a real backbone and print the table: k-NN, linear probe, then each recipe's best over three seeds.

Used by `real_vit.py`, `real_vit_bytes.py` and `real_resnet.py`; not an example by itself.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from cifar import Task, load_task
from torch import nn
from transfer import Classifier, accuracy, features, train
from transfer_recipe import Recipe
from transfer_report import render

from smn_peft.evaluation import Features, evaluate_knn, fit_linear_probe
from smn_peft.storage import AdapterSizes, adapter_sizes

__all__ = ["main"]

More = Callable[[nn.Module, Task], dict]
"""What else to measure of an adapted model: fields for the record."""


def run(
    start: Callable[[int], Classifier], task: Task, recipe: Recipe, lr: float, seed: int, targets: str, more: More
) -> dict:
    """One run: validation and test accuracy, density and sizes, and `more`."""
    began, model = time.perf_counter(), start(seed)
    if not recipe.probe_head:
        model.head.reset_parameters()
    adapted, loss = train(model, task, recipe, lr, seed, targets, f"{recipe.label}, lr {lr:g}, seed {seed}")
    row = {"recipe": recipe.label, "lr": lr, "seed": seed, "loss": loss}
    row |= {name: accuracy(adapted, task, getattr(task, name)) for name in ("validation", "test")}
    if recipe.mask:
        with tempfile.TemporaryDirectory() as folder:
            adapted.save_pretrained(folder)
            sizes: AdapterSizes = adapter_sizes(folder)
        row |= {"density": adapted.density(), "bytes": sizes.total, "mask_bytes": sizes.mask}
        row |= {"head_bytes": sizes.head, "statistics_bytes": sizes.statistics}
    else:
        row["bytes"] = sum(t.numel() * t.element_size() for t in adapted.state_dict().values())
    row |= more(adapted, task)
    row["seconds"] = time.perf_counter() - began
    print(
        ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
    )
    return row


def main(
    build: Callable[[], nn.Module],
    recipes: list[Recipe],
    effects: list[Recipe],
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    targets: str,
    more: More = lambda adapted, task: {},
) -> None:
    """Parse the command line, run, print, and write a record if asked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--effects", action="store_true", help="instead: the last recipe with one change at a time")
    parser.add_argument("--seeds", type=int, default=3, help="seeds at the best learning rate")
    parser.add_argument("--json", type=Path, help="file for the record of all runs")
    parser.add_argument("--smoke", action="store_true", help="a minute's run on 192 images, for tests")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="Could not find a config file")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    task = load_task(size, mean, std, (192, 64, 64) if options.smoke else (2000, 1000, 4000), device)
    frozen = build().to(device)
    splits = (task.train, task.validation, task.test)
    seen, validation, test = (Features(features(frozen, task, split), split.labels) for split in splits)
    probe = fit_linear_probe(seen, decays=(30, 100, 300, 1000), validation=validation, standardise=True)

    def start(seed: int) -> Classifier:
        torch.manual_seed(seed)
        model = Classifier(build().to(device), probe.mean, probe.std, classes=10).to(device)
        model.head.load_state_dict({"weight": probe.weight, "bias": probe.bias})
        return model

    rows = []
    for recipe in effects if options.effects else recipes:
        if options.smoke:
            recipe = replace(recipe, lrs=recipe.lrs[:1], epochs=1)
        mine = [run(start, task, recipe, lr, 0, targets, more) for lr in recipe.lrs]
        best = max(mine, key=lambda row: row["validation"])["lr"]
        seeds = range(1, 1 if options.smoke else options.seeds)
        mine += [run(start, task, recipe, best, seed, targets, more) for seed in seeds]
        rows += mine
    measured = {"knn": evaluate_knn(seen, test), "probe": probe.accuracy(test)}
    record = {**measured, "device": device, "runs": rows}
    print(render(record))
    if options.json:
        options.json.write_text(json.dumps(record, indent=1))
