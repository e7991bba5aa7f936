# SPDX-License-Identifier: Apache-2.0
"""A bank of many tasks on a real ViT-Tiny at 64 px: for `serve_load.py --real`, not an example by itself.

SMN_ASSETS names the folder of weights and images. Real masks, each trained for a few steps to tell three of CIFAR-10's
classes from each other, and copies of them with a few more weights switched off and another head: enough to load a
server with tasks that differ, not to say how well masks classify.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from cifar import Split, Task, assets_folder, load_task
from peft import get_peft_model
from torch.nn import functional as F
from tqdm import tqdm

from smn_peft import MaskConfig
from smn_peft.backbones import load_classifier
from smn_peft.bank.source import StoredAdapter, read_adapter
from smn_peft.bank.store import DiskStore
from smn_peft.functional.packing import pack_bits

__all__ = ["real_bank"]

WEIGHTS = "vit_tiny_patch16_224.augreg_in21k_ft_in1k.fp16.safetensors"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
HALF = (0.5,) * 3


def train_mask(task: Task, seed: int, steps: int, folder: Path) -> None:
    """One task: three classes, the mask and a head, by Adam."""
    torch.manual_seed(seed)
    chosen = np.random.default_rng(seed).permutation(len(CLASSES))[:3].tolist()
    rows = torch.isin(task.train.labels, torch.tensor(chosen)).nonzero()[:, 0]
    split = Split(task.train.images[rows], torch.tensor([chosen.index(y) for y in task.train.labels[rows].tolist()]))
    base = load_classifier("vit_tiny_patch16_224", 3, state_dict=assets_folder() / WEIGHTS, image_size=64).model
    model = get_peft_model(base, MaskConfig(modules_to_save=["head"]))
    scores = [parameter for name, parameter in model.named_parameters() if "smn_" in name]
    head = [parameter for name, parameter in model.named_parameters() if ".head.modules_to_save" in name]
    optimizer = torch.optim.Adam([{"params": scores, "lr": 0.1}, {"params": head, "lr": 0.01}])
    for _ in range(steps):
        batch = torch.randint(len(rows), (32,))
        loss = F.cross_entropy(model(task.normalise(split.images[batch])), split.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(str(folder))
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    config["id2label"] = {str(index): CLASSES[label] for index, label in enumerate(chosen)}
    (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")


def perturbed(adapter: StoredAdapter, seed: int) -> StoredAdapter:
    """A copy in which 1 weight in 2,000 more is switched off, and the head is moved."""
    generator, tensors = torch.Generator().manual_seed(seed), dict(adapter.tensors)
    for key, tensor in adapter.tensors.items():
        if key.endswith("smn_mask"):
            off = torch.randint(8 * len(tensor), (len(tensor) // 250,), generator=generator)
            kept = torch.ones(8 * len(tensor), dtype=torch.bool)
            kept[off] = False
            tensors[key] = tensor & pack_bits(kept)
        elif key.endswith("head.weight"):
            tensors[key] = tensor + 0.1 * tensor.std() * torch.randn(tensor.shape, generator=generator)
    return StoredAdapter(adapter.config, tensors)


def real_bank(folder: Path, count: int, masks: int, steps: int) -> list[str]:
    """Train masks, fill a bank up to `count` tasks, and return the arguments that name it."""
    task = load_task(64, HALF, HALF, (2000, 1, 1), "cpu")  # only the first are used
    for seed in tqdm(range(min(masks, count)), desc="training masks", unit="mask", disable=None):
        train_mask(task, seed, steps, folder / f"mask-{seed:02}")
    real = [read_adapter(folder / f"mask-{seed:02}") for seed in range(min(masks, count))]

    def tasks() -> Iterator[tuple[str, StoredAdapter]]:
        for index in tqdm(range(count), desc="filling the bank", unit="task", disable=None):
            like = real[index % len(real)]
            yield f"task-{index:04}", like if index < len(real) else perturbed(like, index)

    with DiskStore.open(folder / "bank") as store:
        store.add_many(tasks())
        densities = sorted(store.info(f"task-{index:04}").density for index in range(len(real)))
        print(f"{len(real)} real masks of density {densities[0]:.4f} to {densities[-1]:.4f} and ", end="")
        print(f"{count - len(real)} perturbed: {store.summary().bytes:,} bytes", flush=True)
    options = ["--base=vit_tiny_patch16_224", f"--weights={assets_folder() / WEIGHTS}", "--image-size=64"]
    return [str(folder / "bank"), *options]
