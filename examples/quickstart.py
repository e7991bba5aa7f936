# SPDX-License-Identifier: Apache-2.0
"""Adapt a small ResNet to classes it never saw by learning one bit per weight, and compare (`make quickstart`).

A narrow ResNet-18 is trained on the handwritten digits 0–4. For the digits 5–9 the script then compares its frozen
features (k-NN, linear probe) with full fine-tuning and with masks trained for as many epochs, saves the masks, and
loads them back in a fresh process. It needs no network, and a minute or two on one CPU core.

It shows how the method is used, and reproduces no number of the paper, whose networks and datasets are larger.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import common
import peft
import quickstart_report
import timm
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset, random_split

from smn_peft import MaskConfig, __version__
from smn_peft.storage import adapter_sizes

MODEL = {"model_name": "resnet18", "channels": [16, 32, 64, 128], "in_chans": 1, "num_classes": 5}
OLD, NEW = range(5), range(5, 10)
BATCH = 32


class Recipe(NamedTuple):
    """What is adapted beside the head, with which optimizer, and at which learning rates."""

    what: str
    optimizer: Callable[..., torch.optim.Optimizer]
    lr: float
    head_lr: float
    swept: tuple[float, ...] = ()


sgd = partial(torch.optim.SGD, momentum=0.9)
# Learning rates were chosen with --sweep, on a validation part of the training images.
RECIPES = {
    "new head, statistics adapt": Recipe("statistics", sgd, 0.0, 0.1),
    "full fine-tuning": Recipe("weights", sgd, 0.2, 0.1, (0.01, 0.03, 0.1, 0.2, 0.4)),
    "mask, the defaults": Recipe("frozen", torch.optim.Adam, 0.1, 0.01, (0.03, 0.1, 0.2, 0.4)),
    "mask, the paper's recipe": Recipe("adapt", sgd, 20.0, 0.1, (10.0, 20.0, 40.0, 80.0, 160.0)),
}


def load_base(folder: Path) -> nn.Module:
    """The base model, rebuilt from its configuration and its weights."""
    config = json.loads((folder / "config.json").read_text())
    model = timm.create_model(**config, checkpoint_path=folder / "model.safetensors").eval()
    model.name_or_path = str(folder)  # else the adapter would name timm's own weights as its base
    return model


def pretrain(folder: Path, epochs: int) -> float:
    """Train the base on the old digits and save it; returns its accuracy on them."""
    torch.manual_seed(0)
    train, test = common.digits(OLD)
    model = timm.create_model(**MODEL)
    optimizer = sgd(model.parameters(), lr=0.05, weight_decay=5e-4)
    common.fit(model, common.batches(train, BATCH, train=True), epochs, optimizer, label="pretrain on 0–4")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(MODEL))
    save_file(model.state_dict(), folder / "model.safetensors")
    return common.accuracy(model, common.batches(test, 100))


def adapt(recipe: Recipe, base: Path, train: Dataset, epochs: int, seed: int) -> tuple[nn.Module, float]:
    """Adapt the base, with a new head, to the new digits; returns the model and the seconds it took."""
    torch.manual_seed(seed)
    model = load_base(base)
    model.reset_classifier(len(NEW))
    if recipe.what in ("frozen", "adapt"):
        model = get_peft_model(model, MaskConfig(modules_to_save=["fc"], batch_norm=recipe.what))
    elif recipe.what == "statistics":  # a control: all that a mask adapter has but the mask
        model.requires_grad_(False).fc.requires_grad_(True)
    optimizer = recipe.optimizer(common.param_groups(model, recipe.lr, recipe.head_lr, head="fc"))
    loader = common.batches(train, BATCH, train=True)
    return model, common.fit(model, loader, epochs, optimizer, label=f"{recipe.what}, seed {seed}")["seconds"]


def sweep(base: Path, epochs: int, seeds: int) -> None:
    """Print the accuracy of each learning rate on 100 of the training images, held out; test images take no part."""
    for method, recipe in RECIPES.items():
        for lr in recipe.swept:
            found = []
            for seed in range(seeds):
                part, held = random_split(common.digits(NEW)[0], (396, 100), torch.Generator().manual_seed(seed))
                model, _ = adapt(recipe._replace(lr=lr), base, part, epochs, seed)
                found.append(common.accuracy(model, common.batches(held, 100)))
            words = f"{statistics.mean(found):.3f} ({', '.join(f'{value:.2f}' for value in found)})"
            print(f"{method}, lr {lr:g}: validation accuracy {words}", flush=True)


def stored_bytes(model: nn.Module, folder: Path) -> dict[str, int]:
    """Bytes to keep beside the base, or in its place; a mask is saved in `folder`, and its file counted."""
    if isinstance(model, PeftModel):
        model.save_pretrained(folder)
        logits, _ = common.predict(model, common.batches(common.digits(NEW)[1], 100))
        save_file({"logits": logits}, folder / "logits.safetensors")
        return vars(adapter_sizes(folder))
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in model.state_dict().items()}
    if all(parameter.requires_grad for parameter in model.parameters()):
        return {"total": sum(sizes.values())}
    head = sizes["fc.weight"] + sizes["fc.bias"]
    buffers = sum(sizes[name] for name, _ in model.named_buffers())
    return {"head": head, "statistics": buffers, "total": head + buffers}


def run(method: str, folder: Path, epochs: int, seeds: int) -> dict[str, Any]:
    """Adapt once per seed and test; a mask of the last seed is saved with the logits that it gives."""
    train, test = common.digits(NEW)
    recipe = RECIPES[method]
    row: dict[str, Any] = {"method": method, "lr": recipe.lr, "accuracy": [], "seconds": [], "density": []}
    for seed in range(seeds):
        model, seconds = adapt(recipe, folder / "base", train, epochs, seed)
        row["accuracy"].append(common.accuracy(model, common.batches(test, 100)))
        row["seconds"].append(seconds)
        row["density"] += [model.density()] if isinstance(model, PeftModel) else []
    row["trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    row["bytes"] = stored_bytes(model, folder / f"mask-{recipe.what}")
    print(f"{method}: accuracy {', '.join(f'{value:.3f}' for value in row['accuracy'])}", flush=True)
    return row


def compare(folder: Path, epochs: int, seeds: int) -> dict[str, Any]:
    """Run every method; returns all that was measured."""
    start = time.perf_counter()
    old = pretrain(folder / "base", epochs)
    base = load_base(folder / "base")
    base.reset_classifier(0)
    train, test = (common.batches(part, 100) for part in common.digits(NEW))
    features = (*common.extract_features(base, train), *common.extract_features(base, test))
    knn, (probe, *head) = common.knn_accuracy(*features), common.linear_probe(*features)
    numbers = sum(tensor.numel() for tensor in head)
    size = {"head": 4 * numbers, "total": 4 * numbers}
    rows = [
        {"method": "frozen, k-NN (k = 200)", "accuracy": [knn], "trained": 0, "bytes": {"total": 0}},
        {"method": "frozen, linear probe", "accuracy": [probe], "trained": numbers, "bytes": size},
        *(run(method, folder, epochs, seeds) for method in RECIPES),
    ]
    check = subprocess.run([sys.executable, __file__, "--verify", str(folder)], capture_output=True, text=True)
    print(check.stdout + check.stderr, end="", flush=True)
    packages = {
        "smn_peft": __version__,
        "peft": peft.__version__,
        "timm": timm.__version__,
        "torch": torch.__version__,
    }
    return {
        "rows": rows,
        "old_accuracy": old,
        "knn_20_accuracy": common.knn_accuracy(*features, k=20),
        "reload_identical": check.returncode == 0,
        "images": {"train": len(train.dataset), "test": len(test.dataset)},
        "epochs": epochs,
        "seconds": time.perf_counter() - start,
        "versions": {**packages, "python": platform.python_version()},
    }


def verify(folder: Path) -> bool:
    """Rebuild base and adapters from their files, and compare their logits with those of the process that trained."""
    same = []
    for saved in sorted(folder.glob("mask-*/logits.safetensors")):
        model = PeftModel.from_pretrained(load_base(folder / "base"), saved.parent)
        logits = common.predict(model, common.batches(common.digits(NEW)[1], 100))[0]
        same.append(torch.equal(logits, load_file(saved)["logits"]))
        words = "identical to the bit" if same[-1] else "NOT identical"
        print(f"Reloaded {saved.parent.name} in a fresh process: {logits.numel()} logits {words}.", flush=True)
    return bool(same) and all(same)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="one seed and few epochs: to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured to FILE")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep base and adapters in DIR, a new folder")
    parser.add_argument("--readme", action="store_true", help="render README.md from the record (--json), run nothing")
    parser.add_argument(
        "--sweep", action="store_true", help="try learning rates on a validation part, run nothing else"
    )
    parser.add_argument(
        "--verify", type=Path, metavar="DIR", help="check the adapters of an --out DIR, run nothing else"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)  # a model this small gains little from more, and waits for them on a busy machine
    epochs, seeds = (2, 1) if args.fast else (12, 3)
    if args.readme:
        quickstart_report.render_readme(args.json or quickstart_report.RECORD)
        return
    if args.verify:
        sys.exit(not verify(args.verify))
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.out or Path(temporary) / "quickstart"
        if args.sweep:
            pretrain(folder / "base", epochs)
            sweep(folder / "base", epochs, seeds)
            return
        record = compare(folder, epochs, seeds)
    print(f"\n{quickstart_report.render(record)}")
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    sys.exit(not record["reload_identical"])


if __name__ == "__main__":
    main()
