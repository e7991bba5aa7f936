# SPDX-License-Identifier: Apache-2.0
"""Adapt a small ResNet to classes it never saw by learning one bit per weight, and compare (`make quickstart`).

A narrow ResNet-18 is trained on the handwritten digits 0–4. The script then masks it for the digits 5–9, with labels
(cross-entropy) and without (SwAV), and compares: k-NN and linear probe on the frozen features, full fine-tuning, and
controls that have all but the mask. It saves the masks and loads them back in a fresh process, without a network.

It shows how the method is used, and reproduces no number of the paper, whose networks and datasets are larger.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import logging

from smn_peft import MaskConfig
from smn_peft.backbones import load_backbone, load_classifier
from smn_peft.data import ImageDataset, build_loader, evaluation_transform, multi_crop_transform
from smn_peft.evaluation import (
    evaluate_accuracy,
    evaluate_knn,
    extract_features,
    library_versions,
    linear_probe,
    markdown_table,
)
from smn_peft.objectives import create_objective
from smn_peft.storage.adapter_file import adapter_sizes
from smn_peft.training import LoopArguments, Trainer, TrainingTask

OLD, NEW = range(5), range(5, 10)
NORM = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as timm makes its ResNet-18
PLAIN = evaluation_transform(32, *NORM)
# Crops show a digit in parts and sizes, and the jitter keeps the amount of ink from giving it away.
CROPS = {"global_size": 32, "global_scale": (0.5, 1.0), "local_crops": 0, "jitter": (0.4, 0.4, 0.0, 0.0)}
VIEWS = multi_crop_transform(*NORM, **CROPS, flip=0, grayscale=0, blur=0)
VERSIONS = ("smn_peft", "peft", "timm", "torch", "python")
# For a few hundred images: fewer prototypes than a batch has images, harder codes, no queue.
SWAV = {"prototypes": 50, "hidden_dim": 512, "epsilon": 0.02, "queue_length": 0, "freeze_prototypes_steps": 0}


@dataclass(frozen=True)
class Method:
    """How the base is adapted.

    Attributes:
        name: Short, for folders.
        trains: "mask", "weights", or "statistics": a control with all that a mask has but the mask.
        settings: Fields of `LoopArguments`.
        labels: Whether it learns by cross-entropy with a new head, or by SwAV without labels.
        batch_norm: Of the mask.
    """

    name: str
    trains: str
    settings: Mapping[str, Any]
    labels: bool = True
    batch_norm: str = "adapt"


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


class _Pngs:
    """Grey images (n, height, width) in uint8 as the files that an `ImageDataset` reads."""

    def __init__(self, images: Tensor) -> None:
        self.files = []
        for image in images:
            Image.fromarray(image.numpy()).save(file := io.BytesIO(), "png")
            self.files.append(file.getvalue())

    def read(self, row: int) -> tuple[bytes, str]:
        return self.files[row], f"digit {row}"


@functools.cache
def digits(classes: Sequence[int]) -> tuple[ImageDataset, ImageDataset]:
    """Training and test part (400 images) of scikit-learn's digits at 32 px; labels count from 0 in `classes`."""
    data = load_digits()
    chosen = torch.isin(torch.tensor(data.target), torch.tensor(classes))
    images = torch.tensor(data.images, dtype=torch.float32)[chosen, None] * (255 / 16)
    images = F.interpolate(images, size=(32, 32), mode="bilinear").round().to(torch.uint8)
    labels = torch.tensor([classes.index(label) for label in data.target[chosen.numpy()]])
    parts = train_test_split(torch.arange(len(labels)), test_size=400, random_state=0, stratify=labels)
    facts = {"classes": [str(digit) for digit in classes], "name": "digits"}
    source = _Pngs(images[:, 0])
    train, test = (
        ImageDataset(source, labels=labels[rows], split=split, rows=rows, **facts).cached()
        for split, rows in zip(("train", "test"), parts, strict=True)
    )
    return train, test


def load(base: Path, head: bool, seed: int = 0) -> nn.Module:
    """The base from its folder, with a new head for the new digits or without."""
    backbone = load_backbone(base)
    return load_classifier(backbone, len(NEW), head_seed=seed).model if head else backbone.model


def fit(model: nn.Module, objective: Any, images: ImageDataset, transform: Any, folder: Path, **settings: Any) -> None:
    """Train on one CPU process; metrics.jsonl is written in `folder`."""
    settings["warmup_epochs"] = settings["epochs"] / 4
    arguments = LoopArguments(str(folder), cpu=True, keep_checkpoints=0, **settings)
    loader = build_loader(images, transform, arguments.batch_size, seed=arguments.seed)
    Trainer(TrainingTask(model, objective), loader, arguments).train()
    model.eval()


def pretrain(folder: Path, epochs: int) -> float:
    """Train the base on the old digits and save it without its head; returns its accuracy on them."""
    torch.manual_seed(0)
    train, test = digits(OLD)
    backbone = load_backbone("resnet18", pretrained=False, image_size=32, channels=(16, 32, 64, 128))
    model = load_classifier(backbone, len(OLD)).model.requires_grad_(True)
    objective = create_objective("cross_entropy", feature_dim=backbone.feature_dim, num_classes=len(OLD))
    settings = {"lr": 0.05, "head_lr": 0.05, "weight_decay": 5e-4, "head_weight_decay": 5e-4, "batch_size": 32}
    fit(model, objective, train, PLAIN, folder / "log", epochs=epochs, **settings)
    model.backbone.save_pretrained(folder / "base")
    return measure(model, True, train, test)["accuracy"]


def adapt(method: Method, folder: Path, train: ImageDataset, epochs: int, seed: int) -> Any:
    """Adapt the base to the new digits; returns the model."""
    torch.manual_seed(seed)
    model: Any = load(folder / "base", method.labels, seed)
    body = model.backbone if method.labels else model
    if method.trains == "mask":
        kept = ["head"] if method.labels else None
        model = get_peft_model(model, MaskConfig(modules_to_save=kept, batch_norm=method.batch_norm))
    else:
        model.requires_grad_(method.trains == "weights")
        if method.labels:
            model.head.requires_grad_(True)
    # The trainer holds the statistics of a backbone of which nothing trains; this, at learning rate 0, lets them move.
    if method.trains == "statistics":
        list(body.parameters())[-1].requires_grad_(True)
    kind, options = ("cross_entropy", {}) if method.labels else ("swav", SWAV)
    objective = create_objective(kind, feature_dim=128, num_classes=len(NEW), options=options)
    images, views = (train, PLAIN) if method.labels else (train.without_labels(), VIEWS)
    fit(model, objective, images, views, folder / "log", epochs=epochs, seed=seed, **method.settings)
    if method.trains == "statistics":
        body.requires_grad_(False)
    return model


def measure(model: nn.Module, head: bool, train: ImageDataset, test: ImageDataset) -> dict[str, float]:
    """Accuracy of a classifier; of a model without head k-NN and a linear probe on its features."""
    if head:
        return {"accuracy": evaluate_accuracy(extract_features(model, test, PLAIN, function=model)).top1}
    seen, new = (extract_features(model, part, PLAIN) for part in (train, test))
    knn, knn_20 = (evaluate_knn(seen, new, k=k) for k in (200, 20))
    return {"knn": knn, "knn_20": knn_20, "probe": linear_probe(seen, new)}


def stored_bytes(model: nn.Module, folder: Path, head: bool) -> dict[str, int]:
    """Bytes to keep beside the base, or in its place; a mask is saved in `folder` with what it computes."""
    if isinstance(model, PeftModel):
        model.save_pretrained(folder)
        outputs = extract_features(model, digits(NEW)[1], PLAIN, function=model if head else None)
        save_file({"logits" if head else "features": outputs.features}, folder / "outputs.safetensors")
        return vars(adapter_sizes(folder))
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in model.state_dict().items()}
    if all(parameter.requires_grad for parameter in model.parameters()):
        return {"total": sum(sizes.values())}
    head_size = sum(size for name, size in sizes.items() if name.startswith("head."))
    buffers = sum(sizes[name] for name, _ in model.named_buffers() if not name.startswith("head."))
    return {"head": head_size, "statistics": buffers, "total": head_size + buffers}


def verify(folder: Path) -> bool:
    """Rebuild base and adapters from their files, and compare their outputs with those of the process that trained."""
    same = []
    for saved in sorted(folder.glob("mask-*/outputs.safetensors")):
        ((kind, expected),) = load_file(saved).items()
        model = PeftModel.from_pretrained(load(folder / "base", head=kind == "logits"), saved.parent)
        function = model if kind == "logits" else None
        outputs = extract_features(model, digits(NEW)[1], PLAIN, function=function).features
        same.append(torch.equal(outputs, expected))
        words = "identical to the bit" if same[-1] else "NOT identical"
        print(f"Reloaded {saved.parent.name} in a fresh process: {outputs.numel()} {kind} {words}.", flush=True)
    return bool(same) and all(same)


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


def _cpu_seconds() -> float:
    return sum(os.times()[:4])  # of this process and of those it waited for: what a busy machine does not change


def compare(folder: Path, epochs: int, seeds: int) -> dict[str, Any]:
    """Run every method; returns all that was measured."""
    start = _cpu_seconds()
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
        "cpu_seconds": _cpu_seconds() - start,
        "versions": library_versions(),
    }


def _mean(values: Sequence[float]) -> str:
    """Mean and, of several, standard deviation, in percent."""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def _cells(row: Mapping[str, Any], measures: Mapping[str, str], checkpoint: int) -> dict[str, str]:
    sizes = {part: row["bytes"].get(part) for part in ("mask", "head", "statistics", "total")}
    return {
        "method": row["method"],
        **{words: _mean(row[key]) for key, words in measures.items()},
        "density": f"{_mean([statistics.mean(row['density'])])} %" if row.get("density") else "–",
        **{f"{part} kB": f"{size / 1000:,.1f}" if size else "–" for part, size in sizes.items()},
        "of full": f"{100 * sizes['total'] / checkpoint:.1f} %" if sizes["total"] else "–",
    }


def render(record: Mapping[str, Any]) -> str:
    """Markdown of a record: what was done, a table with labels, one without, and what it cost."""
    frozen, rows, images = record["frozen"], record["rows"], record["images"]
    by_method = {row["method"]: row for row in rows}
    full, mask, swav = (by_method[label] for label in ("full fine-tuning", "mask, the defaults", "SwAV, mask"))
    head = 4 * rows[0]["trained"]  # of a new head alone; a probe is one
    labelled = [
        {"method": "frozen, k-NN (k = 200)", "accuracy": [frozen["knn"]], "bytes": {}},
        {"method": "frozen, linear probe", "accuracy": [frozen["probe"]], "bytes": {"head": head, "total": head}},
        *(row for row in rows if row["labels"]),
    ]
    bare = {"method": "frozen", "bytes": {}, **{name: [value] for name, value in frozen.items()}}
    unlabelled = [bare, *(row for row in rows if not row["labels"])]
    features = {"knn": "k-NN %", "knn_20": "k-NN %, k = 20", "probe": "linear probe %"}
    tables = ((labelled, {"accuracy": "accuracy %"}), (unlabelled, features))
    same = "gave outputs identical to the bit" if record["reload_identical"] else "DID NOT GIVE THE SAME OUTPUTS"
    versions = [f"{name} {version}" for name, version in record["versions"].items() if name in VERSIONS]
    seeds = len(mask["accuracy"])
    spread = f"mean and standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    return "\n\n".join(
        [
            f"A narrow ResNet-18, trained on the handwritten digits 0–4 until {_mean([record['old_accuracy']])} % of "
            f"them are right, is adapted to the digits 5–9 with {images['train']} images and tested on "
            f"{images['test']} others: {mask['epochs']} epochs with labels, {swav['epochs']} by SwAV without, "
            f"{spread}.",
            *(markdown_table([_cells(row, names, full["bytes"]["total"]) for row in part]) for part, names in tables),
            f"Base and masks, loaded from their files in a fresh process, {same}. All of it took "
            f"{record['cpu_seconds']:.0f} s of one CPU core, with "
            f"{', '.join(versions)}.",
        ]
    )


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
