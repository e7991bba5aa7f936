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
from pathlib import Path
from typing import Any

import quickstart_report
import torch
from common import digits
from quickstart_methods import METHODS
from quickstart_saved import stored_bytes, verify
from quickstart_sweep import sweep
from quickstart_training import NEW, adapt, load, measure, pretrain
from transformers.utils import logging

from smn_peft.evaluation import library_versions


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
