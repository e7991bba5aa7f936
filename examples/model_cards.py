# SPDX-License-Identifier: Apache-2.0
"""The cards of the adapters behind README's tables, rendered from the records; run it to write `model_cards/`.

A tool for maintainers, not an example by itself.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import quickstart_methods
import real_resnet
import real_vit
from transfer import Recipe

from smn_peft.evaluation import EvalReport
from smn_peft.hub import AdapterFacts, render_card
from smn_peft.storage import AdapterSizes
from smn_peft.training import load_recipe

HERE = Path(__file__).resolve().parent
CARDS = HERE.parent / "model_cards"
LOSSY = "CIFAR-10 (lossy JPEG)"
IMAGES = (
    "Trained on 2,000 images of CIFAR-10 in lossy JPEG, enlarged: no number here compares with others' on CIFAR-10."
)
VIT = {
    "title": "ViT-Tiny",
    "base": "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "base_id": "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "note": "The base's matrices were rounded to fp16 once: the Hub's own weights differ in the last bits and are "
    "refused.",
}
RESNET = {
    "title": "ResNet-50 v2, stages 1 to 3",
    "base": "ResNet-50 v2 of the ONNX model zoo, stages 1 to 3",
    "base_id": None,
    "note": "The base's matrices were rounded to fp16 once, and it has no repository on the Hub.",
}


def _report(label: str, metric: str, values: Sequence[float], dataset: str = LOSSY, **settings: Any) -> EvalReport:
    seeds = range(len(values)) if len(values) > 1 else ()
    return EvalReport(label, dataset, "test", metric, tuple(values), tuple(seeds), settings=settings, versions={})


def _shown(options: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in options.items()}


def _best(runs: list[dict[str, Any]], label: str) -> list[dict[str, Any]]:
    """The seeds of a recipe at the learning rate that was best on validation with the first."""
    mine = [run for run in runs if run["recipe"] == label]
    lr = max((run for run in mine if run["seed"] == 0), key=lambda run: run["validation"])["lr"]
    return [run for run in mine if run["lr"] == lr]


def with_labels(name: str, recipe: Recipe, base: Mapping[str, Any]) -> AdapterFacts:
    """The mask of `real_vit.py` or `real_resnet.py`."""
    record = json.loads((HERE / "records" / f"{name}.json").read_text("utf-8"))
    runs, full = _best(record["runs"], recipe.label), _best(record["runs"], "full fine-tuning, Adam")
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
        recipe=_shown({"lr": first["lr"], **options, "seeds": len(runs)}),
        reports=[_report("this adapter", "accuracy", [run["test"] for run in runs])],
        baselines=[
            _report("frozen base", "knn", [record["knn"]]),
            _report("frozen base", "linear_probe", [record["probe"]]),
            _report("full fine-tuning, Adam", "accuracy", [run["test"] for run in full]),
        ],
        code=f"\nbase = ...  # backbone, standardised features and head, as examples/{name}.py makes them",
        notes=[IMAGES, base["note"], "Tested on 4,000 images of the test split; sizes are those of the first seed."],
    )


def without_labels(backbone: str, base: Mapping[str, Any]) -> AdapterFacts:
    """The mask of `without_labels.py`; its record has the file's size but not how it is split."""
    record = json.loads((HERE / "records" / "swav_small.json").read_text("utf-8"))
    rows = [row for row in record["without_labels"] if row["backbone"] == backbone]
    recipe = load_recipe("swav-small")
    shown = {
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
        recipe=_shown({**shown, "image_size": rows[0]["image_size"], "steps": rows[0]["steps"], "seeds": len(rows)}),
        reports=[_report("this adapter", "knn", [row["after"] for row in rows], k=200)],
        baselines=[_report("frozen base", "knn", [rows[0]["before"]], k=200)],
        code="\nbase = ...  # the backbone that examples/without_labels.py names",
        notes=[IMAGES, base["note"], "k-NN votes with the labels of the training images, on 2,000 test images."],
    )


def quickstart(method: str) -> AdapterFacts:
    """A mask of `make quickstart`."""
    record = json.loads((HERE / "quickstart.json").read_text("utf-8"))
    rows = {row["method"]: row for row in record["rows"]}
    row, full, chosen = rows[method], rows["full fine-tuning"], quickstart_methods.METHODS[method]
    dataset = "digits 5 to 9 of scikit-learn"
    frozen = {"knn": record["frozen"]["knn"], "linear_probe": record["frozen"]["probe"]}
    names = {"accuracy": "accuracy"} if chosen.labels else {"knn": "knn", "probe": "linear_probe"}
    reports = [_report("this adapter", metric, row[key], dataset) for key, metric in names.items()]
    baselines = [_report("frozen base", metric, [value], dataset) for metric, value in frozen.items()]
    if chosen.labels:
        baselines.append(_report("full fine-tuning", "accuracy", full["accuracy"], dataset))
    options = {**chosen.settings, "epochs": row["epochs"], "batch_norm": chosen.batch_norm}
    return AdapterFacts(
        title="A narrow ResNet-18 masked for digits" + ("" if chosen.labels else " without labels"),
        sizes=AdapterSizes(**row["bytes"]),
        base="a narrow ResNet-18 trained on the digits 0 to 4",
        full_bytes=full["bytes"]["total"],
        density=statistics.mean(row["density"]),
        dataset=dataset,
        objective="cross_entropy" if chosen.labels else "swav",
        recipe=_shown({**options, "images": record["images"]["train"], "seeds": len(row["density"])}),
        reports=reports,
        baselines=baselines,
        code="\nbase = ...  # the base that examples/quickstart.py trains",
        versions=record["versions"],
        notes=["A toy of 8 × 8 pixels, to show the method in minutes."],
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
