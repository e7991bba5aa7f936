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
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import quickstart_report
import torch
from common import digits
from peft import PeftModel
from quickstart_methods import METHODS, NEW, PLAIN, adapt, load, measure, pretrain
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import logging

from smn_peft.evaluation import extract_features, library_versions
from smn_peft.storage import adapter_sizes


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


def run(label: str, folder: Path, epochs: int, seeds: int) -> dict[str, Any]:
    """Adapt once per seed and test; a mask of the last seed is saved with the outputs that it gives."""
    train, test = digits(NEW)
    method = METHODS[label]
    row: dict[str, Any] = {"method": label, "labels": method.labels, "lr": method.settings["lr"]}
    row |= {"epochs": epochs * method.epochs, "cpu_seconds": [], "density": []}
    for seed in range(seeds):
        start = time.process_time()
        model, log = adapt(method, folder, train, epochs, seed)
        row["cpu_seconds"].append(time.process_time() - start)
        row["density"] += [] if log["density"] is None else [log["density"]]
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


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="one seed and few epochs: to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured to FILE")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep base and adapters in DIR, a new folder")
    parser.add_argument("--readme", action="store_true", help="render README.md from the record (--json), run nothing")
    parser.add_argument("--sweep", action="store_true", help="try learning rates on a validation part instead")
    parser.add_argument("--verify", type=Path, metavar="DIR", help="check the adapters of an --out DIR instead")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a model this small gains little from more, and waits for them on a busy machine
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # PEFT asks transformers for it
    logging.disable_progress_bar()  # transformers', of writing and loading a small file
    epochs, seeds = (1, 1) if args.fast else (12, 3)
    if args.readme:
        quickstart_report.render_readme(args.json or quickstart_report.RECORD)
        return
    if args.verify:
        sys.exit(not verify(args.verify))
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.out or Path(temporary) / "quickstart"
        if args.sweep:
            pretrain(folder, epochs)
            sweep(folder, epochs, seeds)
            return
        record = compare(folder, epochs, seeds)
    print(f"\n{quickstart_report.render(record)}")
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    sys.exit(not record["reload_identical"])


if __name__ == "__main__":
    main()
