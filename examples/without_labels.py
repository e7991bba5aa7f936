# SPDX-License-Identifier: Apache-2.0
"""Masks without labels on two real backbones: recipe `swav-small` on 2,000 CIFAR-10 images, k-NN before and after.

SMN_ASSETS names a folder with the ViT-Tiny and ResNetV2 weights and `cifar10_jpeg.npz`. The images are lossy JPEGs of
a small subset, and the recipe is made for two CPU cores: no number here compares with the paper's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from cifar import assets_folder

from smn_peft.training import RunSummary, TrainArguments, load_recipe, run

HERE = Path(__file__).resolve().parent


def backbones(assets: Path) -> dict[str, dict[str, Any]]:
    """The options that name each backbone."""
    weights = assets / "vit_tiny_patch16_224.augreg_in21k_ft_in1k.fp16.safetensors"
    return {
        "vit": {"backbone": "vit_tiny_patch16_224", "weights": str(weights), "image_size": 64},
        "resnet": {"backbone": f"{HERE / 'real_resnet.py'}:build", "image_size": 48},
    }


def one(name: str, options: dict[str, Any], seed: int, folder: Path, smoke: bool) -> dict[str, Any]:
    """Run a backbone and seed, or take what an earlier call has run in the folder; returns a row of the record."""
    output = folder / f"{name}-{seed}"
    if (output / "run.json").is_file():
        summary = RunSummary.load(output)
    else:
        short = {"limit": 300, "eval_limit": 60, "max_steps": 2} if smoke else {"limit": 2000, "eval_limit": 2000}
        recipe = load_recipe("swav-small")
        summary = run(TrainArguments(**{**recipe, **options, **short, "seed": seed, "output_dir": str(output)}))
    row = {"backbone": name, "image_size": options["image_size"], "seed": seed, "density": summary.density}
    row |= {"before": summary.before["knn"], "after": summary.after["knn"], "bytes": summary.sizes["total"]}
    return {**row, "steps": summary.steps, "seconds": summary.seconds}


def main() -> None:
    """Run all, print a line each, and write the record if asked."""
    parser = argparse.ArgumentParser()
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
                rows.append(one(name, chosen, seed, options.runs or Path(temporary), options.smoke))
                print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"without_labels": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
