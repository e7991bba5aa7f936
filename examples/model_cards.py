# SPDX-License-Identifier: Apache-2.0
"""The cards of the adapters behind RESULTS.md, rendered from the records; run it to write `model_cards/`.

A tool for maintainers, not an example by itself.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import quickstart
import results
from real_recipes import RESNET_MASK, VIT_MASK

from smn_peft.evaluation import EvalReport
from smn_peft.hub import AdapterFacts, render_card
from smn_peft.storage.adapter_file import AdapterSizes
from smn_peft.training import load_recipe

CARDS = Path(__file__).resolve().parent.parent / "model_cards"
LOSSY = "CIFAR-10 (lossy JPEG)"
IMAGES = (
    "Trained on 2,000 images of CIFAR-10 in lossy JPEG, enlarged: no number here compares with others' on CIFAR-10."
)
BASES = {
    "vit": {
        "title": "ViT-Tiny",
        "base": "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        "base_id": "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        "note": "The base's matrices were rounded to fp16 once: the Hub's own weights differ in the last bits and are "
        "refused.",
    },
    "resnet": {
        "title": "ResNet-50 v2, stages 1 to 3",
        "base": "ResNet-50 v2 of the ONNX model zoo, stages 1 to 3",
        "base_id": None,
        "note": "The base's matrices were rounded to fp16 once, and it has no repository on the Hub.",
    },
}


def report(label: str, metric: str, values: Sequence[float], dataset: str = LOSSY, **settings: Any) -> EvalReport:
    """A report over seeds, or of one value."""
    seeds = range(len(values)) if len(values) > 1 else ()
    return EvalReport(label, dataset, "test", metric, tuple(values), tuple(seeds), settings=settings, versions={})


def shown(options: Mapping[str, Any]) -> dict[str, str]:
    """Settings as text."""
    return {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in options.items()}


def with_labels(backbone: str, recipe: Any) -> AdapterFacts:
    """The mask of `real_backbones.py`."""
    record, base = results.load(f"real_{backbone}"), BASES[backbone]
    runs, full = (results.chosen_runs(record["runs"], label) for label in (recipe.label, "full fine-tuning, Adam"))
    first, options = runs[0], asdict(recipe)
    names = ("adam", "probe_head", "adapt_statistics", "warmup", "epochs", "smoothing")
    return AdapterFacts(
        title=f"{base['title']} masked for CIFAR-10",
        sizes=AdapterSizes(*(first[f"{part}_bytes"] for part in ("mask", "head", "statistics")), 0, first["bytes"]),
        base=base["base"],
        base_id=base["base_id"],
        full_bytes=full[0]["bytes"],
        density=statistics.mean(run["density"] for run in runs),
        dataset="cifar10",
        objective="cross_entropy",
        recipe=shown({"lr": first["lr"], **{name: options[name] for name in names}, "seeds": len(runs)}),
        reports=[report("this adapter", "accuracy", [run["test"] for run in runs])],
        baselines=[
            report("frozen base", "knn", [record["knn"]]),
            report("frozen base", "linear_probe", [record["probe"]]),
            report("full fine-tuning, Adam", "accuracy", [run["test"] for run in full]),
        ],
        code="\nbase = ...  # backbone, standardised features and head, as examples/real_backbones.py makes them",
        notes=[IMAGES, base["note"], "Tested on 4,000 images of the test split; sizes are those of the first seed."],
    )


def without_labels(backbone: str) -> AdapterFacts:
    """The mask of `small_recipes.py`; its record has the file's size but not how it is split."""
    rows = [row for row in results.load("swav_small")["rows"] if row["backbone"] == backbone]
    base, recipe = BASES[backbone], load_recipe("swav-small")
    names = ("objective", "optimizer", "lr", "head_lr", "batch_size", "warmup_epochs", "epochs")
    options = {name: recipe[name] for name in names}
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


def of_quickstart(method: str) -> AdapterFacts:
    """A mask of `make quickstart`."""
    record = results.load("quickstart")
    rows, dataset = {row["method"]: row for row in record["rows"]}, "digits 5 to 9 of scikit-learn"
    row, full, chosen = rows[method], rows["full fine-tuning"], quickstart.METHODS[method]
    frozen = {"knn": record["frozen"]["knn"], "linear_probe": record["frozen"]["probe"]}
    names = {"accuracy": "accuracy"} if chosen.labels else {"knn": "knn", "probe": "linear_probe"}
    baselines = [report("frozen base", metric, [value], dataset) for metric, value in frozen.items()]
    if chosen.labels:
        baselines.append(report("full fine-tuning", "accuracy", full["accuracy"], dataset))
    options = {**chosen.settings, "epochs": row["epochs"], "batch_norm": chosen.batch_norm}
    return AdapterFacts(
        title="A narrow ResNet-18 masked for digits" + ("" if chosen.labels else " without labels"),
        sizes=AdapterSizes(**row["bytes"]),
        base="a narrow ResNet-18 trained on the digits 0 to 4",
        full_bytes=full["bytes"]["total"],
        density=statistics.mean(row["density"]),
        dataset=dataset,
        objective="cross_entropy" if chosen.labels else "swav",
        recipe=shown({**options, "images": record["images"]["train"], "seeds": len(row["density"])}),
        reports=[report("this adapter", metric, row[key], dataset) for key, metric in names.items()],
        baselines=baselines,
        code="\nbase = ...  # the base that examples/quickstart.py trains",
        versions=record["versions"],
        notes=["A toy of 8 × 8 pixels, to show the method in minutes."],
    )


def cards() -> dict[str, str]:
    """File name -> card."""
    facts = {
        "vit-tiny-cifar10": with_labels("vit", VIT_MASK),
        "resnetv2-50-cifar10": with_labels("resnet", RESNET_MASK),
        "vit-tiny-cifar10-swav": without_labels("vit"),
        "resnetv2-50-cifar10-swav": without_labels("resnet"),
        "resnet18-digits": of_quickstart("mask, the defaults"),
        "resnet18-digits-swav": of_quickstart("SwAV, mask"),
    }
    return {f"{name}.md": str(render_card(found, f"smn-{name}")) for name, found in facts.items()}


if __name__ == "__main__":
    CARDS.mkdir(exist_ok=True)
    for name, text in cards().items():
        (CARDS / name).write_text(text, "utf-8")
