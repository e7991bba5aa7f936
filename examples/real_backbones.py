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
import os
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from results import method_rows
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.io import ImageReadMode, decode_jpeg
from tqdm import tqdm

from smn_peft import MaskConfig
from smn_peft.backbones import load_backbone
from smn_peft.evaluation import Features, evaluate_accuracy, evaluate_knn, fit_linear_probe, markdown_table
from smn_peft.paper import small_resnet
from smn_peft.storage.adapter_file import WEIGHTS_NAME, adapter_sizes
from smn_peft.training.assemble import lora_sizes

VIT_WEIGHTS = "vit_tiny_patch16_224.augreg_in21k_ft_in1k.fp16.safetensors"
CODECS = {"bits": "bit-packed", "entropy": "coded"}


@dataclass(frozen=True)
class Recipe:
    """How to adapt: what trains, from which head, by which optimizer.

    Attributes:
        label: Row of the table.
        lrs: Learning rates of the scores or weights to sweep.
        trains: "mask", "weights", or "lora", of rank 8 on the layers of the mask and scaled by 2.
        adam: Adam for scores or weights and not SGD with momentum 0.9; the head has SGD always.
        probe_head: Start the head from the linear probe, at learning rate 0.001 (a random one: 0.01).
        adapt_statistics: BatchNorm in train mode, re-estimating its statistics; False: the base's, frozen.
        warmup: Fraction of the steps with a rising learning rate, before the cosine.
        epochs: Passes over the training images, in batches of 64.
        smoothing: Label smoothing.
    """

    label: str
    lrs: tuple[float, ...]
    trains: str = "mask"
    adam: bool = True
    probe_head: bool = True
    adapt_statistics: bool = False
    warmup: float = 0.3
    epochs: int = 6
    smoothing: float = 0.0


def _full(name: str, *lrs: float, **more: Any) -> Recipe:
    return Recipe(f"full fine-tuning, {name}", lrs, trains="weights", adam=name == "Adam", **more)


LORA = Recipe("LoRA, rank 8", (1e-3, 3e-3, 1e-2), trains="lora")
VIT_MASK = Recipe("mask, Adam on the scores, head from the probe", (0.03, 0.06, 0.1))
RESNET_MASK = replace(VIT_MASK, label=f"{VIT_MASK.label}, statistics frozen")
VIT_PAPER = Recipe("mask, the paper's recipe (SGD, random head)", (3, 10, 30), adam=False, probe_head=False)
RESNET_PAPER = replace(
    VIT_PAPER,
    label="mask, the paper's recipe (SGD, random head, statistics adapt)",
    lrs=(10, 30, 100),
    adapt_statistics=True,
)
_RECIPE = replace(RESNET_MASK, label="the recipe", lrs=(0.1,))
RECIPES = {
    "vit": [_full("SGD", 0.001, 0.003, 0.01), _full("Adam", 1e-4, 3e-4, 1e-3), VIT_PAPER, VIT_MASK],
    "vit-bytes": [_full("Adam", 3e-4), LORA, replace(VIT_MASK, lrs=(0.06,))],
    "resnet": [
        _full("SGD", 0.003, 0.006, 0.012, adapt_statistics=True),
        _full("Adam", 3e-5, 1e-4, 3e-4),
        RESNET_PAPER,
        RESNET_MASK,
    ],
    "resnet-effects": [
        _RECIPE,
        replace(_RECIPE, label="SGD, not Adam", adam=False, lrs=(10, 30, 100)),
        replace(_RECIPE, label="random head", probe_head=False),
        replace(_RECIPE, label="statistics adapt", adapt_statistics=True),
        replace(_RECIPE, label="no warm-up", warmup=0.0),
        replace(_RECIPE, label="label smoothing 0.1", smoothing=0.1),
        replace(_RECIPE, label="12 epochs", epochs=12),
        replace(_RECIPE, label="learning rate 0.06", lrs=(0.06,)),
    ],
}


def assets_folder() -> Path:
    """The folder of weights and images that `SMN_ASSETS` names."""
    folder = Path(os.environ.get("SMN_ASSETS", ""))
    if not (folder / "cifar10_jpeg.npz").is_file():
        sys.exit("Set SMN_ASSETS to the folder with cifar10_jpeg.npz and the weights, see this example's first lines.")
    return folder


@dataclass(frozen=True)
class Setting:
    """A backbone and how it takes its images."""

    build: Any
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    targets: str


def build_vit() -> nn.Module:
    """The ViT-Tiny at 64 px, features (batch, 192); transformers' wrapper around timm's model is taken off."""
    weights = assets_folder() / VIT_WEIGHTS
    return load_backbone("vit_tiny_patch16_224", state_dict=weights, image_size=64).model.timm_model


SETTINGS = {
    "vit": Setting(build_vit, 64, (0.5,) * 3, (0.5,) * 3, r"backbone\.blocks\.\d+\..*(qkv|proj|fc1|fc2)"),
    "resnet": Setting(small_resnet.build, 48, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "all-conv"),
}


@dataclass(frozen=True)
class Images:
    """Seeded random images of CIFAR-10, normalised (n, 3, size, size), and their labels (n,)."""

    pixels: Tensor
    labels: Tensor


def load_task(setting: Setting, counts: tuple[int, int, int], device: str = "cpu") -> dict[str, Images]:
    """Images to train on, to choose settings on ("validation", of the training split too) and to test on once."""
    with np.load(assets_folder() / "cifar10_jpeg.npz") as archive:
        jpeg, offsets, label, split = (archive[key] for key in ("jpeg", "offsets", "label", "split"))
    generator = np.random.default_rng(0)
    training = generator.permutation(np.flatnonzero(split == 0))[: counts[0] + counts[1]]
    test = generator.permutation(np.flatnonzero(split == 1))[: counts[2]]
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (setting.mean, setting.std))

    def decode(indices: np.ndarray) -> Images:
        files = (torch.from_numpy(jpeg[offsets[i] : offsets[i + 1]]) for i in indices)
        images = torch.stack([decode_jpeg(file, mode=ImageReadMode.RGB) for file in files])
        size = (setting.size, setting.size)
        parts = (F.interpolate(part.to(device).float(), size=size, mode="bicubic", antialias=True)
                 for part in images.split(500))  # fmt: skip
        pixels = torch.cat([(part.round().clamp(0, 255) / 255 - mean) / std for part in parts])
        return Images(pixels, torch.from_numpy(label[indices].astype(np.int64)).to(device))

    parts = {"train": training[: counts[0]], "validation": training[counts[0] :], "test": test}
    return {name: decode(indices) for name, indices in parts.items()}


class Classifier(nn.Module):
    """Backbone, features standardised by the frozen backbone's statistics on the training images, linear head."""

    def __init__(self, backbone: nn.Module, mean: Tensor, std: Tensor, classes: int = 10) -> None:
        """Take the backbone and its features' mean and standard deviation (dim,)."""
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(len(mean), classes)
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(batch, 3, size, size) -> logits (batch, classes)."""
        return self.head((self.backbone(pixel_values) - self.mean) / self.std)


@torch.no_grad()
def outputs(model: nn.Module, images: Images) -> Features:
    """The model's output (n, dim) in eval mode on un-augmented images."""
    model.eval()
    return Features(torch.cat([model(part) for part in images.pixels.split(256)]), images.labels)


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


def saved(adapted: Any, recipe: Recipe, test: Images) -> dict[str, Any]:
    """Bytes of what was trained, in every form that it can be saved in."""
    if recipe.trains == "weights":
        return {"bytes": sum(t.numel() * t.element_size() for t in adapted.state_dict().values())}
    with tempfile.TemporaryDirectory() as folder:
        if recipe.trains == "mask":
            forms = {}
            for codec, label in CODECS.items():
                adapted.peft_config["default"].codec = codec
                adapted.save_pretrained(Path(folder) / codec)
                forms[label] = asdict(adapter_sizes(Path(folder) / codec))
            bits = forms["bit-packed"]
            parts = {f"{part}_bytes": bits[part] for part in ("mask", "head", "statistics")}
            return {"density": adapted.density(), "bytes": bits["total"], **parts, "forms": forms}
        adapted.save_pretrained(folder)
        forms = {"float32": lora_sizes(folder)}
        with torch.no_grad():  # rounded first, measured then: what is saved is what is evaluated
            for parameter in (p for p in adapted.parameters() if p.requires_grad):
                parameter.copy_(parameter.bfloat16())
        path = Path(folder) / WEIGHTS_NAME
        save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
        accuracy = evaluate_accuracy(outputs(adapted, test)).top1
        forms["bfloat16"] = {**lora_sizes(folder), "test": accuracy}
    return {"bytes": forms["float32"]["total"], "forms": forms}


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
        row |= {name: evaluate_accuracy(outputs(adapted, task[name])).top1 for name in ("validation", "test")}
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
