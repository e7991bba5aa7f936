# SPDX-License-Identifier: Apache-2.0
"""Masks, LoRA and full fine-tuning on two real backbones: 2,000 CIFAR-10 images, six epochs, three seeds.

`vit` and `resnet` compare methods on a ViT-Tiny (ImageNet-21k) at 64 px and on stages 1 to 3 of a pre-activation
ResNet-50 (ImageNet) at 48 px, `vit-bytes` what each method's file weighs, and `resnet-effects` one recipe with one
change at a time. SMN_ASSETS names a folder with the weights and `cifar10_jpeg.npz`. The images are lossy JPEGs of a
small subset: no number here compares with the paper's.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from real_parts import SETTINGS, Classifier, Images, load_task, outputs, saved
from real_recipes import RECIPES, Recipe, method_rows
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from smn_peft import MaskConfig
from smn_peft.evaluation import evaluate_accuracy, evaluate_knn, fit_linear_probe, markdown_table


def train(model: Classifier, images: Images, recipe: Recipe, lr: float, seed: int, targets: str) -> Any:
    """Adapt `model` in place by a recipe; returns it, under its adapter if there is one, and the last epoch's loss."""
    torch.manual_seed(seed)
    adapted: nn.Module = model
    if recipe.trains == "mask":
        batch_norm = "adapt" if recipe.adapt_statistics else "frozen"
        adapted = get_peft_model(
            model, MaskConfig(target_modules=targets, modules_to_save=["head"], batch_norm=batch_norm)
        )
    elif recipe.trains == "lora":
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=targets, modules_to_save=["head"])
        adapted = get_peft_model(model, lora)
    trainable = [(name, p) for name, p in adapted.named_parameters() if p.requires_grad]
    head = [p for name, p in trainable if ".head." in f".{name}"]
    body = [p for name, p in trainable if ".head." not in f".{name}"]
    adam = torch.optim.Adam(body, lr=lr) if recipe.adam else torch.optim.SGD(body, lr=lr, momentum=0.9)
    optimizers = [adam, torch.optim.SGD(head, lr=0.001 if recipe.probe_head else 0.01, momentum=0.9)]
    per_epoch = len(images.labels) // 64
    steps = recipe.epochs * per_epoch
    rising = int(recipe.warmup * steps)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in tqdm(range(recipe.epochs), desc=f"{recipe.label}, lr {lr:g}, seed {seed}", unit="epoch", leave=False):
        adapted.train()
        if not recipe.adapt_statistics:
            for module in adapted.modules():
                module.training &= not isinstance(module, _BatchNorm)
        for batch in torch.randperm(len(images.labels), generator=generator)[: per_epoch * 64].split(64):
            pixels, labels = images.pixels[batch], images.labels[batch]
            flipped = torch.rand(64, generator=generator) < 0.5
            pixels[flipped.to(pixels.device)] = pixels[flipped.to(pixels.device)].flip(3)
            loss = F.cross_entropy(adapted(pixels), labels, label_smoothing=recipe.smoothing)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            losses.append(loss.item())
    return adapted, sum(losses[-per_epoch:]) / per_epoch


def main() -> None:
    """Sweep learning rates with one seed, run all seeds at each recipe's best, and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("experiment", choices=RECIPES)
    parser.add_argument("--seeds", type=int, default=3, help="seeds at the best learning rate")
    parser.add_argument("--json", type=Path, help="file for the record of all runs")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds on 64 images, for tests")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="Could not find a config file")
    device, setting = "cuda" if torch.cuda.is_available() else "cpu", SETTINGS[options.experiment.partition("-")[0]]
    task = load_task(setting, (64, 32, 32) if options.smoke else (2000, 1000, 4000), device)
    frozen = setting.build().to(device)
    seen, validation, test = (outputs(frozen, task[name]) for name in ("train", "validation", "test"))
    probe = fit_linear_probe(seen, decays=(30, 100, 300, 1000), validation=validation, standardise=True)

    def run(recipe: Recipe, lr: float, seed: int) -> dict[str, Any]:
        began = time.perf_counter()
        torch.manual_seed(seed)
        model = Classifier(setting.build().to(device), probe.mean, probe.std).to(device)
        model.head.load_state_dict({"weight": probe.weight, "bias": probe.bias})
        if not recipe.probe_head:
            model.head.reset_parameters()
        adapted, loss = train(model, task["train"], recipe, lr, seed, setting.targets)
        row = {"recipe": recipe.label, "lr": lr, "seed": seed, "loss": loss}
        row |= {name: evaluate_accuracy(outputs(adapted, task[name])) for name in ("validation", "test")}
        row |= saved(adapted, recipe, task["test"])
        if not options.experiment.endswith("bytes"):
            row.pop("forms", None)
        print(f"{recipe.label}, lr {lr:g}, seed {seed}: validation {row['validation']:.4f}, test {row['test']:.4f}")
        return {**row, "seconds": time.perf_counter() - began}

    rows = []
    for recipe in RECIPES[options.experiment]:
        if options.smoke:
            recipe = replace(recipe, lrs=recipe.lrs[:1], epochs=1)
        mine = [run(recipe, lr, 0) for lr in recipe.lrs]
        best = max(mine, key=lambda row: row["validation"])["lr"]
        rows += mine + [run(recipe, best, seed) for seed in range(1, 1 if options.smoke else options.seeds)]
    record = {"knn": evaluate_knn(seen, test), "probe": probe.accuracy(test), "device": device, "runs": rows}
    print(markdown_table(method_rows(record)))
    if options.json:
        options.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
