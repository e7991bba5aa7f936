# SPDX-License-Identifier: Apache-2.0
"""A cascade of masks without labels on a real ViT-Tiny: dispatcher, router, K = 3 experts, and two controls.

SMN_ASSETS names a folder with the ViT-Tiny weights and `cifar10_jpeg.npz`. Each seed trains a dispatcher by the recipe
`swav-small` on 2,000 CIFAR-10 images, three experts on its clusters, and three more dispatchers with other seeds. The
table compares their embeddings, all of the dispatcher's dimension: the paper's two, and what it does not show,
whitening alone and as many masks without clusters. Lossy JPEGs of a small subset, six epochs and 3 experts where the
paper has 50,000 images, 150 epochs and 5: no number here compares with the paper's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cifar import assets_folder
from small_recipes import backbones

from smn_peft.cascade import Cascade, CascadeArguments, cascade_sizes, evaluate_cascade
from smn_peft.evaluation import EvalReport, merge_reports, report_table
from smn_peft.training import RunSummary, TrainArguments, load_recipe

EXPERTS = 3
SEED_STEP = 100  # a dispatcher of seed s is joined by those of s + 1, s + 2 …, which no other may share
IMAGES = {"limit": 2000, "eval_limit": 2000}
SMOKE = {"limit": 120, "eval_limit": 60, "max_steps": 1, "batch_size": 16, "mask": {"target_modules": ["attn.proj"]}}


def one(assets: Path, folder: Path, seed: int, smoke: bool) -> tuple[dict[str, Any], list[EvalReport]]:
    """Train a cascade and its ensemble, as far as an earlier call in the folder has not; a row and its reports."""
    recipe = {**load_recipe("swav-small"), **backbones(assets)["vit"], **(SMOKE if smoke else IMAGES)}
    recipe |= {"dataset": str(assets / "cifar10_jpeg.npz"), "seed": SEED_STEP * seed, "output_dir": str(folder)}
    if smoke:
        recipe["objective_options"] = {**recipe["objective_options"], "prototypes": 8}
    began = time.perf_counter()
    cascade = Cascade.fit(TrainArguments(**recipe), CascadeArguments(experts=EXPERTS, ensemble=True))
    assert cascade.router is not None
    trained = time.perf_counter() - began
    reports = [replace(report, seeds=(seed,)) for report in evaluate_cascade(folder, metrics=["knn", "linear_probe"])]
    runs = [RunSummary.load(folder / name) for name in cascade.adapters]
    runs += [RunSummary.load(path.parent) for path in sorted(folder.glob("seeds/*/run.json"))]
    row = {"seed": seed, "clusters": cascade.router.sizes, "steps": [run.steps for run in runs]}
    row |= {"density": [run.density for run in runs], "frozen_knn": runs[0].before["knn"]}
    row |= {"sizes": asdict(cascade_sizes(folder)), "training_seconds": sum(run.seconds for run in runs)}
    return {**row, "seconds": trained, "evaluation_seconds": time.perf_counter() - began - trained}, reports


def main() -> None:
    """Run all seeds, print a line each and the table, and write the record if asked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, help="folder of the runs; those that are finished are not run again")
    parser.add_argument("--json", type=Path, help="file for the record")
    parser.add_argument("--smoke", action="store_true", help="a step each, for tests")
    options = parser.parse_args()
    assets = assets_folder()
    rows, found = [], []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(1 if options.smoke else options.seeds):
            row, reports = one(assets, (options.runs or Path(temporary)) / str(seed), seed, options.smoke)
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            rows.append(row)
            found.append(reports)
    merged = [replace(merge_reports(same), dataset="CIFAR-10") for same in zip(*found, strict=True)]
    print(report_table(merged))
    if options.json:
        record = {"cascade": rows, "reports": [json.loads(report.to_json()) for report in merged]}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
