# SPDX-License-Identifier: Apache-2.0
"""The cards of the adapters behind README's tables, rendered from the records; run it to write `model_cards/`.

A tool for maintainers, not an example by itself.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import real_resnet
import real_vit
from model_cards_parts import IMAGES, RESNET, VIT, report, shown
from model_cards_quickstart import quickstart
from transfer_recipe import Recipe
from transfer_rows import chosen_runs

from smn_peft.hub import AdapterFacts, render_card
from smn_peft.storage import AdapterSizes
from smn_peft.training import load_recipe

HERE = Path(__file__).resolve().parent
CARDS = HERE.parent / "model_cards"


def with_labels(name: str, recipe: Recipe, base: Mapping[str, Any]) -> AdapterFacts:
    """The mask of `real_vit.py` or `real_resnet.py`."""
    record = json.loads((HERE / "records" / f"{name}.json").read_text("utf-8"))
    runs, full = (
        chosen_runs([run for run in record["runs"] if run["recipe"] == label])
        for label in (recipe.label, "full fine-tuning, Adam")
    )
    first, options = runs[0], {k: v for k, v in asdict(recipe).items() if k not in ("label", "mask", "lrs")}
    parts = [first[f"{part}_bytes"] for part in ("mask", "head", "statistics")]
    return AdapterFacts(
        title=f"{base['title']} masked for CIFAR-10",
        sizes=AdapterSizes(*parts, 0, first["bytes"]),
        base=base["base"],
        base_id=base["base_id"],
        full_bytes=full[0]["bytes"],
        density=statistics.mean(run["density"] for run in runs),
        dataset="cifar10",
        objective="cross_entropy",
        recipe=shown({"lr": first["lr"], **options, "seeds": len(runs)}),
        reports=[report("this adapter", "accuracy", [run["test"] for run in runs])],
        baselines=[
            report("frozen base", "knn", [record["knn"]]),
            report("frozen base", "linear_probe", [record["probe"]]),
            report("full fine-tuning, Adam", "accuracy", [run["test"] for run in full]),
        ],
        code=f"\nbase = ...  # backbone, standardised features and head, as examples/{name}.py makes them",
        notes=[IMAGES, base["note"], "Tested on 4,000 images of the test split; sizes are those of the first seed."],
    )


def without_labels(backbone: str, base: Mapping[str, Any]) -> AdapterFacts:
    """The mask of `small_recipes.py`; its record has the file's size but not how it is split."""
    record = json.loads((HERE / "records" / "swav_small.json").read_text("utf-8"))
    rows = [row for row in record["rows"] if row["backbone"] == backbone]
    recipe = load_recipe("swav-small")
    options = {
        key: recipe[key]
        for key in ("objective", "optimizer", "lr", "head_lr", "batch_size", "warmup_epochs", "epochs")
    }
    return AdapterFacts(
        title=f"{base['title']} masked for CIFAR-10 without labels",
        sizes=AdapterSizes(0, 0, 0, 0, rows[0]["bytes"]),
        base=base["base"],
        base_id=base["base_id"],
        density=statistics.mean(row["density"] for row in rows),
        dataset="cifar10",
        objective="swav",
        recipe=shown({**options, "image_size": rows[0]["image_size"], "steps": rows[0]["steps"], "seeds": len(rows)}),
        reports=[report("this adapter", "knn", [row["after"] for row in rows], k=200)],
        baselines=[report("frozen base", "knn", [rows[0]["before"]], k=200)],
        code="\nbase = ...  # the backbone that examples/small_recipes.py names",
        notes=[IMAGES, base["note"], "k-NN votes with the labels of the training images, on 2,000 test images."],
    )


def cards() -> dict[str, str]:
    """File name -> card."""
    facts = {
        "vit-tiny-cifar10": with_labels("real_vit", real_vit.MASK, VIT),
        "resnetv2-50-cifar10": with_labels("real_resnet", real_resnet.MASK, RESNET),
        "vit-tiny-cifar10-swav": without_labels("vit", VIT),
        "resnetv2-50-cifar10-swav": without_labels("resnet", RESNET),
        "resnet18-digits": quickstart("mask, the defaults"),
        "resnet18-digits-swav": quickstart("SwAV, mask"),
    }
    return {f"{name}.md": str(render_card(found, f"smn-{name}")) for name, found in facts.items()}


if __name__ == "__main__":
    CARDS.mkdir(exist_ok=True)
    for name, text in cards().items():
        (CARDS / name).write_text(text, "utf-8")
