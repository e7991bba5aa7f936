# SPDX-License-Identifier: Apache-2.0
"""Mask a transformers ResNet with transformers' own `Trainer`: resume from half-way, export one bit per weight.

The `Trainer` is used as it is. Two things are handed to it: an optimizer with two parameter groups, since scores want
a much larger learning rate than a head, and `ExactResumeCallback`, since a checkpoint has to hold scores, not bits.
The task is the quickstart's; no number of the paper is reproduced.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from transformers import (
    EvalPrediction,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from smn_peft import MaskConfig
from smn_peft.training import ExactResumeCallback

EPOCHS, BATCH = 4, 32


def digits(first: int) -> tuple[list, list]:
    """Training and test images of five digits from `first` on, (3, 32, 32) in [-1, 1]; labels count from 0."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1).expand(-1, 3, -1, -1) / 8 - 1
    images, labels = F.interpolate(images, size=(32, 32), mode="bilinear"), torch.tensor(data.target) - first
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    order = order[(labels[order] >= 0) & (labels[order] < 5)]
    rows = [{"pixel_values": images[i], "labels": labels[i]} for i in order]
    return rows[400:], rows[:400]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Fraction of images whose largest logit is right."""
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def trainer(model: nn.Module, folder: Path, data: tuple[list, list], lr: float, callbacks: list) -> Trainer:
    """A Trainer with Adam, `lr` for scores (or weights) and 0.01 for the head, both following a cosine."""
    steps = EPOCHS * (len(data[0]) // BATCH)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head, rest = ([p for name, p in named if ("classifier" in name) == is_head] for is_head in (True, False))
    optimizer = torch.optim.Adam([{"params": rest, "lr": lr}, {"params": head, "lr": 0.01}])
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        save_steps=steps // 2,
        logging_steps=steps // 4,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=100,
        dataloader_drop_last=True,
        max_grad_norm=0.0,  # no clipping, which by default acts on the norm of both groups together
        remove_unused_columns=False,  # PEFT's forward takes **kwargs, which would look like "no column is used"
        label_names=["labels"],
        report_to="none",
        use_cpu=True,
    )
    return Trainer(
        model,
        arguments,
        train_dataset=data[0],
        eval_dataset=data[1],
        compute_metrics=accuracy,
        callbacks=callbacks,
        optimizers=(optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)),
    )


def masked(base: Path) -> PeftModel:
    """The base with a new head and a mask that trains."""
    set_seed(0)
    model = ResNetForImageClassification.from_pretrained(base)
    model.classifier[-1].reset_parameters()
    return get_peft_model(model, MaskConfig(modules_to_save=["classifier"]))


def main(folder: Path) -> None:
    """Pretrain on the digits 0–4, then mask for 5–9 twice: in one go, and resumed from half-way."""
    set_seed(0)
    torch.set_num_threads(1)
    shape = {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 128], "depths": [2, 2, 2, 2], "layer_type": "basic"}
    config = ResNetConfig(num_labels=5, **shape)
    first = trainer(ResNetForImageClassification(config), folder / "base", digits(0), lr=0.003, callbacks=[])
    first.train()
    first.save_model()

    data, exported = digits(5), folder / "adapter"
    whole = trainer(masked(folder / "base"), folder / "run", data, 0.1, [ExactResumeCallback()])
    whole.train()
    whole.save_model(str(exported))
    print(f"test accuracy on 5–9: {whole.evaluate()['eval_accuracy']:.3f}, density {whole.model.density():.3f}")

    half = folder / "run" / f"checkpoint-{whole.state.max_steps // 2}"
    resumed = trainer(masked(folder / "base"), folder / "resumed", data, 0.1, [ExactResumeCallback()])
    resumed.train(resume_from_checkpoint=str(half))
    resumed.save_model(str(folder / "adapter-resumed"))
    files = [path / "adapter_model.safetensors" for path in (exported, folder / "adapter-resumed")]
    print(f"resumed from half-way, exported file identical: {files[0].read_bytes() == files[1].read_bytes()}")

    loaded = PeftModel.from_pretrained(ResNetForImageClassification.from_pretrained(folder / "base"), exported).eval()
    images = torch.stack([row["pixel_values"] for row in data[1]])
    with torch.no_grad():
        same = torch.equal(loaded(images).logits, whole.model.eval()(images).logits)
    print(f"loaded from {files[0].stat().st_size} bytes, logits identical: {same}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
