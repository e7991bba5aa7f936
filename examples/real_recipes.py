# SPDX-License-Identifier: Apache-2.0
"""What `real_backbones.py` compares, and the table of it; not an example by itself."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from smn_peft.evaluation import format_fraction


@dataclass(frozen=True)
class Recipe:
    """How to adapt: what trains, from which head, by which optimizer.

    Attributes:
        label: Row of the table.
        lrs: Learning rates of the scores or weights to sweep.
        trains: "mask", "weights", or "lora", of rank 8 on the layers of the mask and scaled by 2.
        adam: Adam for scores or weights and not SGD with momentum 0.9; the head has SGD always.
        probe_head: Start the head from the linear probe, at learning rate 0.001 (a random one: 0.01).
        adapt_statistics: BatchNorm in train mode, re-estimating its statistics; False: the base's, frozen.
        warmup: Fraction of the steps with a rising learning rate, before the cosine.
        epochs: Passes over the training images, in batches of 64.
        smoothing: Label smoothing.
    """

    label: str
    lrs: tuple[float, ...]
    trains: str = "mask"
    adam: bool = True
    probe_head: bool = True
    adapt_statistics: bool = False
    warmup: float = 0.3
    epochs: int = 6
    smoothing: float = 0.0


def _full(name: str, *lrs: float, **more: Any) -> Recipe:
    return Recipe(f"full fine-tuning, {name}", lrs, trains="weights", adam=name == "Adam", **more)


LORA = Recipe("LoRA, rank 8", (1e-3, 3e-3, 1e-2), trains="lora")
VIT_MASK = Recipe("mask, Adam on the scores, head from the probe", (0.03, 0.06, 0.1))
RESNET_MASK = replace(VIT_MASK, label=f"{VIT_MASK.label}, statistics frozen")
VIT_PAPER = Recipe("mask, the paper's recipe (SGD, random head)", (3, 10, 30), adam=False, probe_head=False)
RESNET_PAPER = replace(
    VIT_PAPER,
    label="mask, the paper's recipe (SGD, random head, statistics adapt)",
    lrs=(10, 30, 100),
    adapt_statistics=True,
)
_RECIPE = replace(RESNET_MASK, label="the recipe", lrs=(0.1,))
RECIPES = {
    "vit": [_full("SGD", 0.001, 0.003, 0.01), _full("Adam", 1e-4, 3e-4, 1e-3), VIT_PAPER, VIT_MASK],
    "vit-bytes": [_full("Adam", 3e-4), LORA, replace(VIT_MASK, lrs=(0.06,))],
    "resnet": [
        _full("SGD", 0.003, 0.006, 0.012, adapt_statistics=True),
        _full("Adam", 3e-5, 1e-4, 3e-4),
        RESNET_PAPER,
        RESNET_MASK,
    ],
    "resnet-effects": [
        _RECIPE,
        replace(_RECIPE, label="SGD, not Adam", adam=False, lrs=(10, 30, 100)),
        replace(_RECIPE, label="random head", probe_head=False),
        replace(_RECIPE, label="statistics adapt", adapt_statistics=True),
        replace(_RECIPE, label="no warm-up", warmup=0.0),
        replace(_RECIPE, label="label smoothing 0.1", smoothing=0.1),
        replace(_RECIPE, label="12 epochs", epochs=12),
        replace(_RECIPE, label="learning rate 0.06", lrs=(0.06,)),
    ],
}


def chosen_runs(runs: list[dict[str, Any]], recipe: str) -> list[dict[str, Any]]:
    """The runs of a recipe at the learning rate that was best on validation."""
    mine = [run for run in runs if run["recipe"] == recipe]
    best = max((run for run in mine if run["seed"] == 0), key=lambda run: run["validation"])["lr"]
    return [run for run in mine if run["lr"] == best]


def accuracy(fractions: Sequence[float]) -> str:
    """Mean in percent, and the spread of several seeds."""
    spread = statistics.stdev(fractions) if len(fractions) > 1 else None
    return format_fraction(statistics.mean(fractions), spread)


def method_rows(record: dict[str, Any]) -> list[dict[str, str]]:
    """A row per method of a record of `real_backbones.py`, or per form that a method can be saved in."""
    runs, columns = record["runs"], ("method", "learning rate", "test accuracy %", "density", "bytes")
    frozen = {"k-NN": record["knn"], "linear probe": record["probe"]}
    rows = [{"method": f"frozen, {name}", "test accuracy %": accuracy([value])} for name, value in frozen.items()]
    for recipe in dict.fromkeys(run["recipe"] for run in runs):
        chosen = chosen_runs(runs, recipe)
        density = f"{statistics.mean(run['density'] for run in chosen):.4f}" if "density" in chosen[0] else ""
        for form in chosen[0].get("forms", {"": None}):
            sizes = [run["forms"][form] if form else {"total": run["bytes"]} for run in chosen]
            accuracies = [size.get("test", run["test"]) for size, run in zip(sizes, chosen, strict=True)]
            size = f"{statistics.mean(size['total'] for size in sizes):,.0f}"
            label = f"{recipe}, {form}" if form else recipe
            cells = (label, f"{chosen[0]['lr']:g}", accuracy(accuracies), density, size)
            rows.append(dict(zip(columns, cells, strict=True)))
    return [{column: row.get(column, "") for column in columns} for row in rows]
