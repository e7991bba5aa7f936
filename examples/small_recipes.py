# SPDX-License-Identifier: Apache-2.0
"""The recipes for two CPU cores on two real backbones and 2,000 CIFAR-10 images, before and after, three seeds each.

SMN_ASSETS names a folder with the ViT-Tiny and ResNetV2 weights and `cifar10_jpeg.npz`. The images are lossy JPEGs of
a small subset: no number here compares with the paper's. k-NN is what a mask without labels (`swav-small`) is measured
by; a mask from labels (`supervised-small`) by its accuracy, and before it stands the linear probe that it starts from.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from real_backbones import VIT_WEIGHTS, assets_folder

from smn_peft.paper import small_resnet
from smn_peft.training import RunSummary, TrainArguments, load_recipe, run

METRICS = {"swav-small": "knn", "supervised-small": "accuracy"}


def backbones(assets: Path) -> dict[str, dict[str, Any]]:
    """The options that name each backbone."""
    return {
        "vit": {"backbone": "vit_tiny_patch16_224", "weights": str(assets / VIT_WEIGHTS), "image_size": 64},
        "resnet": {"backbone": f"{small_resnet.__file__}:build", "image_size": 48},
    }


def one(recipe: str, name: str, options: dict[str, Any], seed: int, folder: Path, smoke: bool) -> dict[str, Any]:
    """Run a backbone and seed, or take what an earlier call has run in the folder; returns a row of the record."""
    output = folder / f"{recipe}-{name}-{seed}"
    if (output / "run.json").is_file():
        summary = RunSummary.load(output)
    else:
        short = {"limit": 150, "eval_limit": 60, "max_steps": 2} if smoke else {"limit": 2000, "eval_limit": 2000}
        settings = {**load_recipe(recipe), **options}
        summary = run(TrainArguments(**{**settings, **short, "seed": seed, "output_dir": str(output)}))
    row = {"backbone": name, "image_size": options["image_size"], "seed": seed, "density": summary.density}
    row |= {
        "before": summary.before[METRICS[recipe]],
        "after": summary.after[METRICS[recipe]],
        "bytes": summary.sizes["total"],
    }
    return {**row, "steps": summary.steps, "seconds": summary.seconds}


def main() -> None:
    """Run all, print a line each, and write the record if asked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", choices=METRICS, default="swav-small")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, help="folder of the runs; those that are finished are not run again")
    parser.add_argument("--json", type=Path, help="file for the record")
    parser.add_argument("--smoke", action="store_true", help="two steps each, for tests")
    options = parser.parse_args()
    assets = assets_folder()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, chosen in backbones(assets).items():
            chosen["dataset"] = str(assets / "cifar10_jpeg.npz")
            for seed in range(1 if options.smoke else options.seeds):
                rows.append(one(options.recipe, name, chosen, seed, options.runs or Path(temporary), options.smoke))
                print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if options.json:
        record = {"recipe": options.recipe, "metric": METRICS[options.recipe], "rows": rows}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
