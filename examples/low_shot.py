# SPDX-License-Identifier: Apache-2.0
"""Few labels on a real ViT-Tiny: linear probe, fine-tuning, a supervised mask, and a mask learned without labels.

SMN_ASSETS names a folder with `vit_tiny_patch16_224.augreg_in21k_ft_in1k.fp16.safetensors` and `cifar10_jpeg.npz`.
Of 5,000 training images at 64 px 10, 4 and 1 % have labels; the self-supervised mask sees all of them without. This is
the setting of the paper's Figure 3 at a small scale: its networks, image size and datasets are others. Learning rates
are chosen per method and fraction, with one seed, on 1,000 other training images.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from real_backbones import VIT_WEIGHTS, assets_folder

from smn_peft.analysis import low_shot_series, low_shot_table, plot_low_shot
from smn_peft.evaluation import EvalReport, extract_features, low_shot_reports, merge_reports
from smn_peft.training import TrainArguments, load_recipe, run
from smn_peft.training.assemble import build_images, evaluation_of, load_base
from smn_peft.training.saved import load_run

FRACTIONS = (0.1, 0.04, 0.01)
RATES = {"full": (3e-5, 1e-4, 3e-4), "mask": (0.03, 0.06, 0.1)}
LABELS = {"full": "full fine-tuning", "mask": "mask from labels"}
AUGMENTATION = {"scale": (0.6, 1.0), "jitter_probability": 0.0, "grayscale": 0.0, "solarize": 0.0}
PROBE = {"standardise": True, "decays": (100.0,)}  # with one image per class there is nothing to choose on


def write_subsets(folder: Path, training: int, validation: int) -> tuple[Path, Path]:
    """Two npz files with the same seeded training images: one has CIFAR-10's test split, to report on.

    The other has `validation` more training images as its test split, to choose settings on.
    """
    with np.load(assets_folder() / "cifar10_jpeg.npz") as archive:
        arrays = {key: archive[key] for key in archive}
    order = np.random.default_rng(0).permutation(np.flatnonzero(arrays["split"] == 0))
    train, held_out = order[:training], order[training : training + validation]
    paths = []
    for name, test in (("final", np.flatnonzero(arrays["split"] == 1)), ("selection", held_out)):
        indices, starts = np.concatenate([train, test]), arrays["offsets"]
        files = {"jpeg": np.concatenate([arrays["jpeg"][starts[i] : starts[i + 1]] for i in indices])}
        files["offsets"] = np.concatenate([[0], np.cumsum(np.diff(starts)[indices])])
        split = np.repeat(np.uint8([0, 1]), [len(train), len(test)])
        paths.append(folder / f"{name}.npz")
        np.savez(paths[-1], **files, label=arrays["label"][indices], split=split, classes=arrays["classes"])
    return paths[0], paths[1]


def arguments_for(folder: Path, dataset: Path, smoke: bool) -> dict[str, Any]:
    """What all runs share: the backbone and the images."""
    assets = assets_folder()
    return {
        "backbone": "vit_tiny_patch16_224",
        "weights": str(assets / VIT_WEIGHTS),
        "dataset": str(dataset),
        "output_dir": str(folder),
        "image_size": 64,
        "eval_limit": 60 if smoke else 2000,
        "knn_limit": 60 if smoke else 200,  # k-NN is not what is compared
        "cache_images": True,
        "keep_checkpoints": 0,
    }


def probes(label: str, backbone: Any, images: Any, seeds: list[int]) -> list[EvalReport]:
    """Linear probes on the features of a backbone, one per fraction and seed."""
    train, test = (extract_features(backbone, part, evaluation_of(backbone)) for part in (images.train, images.test))
    fields = {"label": label, "dataset": "CIFAR-10", "split": "test", "metric": "accuracy"}
    return low_shot_reports(train, test, fractions=FRACTIONS, seeds=seeds, probe=PROBE, **fields)


def supervised(adapt: str, lr: float, shared: dict[str, Any], fraction: float, seed: int, smoke: bool) -> float:
    """Accuracy after training on a fraction of the labels, with a head that starts from the probe."""
    with tempfile.TemporaryDirectory() as folder:
        options = {**shared, "output_dir": folder, "fraction": fraction, "seed": seed, "fraction_seed": seed}
        schedule = {"max_steps": 2 if smoke else 60, "epochs": 1000, "batch_size": 8 if smoke else 32}
        rates = {"adapt": adapt, "lr": lr, "head_lr": 1e-3, "optimizer": "adamw"}
        arguments = TrainArguments(**options, **schedule, **rates, head="probe", supervised=AUGMENTATION)
        return run(arguments).after["accuracy"]


def self_supervised(shared: dict[str, Any], seed: int, smoke: bool) -> Any:
    """The backbone under a mask that saw all images and no label."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = {**load_recipe("swav-small"), **shared, "output_dir": folder, "seed": seed, "eval_split": None}
        run(TrainArguments(**recipe, **({"max_steps": 2} if smoke else {})))
        return load_run(folder)[1]


def measure(folder: Path, seeds: list[int], smoke: bool) -> list[EvalReport]:
    """A report per method and fraction."""
    final, selection = write_subsets(folder, *((150, 60) if smoke else (5000, 1000)))
    shared = arguments_for(folder / "run", final, smoke)
    start = TrainArguments(**shared)
    images = build_images(start)
    reports = probes("frozen, linear probe", load_base(start), images, seeds)
    found: dict[float, list[EvalReport]] = {}
    for seed in seeds:
        masked = self_supervised(shared, seed, smoke)
        for report in probes("mask without labels, linear probe", masked, images, [seed]):
            found.setdefault(report.settings["label_fraction"], []).append(report)
    reports += [merge_reports(same) for same in found.values()]
    for adapt, rates in RATES.items():
        for fraction in FRACTIONS:
            choice = {**shared, "dataset": str(selection)}
            trials = {lr: supervised(adapt, lr, choice, fraction, 0, smoke) for lr in (rates[:1] if smoke else rates)}
            lr = max(trials, key=trials.__getitem__)
            print(f"{LABELS[adapt]}, {fraction:.0%} of labels: validation {trials}, lr {lr}", flush=True)
            values = tuple(supervised(adapt, lr, shared, fraction, seed, smoke) for seed in seeds)
            settings = {"label_fraction": fraction, "lr": lr}
            reports.append(
                EvalReport(LABELS[adapt], "CIFAR-10", "test", "accuracy", values, tuple(seeds), settings=settings)
            )
    return reports


def main() -> None:
    """Run all methods, print the table, and write record and plot if asked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for the record")
    parser.add_argument("--plot", type=Path, help="file for the picture")
    parser.add_argument("--smoke", action="store_true", help="a short run, for tests")
    options = parser.parse_args()
    seeds = list(range(1 if options.smoke else options.seeds))
    with tempfile.TemporaryDirectory() as folder:
        reports = measure(Path(folder), seeds, options.smoke)
    print(low_shot_table(reports))
    if options.json:
        options.json.write_text(json.dumps([json.loads(report.to_json()) for report in reports], indent=1) + "\n")
    if options.plot:
        plot_low_shot(low_shot_series(reports), options.plot, title="CIFAR-10, ViT-Tiny, 5,000 images")


if __name__ == "__main__":
    main()
